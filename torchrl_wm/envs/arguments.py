"""Checks of what callers give to a :class:`~torchrl_wm.WorldModelEnv`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.modules import WorldModel


def check_parts(world_model: Any, base_env: Any, max_steps: Any) -> None:
    """Refuse what no env can be made of.

    Raises:
        TypeError: if the model or the env is something else.
        ValueError: if ``max_steps`` is no positive number.
    """
    if not isinstance(world_model, WorldModel):
        raise TypeError(
            f"world_model must be a torchrl_wm.WorldModel, got "
            f"{type(world_model).__module__}.{type(world_model).__name__}. Compose one: "
            f"WorldModel(encoder, dynamics, reward_head, done_head=..., decoder=...)."
        )
    if not isinstance(base_env, EnvBase):
        raise TypeError(
            f"base_env must be a torchrl.envs.EnvBase, whose specs are copied, got "
            f"{type(base_env).__name__}. Wrap a Gymnasium env: torchrl.envs.GymWrapper(env)."
        )
    is_count = isinstance(max_steps, Integral) and not isinstance(max_steps, bool)
    if max_steps is not None and (not is_count or max_steps <= 0):
        raise ValueError(
            f"max_steps must be a positive int or None, got {max_steps!r}."
        )


def as_size(batch_size: int | Sequence[int] | None, default: torch.Size) -> torch.Size:
    """Return a batch size as the caller may give it.

    Raises:
        ValueError: if it is no batch size of at least one row.
    """
    if batch_size is None:
        return default
    sizes = [batch_size] if isinstance(batch_size, Integral) else list(batch_size)
    if not all(isinstance(size, Integral) and size > 0 for size in sizes):
        raise ValueError(
            f"batch_size must be a positive int or a sequence of them, [] for any batch size; "
            f"got {batch_size!r}."
        )
    return torch.Size(int(size) for size in sizes)


def check_start(tensordict: Any, call: str) -> TensorDictBase | None:
    """Return a start whose time, if it is a slice of real data, is a dim like others.

    Raises:
        TypeError: if it is no tensordict; ``call`` begins the call to make.
    """
    if tensordict is None:
        return None
    if not isinstance(tensordict, TensorDictBase):
        raise TypeError(
            f"The start must be a TensorDict, got {type(tensordict).__name__}: "
            f"env.{call}, tensordict=world_model.encode(obs))."
        )
    if "time" in tensordict.names:  # the imagined time is another dim
        tensordict = tensordict.copy()
        tensordict.names = [None] * tensordict.batch_dims
    return tensordict


def check_imagine(
    horizon: Any, policy: Callable | None, tensordict: Any, actions: Any
) -> int:
    """Return the horizon of :meth:`~torchrl_wm.WorldModelEnv.imagine`, if its arguments are right.

    Raises:
        TypeError: if one is of another type.
        ValueError: if the horizon is not positive, or if both a policy and actions are given.
    """
    if not isinstance(horizon, Integral) or isinstance(horizon, bool):
        raise TypeError(
            f"horizon must be an int, got {type(horizon).__name__}: imagine(horizon, policy, "
            f"tensordict)."
        )
    if horizon <= 0:
        raise ValueError(f"horizon must be at least 1, got {horizon}.")
    if isinstance(policy, TensorDictBase):
        raise TypeError(
            "imagine got a tensordict as policy. The start is a keyword: "
            "imagine(horizon, tensordict=start)."
        )
    check_start(tensordict, "imagine(horizon")
    if actions is not None and not isinstance(actions, (torch.Tensor, TensorDictBase)):
        raise TypeError(
            f"actions must be a tensor [*B, H, *A] or a TensorDict, got "
            f"{type(actions).__name__}. Convert them: torch.as_tensor(actions)."
        )
    if policy is not None and actions is not None:
        raise ValueError(
            "imagine takes a policy or actions, not both: with actions given there is "
            "nothing left to decide."
        )
    return int(horizon)
