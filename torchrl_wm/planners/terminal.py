"""The value of where plans end, beyond what their steps score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase

from torchrl_wm.modules.keys import unique
from torchrl_wm.planners.step_scores import per_row

#: The names under which TorchRL's modules write values.
_VALUE_NAMES = ("state_value", "state_action_value", "chosen_action_value")

#: The rows, ``[R]`` bool, in which a new state replaces an old one.
Select = Callable[[torch.Tensor, Any, Any], Any]


class TerminalValue:
    """The value of where each plan is when its episode ends or the horizon is reached.

    A termination is worth nothing; a truncation is worth its state.

    Args:
        evaluate: gives the values of states, ``[R, 1]``.
        select: puts new states in the place of old ones.
    """

    def __init__(self, evaluate: Callable[[Any], torch.Tensor], select: Select) -> None:
        self.evaluate, self.select = evaluate, select
        self.state: Any = None
        self.scale: torch.Tensor | float = 1.0
        self.worth: torch.Tensor | None = None

    def follow(
        self,
        state: Any,
        scale: float,
        going: torch.Tensor | None,
        terminated: torch.Tensor | None,
    ) -> None:
        """Follow the plans that were still ``going`` before this step."""
        if going is None:
            self.state, self.scale = state, scale
        else:
            self.state = self.select(going, state, self.state)
            before = torch.as_tensor(self.scale, device=going.device)
            self.scale = torch.where(going, scale, before)
        if terminated is not None:
            ended = terminated if going is None else terminated & going
            self.worth = ~ended if self.worth is None else self.worth & ~ended

    def __call__(self) -> torch.Tensor:
        """Return the discounted values, ``[R]``."""
        value = self.scale * per_row(self.evaluate(self.state))
        if self.worth is None:
            return value
        return torch.where(self.worth, value, torch.zeros_like(value))


def value_key(module: TensorDictModuleBase) -> NestedKey:
    """Where a value module writes.

    Raises:
        ValueError: if that is not clear from its keys.
    """
    keys = unique(module.out_keys)
    for name in _VALUE_NAMES:
        named = [key for key in keys if key == name or key[-1] == name]
        if len(named) == 1:
            return named[0]
    if len(keys) == 1:
        return keys[0]
    raise ValueError(
        f"terminal_value writes {keys}, and it is not clear which is the value: let it write one "
        f"of {list(_VALUE_NAMES)}, or nothing else."
    )
