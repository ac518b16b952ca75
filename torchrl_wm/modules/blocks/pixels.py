"""Images in and out of a world model, by TorchRL's DreamerV3 convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from numbers import Integral
from typing import Literal

import torch
from torch import nn
from torchrl.modules import DreamerV3ImageDecoder, DreamerV3ImageEncoder

ImageLayout = Literal["CHW", "HWC", "HW"]
_LAYOUTS = ("CHW", "HWC", "HW")
#: The most channels of an image: a stack of 4 RGBA frames has 16. Images of bytes may have more.
_MAX_CHANNELS = 16
#: The fewest rows and columns of an image that is not called one.
MIN_SIDE = 8
#: Channels of the stages relative to ``depth``, as in DreamerV3.
_MULTIPLIERS = (2, 3, 4, 4)


def image_layout(
    shape: Sequence[int], dtype: torch.dtype, named: bool = False
) -> ImageLayout | None:
    """Return the order of the dims of an image; None for what is no image.

    Args:
        shape: the shape of an entry, without batch dims.
        dtype: its dtype.
        named: whether the entry is known to be an image, however small.
    """
    shape = tuple(shape)
    if dtype is not torch.uint8 and not dtype.is_floating_point:
        return None
    if len(shape) == 2 and (dtype is torch.uint8 or named):
        layout: ImageLayout = "HW"
        sides = shape
    elif len(shape) == 3:
        # The smaller of the first and the last dim is that of the channels.
        first = shape[0] <= shape[-1]
        layout = "CHW" if first else "HWC"
        sides = shape[1:] if first else shape[:-1]
        most = min(sides) - 1 if dtype is torch.uint8 else 0
        if min(shape[0], shape[-1]) > max(most, _MAX_CHANNELS):
            return None
    else:
        return None
    return layout if named or min(sides) >= MIN_SIDE else None


def default_multipliers(height: int, width: int) -> tuple[int, ...]:
    """Return channel multipliers, one for each halving that brings the smaller side to about 4."""
    stages = ceil(log2(max(min(height, width), 1) / 4)) if min(height, width) > 4 else 1
    return _MULTIPLIERS[: min(max(stages, 1), len(_MULTIPLIERS))]


def _is_count(number: object) -> bool:
    return isinstance(number, Integral) and number >= 1


class _ImageNetwork(nn.Module):
    """The choices that encoder and decoder of an image share."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        layout: ImageLayout,
        scale: float,
        depth: int,
        multipliers: Sequence[int] | None,
    ) -> None:
        super().__init__()
        if layout not in _LAYOUTS:
            raise ValueError(f"Unknown layout={layout!r}. Valid are {list(_LAYOUTS)}.")
        if len(image_shape) != 3 or not all(map(_is_count, image_shape)):
            raise ValueError(
                f"image_shape must be (channels, height, width), whole numbers of at least 1, in "
                f"this order for any layout, got {tuple(image_shape)}."
            )
        if layout == "HW" and image_shape[0] != 1:
            raise ValueError(
                f"An image of layout='HW' has one channel: image_shape=(1, height, width), got "
                f"{tuple(image_shape)}."
            )
        if not all(map(_is_count, (depth, *(multipliers or ())))):
            raise ValueError(
                f"depth and multipliers must be whole numbers of at least 1, got {depth!r} and "
                f"{multipliers!r}."
            )
        if not scale > 0:
            raise ValueError(f"scale is the largest value of an image, got {scale}.")
        self.image_shape, self.layout, self.scale = tuple(image_shape), layout, scale
        self.stages = tuple(multipliers or default_multipliers(*self.image_shape[1:]))


class PixelEncoder(_ImageNetwork):
    """A network that maps images to vectors of features.

    TorchRL's :class:`~torchrl.modules.DreamerV3ImageEncoder` (arXiv 2301.04104)
    for images of any size, order of dims and range of values.

    Args:
        image_shape: channels, height, width.
        layout: the order of the dims: ``"CHW"``, ``"HWC"``, or ``"HW"`` without
            a channel dim.
        scale: the largest value, 255 or 1.
        depth: the number of channels of a stage for a multiplier of 1.
        multipliers: those of the stages, each of which halves the sides; by default as
            many as bring the smaller side to about 4.
        kernel_size: that of the convolutions; odd.

    Raises:
        ValueError: if ``layout`` is unknown, or a size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import PixelEncoder
        >>> encoder = PixelEncoder((3, 16, 16), layout="HWC", scale=255.0, depth=4)
        >>> image = torch.randint(256, (5, 2, 16, 16, 3), dtype=torch.uint8)
        >>> encoder(image).shape == (5, 2, encoder.out_features)
        True
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        layout: ImageLayout = "CHW",
        scale: float = 1.0,
        depth: int = 16,
        multipliers: Sequence[int] | None = None,
        kernel_size: int = 5,
    ) -> None:
        super().__init__(image_shape, layout, scale, depth, multipliers)
        self.network = DreamerV3ImageEncoder(
            in_channels=self.image_shape[0],
            depth=depth,
            mults=self.stages,
            kernel_size=kernel_size,
        )
        #: The length of the feature vector.
        self.out_features = self.network.output_features(self.image_shape)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            image: ``[*B, C, H, W]``, in the dims' order of ``layout``.

        Returns:
            ``[*B, out_features]`` float.

        Raises:
            ValueError: if the image has another shape.
        """
        channels, height, width = self.image_shape
        shape = {
            "CHW": (channels, height, width),
            "HWC": (height, width, channels),
            "HW": (height, width),
        }[self.layout]
        if tuple(image.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"The image has the shape {tuple(image.shape)}; [*B, "
                f"{', '.join(map(str, shape))}] is expected."
            )
        if self.layout == "HWC":
            image = image.movedim(-1, -3)
        elif self.layout == "HW":
            image = image.unsqueeze(-3)
        image = image.to(next(self.network.parameters()).dtype)
        if not image.numel():  # the network cannot reshape nothing
            return image.new_empty((*image.shape[:-3], self.out_features))
        return self.network(image / self.scale)


class PixelDecoder(_ImageNetwork):
    """A network that maps vectors of features to images.

    TorchRL's :class:`~torchrl.modules.DreamerV3ImageDecoder` (arXiv 2301.04104)
    for images of any size: larger ones are cropped. The image is a
    float in the units of the observation, ``[0, scale]``, and not clamped.

    Args:
        in_features: the length of the vector.
        image_shape, layout, scale, depth, multipliers, kernel_size: as those of
            :class:`PixelEncoder`; stages double the sides in the opposite order.

    Raises:
        ValueError: if ``layout`` is unknown, or a size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import PixelDecoder
        >>> decoder = PixelDecoder(6, (3, 10, 12), layout="HWC", scale=255.0, depth=4)
        >>> decoder(torch.randn(5, 4), torch.randn(5, 2)).shape
        torch.Size([5, 10, 12, 3])
    """

    def __init__(
        self,
        in_features: int,
        image_shape: tuple[int, int, int],
        *,
        layout: ImageLayout = "CHW",
        scale: float = 1.0,
        depth: int = 16,
        multipliers: Sequence[int] | None = None,
        kernel_size: int = 5,
    ) -> None:
        super().__init__(image_shape, layout, scale, depth, multipliers)
        channels, *sides = self.image_shape
        block = 2 ** len(self.stages)
        self.network = DreamerV3ImageDecoder(
            in_features=in_features,
            image_shape=(channels, *(ceil(side / block) * block for side in sides)),
            depth=depth,
            mults=self.stages,
            kernel_size=kernel_size,
            num_blocks=1,
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Decode vectors.

        Args:
            inputs: vectors ``[*B, n]``, which are joined.

        Returns:
            ``[*B, C, H, W]`` float, in the dims' order of ``layout``.
        """
        _, height, width = self.image_shape
        image = self.scale * self.network(*inputs)[..., :height, :width]
        if self.layout == "HWC":
            return image.movedim(-3, -1)
        return image.squeeze(-3) if self.layout == "HW" else image
