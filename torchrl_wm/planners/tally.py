"""Scores of many plans, added up while the plans are imagined step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, leaf_keys
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict

#: What TorchRL's losses heed: False after the first end of a trajectory.
_MASK = ("collector", "mask")


class Imagined(NamedTuple):
    """One imagined step of all plans.

    Args:
        values: its entries by flat key, ``[R, ...]``: state, action and start at the root,
            what the step wrote below "next".
        going: which plans had not ended before, ``[R]`` bool; None if all go on.
        ended: which end with it, ``[R]`` bool; None if none can.
        scale: the discount of this step.
        is_last: whether it is the last step of the plans.
    """

    values: FlatTensors
    going: torch.Tensor | None
    ended: torch.Tensor | None
    scale: float
    is_last: bool


class Tally(ABC):
    """What the plans score by one score, added up over the steps.

    Args:
        score: what scores.
        weight: the factor on it.
    """

    def __init__(self, score: Any, weight: float) -> None:
        self.score, self.weight = score, weight
        self.total: torch.Tensor | None = None

    @abstractmethod
    def add(self, step: Imagined) -> None:
        """Take one step into account."""

    def scores(self, lead: torch.Size) -> torch.Tensor:
        """Return the scores ``[R]`` when all steps are made, of ``lead = [B, N]`` plans."""
        return self.total

    def _judged(self, step: Imagined) -> torch.Tensor:
        """Return what the score says of one step, ``[R]``; checked the first time."""
        if self.total is not None:
            return self.score.step(step.values)
        check_reads(self.score, step.values)
        value = self.score.step(step.values)
        rows = next(iter(step.values.values())).shape[:1]
        check_scores(self.score, value, rows, "[R], one for each row of the step")
        return value


class EveryStep(Tally):
    """The discounted sum over the steps up to, and with, the one that ends a plan."""

    def add(self, step: Imagined) -> None:
        value, factor = self._judged(step), self.weight * step.scale
        value = value if factor == 1.0 else factor * value
        if step.going is not None:
            # Not a product: what follows an end may be NaN.
            value = torch.where(step.going, value, torch.zeros_like(value))
        self.total = value if self.total is None else self.total + value


class LastStep(Tally):
    """The score of the step that ends a plan, else of its last one; not discounted."""

    def add(self, step: Imagined) -> None:
        if step.ended is None and not step.is_last:
            return
        value = self._judged(step)
        value = value if self.weight == 1.0 else self.weight * value
        if step.going is not None:
            value = torch.where(step.going, value, self.total)
        self.total = value


class WholeTrajectory(Tally):
    """The score of a function that is shown the whole trajectory."""

    def __init__(self, score: Any, weight: float) -> None:
        super().__init__(score, weight)
        self.columns: dict[NestedKey, list[torch.Tensor]] = {}
        self.going: list[torch.Tensor | None] = []

    def add(self, step: Imagined) -> None:
        if not self.columns:
            check_reads(self.score, step.values)
            keys = step.values if self.score.in_keys is None else self.score.in_keys
            self.columns = {key: [] for key in keys}
        for key, column in self.columns.items():
            column.append(step.values[key])
        self.going.append(step.going)

    def scores(self, lead: torch.Size) -> torch.Tensor:
        steps = len(self.going)
        values = {key: _over_time(column) for key, column in self.columns.items()}
        first = next(iter(values.values()))
        rows = [
            torch.ones(first.shape[:1], dtype=torch.bool, device=first.device)
            if going is None
            else going
            for going in self.going
        ]
        values[_MASK] = torch.stack(rows, 1)
        at = Placement(torch.Size([*lead, steps]), first.device)
        shown = to_tensordict(
            {k: v.reshape(*at.batch_size, *v.shape[2:]) for k, v in values.items()}, at
        )
        value = named(self.score, self.score, shown)
        check_scores(self.score, value, lead, "[B, N], one for each trajectory")
        return self.weight * value.flatten()


def named(score: Any, function: Callable, trajectory: TensorDict) -> torch.Tensor:
    """Return the score of a trajectory; an entry that it lacks is named."""
    try:
        return function(trajectory)
    except MissingEntryError:
        raise
    except KeyError as err:
        raise MissingEntryError(
            f"The score {score} reads an entry that an imagined trajectory lacks: {err.args[0]}. It has "
            f"{leaf_keys(trajectory)}."
        ) from err


def check_reads(score: Any, values: FlatTensors) -> None:
    """Refuse a score that reads what an imagined step does not have.

    Raises:
        MissingEntryError: naming the entries that are missing and those that are there.
    """
    lacking = [key for key in score.in_keys or () if key not in values]
    if lacking:
        written = [key for key in values if is_next(key)]
        others = [key for key in values if not is_next(key)]
        raise MissingEntryError(
            f"The score {score} reads {lacking}, which nothing supplies: there are the state and "
            f"the action, {others}, and an imagined step writes {written}."
        )


def check_scores(score: Any, value: Any, shape: torch.Size, wanted: str) -> None:
    """Refuse what is no tensor of scores.

    Raises:
        ValueError: naming the shape that is expected and the one that came.
    """
    got = (
        tuple(value.shape)
        if isinstance(value, torch.Tensor)
        else f"a {type(value).__name__}"
    )
    if got != tuple(shape):
        raise ValueError(
            f"The score {score} returned {got}, and scores are {wanted}: {tuple(shape)}. Reduce "
            f"the other dims: score.sum(-1)."
        )


def _over_time(column: list[torch.Tensor]) -> torch.Tensor:
    """Return the entries of all steps, ``[R, H, ...]``; those that stay the same are not copied."""
    first = column[0]
    if all(value is first for value in column):
        return first.unsqueeze(1).expand(-1, len(column), *first.shape[1:])
    return torch.stack(column, 1)
