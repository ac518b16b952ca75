"""The subject of a report: the model, the episodes and the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.diagnostics.drawing import MAX_DIMS
from torchrl_wm.diagnostics.page import ReportSection
from torchrl_wm.diagnostics.recording import Recording
from torchrl_wm.diagnostics.unchanging import names_of
from torchrl_wm.envs import WorldModelEnv


#: A section, and what the diagnostic behind it returned.
Measured = tuple[ReportSection, TensorDictBase]


class DoesNotApply(Exception):
    """The reason why a section is left out."""


@dataclass
class Study:
    """The model, the episodes and the settings of a report.

    Args: those of :func:`~torchrl_wm.diagnostics.write_report`.
    """

    env: WorldModelEnv
    episodes: TensorDictBase
    recording: Recording
    horizon: int
    particles: int
    stride: int
    labels: Mapping[NestedKey, Sequence[str]]
    policy: Callable | None
    real_env: EnvBase | None
    real_policy: Callable | None
    policy_steps: int
    policy_episodes: int
    render: Any
    constant: dict[NestedKey, torch.Tensor]
    worst: dict[NestedKey, list[int]] = field(default_factory=dict)
    fan: str = ""  # "narrow" or "wide", once the fan was found to be so

    def drawing(self, key: NestedKey) -> dict[str, Any]:
        """Return the dims of an entry to draw and their names, without constant ones if there are others."""
        dims = self.worst.get(key)
        constant = self.constant.get(key)
        if dims is None and constant is not None and constant.any():
            dims = (~constant).nonzero().flatten().tolist()[:MAX_DIMS] or None
        return {"dims": dims, "labels": self.labels.get(key)}

    def varies(self, key: NestedKey, size: int) -> torch.Tensor:
        """Return the dims that verdicts speak of, ``[D]`` bool."""
        constant = self.constant.get(key)
        if constant is None or len(constant) != size:
            return torch.ones(size, dtype=torch.bool)
        return ~constant.cpu()

    def note(self, keys: Sequence[NestedKey]) -> str:
        """Say what a verdict on these entries leaves out."""
        dropped = {key: self.constant[key] for key in keys if key in self.constant}
        names = names_of(dropped, self.labels)
        if not names:
            return ""
        return f"Left out of the verdict, constant in the episodes: {', '.join(names)}."
