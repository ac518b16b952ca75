"""Rows of logged arrays, picked and joined with little memory."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_wm.modules.keys import leaf_keys


class Pick:
    """What picks the rows of transitions.

    Args:
        keep: which rows are kept, ``[N]`` bool, in their order; None for all.
        order: the order of the rows, ``[N]``; None for that of the log.
        is_own: whether nobody else has the arrays, so that they may be overwritten.
    """

    #: How many rows are picked at once: numbers of rows need more memory than a short row.
    rows = 2**16

    def __init__(
        self, keep: torch.Tensor | None, order: torch.Tensor | None, is_own: bool
    ) -> None:
        self.keep, self.order, self.is_own = keep, order, is_own

    def __call__(self, value: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """Return the rows of an array in the order of the log, each ``shift`` rows later in theirs."""
        if self.keep is not None:
            return self._kept(value, shift, self.order)
        if self.order is not None:
            return value[self.order]
        return value if self.is_own else value.clone()

    def of_ordered(self, value: torch.Tensor) -> torch.Tensor:
        """Return the rows of an array that is in order already."""
        return value if self.keep is None else self._kept(value, 0, None)

    def _kept(
        self, value: torch.Tensor, shift: int, order: torch.Tensor | None
    ) -> torch.Tensor:
        number, done = int(self.keep.sum()), 0
        # Rows move to places before theirs.
        in_place = self.is_own and order is None and not shift
        out = (
            value[:number] if in_place else value.new_empty((number, *value.shape[1:]))
        )
        for start in range(0, len(self.keep), self.rows):
            places = self.keep[start : start + self.rows].nonzero().flatten()
            places += start + shift
            out[done : done + len(places)] = value[
                places if order is None else order[places]
            ]
            done += len(places)
        return out


class Joined:
    """Transitions one after the other, each written to its place at once.

    Args:
        most: how many there are at most.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.values: dict[Any, torch.Tensor] = {}

    def add(self, part: TensorDictBase, number: int) -> None:
        """Add the transitions of an episode."""
        own = {key: part.get(key) for key in leaf_keys(part)}
        if not self.values:
            for key, value in own.items():
                self.values[key] = value.new_empty((self.most, *value.shape[1:]))
        shapes, others = (
            {key: tuple(value.shape[1:]) for key, value in values.items()}
            for values in (self.values, own)
        )
        if shapes != others:
            raise ValueError(
                f"episode {number} has the entries and shapes {others} per step, and episode 0 "
                f"{shapes}: all must be alike."
            )
        stop = self.count + len(part)
        for key, value in own.items():
            kind = torch.promote_types(self.values[key].dtype, value.dtype)
            self.values[key] = self.values[key].to(kind)
            self.values[key][self.count : stop] = value
        self.count = stop

    def transitions(self) -> TensorDictBase:
        """Return them all, ``[N]``."""
        out = TensorDict({}, batch_size=[self.count])
        for key, value in self.values.items():
            out.set(key, value[: self.count])
        return out
