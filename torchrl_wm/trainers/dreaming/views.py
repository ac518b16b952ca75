"""What is shown of the imagined and of the real env at a step: numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.envs import EnvBase

from torchrl_wm._rendering import as_frame
from torchrl_wm.diagnostics.drawing import choose_dims, name_of
from torchrl_wm.diagnostics.drawn_observations import (
    class_name,
    Draw,
    observation_renderer,
    Render,
)
from torchrl_wm.diagnostics.images import beside, Image, images_of
from torchrl_wm.diagnostics.recording import observed_keys
from torchrl_wm.diagnostics.video_files import png, resized
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.keys import unique
from torchrl_wm.trainers.dreaming.with_disagreement import disagreement_keys
from torchrl_wm.trainers.films import found_render
from torchrl_wm.trainers.pixels import rendered_frame

#: The most dims of an entry that are shown, and the greatest height of a picture.
_DIMS, _HEIGHT = 24, 400


@dataclass(frozen=True)
class View:
    """One side, imagined or real, after a step.

    Args:
        reward: the reward of the step; None at the start, after the end, and of a model without
            rewards.
        total: the sum of the rewards since the start.
        terminated, truncated: whether the episode is over, and why.
        values: the numbers that are shown, by entry.
        frame: the picture, a PNG file; None if nothing draws one.
    """

    reward: float | None = None
    total: float = 0.0
    terminated: bool = False
    truncated: bool = False
    values: Mapping[str, list[float]] = field(default_factory=dict)
    frame: bytes | None = None

    @property
    def ended(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


class Viewer:
    """Draws both sides alike.

    Args:
        env: the imagined env.
        real_env: the real env, if there is one.

    Keyword Args:
        render: draws observations, see :func:`~torchrl_wm.trainers.film_policy`.
        labels: a name for each dim of an observation, by its key.

    Attributes:
        names: the name of each number that is shown, by entry.
        notes: what is not shown, and why.
    """

    def __init__(
        self,
        env: WorldModelEnv,
        real_env: EnvBase | None,
        *,
        render: Render | None = None,
        labels: Mapping[NestedKey, Sequence[str]] | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._real_env = real_env
        self._images = {image.key: image for image in images_of(env)}
        reals = [] if real_env is None else images_of(real_env)
        # What is recorded in bytes may be decoded as floats.
        self._real_images = {**self._images, **{image.key: image for image in reals}}
        inner = {*disagreement_keys(env), *env.imaginer.layout.counter}
        observed = [key for key in observed_keys(env) if key not in inner]
        self._drawn = observed or unique(env.world_model.encoder.in_keys)
        self._keys = self._choose(env, observed or env.latent_keys, labels or {})
        self._draw = self._drawer(render)
        if not observed:
            self.notes.append(
                "The model predicts latents and no observations: its side shows latents."
            )

    def _choose(
        self,
        env: WorldModelEnv,
        keys: list[NestedKey],
        labels: Mapping[NestedKey, Sequence[str]],
    ) -> dict[NestedKey, list[int]]:
        """Return the dims of each entry that are shown as numbers, and name them."""
        labels = {unravel_key(key): names for key, names in labels.items()}
        specs, found = env.full_observation_spec_unbatched, {}
        self.names: dict[str, list[str]] = {}
        for key in keys:
            if key in self._images:
                continue
            dims = choose_dims(key, specs[key].shape, None, labels.get(key), _DIMS)
            found[key], self.names[name_of(key)] = dims.shown, dims.labels
            if dims.note:
                self.notes.append(f"{name_of(key)}: {dims.note}.")
        return found

    def _drawer(self, render: Render | None) -> Draw | None:
        """Return what draws observations that are no images."""
        if render is None and (self._images or self._real_env is None):
            return None
        given = self._real_env if render is None else found_render(render)
        try:
            draw = observation_renderer(given)
        except RuntimeError as err:  # no display
            self.notes.append(f"Nothing is drawn: {err}")
            return None
        if draw is None and render is not None:
            raise ValueError(
                f"Nothing is known that draws {render!r} from its observations. Give a function, "
                f"render=f with f(observation) -> [height, width, 3]."
            )
        if draw is None:
            self.notes.append(
                f"Nothing is known that draws {class_name(self._real_env)} from its "
                f"observations: render=f, or --render module:function, names your function "
                f"that does."
            )
        return draw

    def imagined(self, state: TensorDictBase, **facts: Any) -> View:
        """Return the view of an imagined state, ``[1]``."""
        return View(
            values=self._values(state),
            frame=self._frame(state, self._images),
            **facts,
        )

    def real(self, root: TensorDictBase, latents: TensorDictBase, **facts: Any) -> View:
        """Return the view of the real env.

        Args:
            root: what it shows, ``[1]``.
            latents: the latents that belong to it, ``[1]``.
            facts: the fields of the view that are known.
        """
        frame = self._frame(root, self._real_images)
        if frame is None:
            shown = rendered_frame(self._real_env)
            frame = None if shown is None else _encoded(shown)
        return View(values=self._values(root, latents), frame=frame, **facts)

    def _values(
        self, state: TensorDictBase, latents: TensorDictBase | None = None
    ) -> dict[str, list[float]]:
        out = {}
        for key, dims in self._keys.items():
            value = state.get(key, None)
            if latents is not None and (key not in self._drawn or value is None):
                value = latents.get(key, None)
            if value is not None:
                numbers = value.detach().flatten().float().cpu()
                out[name_of(key)] = numbers[dims].tolist()
        return out

    def _frame(
        self, state: TensorDictBase, images: Mapping[NestedKey, Image]
    ) -> bytes | None:
        if self._draw is None:
            shown = [
                image.frames(state.get(key))[0]
                for key, image in images.items()
                if state.get(key, None) is not None
            ]
            return _encoded(beside(shown)) if shown else None
        entries = {key: state.get(key, None) for key in self._drawn}
        if any(value is None for value in entries.values()):
            return None
        arrays = {name_of(k): _array(value) for k, value in entries.items()}
        one = next(iter(arrays.values())) if len(arrays) == 1 else arrays
        return _encoded(as_frame(self._draw(one), None, "what render draws"))


def _array(value: torch.Tensor) -> np.ndarray:
    return value[0].detach().cpu().numpy()


def _encoded(frame: np.ndarray) -> bytes:
    """Return a frame ``[height, width, 3]`` as a PNG file, of no more than 400 rows."""
    if frame.shape[0] > _HEIGHT:
        frame = resized(frame[None], _HEIGHT)[0]
    return png(np.ascontiguousarray(frame))
