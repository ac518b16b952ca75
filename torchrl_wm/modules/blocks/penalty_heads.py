"""The heads by which a reward pays for what a model does not know, and by which episodes end there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any, Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm._checks import check_choice
from torchrl_wm.modules.keys import as_tuple, join, sibling, strip_next, unique

#: What a done head may write, below "next", to say how a step ended.
ENDING_NAMES = (
    "terminated_logits",
    "continue_pred",
    "continue_prob",
    "terminated",
    "truncated",
    "done",
)
#: A logit whose probability is one, in any float dtype.
_CERTAIN = 1e4


@dataclass(frozen=True)
class Penalty:
    """What a world model of :func:`with_penalty` pays for, and where its episodes end.

    Args:
        coefficient, measure, limit, on_limit, limit_reward, reward_key, done_key: see
            :func:`with_penalty`. ``measure`` is the whole key, such as
            ``("next", "disagreement")``.
    """

    coefficient: float
    measure: NestedKey = ("next", "disagreement")
    limit: float | None = None
    on_limit: Literal["terminate", "truncate"] = "terminate"
    limit_reward: float | None = None
    reward_key: NestedKey | None = None
    done_key: NestedKey = "done"

    def __post_init__(self) -> None:
        number("coefficient", self.coefficient)
        if self.coefficient < 0:
            raise ValueError(
                f"coefficient={self.coefficient} must not be negative: it would pay for what the "
                f"model does not know. To explore there, score plans by a bonus instead: "
                f"PredictedReward() - {-self.coefficient} * DisagreementPenalty()."
            )
        check_choice("on_limit", self.on_limit, ("terminate", "truncate"))
        if self.limit is not None:
            number("limit", self.limit, ", or None for no limit")
        elif self.limit_reward is not None or self.on_limit != "terminate":
            raise ValueError(
                f"on_limit={self.on_limit!r} and limit_reward={self.limit_reward} say what happens "
                f"at a limit, and limit is None. Give one, e.g. limit=data_limit(world_model, data)."
            )
        if self.limit_reward is not None:
            number("limit_reward", self.limit_reward, ", or None for the model's own")
            if self.on_limit == "truncate":
                raise ValueError(
                    f"limit_reward={self.limit_reward} is the reward of an episode that terminates "
                    f"at the limit, and on_limit='truncate' lets its value go on. Leave out one."
                )
        for name in ("coefficient", "limit", "limit_reward"):
            value = getattr(self, name)
            if (
                value is not None
            ):  # numbers of numpy, which no file holds, become Python's
                object.__setattr__(self, name, float(value))


class PenaltyHead(TensorDictModule):
    """Takes the penalty off the rewards that the heads before it wrote.

    Args:
        penalty: the settings.
        rewards: the rewards, below "next".
    """

    def __init__(self, penalty: Penalty, rewards: Sequence[NestedKey]) -> None:
        penalties = [sibling(key, "penalty") for key in rewards]
        reads, writes = [penalty.measure, *rewards], unique([*rewards, *penalties])
        if len(writes) < 2 * len(rewards):
            raise ValueError(
                f"The rewards {list(rewards)} stand side by side, where there is room for one "
                f"penalty: {unique(penalties)}. Say which of them pays: "
                f"with_penalty(..., reward_key={strip_next(rewards[0])!r})."
            )
        super().__init__(_Pay(penalty), reads, writes)
        self.penalty = penalty
        #: Where the penalties stand.
        self.penalties = penalties


class _Pay(nn.Module):
    """Rewards less the penalty, and the penalty."""

    def __init__(self, penalty: Penalty) -> None:
        super().__init__()
        self.penalty = penalty
        #: Whether rewards are left as they are, for a while.
        self.paused = False

    def forward(
        self, measure: torch.Tensor, *rewards: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        if self.paused:
            return (*rewards, *(torch.zeros_like(reward) for reward in rewards))
        penalty, paid, penalties = self.penalty, [], []
        for reward in rewards:
            u = _beside(measure, reward, penalty.measure, "the reward")
            if not reward.is_floating_point():
                raise ValueError(
                    f"The reward is {reward.dtype}, from which no penalty can be taken off. Let "
                    f"reward_head write floats."
                )
            cost = (penalty.coefficient * u).to(reward.dtype)
            less = reward - cost
            if penalty.limit_reward is not None:
                beyond = _beyond(u, penalty)
                cost = torch.where(beyond, reward - penalty.limit_reward, cost)
                less = torch.where(beyond, penalty.limit_reward, less)
            elif cost.shape != reward.shape:
                cost = cost.expand_as(reward).contiguous()
            paid.append(less)
            penalties.append(cost)
        return (*paid, *penalties)


class LimitHead(TensorDictModule):
    """Ends episodes where the measure is beyond the limit, besides what the head before it says.

    Args:
        penalty: the settings.
        endings: the entries of :data:`ENDING_NAMES` that the head before it writes.
    """

    def __init__(self, penalty: Penalty, endings: Sequence[NestedKey]) -> None:
        beside = [join("next", penalty.done_key)] if not endings else endings
        places = unique(sibling(key, "done") for key in beside)
        groups = [
            [as_tuple(key)[-1] for key in endings if sibling(key, "done") == place]
            for place in places
        ]
        module = _End(penalty, groups)
        writes = [
            sibling(place, name)
            for place, names in zip(places, module.writes)
            for name in names
        ]
        reads = [
            sibling(place, name)
            for place, names in zip(places, groups)
            for name in names
        ]
        super().__init__(module, [penalty.measure, *reads], writes)
        self.penalty = penalty


class _End(nn.Module):
    """The done entries of some groups, ended beyond the limit."""

    def __init__(self, penalty: Penalty, groups: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.penalty, self.groups = penalty, [list(names) for names in groups]
        #: Whether the limit is left out, for a while.
        self.paused = False
        #: What is written for each group.
        self.writes = [self._written(names) for names in self.groups]

    def _written(self, names: list[str]) -> list[str]:
        if self.penalty.on_limit == "terminate":
            return list(dict.fromkeys([*names, "terminated"]))
        # What is a termination without the limit is told from what the limit ends.
        said = {*names} - {"truncated", "continue_prob"}
        ending = ["terminated"] if said else []
        done = ["done"] if "done" in names else []
        return [*ending, "truncated", *done]

    def forward(
        self, measure: torch.Tensor, *entries: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        given, out = iter(entries), []
        for names, writes in zip(self.groups, self.writes):
            said = {name: next(given) for name in names}
            ended = self._ended(measure, said)
            out += [ended[name] for name in writes]
        return tuple(out)

    def _ended(
        self, measure: torch.Tensor, said: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        penalty = self.penalty
        first = next(iter(said.values()), measure)
        u = _beside(measure, first, penalty.measure, "the done entry")
        beyond, terminated = _beyond(u, penalty), _terminated(said)
        if self.paused:
            beyond = torch.zeros_like(beyond)
        flag = "terminated" if penalty.on_limit == "terminate" else "truncated"
        before = terminated if flag == "terminated" else said.get("truncated")
        ended = dict(said)
        if terminated is not None:
            ended["terminated"] = terminated
        ended[flag] = beyond if before is None else before | beyond
        if "done" in said:
            ended["done"] = said["done"] | beyond
        if flag == "terminated":
            for name, value in (
                ("terminated_logits", _CERTAIN),
                ("continue_pred", -_CERTAIN),
                ("continue_prob", 0.0),
            ):
                if name in said:
                    ended[name] = torch.where(beyond, value, said[name])
        return ended


def _terminated(said: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what a head says of terminations; None if nothing. The env reads it so, too."""
    for name in ("terminated", "done"):
        if name in said and said[name].is_floating_point():
            raise ValueError(
                f"The done head writes {name!r} as {said[name].dtype}, and an imagined env needs a "
                f"bool there. If these are logits, let it write ('next', 'terminated_logits')."
            )
    if "terminated" in said:
        return said["terminated"]
    if "terminated_logits" in said:
        return said["terminated_logits"] > 0
    if "continue_pred" in said:
        return said["continue_pred"] < 0
    if "done" in said:
        truncated = said.get("truncated")
        return said["done"] if truncated is None else said["done"] & ~truncated
    return None


def _beyond(measure: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """Return where the measure is above the limit, or no number."""
    return ~(measure <= penalty.limit)


def _beside(
    measure: torch.Tensor, entry: torch.Tensor, key: NestedKey, name: str
) -> torch.Tensor:
    """Return the measure ``[*B, 1]`` with the dims of an entry ``[*B, ..., n]``."""
    if measure.shape == entry.shape:
        return measure
    more = entry.ndim - measure.ndim
    if more >= 0 and measure.ndim:
        u = measure.reshape(
            *measure.shape[:-1], *(1 for _ in range(more)), measure.shape[-1]
        )
        lead = measure.ndim - 1
        if u.shape[:lead] == entry.shape[:lead] and u.shape[lead:].numel() == 1:
            return u
    raise ValueError(
        f"The measure {key} has the shape {tuple(measure.shape)}, and {name} "
        f"{tuple(entry.shape)}: it must have one value for each row, [*B, 1], or the shape of "
        f"{name}."
    )


def number(name: str, value: Any, otherwise: str = "") -> None:
    """Refuse what is no finite number.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a number{otherwise}, got {type(value).__name__}."
        )
    if not isfinite(value):
        raise ValueError(f"{name} must be finite{otherwise}, got {value}.")
