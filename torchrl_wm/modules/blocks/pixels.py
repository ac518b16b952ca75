"""Images in and out of a world model, by TorchRL's DreamerV3 convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import Literal

import torch
from torch import nn
from torchrl.modules import DreamerV3ImageDecoder, DreamerV3ImageEncoder

ImageLayout = Literal["CHW", "HWC", "HW"]
_LAYOUTS = ("CHW", "HWC", "HW")
#: Channels of the stages relative to ``depth``, as in DreamerV3.
_MULTIPLIERS = (2, 3, 4, 4)


def default_multipliers(height: int, width: int) -> tuple[int, ...]:
    """Channel multipliers of as many halvings as bring the smaller side to about 4."""
    stages = ceil(log2(max(min(height, width), 1) / 4)) if min(height, width) > 4 else 1
    return _MULTIPLIERS[: min(max(stages, 1), len(_MULTIPLIERS))]


class PixelEncoder(nn.Module):
    """An image as a vector of features.

    TorchRL's :class:`~torchrl.modules.DreamerV3ImageEncoder` (arXiv 2301.04104)
    for images of any size, order of dims and range of values.

    Args:
        image_shape: channels, height, width.
        layout: the order of the dims: ``"CHW"``, ``"HWC"``, or ``"HW"`` without
            a channel dim.
        scale: the largest value, 255 or 1.
        depth: the number of channels of a stage for a multiplier of 1.
        multipliers: of each stage, which halves the sides; by default as many
            as bring the smaller side to about 4.
        kernel_size: of the convolutions; odd.

    Raises:
        ValueError: if ``layout`` is unknown.

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
        super().__init__()
        self.layout, self.scale = _check_layout(layout), scale
        channels, height, width = self.image_shape = tuple(image_shape)
        self.network = DreamerV3ImageEncoder(
            in_channels=channels,
            depth=depth,
            mults=_stages(multipliers, height, width),
            kernel_size=kernel_size,
        )
        #: The length of the feature vector.
        self.out_features = self.network.output_features(self.image_shape)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Encode.

        Args:
            image: ``[*B, C, H, W]``, in the dims' order of ``layout``.

        Returns:
            ``[*B, out_features]`` float.

        Raises:
            ValueError: if the image has another shape.
        """
        shape = _in_layout(self.image_shape, self.layout)
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


class PixelDecoder(nn.Module):
    """A vector of features as an image.

    TorchRL's :class:`~torchrl.modules.DreamerV3ImageDecoder` (arXiv 2301.04104)
    for images of any size: what it makes too large is cropped. The image is a
    float in the units of the observation, ``[0, scale]``, without being clamped.

    Args:
        in_features: the length of the vector.
        image_shape, layout, scale, depth, multipliers, kernel_size: as those of
            :class:`PixelEncoder`; stages double the sides in the opposite order.

    Raises:
        ValueError: if ``layout`` is unknown.

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
        super().__init__()
        self.layout, self.scale = _check_layout(layout), scale
        channels, height, width = self.image_shape = tuple(image_shape)
        stages = _stages(multipliers, height, width)
        block = 2 ** len(stages)
        self.network = DreamerV3ImageDecoder(
            in_features=in_features,
            image_shape=(
                channels,
                ceil(height / block) * block,
                ceil(width / block) * block,
            ),
            depth=depth,
            mults=stages,
            kernel_size=kernel_size,
            num_blocks=1,
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Decode.

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


def _check_layout(layout: str) -> str:
    if layout not in _LAYOUTS:
        raise ValueError(f"Unknown layout={layout!r}. Valid are {list(_LAYOUTS)}.")
    return layout


def _stages(
    multipliers: Sequence[int] | None, height: int, width: int
) -> tuple[int, ...]:
    return default_multipliers(height, width) if not multipliers else tuple(multipliers)


def _in_layout(image_shape: tuple[int, int, int], layout: str) -> tuple[int, ...]:
    channels, height, width = image_shape
    if layout == "HW":
        return height, width
    return (height, width, channels) if layout == "HWC" else image_shape
