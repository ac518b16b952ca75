"""Observations of Gymnasium's ``reset`` and ``step``, and actions for its ``step``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Composite
from torchrl.envs import EnvBase

from torchrl_wm.trainers.gym_actions import (
    gymnasium_env,
    own_action_space,
    TorchRLActions,
    wrapped_env,
)
from torchrl_wm.trainers.pixels import Pixels, reduced

#: The structure of an observation: dictionaries, lists (for a Tuple space), and parts; None for
#: those without a shape.
Layout = Any


class _Part(NamedTuple):
    """A part of an observation: its shape, and whether its numbers are bytes."""

    shape: tuple[int, ...]
    is_bytes: bool


class HandedValues:
    """A reader of a Gymnasium env's observations, which also returns actions for it.

    Args:
        env: the innermost TorchRL env, without transforms.
        pixels: what observes frames of the env, which are part of its observations then.
    """

    def __init__(self, env: EnvBase, pixels: Pixels | None = None) -> None:
        self._env, self._inner = env, gymnasium_env(env)
        self._space = own_action_space(env)
        self._layout, self._pixels = _layout_of(env), pixels
        self._is_bare = not isinstance(self._layout, dict)
        if pixels is not None:
            image = _Part((pixels.size, pixels.size, 3), True)
            own = {"observation": self._layout} if self._is_bare else self._layout
            self._layout = image if pixels.only else {**own, "pixels": image}

    def split(self, observation: Any) -> tuple[int | None, list[Any]]:
        """Return the size of a batch of observations, None for a single one, and each observation.

        Raises:
            ValueError: if entries are missing or unknown, or of another shape.
        """
        observation = self._named(self._with_reduced(observation))
        sizes = dict(_sizes(self._layout, observation, "observation"))
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"The entries of an observation must all be single ones or batches of one size, got "
                f"the leading sizes {sizes} (None: a single one)."
            )
        size = next(iter(sizes.values()), None)
        if size is None:
            return None, [_row(self._layout, observation, None)]
        if not size:
            raise ValueError("The batch of observations is empty.")
        return size, [_row(self._layout, observation, row) for row in range(size)]

    def read(self, observation: Any) -> TensorDictBase:
        """Return a single observation as the env's ``reset`` would return it."""
        if self._pixels is None:
            return self._own(observation)
        if self._pixels.only:
            return TensorDict({"pixels": torch.as_tensor(observation)}, batch_size=[])
        own = {name: part for name, part in observation.items() if name != "pixels"}
        entries = self._own(own["observation"] if self._is_bare else own)
        return entries.set("pixels", torch.as_tensor(observation["pixels"]))

    def _own(self, observation: Any) -> TensorDictBase:
        """Return an observation of the env itself as entries."""
        read = getattr(self._env, "read_obs", None)
        if read is not None:
            entries = read(observation)
        else:
            entries = self._env.observation_spec.encode(observation)
        return TensorDict(entries, batch_size=[])

    def action(self, action: torch.Tensor) -> Any:
        """Return an action of the TorchRL env as the env within takes it."""
        read = getattr(self._env, "read_action", None)
        if read is None:
            spec = self._env.full_action_spec_unbatched[self._env.action_key]
            read = spec.to_numpy
        value = read(action)
        if isinstance(self._inner, TorchRLActions):
            value = self._inner.action(value)
        return value if self._space is None else _as_of(self._space, value)

    def batch(self, actions: list[Any]) -> Any:
        """Return several actions as a vector env takes them."""
        if self._space is None:
            return np.stack(actions)
        empty = create_empty_array(self._space, len(actions))
        return concatenate(self._space, actions, empty)

    def _with_reduced(self, observation: Any) -> Any:
        """Return an observation with its frames, of any size, as images of the run's size."""
        if self._pixels is None:
            return observation
        if not isinstance(observation, Mapping):
            return _reduced_frames(observation, self._pixels.size)
        if "pixels" not in observation:
            return observation
        images = _reduced_frames(observation["pixels"], self._pixels.size)
        return {**observation, "pixels": images}

    def _named(self, observation: Any) -> Any:
        """Return a bare value under its name, if the env is a TorchRL env with a single entry."""
        if isinstance(observation, Mapping) or not isinstance(self._layout, dict):
            return observation
        if self._inner is not None:
            return observation
        path, layout = [], self._layout
        while isinstance(layout, dict) and len(layout) == 1:
            ((name, layout),) = layout.items()
            path.append(name)
        if isinstance(layout, dict):
            return observation
        for name in reversed(path):
            observation = {name: observation}
        return observation


def _reduced_frames(frames: Any, size: int) -> Any:
    """Return a frame or a batch of them, uint8, at another size; anything else as it is."""
    array = _array(frames)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
        return frames
    many = array.reshape(-1, *array.shape[-3:])
    images = np.stack([reduced(frame, size).numpy() for frame in many])
    return images if array.ndim == 4 else images[0]


def _layout_of(env: EnvBase) -> Layout:
    inner = wrapped_env(env)
    if isinstance(inner, gymnasium.Env):
        return _layout_of_space(inner.observation_space)
    specs = getattr(inner, "observation_spec", None)
    if callable(specs):  # dm_control
        return {name: _Part(spec.shape, False) for name, spec in specs().items()}
    return _layout_of_spec(env.observation_spec)


def _layout_of_space(space: gymnasium.Space) -> Layout:
    if isinstance(space, spaces.Dict):
        return {name: _layout_of_space(part) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return [_layout_of_space(part) for part in space]
    return None if space.shape is None else _Part(space.shape, space.dtype == np.uint8)


def _layout_of_spec(spec: Any) -> Layout:
    if isinstance(spec, Composite):
        return {name: _layout_of_spec(part) for name, part in spec.items()}
    return _Part(tuple(spec.shape), spec.dtype is torch.uint8)


def _sizes(layout: Layout, value: Any, name: str) -> Iterator[tuple[str, int | None]]:
    """Check an observation; give the leading size of each entry, None for single ones."""
    if isinstance(layout, dict):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"The {name} must be a dictionary with the entries {list(layout)}, got "
                f"{_described(value)}."
            )
        missing = [part for part in layout if part not in value]
        unknown = [part for part in value if part not in layout]
        if missing or unknown:
            raise ValueError(
                f"The {name} must have the entries {list(layout)}, got {list(value)}: "
                f"{f'missing are {missing}' if missing else f'{unknown} are unknown'}."
            )
        for part, inner in layout.items():
            yield from _sizes(inner, value[part], f"{name}[{part!r}]")
    elif isinstance(layout, list):
        if not isinstance(value, (tuple, list)) or len(value) != len(layout):
            raise ValueError(
                f"The {name} must be a tuple of {len(layout)}, got {_described(value)}."
            )
        for number, inner in enumerate(layout):
            yield from _sizes(inner, value[number], f"{name}[{number}]")
    elif layout is not None:
        yield name, _leading(layout, value, name)


def _leading(layout: _Part, value: Any, name: str) -> int | None:
    shape = layout.shape
    try:
        array = _array(value)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"The {name} must be numbers of the shape {shape}, got {_described(value)}."
        )
    is_single = array.shape == shape
    if not is_single and not (array.ndim and array.shape[1:] == shape):
        batch = ", ".join(map(str, ("N", *shape)))
        raise ValueError(
            f"The {name} must have the shape {shape}, or ({batch}) for a batch, got "
            f"{_described(value)}. Give what the env of the run returns, before any transform of the "
            f"run."
        )
    if layout.is_bytes and array.dtype.kind == "f":
        raise ValueError(
            f"The {name} must be whole numbers from 0 to 255, got {_described(value)}. Give what the "
            f"env of the run returns: of an image its bytes, not divided by 255."
        )
    return None if is_single else array.shape[0]


def _row(layout: Layout, value: Any, row: int | None) -> Any:
    """Return one observation of a batch, or the single one, in containers of its own."""
    if isinstance(layout, dict):
        return {name: _row(part, value[name], row) for name, part in layout.items()}
    if isinstance(layout, list):
        return tuple(_row(part, value[n], row) for n, part in enumerate(layout))
    if layout is not None and (row is not None or isinstance(value, torch.Tensor)):
        value = _array(value)
    return value if row is None else value[row]


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary with the entries {list(value)}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"the shape {tuple(shape)} of {value.dtype}"
    return f"{type(value).__name__} {value!r:.80}"


def _as_of(space: gymnasium.Space, action: Any) -> Any:
    """Return an action in the types of a space."""
    if isinstance(space, spaces.Dict):
        return {name: _as_of(part, action[name]) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_as_of(part, value) for part, value in zip(space, action))
    if isinstance(space, spaces.Discrete):
        return space.dtype.type(int(action))
    if isinstance(space, spaces.Box):
        array = np.asarray(action, dtype=space.dtype).reshape(space.shape)
        inside = np.clip(array, space.low, space.high)
        # Bounds in float32 may exceed those in float64 by a rounding error.
        return inside if np.allclose(inside, array, rtol=1e-6, atol=0) else array
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        return np.asarray(action, dtype=space.dtype).reshape(space.shape)
    return action
