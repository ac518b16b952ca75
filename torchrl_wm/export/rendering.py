"""Frames of imagined states: decoded pixels, a function's, or the real env's own renderer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from torchrl_wm.export.signatures import bind
from torchrl_wm.export.sources import Source
from torchrl_wm.export.trees import snapshot, to_numpy

#: Entries of a Dict observation that are images.
IMAGE_KEYS = ("image", "pixels", "rgb")


class Renderer:
    """Draws the present state of one env.

    Args:
        source: what is drawn.
        render_fn: draws, ``(model, state, obs)``.
        render_env: the id of a real env, or the env, whose renderer draws.
    """

    def __init__(
        self, source: Source, render_fn: Callable | None, render_env: Any
    ) -> None:
        if render_fn is not None and render_env is not None:
            raise ValueError("Pass render_fn or render_env, not both.")
        self.source = source
        self.real: RealEnvRenderer | None = None
        self._function = None
        if render_fn is not None:
            roles = ("model", "state", "obs")
            self._function = bind(render_fn, roles, "render_fn")
        elif render_env is not None:
            self.real = RealEnvRenderer(render_env)
        self._space = source.observation_space

    def __call__(self, state: Any, observation: Any) -> np.ndarray:
        """A frame ``[height, width, 3]`` uint8.

        Args:
            state: a copy of the model's state.
            observation: of one env.
        """
        if self._function is not None:
            source = self.source
            model = source.model if hasattr(source, "model") else source.env
            with source.isolation.apart():
                drawn = self._function(
                    {
                        "model": model,
                        "state": state,
                        "obs": snapshot(observation),
                        # Of its own: pictures do not change what comes next.
                        "np_random": np.random.default_rng(0),
                    }
                )
            return as_frame(to_numpy(drawn), None, "render_fn")
        if self.real is not None:
            return self.real(observation)
        space, image, name = self._space, observation, "the observation"
        if isinstance(space, spaces.Dict):
            there = [key for key in IMAGE_KEYS if key in space.spaces]
            if not there:
                raise self._nothing_to_draw(f"none of the keys {list(IMAGE_KEYS)}")
            name = f"observation[{there[0]!r}]"
            space, image = space[there[0]], observation[there[0]]
        if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
            raise self._nothing_to_draw(f"the space {space}")
        return as_frame(image, space, name)

    def _nothing_to_draw(self, got: str) -> RuntimeError:
        return RuntimeError(
            f"There is no image to render: the observation has {got}. Pass "
            f"render_fn(model, state, obs), or render_env='Pendulum-v1' or 'CartPole-v1' for these "
            f"envs' observations, or decode pixels: WorldModelEnv(..., decode=True)."
        )

    def close(self) -> None:
        if self.real is not None:
            self.real.close()


class RealEnvRenderer:
    """Draws an observation with the real env's own renderer.

    Args:
        env: ``"Pendulum-v1"``, ``"CartPole-v1"``, or such an env made with
            ``render_mode="rgb_array"``.

    Raises:
        ValueError: if it is another env.
    """

    def __init__(self, env: Any) -> None:
        if isinstance(env, str):
            env = gymnasium.make(env, render_mode="rgb_array")
        name = type(env.unwrapped).__name__ if isinstance(env, gymnasium.Env) else env
        states = {"PendulumEnv": _pendulum_state, "CartPoleEnv": _cart_pole_state}
        if name not in states or env.unwrapped.render_mode != "rgb_array":
            raise ValueError(
                f"render_env must be 'Pendulum-v1' or 'CartPole-v1', or such an env made with "
                f"render_mode='rgb_array', got {env!r}. For others pass render_fn."
            )
        self.env = env
        self._set = states[name]
        self._size = 3 if name == "PendulumEnv" else 4
        env.reset(seed=0)

    def __call__(self, observation: Any) -> np.ndarray:
        """A frame ``[height, width, 3]`` uint8 of an observation, a vector of the env's."""
        parts = observation.values() if isinstance(observation, dict) else [observation]
        vectors = [np.asarray(p) for p in parts if np.shape(p) == (self._size,)]
        if len(vectors) != 1:
            shapes = [np.shape(part) for part in parts]
            raise ValueError(
                f"The real env's renderer draws one observation of shape ({self._size},), got "
                f"{shapes}. Decode it: WorldModelEnv(..., decode=True); or pass render_fn."
            )
        self._set(self.env.unwrapped, vectors[0].astype(np.float64))
        frame = self.env.unwrapped.render()
        return np.array(frame, dtype=np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        # The canvas, which cannot be copied, is made again with the env.
        env = self.env if self.env.spec is None else self.env.spec
        return {**self.__dict__, "env": env}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not isinstance(self.env, gymnasium.Env):
            self.env = gymnasium.make(self.env)
            self.env.reset(seed=0)

    def close(self) -> None:
        self.env.close()


def _pendulum_state(env: Any, observation: np.ndarray) -> None:
    cosine, sine, velocity = observation
    env.state = np.array([np.arctan2(sine, cosine), velocity])
    env.last_u = (
        None  # the arrow of the last torque, which an observation does not have
    )


def _cart_pole_state(env: Any, observation: np.ndarray) -> None:
    env.state = observation


def as_frame(image: Any, space: spaces.Box | None, name: str) -> np.ndarray:
    """An image as ``[height, width, 3]`` uint8.

    Args:
        image: ``[height, width]``, or with 1 or 3 channels as first or last dim; integers
            in [0, 255], or floats between the bounds of their space, or in [0, 1].
        space: the image's space, whose bounds say what is black and white.
        name: what it is, for messages.

    Raises:
        ValueError: if it is no image, or if its values are far outside of [0, 1].
    """
    array = np.asarray(image)
    if array.dtype.kind not in "uifb":
        raise ValueError(f"{name} must be an image, got {type(image).__name__}.")
    array = _channels_last(array, name)
    if array.dtype != np.uint8:
        array = _to_uint8(array, space, name)
    if array.shape[-1] == 1:
        array = array.repeat(3, -1)
    return np.ascontiguousarray(array)


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    first, last = (
        (array.shape[0] in (1, 3), array.shape[-1] in (1, 3))
        if array.ndim == 3
        else (False, False)
    )
    if first and last:
        raise ValueError(
            f"{name} has the shape {array.shape}, in which the first and the last dim could be "
            f"the channels. Pass a render_fn that returns [height, width, 3]."
        )
    if not (first or last):
        raise ValueError(
            f"{name} must be [height, width], [height, width, channels] or [channels, height, "
            f"width] with 1 or 3 channels, got {array.shape}. Pass a render_fn that returns one."
        )
    return np.moveaxis(array, 0, -1) if first else array


def _to_uint8(array: np.ndarray, space: spaces.Box | None, name: str) -> np.ndarray:
    low, high = (0, 255) if array.dtype.kind in "ui" else (0.0, 1.0)
    if space is not None and space.is_bounded():
        low, high = float(space.low.min()), float(space.high.max())
    slack = 0.5 * (high - low)
    if array.min() < low - slack or array.max() > high + slack:
        raise ValueError(
            f"{name} has values in [{array.min():.3g}, {array.max():.3g}], taken to be between "
            f"{low:g} (black) and {high:g} (white). Give its space these bounds, or pass a "
            f"render_fn that returns uint8."
        )
    scaled = (array.astype(np.float64) - low) / (high - low)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)
