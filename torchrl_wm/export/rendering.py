"""Frames of imagined states, from decoded pixels, a function, or the real env's renderer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from torchrl_wm._rendering import as_frame, IMAGE_KEYS, RealEnvRenderer
from torchrl_wm.export.signatures import bind
from torchrl_wm.export.sources import Source
from torchrl_wm.export.trees import snapshot, to_numpy


class Renderer:
    """A renderer of the present state of one env.

    Args:
        source: the source of the states.
        render_fn: a function that draws, ``(model, state, obs)``.
        render_env: a real env whose renderer draws, or its id.

    Raises:
        ValueError: if both are given.
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
        """Draw a frame ``[height, width, 3]`` uint8.

        Args:
            state: a copy of the model's state.
            observation: the observation of one env.

        Raises:
            RuntimeError: if there is nothing to draw.
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
                        # A generator of its own: pictures do not change the episode.
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
            f"render_fn(model, state, obs), or render_env='Pendulum-v1' (CartPole-v1, Hopper-v5, ...) "
            f"for these envs' observations, or decode pixels: WorldModelEnv(..., decode=True)."
        )

    def close(self) -> None:
        """Close the real env that draws, if there is one."""
        if self.real is not None:
            self.real.close()
