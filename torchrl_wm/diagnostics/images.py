"""Images among observations: which entries they are, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm._rendering import IMAGE_KEYS
from torchrl_wm.modules.blocks.pixels import image_layout, ImageLayout
from torchrl_wm.modules.keys import as_tuple, join, unique


@dataclass(frozen=True)
class Image:
    """An image among the observations of an env.

    Args:
        key: its entry.
        layout: the order of its dims: channels first, channels last, or no channels.
        low, high: the values of black and white.
    """

    key: NestedKey
    layout: ImageLayout
    low: float
    high: float

    def shares(self, value: torch.Tensor) -> torch.Tensor:
        """Return values as floats between 0 (black) and 1 (white), in any shape."""
        return (value.float() - self.low) / (self.high - self.low)

    def frames(self, value: torch.Tensor) -> np.ndarray:
        """Draw images.

        Of four channels the first three are shown, as of RGBA. Of a stack of frames, which has
        another number of channels, the last frame is shown.

        Args:
            value: ``[*B, *shape]``.

        Returns:
            ``[*B, height, width, 3]`` uint8.
        """
        share = self.shares(value.detach()).nan_to_num().clamp(0, 1)
        if self.layout == "HW":
            share = share.unsqueeze(-1)
        elif self.layout == "CHW":
            share = share.movedim(-3, -1)
        channels = share.shape[-1]
        if channels == 4:
            share = share[..., :3]
        else:
            share = share[..., -3:] if channels % 3 == 0 else share[..., -1:]
        drawn = (255 * share).round().to(torch.uint8).cpu()
        return drawn.expand(*drawn.shape[:-1], 3).numpy()


def images_of(env: EnvBase, recorded: TensorDictBase | None = None) -> list[Image]:
    """Return the images among the observations of an env.

    These are entries ``[C, H, W]`` or ``[H, W, C]`` of uint8 or floats, or ``[H, W]`` of uint8,
    with at most 16 channels; of uint8 with more, if rows and columns are more still. Their sides
    are at least 8, unless they are called image, pixels or rgb.

    Args:
        env: the env whose specs are read.
        recorded: steps ``[*B, T]``; only images that they have below "next" count then.
    """
    out = []
    specs = env.full_observation_spec_unbatched
    for key in unique(specs.keys(True, True)):
        values = None if recorded is None else recorded.get(join("next", key), None)
        if recorded is None or values is not None:
            named = as_tuple(key)[-1] in IMAGE_KEYS
            image = image_of(key, specs[key], values, named=named)
            out += [] if image is None else [image]
    return out


def image_of(
    key: NestedKey,
    spec: TensorSpec,
    recorded: torch.Tensor | None = None,
    *,
    named: bool = False,
) -> Image | None:
    """Return the image of an entry; None if the entry is no image.

    Args:
        key: the entry.
        spec: without batch dims. Its bounds are black and white if it has any.
        recorded: values of it. Without bounds, bytes are between 0 and 255, and floats between
            0 and 1, or between the least and the greatest one if they exceed that.

    Keyword Args:
        named: the entry is known to be an image, however small.
    """
    if spec.dtype is None:
        return None
    layout = image_layout(spec.shape, spec.dtype, named)
    if layout is None:
        return None
    dtype = spec.dtype if recorded is None else recorded.dtype
    space = spec.space
    low, high = (0.0, 255.0) if dtype is torch.uint8 else (0.0, 1.0)
    bounds = [getattr(space, name, None) for name in ("low", "high")]
    if all(isinstance(bound, torch.Tensor) for bound in bounds):
        least, most = float(bounds[0].min()), float(bounds[1].max())
        if isfinite(most - least) and least < most < 1e6:
            return Image(unravel_key(key), layout, least, most)
    if recorded is not None and recorded.numel() and dtype is not torch.uint8:
        least, most = float(recorded.min()), float(recorded.max())
        if least < most and (least < low or most > high):
            low, high = least, most
    return Image(unravel_key(key), layout, low, high)


def beside(films: Sequence[np.ndarray]) -> np.ndarray:
    """Return films ``[*B, height, width, 3]`` side by side, with white below the lower ones."""
    height = max(film.shape[-3] for film in films)
    padded = []
    for film in films:
        room = [(0, 0)] * film.ndim
        room[-3] = (0, height - film.shape[-3])
        padded.append(np.pad(film, room, constant_values=255))
    return np.concatenate(padded, -2)
