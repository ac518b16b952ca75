"""What a plan is worth: scores, which add up."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn

from torchrl_wm._checks import check_choice
from torchrl_wm.modules.keys import is_next, unique
from torchrl_wm.modules.world_model.flat import FlatTensors
from torchrl_wm.planners.tally import (
    check_reads,
    check_scores,
    EveryStep,
    LastStep,
    Tally,
    WholeTrajectory,
)

#: Encodes observations, given by the encoder's key: the entry of the start that holds it.
Encode = Callable[[Mapping[NestedKey, NestedKey]], FlatTensors]


class Score(nn.Module):
    """What a plan is worth: a function of the imagined trajectory, the higher the better.

    Scores add up: ``a + b``, ``a - b``, ``2 * a``, ``sum([a, b])``. A summand may be a plain
    function of the trajectory (:class:`TrajectoryScore`).

    Attributes:
        in_keys: the entries that it reads: at the root latents, the action and any entry of the
            start, which stays as it is; below "next" what a step writes. None means all.
    """

    in_keys: list[NestedKey] | None

    @abstractmethod
    def forward(
        self, trajectory: TensorDictBase, discount: float = 1.0
    ) -> torch.Tensor:
        """Return the scores ``[*P]`` of trajectories ``[*P, H]``, such as ``env.imagine`` makes.

        Args:
            trajectory: the imagined steps. Those that are False under ``("collector", "mask")``
                do not count.
            discount: the factor per step.
        """

    @abstractmethod
    def tally(self, weight: float) -> Tally:
        """Return what adds the score up, step by step, while plans are imagined."""

    def begin(self, start: TensorDictBase, encode: Encode) -> FlatTensors:
        """Return entries that stay as they are over a plan, ``[*B, ...]``; called once a plan.

        Args:
            start: the states to plan from, ``[*B]``.
            encode: encodes observations of the start.
        """
        return {}

    @property
    def start_keys(self) -> list[NestedKey]:
        """The root entries that it reads."""
        return [key for key in self.in_keys or () if not is_next(key)]

    @property
    def terms(self) -> list[tuple[float, Score]]:
        """The scores that it is a sum of, each with its weight."""
        return [(1.0, self)]

    def __add__(self, other: Any) -> Score:
        return _sum(self, other)

    def __radd__(self, other: Any) -> Score:
        # sum() begins with 0.
        return self if isinstance(other, Real) and other == 0 else _sum(other, self)

    def __sub__(self, other: Any) -> Score:
        other = as_score(other)
        return self + -other

    def __rsub__(self, other: Any) -> Score:
        return as_score(other) - self

    def __mul__(self, weight: float) -> Score:
        if not isinstance(weight, Real) or not isfinite(weight):
            return NotImplemented
        return ScoreSum([(float(weight) * own, score) for own, score in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> Score:
        return -1.0 * self


class StepScore(Score):
    """A score that judges each step for itself. Subclasses define :meth:`step`.

    Steps after a predicted end do not count.

    Args:
        in_keys: the entries that it reads.
        steps: ``"all"`` for the sum over all steps, discounted by the planner's ``discount``;
            ``"last"`` for the step with which the plan, or its episode, ends, not discounted.

    Raises:
        ValueError: for other ``steps``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.planners import StepScore
        >>> class Upright(StepScore):
        ...     def __init__(self):
        ...         super().__init__([("next", "latent")])
        ...     def step(self, step):
        ...         return step["next", "latent"][:, 0]
        >>> trajectory = TensorDict({"next": {"latent": torch.ones(5, 10, 3)}}, [5, 10])
        >>> Upright()(trajectory).shape
        torch.Size([5])
    """

    def __init__(
        self, in_keys: Sequence[NestedKey], *, steps: Literal["all", "last"] = "all"
    ) -> None:
        super().__init__()
        check_choice("steps", steps, ("all", "last"))
        self.in_keys, self.steps = unique(in_keys), steps

    @abstractmethod
    def step(self, step: Mapping[NestedKey, torch.Tensor]) -> torch.Tensor:
        """Return what one step is worth, ``[R]``.

        Args:
            step: the entries ``[R, ...]`` by flat key: ``step["action"]``,
                ``step["next", "latent"]``.
        """

    def tally(self, weight: float) -> Tally:
        """Return what adds the score up, step by step, while plans are imagined."""
        return (LastStep if self.steps == "last" else EveryStep)(self, weight)

    def forward(
        self, trajectory: TensorDictBase, discount: float = 1.0
    ) -> torch.Tensor:
        """Return the scores ``[*P]`` of trajectories ``[*P, H]``."""
        rows = trajectory.reshape(-1)
        there = {key: rows.get(key, None) for key in self.in_keys}
        values = {key: value for key, value in there.items() if value is not None}
        check_reads(self, values)
        value = self.step(values)
        check_scores(self, value, rows.batch_size, "[R], one for each row of the step")
        value = value.reshape(trajectory.batch_size)
        mask = trajectory.get(("collector", "mask"), None)
        mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        if self.steps == "last":
            last = mask.sum(-1, keepdim=True).clamp_min(1) - 1
            return value.gather(-1, last).squeeze(-1)
        time = torch.arange(value.shape[-1], device=value.device)
        return torch.where(mask, value * discount**time, 0.0).sum(-1)

    def extra_repr(self) -> str:
        """Return what tells this score from others of its class."""
        return ", ".join(map(repr, self.in_keys))


class TrajectoryScore(Score):
    """A function of whole trajectories as a score. Planners make one of any function.

    Whole trajectories are kept for it; a :class:`StepScore` needs no memory for them.

    Args:
        function: maps a tensordict ``[B, N, H]`` to scores ``[B, N]``. It has the latents and
            actions of all steps, what they wrote below "next", and the entries of the start.
            Steps after a predicted end are False under ``("collector", "mask")``.
        in_keys: the entries that it is shown; by default its own ``in_keys``, else all but for
            observations at the root.

    Raises:
        TypeError: if it cannot be called.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.planners import ActionCost, TrajectoryScore
        >>> score = TrajectoryScore(
        ...     lambda trajectory: trajectory["next", "latent"][..., -1, 0],
        ...     in_keys=[("next", "latent")],
        ... )
        >>> both = score + 0.1 * ActionCost()
    """

    def __init__(
        self,
        function: Callable[[TensorDictBase], torch.Tensor],
        in_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(
                f"A score is a function of the imagined trajectory, [B, N, H] to [B, N], or one "
                f"of torchrl_wm.planners; got {type(function).__name__}."
            )
        self.function = function
        keys = getattr(function, "in_keys", None) if in_keys is None else in_keys
        self.in_keys = None if keys is None else unique(keys)

    def tally(self, weight: float) -> Tally:
        """Return what collects the steps while plans are imagined."""
        return WholeTrajectory(self, weight)

    def forward(
        self, trajectory: TensorDictBase, discount: float = 1.0
    ) -> torch.Tensor:
        """Return the scores ``[*P]`` of trajectories ``[*P, H]``; the function itself discounts."""
        return self.function(trajectory)

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"{type(self).__name__}({name})"


class ScoreSum(Score):
    """A weighted sum of scores; what ``a + 2 * b`` makes.

    Args:
        terms: weights and scores.
    """

    def __init__(self, terms: Sequence[tuple[float, Score]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in terms]
        self.scores = nn.ModuleList(score for _, score in terms)

    @property
    def in_keys(self) -> list[NestedKey] | None:
        """The entries that the summands read."""
        keys = [score.in_keys for score in self.scores]
        return None if None in keys else unique(key for own in keys for key in own)

    @property
    def start_keys(self) -> list[NestedKey]:
        """The root entries that the summands read."""
        return unique(key for score in self.scores for key in score.start_keys)

    @property
    def terms(self) -> list[tuple[float, Score]]:
        """The summands, each with its weight."""
        return list(zip(self.weights, self.scores))

    def tally(self, weight: float) -> Tally:
        """Refuse: planners add up the :attr:`terms`."""
        raise TypeError("A sum of scores is added up by its terms.")

    def forward(
        self, trajectory: TensorDictBase, discount: float = 1.0
    ) -> torch.Tensor:
        """Return the scores ``[*P]`` of trajectories ``[*P, H]``."""
        return sum(w * score(trajectory, discount) for w, score in self.terms)

    def __repr__(self) -> str:
        return " + ".join(
            f"{score}" if weight == 1 else f"{weight:g} * {score}"
            for weight, score in self.terms
        )


def as_score(score: Any) -> Score:
    """Return a score as a :class:`Score`: as it is, a function's, or the sum of several.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is an empty list.
    """
    if isinstance(score, Score):
        return score
    if isinstance(score, type):
        raise TypeError(
            f"score={score.__name__} is a class: give an instance, {score.__name__}(...)."
        )
    if isinstance(score, (list, tuple)):
        if not score:
            raise ValueError(
                "score=[] has no scores to add up. Leave it out for the rewards."
            )
        return ScoreSum([term for part in score for term in as_score(part).terms])
    return TrajectoryScore(score)


def _sum(*scores: Any) -> Score:
    return as_score(list(scores))
