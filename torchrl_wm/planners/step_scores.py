"""Scores of single steps: rewards, distances to goals, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch.nn import functional as F

from torchrl_wm._checks import check_choice
from torchrl_wm.modules.keys import join, strip_next
from torchrl_wm.modules.world_model.flat import FlatTensors
from torchrl_wm.planners.scores import Encode, StepScore

Step = Mapping[NestedKey, torch.Tensor]


class PredictedReward(StepScore):
    """The reward that the model predicts. It is what planners score by default.

    Args:
        reward_key: the reward, below "next". Rewards of several agents add up.

    Examples:
        >>> from torchrl_wm.planners import ActionCost, PredictedReward
        >>> score = PredictedReward() + 0.1 * ActionCost()
    """

    def __init__(self, reward_key: NestedKey = ("next", "reward")) -> None:
        super().__init__([reward_key])
        self.reward_key = self.in_keys[0]

    def step(self, step: Step) -> torch.Tensor:
        """Return the rewards of one step, ``[R]``."""
        return per_row(step[self.reward_key])


class GoalDistance(StepScore):
    """How near the imagined latents come to a goal: their distance, negative.

    Args:
        latent: the latent, which is compared as it stands below "next".

    Keyword Args:
        goal: the entry of the start that holds the goal as a latent, ``[*B, *L]``. Or goal
            observations, which the model's encoder encodes once a plan: a mapping from the
            encoder's inputs to entries of the start, ``{"pixels": "goal_pixels"}``.
        distance: ``"squared"`` is the mean of the squared differences; also ``"euclidean"`` and
            ``"cosine"`` (one less the cosine).
        steps: ``"all"`` or ``"last"``, as in :class:`StepScore`. A goal that counts at the last
            step only says nothing of when to reach it: a planner that acts on one action of each
            plan may put it off for ever. Act on more of each plan (``execute=``).

    Raises:
        ValueError: for other distances or steps, and in a plan if the goal has another shape
            than the latent.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.planners import GoalDistance
        >>> score = GoalDistance("latent", goal="goal", steps="last")
        >>> trajectory = TensorDict(
        ...     {"goal": torch.zeros(5, 10, 3), "next": {"latent": torch.ones(5, 10, 3)}},
        ...     [5, 10],
        ... )
        >>> score(trajectory)
        tensor([-1., -1., -1., -1., -1.])
    """

    def __init__(
        self,
        latent: NestedKey = "latent",
        *,
        goal: NestedKey | Mapping[NestedKey, NestedKey],
        distance: Literal["squared", "euclidean", "cosine"] = "squared",
        steps: Literal["all", "last"] = "all",
    ) -> None:
        check_choice("distance", distance, tuple(_DISTANCES))
        if not isinstance(goal, (str, tuple, Mapping)):
            raise TypeError(
                f"goal names the entry of the start that holds the goal, got "
                f"{type(goal).__name__}. Set the goal beside the state, tensordict['goal'] = ..., and "
                f"give goal='goal'."
            )
        self_latent = join("next", strip_next(latent))
        observations = None
        if isinstance(goal, Mapping):
            observations = {
                unravel_key(k): unravel_key(entry) for k, entry in goal.items()
            }
            if not observations:
                raise ValueError(
                    "goal={} names no goal observations: goal={'pixels': 'goal_pixels'}."
                )
            first = next(iter(observations.values()))
            goal = join("encoded", first, strip_next(self_latent))
        super().__init__([self_latent, goal], steps=steps)
        self.latent, self.goal = self.in_keys
        self.observations, self.distance = observations, distance

    @property
    def start_keys(self) -> list[NestedKey]:
        """The entries of the start that hold the goal."""
        if self.observations is None:
            return [self.goal]
        return list(self.observations.values())

    def begin(self, start: TensorDictBase, encode: Encode) -> FlatTensors:
        """Return the encoded goals, if they are observations."""
        if self.observations is None:
            return {}
        encoded, latent = encode(self.observations), strip_next(self.latent)
        if latent not in encoded:
            raise ValueError(
                f"The goal of {self} is encoded from {list(self.observations.values())}, and the "
                f"encoder writes {list(encoded)}, not {latent!r}."
            )
        return {self.goal: encoded[latent]}

    def step(self, step: Step) -> torch.Tensor:
        """Return the negative distances of the next latents, ``[R]``."""
        latent, goal = step[self.latent], step[self.goal]
        if latent.shape != goal.shape:
            raise ValueError(
                f"The goal {self.goal!r} has the shape {tuple(goal.shape[1:])}, and the latent "
                f"{self.latent!r}, which should reach it, {tuple(latent.shape[1:])}."
            )
        shape = (latent.shape[0], latent.shape[1:].numel())
        near, goal = latent.reshape(shape), goal.to(latent.dtype).reshape(shape)
        return -_DISTANCES[self.distance](near, goal)


class ActionCost(StepScore):
    """The sum of the squares of an action, negative.

    Args:
        action_key: the action.

    Examples:
        >>> from torchrl_wm.planners import ActionCost, GoalDistance
        >>> score = GoalDistance("latent", goal="goal") + 0.1 * ActionCost()
    """

    def __init__(self, action_key: NestedKey = "action") -> None:
        super().__init__([action_key])
        self.action_key = self.in_keys[0]

    def step(self, step: Step) -> torch.Tensor:
        """Return the negative costs of one step, ``[R]``."""
        action = step[self.action_key]
        if not action.is_floating_point():
            raise TypeError(
                f"ActionCost squares actions, and {self.action_key!r} is a choice "
                f"({action.dtype}): score choices by a function of the trajectory."
            )
        return -per_row(action.square())


class DisagreementPenalty(StepScore):
    """How much the members of an ensemble disagree, negative: it keeps plans where a model is sure.

    It is for plans only. Where a policy learns from imagined rewards, too, or other parts should
    see the same reward, put the penalty into the model by
    :func:`~torchrl_wm.modules.with_penalty`; not both, as a plan would pay twice.

    Args:
        disagreement_key: the disagreement, below "next", such as
            :class:`~torchrl_wm.modules.EnsembleDynamics` writes.

    Examples:
        >>> from torchrl_wm.planners import DisagreementPenalty, PredictedReward
        >>> score = PredictedReward() + 2 * DisagreementPenalty()
    """

    def __init__(self, disagreement_key: NestedKey = ("next", "disagreement")) -> None:
        super().__init__([join("next", strip_next(disagreement_key))])
        self.disagreement_key = self.in_keys[0]

    def step(self, step: Step) -> torch.Tensor:
        """Return the negative disagreement of one step, ``[R]``."""
        return -per_row(step[self.disagreement_key])


def per_row(entry: torch.Tensor) -> torch.Tensor:
    """Return ``[R, ...]`` as ``[R]``, added up over all other dims."""
    if entry.ndim == 2 and entry.shape[1] == 1:
        return entry.squeeze(-1)
    return entry if entry.ndim == 1 else entry.flatten(1).sum(-1)


def _squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().mean(-1)


def _euclidean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(a - b, dim=-1)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(a, b, dim=-1)


#: The distances ``[R]`` of two ``[R, L]``.
_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "squared": _squared,
    "euclidean": _euclidean,
    "cosine": _cosine,
}
