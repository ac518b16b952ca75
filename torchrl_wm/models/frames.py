"""Observations as the frames of a diffusion model: one vector, or one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from torchrl_wm.models.env_specs import EnvSpecs, PixelEntry
from torchrl_wm.modules import JoinEntries, Normalizer, SplitEntries


def frame_shape(specs: EnvSpecs, builder: str) -> tuple[int, ...]:
    """Return the shape of frames: ``[n]`` of all vectors, or ``[C, H, W]`` of all images.

    Args:
        specs: the entries of the env.
        builder: the name of the builder, for messages.

    Raises:
        ValueError: if there are both vectors and images, images of several sizes, or class
            numbers; the message names them.
    """
    if specs.vectors and specs.pixels:
        raise ValueError(
            f"{builder} draws the next observations at once, as one vector or as one image, and "
            f"the env has both: {specs.vector_keys} and {specs.pixel_keys}. Choose some of them, "
            f"observation_keys=[...], or use make_rssm_world_model."
        )
    numbers = [entry.key for entry in specs.vectors if entry.classes]
    if numbers:
        raise ValueError(
            f"The observations {numbers} are class numbers, which have no noise between them, so "
            f"that {builder} cannot draw them. Make them one-hot (GymEnv(..., "
            f"categorical_action_encoding=False) does), or leave them out: observation_keys=[...]."
        )
    if specs.vectors:
        return (specs.vector_size,)
    sides = {entry.chw[1:] for entry in specs.pixels}
    if len(sides) > 1:
        shapes = {entry.key: entry.shape for entry in specs.pixels}
        raise ValueError(
            f"{builder} joins images as channels of one, and these differ in size: {shapes}. "
            f"Resize them (torchrl.envs.Resize), or choose: observation_keys=[...]."
        )
    return (sum(entry.chw[0] for entry in specs.pixels), *sides.pop())


class VectorFrames(nn.Module):
    """Vector observations as one frame, each number in units of its spread.

    Args:
        specs: the entries of the env, whose ``observation_keys`` are the order of the inputs.
    """

    def __init__(self, specs: EnvSpecs) -> None:
        super().__init__()
        self.join = JoinEntries(specs.vectors)
        self.normalizer = Normalizer(specs.vector_size)

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        """Return ``[*B, n]`` for observations ``[*B, ...]``."""
        return self.normalizer(self.join(*observations))

    def fit_normalizer(self, *observations: torch.Tensor) -> None:
        """Fit the units to observations."""
        self.normalizer.fit(self.join(*observations))


class FrameVectors(nn.Module):
    """Vector observations of a frame, as floats in the units of the env.

    Args:
        specs: the entries of the env, whose ``observation_keys`` are the order of the outputs.
    """

    #: Imagined envs round such outputs to what the real env has.
    in_env_units = True

    def __init__(self, specs: EnvSpecs) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.split = SplitEntries(
            [
                e if e.dtype.is_floating_point else replace(e, dtype=dtype)
                for e in specs.vectors
            ]
        )
        self.join = JoinEntries(specs.vectors)
        self.normalizer = Normalizer(specs.vector_size)

    def forward(self, frame: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return observations ``[*B, ...]`` for a frame ``[*B, n]``."""
        return self.split(self.normalizer.inverse(frame))

    def fit_output_normalizer(self, *observations: torch.Tensor) -> None:
        """Fit the units to observations."""
        self.normalizer.fit(self.join(*observations))


class ImageFrames(nn.Module):
    """Images as the channels of one, ``[C, H, W]``, between -1 and 1.

    Args:
        entries: the images, all of one height and width.
    """

    def __init__(self, entries: Sequence[PixelEntry]) -> None:
        super().__init__()
        self.entries = tuple(entries)
        # Follows the dtype of the model, as the networks behind it do.
        self.register_buffer("one", torch.ones(()), persistent=False)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """Return ``[*B, C, H, W]`` for images ``[*B, ...]``, in the order of the entries.

        Raises:
            ValueError: if an image has another shape.
        """
        parts = []
        for entry, image in zip(self.entries, images):
            shape = entry.shape
            if tuple(image.shape[image.ndim - len(shape) :]) != shape:
                raise ValueError(
                    f"The image {entry.key!r} has the shape {tuple(image.shape)}; [*B, "
                    f"{', '.join(map(str, shape))}] is expected."
                )
            if entry.layout == "HWC":
                image = image.movedim(-1, -3)
            elif entry.layout == "HW":
                image = image.unsqueeze(-3)
            parts.append(image.to(self.one.dtype) * (2 / entry.scale) - 1)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -3)


class FrameImages(nn.Module):
    """The images of a frame, as floats in the units of the env.

    Args:
        entries: the images, all of one height and width.
    """

    in_env_units = True

    def __init__(self, entries: Sequence[PixelEntry]) -> None:
        super().__init__()
        self.entries = tuple(entries)

    def forward(self, frame: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return images ``[*B, ...]`` for a frame ``[*B, C, H, W]``."""
        out = []
        parts = frame.split([entry.chw[0] for entry in self.entries], -3)
        for entry, image in zip(self.entries, parts):
            image = (image + 1) * (entry.scale / 2)
            if entry.layout == "HWC":
                image = image.movedim(-3, -1)
            out.append(image.squeeze(-3) if entry.layout == "HW" else image)
        return out[0] if len(out) == 1 else tuple(out)
