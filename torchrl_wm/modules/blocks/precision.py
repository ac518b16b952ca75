"""Checks of whether single precision is enough for data, such as the time of day in seconds."""

from __future__ import annotations

import warnings

import torch
from tensordict import NestedKey

#: The distance of two numbers in single precision, relative to the number.
EPS = torch.finfo(torch.float32).eps
#: A spread, or a change over a step, of fewer distances than this is mostly rounding.
_ENOUGH = 8
#: The most jitter of numbers in double precision that is no change; also below a distance.
_JITTER = 1e-3
#: How many numbers are looked at at once: their copies need memory.
_NUMBERS = 2**19


def coarse_dims(
    value: torch.Tensor, following: torch.Tensor | None = None
) -> list[tuple[int, float, float]]:
    """Find dims whose spread, or change over a step, is no more than a few float32 distances.

    Args:
        value: ``[N, *feature]``, float32 or float64. A dim that only jitters by its last
            digits is constant, and not counted.
        following: the values after the step, likewise.

    Returns:
        For each such dim its number in the flattened entry, its mean and its spread.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules.blocks.precision import coarse_dims
        >>> time = 1.7e9 + torch.arange(2000, dtype=torch.float64)
        >>> coarse_dims(torch.stack([time, time - time[0]], -1))[0][0]
        0
    """
    rows = value.reshape(len(value), -1)
    after = None if following is None else following.reshape(len(rows), -1)
    out = []
    size = max(1, _NUMBERS // max(1, len(rows)))
    for first in range(0, rows.shape[1], size):
        dims = slice(first, first + size)
        found = _coarse(rows[:, dims], None if after is None else after[:, dims])
        out += [(first + dim, mean, spread) for dim, mean, spread in found]
    return out


def _coarse(
    value: torch.Tensor, following: torch.Tensor | None
) -> list[tuple[int, float, float]]:
    """Find dims of ``[N, D]``, see :func:`coarse_dims`."""
    rows = value.double()
    mean, spread = rows.mean(0), rows.std(0, unbiased=False)
    distance = EPS * mean.abs()
    noise = distance / 2
    if value.dtype is torch.float64:
        noise = noise.clamp_max(_JITTER)
    unit = spread
    if following is not None:
        change = following.double() - rows
        change = change.square().mean(0).sqrt()
        unit = torch.where(change > noise, torch.minimum(spread, change), spread)
    coarse = (spread > noise) & (unit < _ENOUGH * distance)
    numbers = coarse.nonzero().flatten().tolist()
    return [(dim, float(mean[dim]), float(spread[dim])) for dim in numbers]


def warn_of_coarse(
    key: NestedKey, dims: list[tuple[int, float, float]], stacklevel: int = 3
) -> None:
    """Warn of the dims of an entry that :func:`coarse_dims` found, and say what to do."""
    if not dims:
        return
    _, mean, spread = dims[0]
    distance = 2.0 ** (torch.tensor(abs(mean)).double().log2().floor()) * EPS
    warnings.warn(
        f"{key!r} is too large for single precision in the dims {[dim for dim, *_ in dims]}: the "
        f"first of them has the mean {mean:.4g} and the spread {spread:.4g}, and the float32 "
        f"numbers that a network reads are {float(distance):.3g} apart there, so that it hardly "
        f"sees the entry change. Subtract an offset, such as the first value, where it is "
        f"recorded.",
        stacklevel=stacklevel,
    )
