"""What a dream shows after a step, and what was done to get there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.trainers.dreaming.sides import Side
from torchrl_wm.trainers.dreaming.views import View


@dataclass(frozen=True)
class Moment:
    """What a dream shows after a step.

    Args:
        step: how many steps were imagined since the start.
        actor: who acted: "you", "policy" or "random"; "start" at the start; "look" where the
            model has looked at the real env again.
        action: the action as numbers, one for each control; None where there was none.
        imagined: the imagined side.
        real: the real side; None without a real env.
        disagreement: how much the members of an ensemble disagreed in the step; None without
            members.
    """

    step: int
    actor: str
    action: list[float] | None
    imagined: View
    real: View | None
    disagreement: float | None


class Done(NamedTuple):
    """What was done: an action, or a look at the real env; and what the policy carried after it."""

    actions: TensorDictBase | None
    carried: dict[NestedKey, torch.Tensor]


def facts_of(side: Side, before: View | None) -> dict[str, Any]:
    """Return reward and ends of a side, whose view was another before."""
    total = 0.0 if before is None else before.total
    return {
        "reward": side.reward,
        "total": total + (side.reward or 0.0),
        "terminated": side.terminated,
        "truncated": side.truncated,
    }
