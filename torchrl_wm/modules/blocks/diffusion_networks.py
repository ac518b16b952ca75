"""Networks of denoisers: of vectors, and a U-Net of images; and what they are conditioned by.

A frame is what a denoiser makes, ``*S``: a vector ``[n]`` or an image ``[C, H, W]``. It is
conditioned on the ``K`` frames before it and the ``K`` actions that followed them, ``[N, K, *S]``
and ``[N, K, A]``. Scale and shift of each layer depend on the condition, as in DIAMOND (arXiv
2405.12399) and FiLM (arXiv 1709.07871).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
import torch.nn.functional as F
from torch import nn

#: The channels of a group of a group norm.
_GROUP = 32


class NoiseEmbedding(nn.Module):
    """Sines and cosines of a noise level, at random and fixed frequencies.

    Args:
        features: the length of the embedding; even.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(features // 2))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Embed levels ``[N]`` as ``[N, features]``."""
        angle = 2 * pi * noise.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1)


class DenoiserMLP(nn.Module):
    """A multilayer perceptron that denoises vectors, each layer scaled and shifted by the noise level.

    Args:
        features: the size ``n`` of a frame.
        context: the number of frames ``K`` before it.
        action_size: the size ``A`` of an action.
        hidden: the sizes of the hidden layers.
        noise_features: the length of the noise level's embedding; even.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import DenoiserMLP
        >>> network = DenoiserMLP(3, context=4, action_size=2, hidden=(32, 32))
        >>> x, noise = torch.randn(5, 3), torch.randn(5)
        >>> network(x, noise, torch.randn(5, 4, 3), torch.randn(5, 4, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        *,
        context: int,
        action_size: int,
        hidden: Sequence[int] = (256, 256),
        noise_features: int = 32,
    ) -> None:
        super().__init__()
        self.noise = nn.Sequential(
            NoiseEmbedding(noise_features),
            nn.Linear(noise_features, noise_features),
            nn.SiLU(),
        )
        sizes = [features + context * (features + action_size), *hidden]
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.conditions = nn.ModuleList(
            _zero(nn.Linear(noise_features, 2 * size)) for size in hidden
        )
        self.out = _zero(nn.Linear(sizes[-1], features))

    def forward(
        self,
        x: torch.Tensor,
        noise: torch.Tensor,
        frames: torch.Tensor,
        actions: torch.Tensor,
    ) -> torch.Tensor:
        """Return ``[N, n]`` for noisy ``x``, ``[N, n]``, and what came before it."""
        level = self.noise(noise)
        x = torch.cat([x, frames.flatten(1), actions.flatten(1)], -1)
        for layer, condition in zip(self.layers, self.conditions):
            scale, shift = condition(level).chunk(2, -1)
            x = F.silu(layer(x) * (1 + scale) + shift)
        return self.out(x)


class DenoiserUNet(nn.Module):
    """A U-Net that denoises images, conditioned by adaptive group norms.

    The network of DIAMOND (arXiv 2405.12399, appendix): the frames before join the noisy image as
    channels; the noise level and the actions scale and shift each normalisation.

    Args:
        image_shape: channels, height, width of a frame.
        context: the number of frames ``K`` before it.
        action_size: the size ``A`` of an action.
        channels: those of the stages. Between two of them the sides are halved.
        depths: the number of residual blocks of each stage.
        attention: whether the blocks of a stage have self-attention; none by default.
        condition_features: the length of the condition; even.

    Raises:
        ValueError: if channels, depths and attention are not of one length.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import DenoiserUNet
        >>> network = DenoiserUNet(
        ...     (3, 20, 16), context=4, action_size=2, channels=(8, 16), depths=(1, 1)
        ... )
        >>> x, noise = torch.randn(5, 3, 20, 16), torch.randn(5)
        >>> network(x, noise, torch.randn(5, 4, 3, 20, 16), torch.randn(5, 4, 2)).shape
        torch.Size([5, 3, 20, 16])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        context: int,
        action_size: int,
        channels: Sequence[int] = (64, 64, 64, 64),
        depths: Sequence[int] = (2, 2, 2, 2),
        attention: Sequence[bool] | None = None,
        condition_features: int = 256,
    ) -> None:
        super().__init__()
        attention = [False] * len(channels) if attention is None else attention
        check_stages(channels, depths, attention)
        size = condition_features
        self.noise = NoiseEmbedding(size)
        self.actions = nn.Linear(context * action_size, size)
        self.condition = nn.Sequential(
            nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size)
        )
        number = image_shape[0]
        self.first = _conv(number * (context + 1), channels[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = channels[0]
        for width, depth, attends in zip(channels, depths, attention):
            self.down.append(_stage([before], width, depth, size, attends))
            before = width
        self.middle = _stage([before], before, depths[-1], size, True)
        for level in reversed(range(len(channels))):
            width, depth = channels[level], depths[level]
            # Each block reads what its counterpart on the way down wrote.
            stage = nn.ModuleList()
            for _ in range(depth):
                stage.append(
                    ResidualBlock(before + width, width, size, attention[level])
                )
                before = width
            self.up.append(stage)
        self.norm = _norm(before)
        self.last = _zero(_conv(before, number))

    def forward(
        self,
        x: torch.Tensor,
        noise: torch.Tensor,
        frames: torch.Tensor,
        actions: torch.Tensor,
    ) -> torch.Tensor:
        """Return ``[N, C, H, W]`` for noisy images and what came before them."""
        condition = self.condition(self.noise(noise) + self.actions(actions.flatten(1)))
        x, size = padded(torch.cat([x, frames.flatten(1, 2)], 1), len(self.down))
        x = self.first(x)
        kept = []
        for level, stage in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if level else x
            for block in stage:
                x = block(x, condition)
                kept.append(x)
        for block in self.middle:
            x = block(x, condition)
        for level, stage in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2.0) if level else x
            for block in stage:
                x = block(torch.cat([x, kept.pop()], 1), condition)
        x = self.last(F.silu(self.norm(x)))
        return x[..., : size[0], : size[1]]


class ImageFeatures(nn.Module):
    """A vector of features of images, conditioned by adaptive group norms: half of a U-Net.

    Args:
        in_channels, height, width: the shape of the images.
        condition_features: the length of the condition.
        channels, depths: as those of :class:`DenoiserUNet`.
    """

    def __init__(
        self,
        in_channels: int,
        height: int,
        width: int,
        *,
        condition_features: int,
        channels: Sequence[int],
        depths: Sequence[int],
    ) -> None:
        super().__init__()
        check_stages(channels, depths, [False] * len(channels))
        self.first = _conv(in_channels, channels[0])
        before = channels[0]
        self.stages = nn.ModuleList()
        for out, depth in zip(channels, depths):
            self.stages.append(_stage([before], out, depth, condition_features, False))
            before = out
        cells = 2 ** (len(channels) - 1)
        #: The length of the vector.
        self.out_features = before * -(-height // cells) * -(-width // cells)

    def forward(self, images: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return ``[N, out_features]`` for images ``[N, C, H, W]`` and ``[N, condition]``."""
        x, _ = padded(images, len(self.stages))
        x = self.first(x)
        for level, stage in enumerate(self.stages):
            x = F.avg_pool2d(x, 2) if level else x
            for block in stage:
                x = block(x, condition)
        return x.flatten(1)


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity, each after an adaptive group norm.

    Args:
        in_channels, out_channels: those of the images.
        condition_features: the length of the condition.
        attention: whether self-attention over the pixels follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition_features: int,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.same: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.same = nn.Conv2d(in_channels, out_channels, 1)
        self.norms = nn.ModuleList(map(_norm, (in_channels, out_channels)))
        self.conditions = nn.ModuleList(
            nn.Linear(condition_features, 2 * number)
            for number in (in_channels, out_channels)
        )
        self.convolutions = nn.ModuleList(
            (_conv(in_channels, out_channels), _zero(_conv(out_channels, out_channels)))
        )
        self.attention = PixelAttention(out_channels) if attention else None

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return ``[N, out, H, W]`` for ``[N, in, H, W]`` and a condition ``[N, n]``."""
        out = x
        parts = zip(self.norms, self.conditions, self.convolutions)
        for norm, conditioned, convolution in parts:
            scale, shift = conditioned(condition)[..., None, None].chunk(2, 1)
            out = convolution(F.silu(torch.addcmul(shift, norm(out), 1 + scale)))
        out = self.same(x) + out
        return out if self.attention is None else self.attention(out)


class PixelAttention(nn.Module):
    """Self-attention over the pixels of an image, beside the identity.

    Args:
        channels: the channels; heads have 8 of them, or all if there are fewer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(channels // 8, 1)
        if channels % self.heads:
            self.heads = 1
        self.norm = _norm(channels)
        self.queries = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[N, C, H, W]`` for ``[N, C, H, W]``."""
        parts = self.queries(self.norm(x)).flatten(2)
        parts = parts.unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        q, k, v = parts.unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(attended.reshape(x.shape))


def check_stages(
    channels: Sequence[int], depths: Sequence[int], attention: Sequence[bool]
) -> None:
    """Refuse settings of stages that are not of one length.

    Raises:
        ValueError: naming all of them.
    """
    if not channels or not len(channels) == len(depths) == len(attention):
        raise ValueError(
            f"There is one number of channels, one depth and one choice of attention for each "
            f"stage, and at least one stage; got channels={tuple(channels)}, "
            f"depths={tuple(depths)}, attention={tuple(attention)}."
        )
    if min(*channels, *depths) < 1:
        raise ValueError(
            f"channels and depths must be at least 1, got {tuple(channels)} and {tuple(depths)}."
        )


def padded(x: torch.Tensor, stages: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return images whose sides can be halved between stages, and what the sides were.

    Edges are repeated.
    """
    height, width = x.shape[-2:]
    cells = 2 ** (stages - 1)
    missing = (-width % cells, -height % cells)
    if any(missing):
        x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
    return x, (height, width)


def _stage(
    before: list[int], width: int, depth: int, condition: int, attention: bool
) -> nn.ModuleList:
    inputs = [*before, *[width] * (depth - 1)]
    return nn.ModuleList(
        ResidualBlock(number, width, condition, attention) for number in inputs
    )


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(channels // _GROUP, 1)
    return nn.GroupNorm(1 if channels % groups else groups, channels)


def _zero(layer: nn.Module) -> nn.Module:
    """Return a layer whose outputs begin at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
