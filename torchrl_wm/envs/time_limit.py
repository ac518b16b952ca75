"""Where a time limit ends imagined episodes: the count of their steps, and when it is up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrl.data import TensorSpec, Unbounded

from torchrl_wm.modules.world_model.flat import FlatTensors, Placement


@dataclass(frozen=True)
class TimeLimit:
    """The number of steps after which an episode is truncated.

    Each row of a batch counts its own steps, in an entry of the state.

    Args:
        max_steps: the number of steps.
        key: the entry that counts them, ``[*B, 1]`` int64. It is not TorchRL's
            ``step_count``, which belongs to the transform StepCounter.
    """

    max_steps: int
    key: str = "imagined_step"

    def spec(self, device: torch.device | None) -> TensorSpec:
        """Return the spec of the count, without batch dims."""
        return Unbounded(shape=(1,), dtype=torch.int64, device=device)

    def begin(self, at: Placement) -> torch.Tensor:
        """Return the count of an episode that begins, ``[*B, 1]``."""
        return torch.zeros((*at.batch_size, 1), dtype=torch.int64, device=at.device)

    def advance(
        self, values: FlatTensors, at: Placement
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a step.

        Args:
            values: the state before the step. A state from elsewhere, e.g. a planner's,
                may have no count: its time begins here.
            at: its batch size ``*B`` and device.

        Returns:
            The count after the step, and where the episode is truncated, both ``[*B, 1]``.
        """
        count = values.get(self.key)
        if count is None:
            count = self.begin(at)
        # Batched envs' shared buffers mark even integers as in need of a graph.
        count = count.detach() + 1
        return count, count >= self.max_steps
