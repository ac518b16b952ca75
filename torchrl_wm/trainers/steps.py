"""The real steps that a recipe learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase


@dataclass(frozen=True)
class Steps:
    """The newest real steps, one in each real env.

    Args:
        new: the transitions, ``[N]``, as the envs returned them.
        total: how many steps have been made so far, these included.
        ended: the steps that ended an episode, ``[N]`` bool.
        lengths: the lengths of the episodes so far, these steps included, ``[N]``.
        random: the steps of episodes with random actions, ``[N]`` bool.
    """

    new: TensorDictBase
    total: int
    ended: torch.Tensor
    lengths: torch.Tensor
    random: torch.Tensor

    @property
    def count(self) -> int:
        """The number of steps, ``N``."""
        return len(self.ended)

    def due(self, interval: int, since: int = 0) -> bool:
        """Return whether these steps reach a multiple of ``interval``, counted from step ``since`` on."""
        now, before = self.total - since, self.total - since - self.count
        return now >= 0 and now // interval > before // interval
