"""Frames of observations: images as they are, and what a renderer draws of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import gymnasium
import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm import _upstream
from torchrl_wm._rendering import as_frame, can_draw, RealEnvRenderer
from torchrl_wm.diagnostics.drawing import name_of
from torchrl_wm.diagnostics.images import beside, Image, images_of
from torchrl_wm.modules.keys import join

Draw = Callable[[Any], np.ndarray]
Render = Union[str, Draw, gymnasium.Env, EnvBase]


def observation_renderer(render: Render) -> Draw | None:
    """Return a function that draws observations, if one is known.

    Args:
        render: the id of a Gymnasium env; a Gymnasium or TorchRL env; or a
            function from an observation to a frame, which is returned as it is.

    Returns:
        A function from an observation (an array, or a dictionary of arrays for
        several observations, nested keys joined by dots) to a frame
        ``[height, width, 3]`` uint8; None for envs whose state does not follow from
        their observation. Images among the observations of a TorchRL env are their own drawing.
        Other known envs are the pendulum, the cart-pole, and MuJoCo envs that observe positions
        and velocities.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.diagnostics import observation_renderer
        >>> observation_renderer(GymEnv("MountainCar-v0")) is None
        True
    """
    images = []
    if isinstance(render, EnvBase):
        images = images_of(render)
        render = _innermost(render)
        if not isinstance(render, gymnasium.Env):
            return _ImageDrawing(images) if images else None
    if isinstance(render, (str, gymnasium.Env)):
        state = _state_renderer(render)
        return _ImageDrawing(images, state) if images else state
    if not callable(render):
        raise TypeError(
            f"render must be the id of an env, an env, or a function of the observation, got "
            f"{type(render).__name__}."
        )
    return render


def _state_renderer(render: str | gymnasium.Env) -> RealEnvRenderer | None:
    """Return a function that draws the state of a Gymnasium env from its observations."""
    env = gymnasium.make(render) if isinstance(render, str) else render
    if not can_draw(env):
        return None
    # An env of its own, as drawing sets its state.
    if env.unwrapped.render_mode != "rgb_array" or not isinstance(render, str):
        env = gymnasium.make(env.spec.id, render_mode="rgb_array")
    return RealEnvRenderer(env)


class _ImageDrawing:
    """A function that shows the images of an observation side by side.

    Args:
        images: the images of the env.
        otherwise: draws observations without images.
    """

    def __init__(self, images: list[Image], otherwise: Draw | None = None) -> None:
        self.images = {name_of(image.key): image for image in images}
        self.otherwise = otherwise

    def __call__(self, observation: Any) -> np.ndarray:
        """Return a frame ``[height, width, 3]`` uint8 of an observation."""
        if isinstance(observation, dict):
            shown = [
                image.frames(torch.as_tensor(observation[name]))
                for name, image in self.images.items()
                if name in observation
            ]
        elif np.ndim(observation) > 1 and len(self.images) == 1:
            (image,) = self.images.values()
            shown = [image.frames(torch.as_tensor(observation))]
        else:
            shown = []
        if shown:
            return beside(shown)
        if self.otherwise is None:
            raise ValueError(
                f"The images {list(self.images)} of the env are its drawing, and the observation "
                f"has none of them. Decode them, WorldModelEnv(..., decode=True), or pass "
                f"render=f, f(observation) -> [height, width, 3]."
            )
        return self.otherwise(observation)


def drawn_frames(
    draw: Draw, steps: TensorDictBase, keys: list[NestedKey]
) -> np.ndarray:
    """Draw what steps ``[T]`` observe.

    Args:
        draw: a function from an observation to a frame, as :func:`observation_renderer` returns.
        steps: recorded ones, on the CPU.
        keys: the observations that it gets: an array of a single one, of several a dictionary
            of arrays, nested keys joined by dots.

    Returns:
        ``[T + 1, height, width, 3]`` uint8: the start, and what follows each step.
    """
    series = {key: over_time(steps, key) for key in keys}
    out = []
    for time in range(len(steps) + 1):
        shown = {name_of(key): value[time].numpy() for key, value in series.items()}
        shown = next(iter(shown.values())) if len(shown) == 1 else shown
        out.append(as_frame(draw(shown), None, "what render draws"))
    return np.stack(out)


def over_time(steps: TensorDictBase, key: NestedKey) -> torch.Tensor:
    """Return the start and what follows each of the steps ``[*B, T]``, ``[*B, T + 1, ...]``."""
    following = steps.get(join("next", key))
    first, dim = steps.get(key, None), steps.batch_dims - 1
    if first is None or first.shape != following.shape:
        first = following
    first = first.narrow(dim, 0, 1).to(following.dtype)
    return torch.cat([first, following], dim)


def class_name(render: Render) -> str:
    """Return the class name of an env, whose own repr lists all its specs."""
    if not isinstance(render, EnvBase):
        return repr(render)
    inner = _innermost(render)
    named = inner.unwrapped if isinstance(inner, gymnasium.Env) else inner
    return type(named).__name__


def _innermost(env: EnvBase) -> Any:
    """Return what a TorchRL env wraps in the end, or that env itself."""
    while hasattr(env, "base_env"):
        env = env.base_env
    inner = _upstream.wrapped_env(env)
    return env if inner is None else inner
