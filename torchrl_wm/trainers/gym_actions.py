"""Gymnasium's actions in TorchRL's form: options counted from 0, no dictionaries of one entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import gymnasium
from gymnasium import spaces
from torchrl.envs import Compose, EnvBase, Transform, TransformedEnv

from torchrl_wm import _upstream


class TorchRLActions(gymnasium.ActionWrapper):
    """A Gymnasium env that takes actions as TorchRL's wrappers hand them out.

    TorchRL numbers options 0, 1, ..., ``n - 1``, whatever the ``start`` of the space: this env
    adds ``start``. TorchRL gives only the value of a dictionary with one entry: this env makes
    the dictionary.

    Args:
        env: the env.

    Examples:
        >>> import gymnasium
        >>> from torchrl_wm.trainers.gym_actions import TorchRLActions
        >>> class Lever(gymnasium.Env):
        ...     action_space = gymnasium.spaces.Discrete(3, start=-1)
        >>> env = TorchRLActions(Lever())
        >>> env.action_space, int(env.action(0))
        (Discrete(3), -1)
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.action_space = _from_zero(env.action_space)

    def action(self, action: Any) -> Any:
        """Return the action as the env takes it."""
        return _as_the_env(self.env.action_space, action)


def as_torchrl_acts(env: gymnasium.Env) -> gymnasium.Env:
    """Return the env, in a :class:`TorchRLActions` where its action space needs it."""
    space = env.action_space
    needed = isinstance(space, spaces.Dict) or _from_zero(space) != space
    return TorchRLActions(env) if needed else env


def gymnasium_env(env: EnvBase) -> gymnasium.Env | None:
    """Return the Gymnasium env within a TorchRL env; None if there is none."""
    inner = wrapped_env(env)
    return inner if isinstance(inner, gymnasium.Env) else None


def wrapped_env(env: EnvBase) -> Any:
    """Return the env of another library that a TorchRL env wraps; None if it wraps none."""
    return _upstream.wrapped_env(innermost(env))


def innermost(env: EnvBase) -> EnvBase:
    """Return the env within all transforms."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def layers(env: EnvBase) -> Iterator[list[Transform]]:
    """Give the transforms around an env: a list for each layer, the outer ones first."""
    while isinstance(env, TransformedEnv):
        yield list(_single(env.transform))
        env = env.base_env


def _single(transform: Transform) -> Iterator[Transform]:
    if isinstance(transform, Compose):
        for part in transform:
            yield from _single(part)
    else:
        yield transform


def own_action_space(env: EnvBase) -> gymnasium.Space | None:
    """Return the action space of the Gymnasium env within; None if there is none."""
    inner = gymnasium_env(env)
    if isinstance(inner, TorchRLActions):
        inner = inner.env
    return None if inner is None else inner.action_space


def check_start(env: EnvBase) -> None:
    """Refuse a TorchRL env that numbers its options otherwise than the env within.

    Raises:
        ValueError: if a ``start`` of the env within is not 0.
    """
    inner = gymnasium_env(env)
    if inner is not None and _from_zero(inner.action_space) != inner.action_space:
        raise ValueError(
            f"The Gymnasium env within this {type(env).__name__} has the actions "
            f"{inner.action_space}, with a start that is not 0, and TorchRL would act with numbers "
            f"from 0 on. Give the Gymnasium env itself, its name, or a function that makes it: "
            f"then 0 becomes start, and so on."
        )


def _from_zero(space: gymnasium.Space) -> gymnasium.Space:
    if isinstance(space, spaces.Discrete) and space.start != 0:
        counted = deepcopy(space)  # Discrete takes no dtype before gymnasium 1.2.3
        counted.start = space.start - space.start
        return counted
    if isinstance(space, spaces.MultiDiscrete) and space.start.any():
        return spaces.MultiDiscrete(space.nvec, dtype=space.dtype)
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _from_zero(part) for key, part in space.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_from_zero(part) for part in space])
    return space


def _as_the_env(space: gymnasium.Space, action: Any) -> Any:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return space.start + action
    if isinstance(space, spaces.Dict):
        if not isinstance(action, Mapping):
            action = dict.fromkeys(space, action)  # there is one key
        return {key: _as_the_env(part, action[key]) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_as_the_env(part, value) for part, value in zip(space, action))
    return action
