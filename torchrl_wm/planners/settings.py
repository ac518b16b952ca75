"""The settings of a planner, and the signatures of planners that add to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, InitVar
from math import inf
from typing import Literal

from torchrl_wm._checks import positive_int


_COUNTS = (
    "planning_horizon",
    "optim_steps",
    "num_candidates",
    "top_k",
    "num_particles",
    "execute",
    "action_block",
)


@dataclass
class PlannerSettings:
    """The numbers and switches of a planner, checked; :class:`MPCPlanner` documents them.

    Raises:
        ValueError: naming the setting that does not make sense.
    """

    planning_horizon: int
    optim_steps: int
    num_candidates: int
    top_k: int
    discount: float
    warm_start: bool | None
    num_policy_candidates: int | None
    num_particles: int
    init_std: float
    min_std: float | None
    momentum: float
    act_on: Literal["mean", "best"] | None
    execute: int
    action_block: int
    has_policy: InitVar[bool]

    def __post_init__(self, has_policy: bool) -> None:
        for name in _COUNTS:
            setattr(self, name, positive_int(name, getattr(self, name)))
        if self.top_k > self.num_candidates:
            raise ValueError(
                f"top_k={self.top_k} of num_candidates={self.num_candidates}: there are not so "
                f"many. Choose a top_k of about a tenth of the candidates."
            )
        check_execute(self.execute, self.planning_horizon)
        self._share_with_policy(has_policy)
        self._check_spread()
        if self.warm_start not in (None, True, False):
            raise ValueError(
                f"warm_start must be True, False, or None, with which the env decides; got "
                f"{self.warm_start!r}."
            )
        if self.act_on not in (None, "mean", "best"):
            raise ValueError(f"act_on must be 'mean' or 'best', got {self.act_on!r}.")

    def _share_with_policy(self, has_policy: bool) -> None:
        """Settle how many of the candidates a policy proposes."""
        number = self.num_policy_candidates
        if not has_policy:
            if number:
                raise ValueError(
                    f"num_policy_candidates={number} need a policy that proposes them: pass "
                    f"policy=..."
                )
            number = 0
        elif number is None:
            # TD-MPC2 takes 24 of 512.
            number = max(1, self.num_candidates // 20)
        if not 0 <= number < self.num_candidates:
            raise ValueError(
                f"num_policy_candidates={number} must be less than "
                f"num_candidates={self.num_candidates}, of which they are a part."
            )
        self.num_policy_candidates = number

    def _check_spread(self) -> None:
        for name in ("discount", "momentum"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}.")
            setattr(self, name, float(value))
        if self.momentum == 1:
            raise ValueError("With momentum=1 the proposal would never move.")
        if not (0 < self.init_std < inf and 0 <= (self.min_std or 0) <= self.init_std):
            raise ValueError(
                f"0 <= min_std <= init_std and 0 < init_std < inf are needed, got "
                f"min_std={self.min_std} and init_std={self.init_std}."
            )
        self.init_std = float(self.init_std)


def check_execute(execute: int, planning_horizon: int) -> None:
    """Refuse to act on more actions than a plan has."""
    if execute > planning_horizon:
        raise ValueError(
            f"execute={execute} of planning_horizon={planning_horizon}: a plan has not so many "
            f"actions. Plan further, or plan again earlier."
        )


def passes_on_to(
    base: Callable, without: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Show the parameters of ``base`` in the signature of a function that passes on the rest.

    The function takes ``*args`` and ``**kwargs`` and calls ``base`` with them. Its signature, which
    :func:`help` and the documentation show, then names all parameters in the order in which
    they are given: its own, then those of ``base`` that it does not have itself, ``without``
    some.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = signature.parameters
        inherited = inspect.signature(base).parameters
        every = [
            *own.values(),
            *(p for name, p in inherited.items() if name not in (*own, *without)),
        ]
        named = [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        named.sort(key=lambda parameter: parameter.kind)  # keyword-only ones last
        function.__signature__ = signature.replace(parameters=named)
        return function

    return decorate
