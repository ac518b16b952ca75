"""The sources of imagined steps: one interface over world models of every kind."""

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
    """The result of a reset or a step, checked and copied.

    With ``N`` envs at once, ``N`` is the first dim of all but ``state`` and ``info``.

    Args:
        state: the state from which the next step starts, in the model's form.
        observation: arrays of the observation space.
        reward: a float, or ``[N]`` float64.
        terminated: a bool, or ``[N]`` bool.
        truncated: a bool, or ``[N]`` bool.
        info: other outputs of the model.
    """

    state: Any
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: dict[str, Any]


@dataclass
class Start:
    """A request to begin episodes.

    Args:
        seed: the seed for randomness outside of ``np_random`` and torch.
        np_random: the env's random numbers.
        options: the caller's options, without ``reset_mask``.
        mask: the envs that begin, ``[N]`` bool; None for all.
        state: the state of the other envs.
    """

    seed: int
    np_random: np.random.Generator
    options: dict[str, Any]
    mask: np.ndarray | None = None
    state: Any = None


class Source(Protocol):
    """A source of imagined steps of one env, or of ``rows`` envs at once."""

    observation_space: spaces.Space
    action_space: spaces.Space
    rows: int | None
    isolation: Isolation

    def reset(self, start: Start) -> Moment:
        """Begin episodes."""

    def step(self, state: Any, action: Any) -> Moment:
        """Predict one step of all envs with one call of the model."""

    def state_of(self, state: Any) -> Any:
        """Return the state as new numpy arrays, for ``info["model_state"]``."""

    def shown(self, state: Any, index: int | None = None) -> Any:
        """Return a copy of the state in the model's form: of one env, or of all, ``[N, ...]``."""


def first_moment(
    rows: int | None, state: Any, observation: Any, info: dict[str, Any]
) -> Moment:
    """Return the result of a reset: no reward, and no end."""
    if rows is None:
        return Moment(state, observation, 0.0, False, False, info)
    over = np.zeros(rows, bool)
    return Moment(state, observation, np.zeros(rows), over, over.copy(), info)


def as_device(device: Any) -> torch.device | None:
    """Return a device that this machine has, or None.

    Raises:
        ValueError: if the machine lacks it.
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
    """The open envs of each model, and the env whose episode a model with its own state is in."""

    def __init__(self) -> None:
        self._users: dict[int, weakref.WeakSet] = {}
        self._last: dict[int, weakref.ref] = {}

    def add(self, model: Any, env: Any) -> None:
        """Record that ``env`` uses ``model``."""
        self._users = {key: users for key, users in self._users.items() if len(users)}
        self._users.setdefault(id(model), weakref.WeakSet()).add(env)

    def remove(self, model: Any, env: Any) -> bool:
        """Record that ``env`` no longer uses ``model``, and return whether no other env does."""
        users = self._users.get(id(model), weakref.WeakSet())
        users.discard(env)
        if len(users):
            return False
        self._users.pop(id(model), None)
        self._last.pop(id(model), None)
        return True

    def claim(self, model: Any, owner: Any) -> None:
        """Record that the model is in an episode of ``owner``."""
        self._last[id(model)] = weakref.ref(owner)

    def holds(self, model: Any, owner: Any) -> bool:
        """Return whether the model is still in an episode of ``owner``."""
        last = self._last.get(id(model))
        return last is not None and last() is owner


#: Shared by all envs of a process.
USERS = _Users()


class ModelUser:
    """The part of an env that counts the users of its model; the last one closes the model."""

    _source: Source

    @property
    def world_model(self) -> Any:
        """The given model, or the world model of a given ``WorldModelEnv``."""
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
    """Return a model's info with new arrays in place of tensors.

    Raises:
        TypeError: if it is neither a dictionary nor None.
    """
    if info is None:
        return {}
    if not hasattr(info, "items"):
        raise TypeError(
            f"info must be a dictionary or None, got {type(info).__name__}."
        )
    return {str(k): to_numpy(v) for k, v in info.items()}
