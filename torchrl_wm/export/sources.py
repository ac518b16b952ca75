"""What the Gymnasium envs step: one interface over world models of every make."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces

from torchrl_wm.export.isolation import Isolation
from torchrl_wm.export.trees import to_numpy


@dataclass(slots=True)
class Moment:
    """What a reset or a step leads to, checked and copied.

    With ``N`` envs at once all but ``state`` and ``info`` begin with ``N``.

    Args:
        state: what the next step starts from, as the model has it.
        observation: arrays of the observation space.
        reward: a float, or ``[N]`` float64.
        terminated: a bool, or ``[N]`` bool.
        truncated: a bool, or ``[N]`` bool.
        info: what the model says beside these.
    """

    state: Any
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: dict[str, Any]


@dataclass
class Start:
    """How episodes are to begin.

    Args:
        seed: for whatever is random and has no random numbers of ours.
        np_random: the env's random numbers.
        options: the caller's options, without ``reset_mask``.
        mask: ``[N]`` bool, which envs begin; None for all.
        state: the state of the others.
    """

    seed: int
    np_random: np.random.Generator
    options: dict[str, Any]
    mask: np.ndarray | None = None
    state: Any = None


class Source(Protocol):
    """Imagines one env, or ``rows`` envs at once."""

    observation_space: spaces.Space
    action_space: spaces.Space
    rows: int | None
    isolation: Isolation

    def reset(self, start: Start) -> Moment:
        """Begin episodes."""

    def step(self, state: Any, action: Any) -> Moment:
        """Predict one step of all envs with one call of the model."""

    def state_of(self, state: Any) -> Any:
        """The state as numpy arrays of its own, for ``info["model_state"]``."""

    def shown(self, state: Any, index: int | None = None) -> Any:
        """A copy of the state as the model has it: of one env, or ``[N, ...]`` of all."""


def first_moment(
    rows: int | None, state: Any, observation: Any, info: dict[str, Any]
) -> Moment:
    """The moment that a reset leads to: no reward, and nothing over."""
    if rows is None:
        return Moment(state, observation, 0.0, False, False, info)
    over = np.zeros(rows, bool)
    return Moment(state, observation, np.zeros(rows), over, over.copy(), info)


def as_device(device: Any) -> torch.device | None:
    """A device that is there.

    Raises:
        ValueError: if it is not.
    """
    if device is None:
        return None
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as err:
        raise ValueError(f"device={device!r} is not available here: {err}") from err
    return device


class _Users:
    """Which open envs use a model, and whose episode is in a model that keeps its own state."""

    def __init__(self) -> None:
        self._users: dict[int, weakref.WeakSet] = {}
        self._last: dict[int, weakref.ref] = {}

    def add(self, model: Any, env: Any) -> None:
        """Note that ``env`` uses ``model``."""
        self._users = {key: users for key, users in self._users.items() if len(users)}
        self._users.setdefault(id(model), weakref.WeakSet()).add(env)

    def remove(self, model: Any, env: Any) -> bool:
        """Note that it does no more; whether it was the last one."""
        users = self._users.get(id(model), weakref.WeakSet())
        users.discard(env)
        if len(users):
            return False
        self._users.pop(id(model), None)
        self._last.pop(id(model), None)
        return True

    def claim(self, model: Any, owner: Any) -> None:
        """Note whose episode the model is in."""
        self._last[id(model)] = weakref.ref(owner)

    def holds(self, model: Any, owner: Any) -> bool:
        """Whether the model is still in the owner's episode."""
        last = self._last.get(id(model))
        return last is not None and last() is owner


#: Shared by all envs of a process.
USERS = _Users()


class ModelUser:
    """The part of an env that says which model it uses, and closes it as the last one."""

    _source: Source

    @property
    def world_model(self) -> Any:
        """The model, as it was given; of a ``WorldModelEnv`` the world model."""
        source = self._source
        return source.model if hasattr(source, "model") else source.env.world_model

    def _use_model(self) -> None:
        model = getattr(self._source, "model", None)
        if model is not None:
            USERS.add(model, self)

    def _release_model(self) -> None:
        model = getattr(self._source, "model", None)
        if model is None or not USERS.remove(model, self):
            return
        close = getattr(model, "close", None)
        if callable(close):
            close()


def numpy_info(info: Mapping[str, Any] | None) -> dict[str, Any]:
    """A model's info with arrays of its own in place of tensors."""
    if info is None:
        return {}
    if not hasattr(info, "items"):
        raise TypeError(
            f"info must be a dictionary or None, got {type(info).__name__}."
        )
    return {str(k): to_numpy(v) for k, v in info.items()}
