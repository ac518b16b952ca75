"""Single entries: whether they fit their specs, and the dtypes that autocast gives them."""

from __future__ import annotations

import torch
from torchrl.data import TensorSpec


def fits(value: torch.Tensor, spec: TensorSpec, batch_size: torch.Size) -> bool:
    """Return whether a value ``[*B, ...]`` has the shape and the dtype of its spec.

    Args:
        value: the entry.
        spec: its spec, without batch dims.
        batch_size: ``*B``.
    """
    return value.shape == (*batch_size, *spec.shape) and value.dtype == spec.dtype


def autocasts(device: torch.device | None) -> bool:
    """Return whether networks on a device compute in a narrower dtype than that of their weights."""
    if device is None:
        return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return torch.is_autocast_enabled(device.type)


def widened(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what autocast computes in half precision in the float ``dtype`` that it stands for."""
    if value.dtype == dtype or value.dtype not in (torch.float16, torch.bfloat16):
        return value
    stands_for = dtype.is_floating_point and autocasts(value.device)
    return value.to(dtype) if stands_for else value
