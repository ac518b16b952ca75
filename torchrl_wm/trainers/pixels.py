"""What real envs show: frames for films, and images that are observed."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torch.nn.functional import interpolate
from torchrl.data import Bounded, Composite
from torchrl.envs import EnvBase, Transform

from torchrl_wm.modules.keys import unique
from torchrl_wm.trainers.gym_actions import innermost, wrapped_env

#: The height and width of dm_control's frames in films.
_SIDE = 240


class Pixels(Transform):
    """A transform that observes the image of the env, ``[size, size, 3]`` uint8, under "pixels".

    The image is drawn once for each step and reset: by Gymnasium's ``render``, and averaged down
    to the size, or by the first camera of dm_control at the size itself. TorchRL's
    PixelRenderTransform resets the env to find its size, and draws no dm_control tasks.

    Args:
        env: the env; its own observations are known from it.
        size: the height and width of the image.
        only: leave out the observations that the env has.
    """

    def __init__(self, env: EnvBase, size: int, only: bool = True) -> None:
        super().__init__(in_keys=[], out_keys=["pixels"])
        self.size, self.only = size, only
        own = unique(env.full_observation_spec_unbatched.keys(True, True))
        self._left_out = own if only else []

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Return the spec with the image."""
        if self.only:
            observation_spec = Composite(
                shape=observation_spec.shape, device=observation_spec.device
            )
        shape = (*observation_spec.shape, self.size, self.size, 3)
        spec = Bounded(0, 255, shape, dtype=torch.uint8, device=observation_spec.device)
        observation_spec["pixels"] = spec
        return observation_spec

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        frame = rendered_frame(self.parent, self.size)
        if frame is None:
            raise _without_frames(self.parent, self.size)
        shown = next_tensordict.exclude(*self._left_out)
        return shown.set("pixels", reduced(frame, self.size))


def check_frames(env: EnvBase, size: int) -> None:
    """Refuse an env whose images cannot be observed; a Gymnasium env is reset for that.

    Raises:
        ValueError: if it shows no frames, or has an observation called "pixels".
    """
    if "pixels" in unique(env.full_observation_spec_unbatched.keys(True, True)):
        raise ValueError(
            f"The env observes 'pixels' itself, and pixels={size} would replace them. Leave out "
            f"pixels; the env's own images are observed without it."
        )
    inner = wrapped_env(env)
    if isinstance(inner, gymnasium.Env) and inner.render_mode is not None:
        inner.reset()
    if not hasattr(inner, "physics") and rendered_frame(env) is None:
        raise _without_frames(env, size)


def rendered_frame(env: EnvBase, side: int = _SIDE) -> np.ndarray | None:
    """Return the frame that a real env shows now, ``[height, width, 3]`` uint8; None if it shows none.

    Args:
        env: the real env.
        side: the height and width of dm_control's frames. Those of Gymnasium have their own.
    """
    frame = _shown(env, side)
    is_frame = isinstance(frame, np.ndarray) and frame.ndim == 3
    return frame.astype(np.uint8) if is_frame and frame.shape[-1] == 3 else None


def reduced(frame: np.ndarray, size: int) -> torch.Tensor:
    """Return a frame, ``[height, width, 3]`` uint8, as ``[size, size, 3]``: averages of its pixels."""
    image = torch.from_numpy(np.ascontiguousarray(frame))
    if image.shape[:2] == (size, size):
        return image
    # Ten times as fast as mode="area", and as free of aliases.
    planes = image.permute(2, 0, 1)[None]
    planes = interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return planes[0].permute(1, 2, 0).contiguous()


def _shown(env: EnvBase, side: int) -> Any:
    inner = wrapped_env(env)
    if isinstance(inner, gymnasium.Env) and inner.render_mode is not None:
        renderer = getattr(inner.unwrapped, "mujoco_renderer", None)
        if getattr(renderer, "viewer", None) is not None:
            # Frames are black after another env in this process has closed its own.
            renderer.viewer.make_context_current()
        return inner.render()
    if hasattr(inner, "physics"):  # dm_control
        return inner.physics.render(height=side, width=side, camera_id=0)
    return None


def _without_frames(env: EnvBase, size: int) -> ValueError:
    inner = wrapped_env(env)
    if isinstance(inner, gymnasium.Env):
        name, mode = type(inner.unwrapped).__name__, inner.render_mode
        found = f"render_mode={mode!r}"
        if mode is not None:
            frame = inner.render()
            shape = getattr(frame, "shape", None)
            found += f", and render() returned a {type(frame).__name__}"
            found += "" if shape is None else f" of the shape {tuple(shape)}"
    else:
        name = type(innermost(env) if inner is None else inner).__name__
        found = "it is neither a Gymnasium env nor a task of dm_control"
    return ValueError(
        f"pixels={size} observes the frames of the env, and {name} shows none: {found}. With "
        f"render_mode='rgb_array' the render() of a Gymnasium env returns [height, width, 3] "
        f"uint8. A function that makes the env gets render_mode if it has a parameter of that "
        f"name; an env object is made with it. An env that observes images itself needs no pixels."
    )
