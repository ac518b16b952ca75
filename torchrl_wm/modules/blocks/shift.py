"""Random shifts of images, against overfitting of image encoders."""

from __future__ import annotations

import torch

from torchrl_wm.modules.blocks.pixels import ImageLayout


def random_shift(
    images: torch.Tensor, pad: int, layout: ImageLayout = "CHW"
) -> torch.Tensor:
    """Return images, each moved by up to ``pad`` pixels in both directions (arXiv 2107.09645).

    New pixels at an edge repeat it.

    Args:
        images: ``[*B, C, H, W]``, in the order of dims of ``layout``, of any dtype.
        pad: the longest shift, in pixels.
        layout: ``"CHW"``, ``"HWC"``, or ``"HW"`` without a channel dim.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import random_shift
        >>> images = torch.randint(256, (5, 2, 3, 16, 16), dtype=torch.uint8)
        >>> random_shift(images, 3).shape
        torch.Size([5, 2, 3, 16, 16])
    """
    if layout == "HW":
        flat = images.reshape(-1, *images.shape[-2:], 1)
    else:
        flat = images.reshape(-1, *images.shape[-3:])
    if layout == "CHW":
        flat = flat.movedim(1, -1)
    number, height, width, _ = flat.shape  # [N, H, W, C]
    at = torch.arange(number, device=flat.device)
    down, right = torch.randint(-pad, pad + 1, (2, number, 1), device=flat.device)
    rows = (torch.arange(height, device=flat.device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=flat.device) + right).clamp(0, width - 1)
    moved = flat[at.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
    if layout == "CHW":
        moved = moved.movedim(-1, 1)
    return moved.reshape(images.shape)
