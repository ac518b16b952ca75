"""The real steps that a recipe learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase


@dataclass(frozen=True)
class Steps:
    """The real steps that were just made, one in each real env.

    Args:
        new: the transitions, ``[N]``, as the envs gave them.
        total: how many steps have been made so far, with these.
        ended: which of them ended an episode, ``[N]`` bool.
        lengths: the steps of the episodes so far, with these, ``[N]``.
        random: which of them belong to episodes that are acted at random, ``[N]`` bool.
    """

    new: TensorDictBase
    total: int
    ended: torch.Tensor
    lengths: torch.Tensor
    random: torch.Tensor

    @property
    def count(self) -> int:
        """How many steps were made: ``N``."""
        return len(self.ended)

    def due(self, interval: int, since: int = 0) -> bool:
        """Return whether these steps reach a multiple of ``interval``, counted from step ``since`` on."""
        now, before = self.total - since, self.total - since - self.count
        return now >= 0 and now // interval > before // interval
