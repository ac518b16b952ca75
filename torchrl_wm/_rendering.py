"""Frames of observations: images, and what a real env's own renderer draws."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

#: Entries of a Dict observation that are images.
IMAGE_KEYS = ("image", "pixels", "rgb")


class RealEnvRenderer:
    """Draws an observation with the real env's own renderer.

    Args:
        env: the id of a Gymnasium env, or the env, made with ``render_mode="rgb_array"``:
            the pendulum, the cart-pole, or a MuJoCo env whose observation has the
            positions and velocities (InvertedPendulum, Hopper, HalfCheetah, Walker2d,
            Swimmer, Ant, ...; positions that it leaves out, such as how far it has run,
            are drawn as zero).

    Raises:
        ValueError: if it is another env, or one made without a renderer.
        RuntimeError: for a MuJoCo env where there is neither a display nor
            ``MUJOCO_GL``.
    """

    def __init__(self, env: Any) -> None:
        if isinstance(env, str):
            env = gymnasium.make(env, render_mode="rgb_array")
        drawn = _drawn_states(env)
        if drawn is None or env.unwrapped.render_mode != "rgb_array":
            raise ValueError(
                f"render_env must be 'Pendulum-v1', 'CartPole-v1', a MuJoCo env that observes "
                f"positions and velocities, or such an env made with render_mode='rgb_array', got "
                f"{env!r}. For others pass render_fn."
            )
        self.env = env
        self._set, self._size = drawn
        if self._set is _mujoco_state:
            _check_display()
        env.reset(seed=0)

    def __call__(self, observation: Any) -> np.ndarray:
        """Return a frame ``[height, width, 3]`` uint8 of an observation, a vector of the env's."""
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


def can_draw(env: Any) -> bool:
    """Return whether :class:`RealEnvRenderer` draws the observations of a Gymnasium env."""
    return _drawn_states(env) is not None


def _drawn_states(env: Any) -> tuple[Callable, int] | None:
    """Return the function that puts an observation into the env, and its size; None for unknown envs."""
    inner = env.unwrapped
    known = {"PendulumEnv": (_pendulum_state, 3), "CartPoleEnv": (_cart_pole_state, 4)}
    if type(inner).__name__ in known:
        return known[type(inner).__name__]
    # Gymnasium's MuJoCo envs say what their observations consist of, in this order.
    parts = getattr(inner, "observation_structure", None)
    model = getattr(inner, "model", None)
    if not isinstance(parts, dict) or model is None:
        return None
    positions = parts.get("skipped_qpos", 0) + parts.get("qpos", 0)
    if (positions, parts.get("qvel")) != (model.nq, model.nv):
        return None
    size = sum(number for name, number in parts.items() if name != "skipped_qpos")
    return _mujoco_state, size


def _check_display() -> None:
    """Refuse to open MuJoCo's window without a display, which aborts the whole process."""
    names = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in names):
        raise RuntimeError(
            "There is no display for MuJoCo to draw on. Set the environment variable MUJOCO_GL=egl "
            "(or osmesa), which needs none, before Python starts."
        )


def _mujoco_state(env: Any, observation: np.ndarray) -> None:
    skipped = env.observation_structure.get("skipped_qpos", 0)
    positions = np.zeros(env.model.nq)
    positions[skipped:] = observation[: env.model.nq - skipped]
    velocities = observation[env.model.nq - skipped :][: env.model.nv]
    env.set_state(positions, velocities)


def _pendulum_state(env: Any, observation: np.ndarray) -> None:
    cosine, sine, velocity = observation
    env.state = np.array([np.arctan2(sine, cosine), velocity])
    env.last_u = (
        None  # the arrow of the last torque, which an observation does not have
    )


def _cart_pole_state(env: Any, observation: np.ndarray) -> None:
    env.state = observation


def as_frame(image: Any, space: spaces.Box | None, name: str) -> np.ndarray:
    """Return an image as ``[height, width, 3]`` uint8.

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
