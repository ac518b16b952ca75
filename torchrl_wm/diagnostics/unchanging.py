"""Dims that never change in the episodes: no model is good or bad at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey

from torchrl_wm.diagnostics.drawing import choose_dims
from torchrl_wm.diagnostics.recording import Recording

#: How many dims are named one by one.
_NAMED = 12


def unchanging_dims(recording: Recording) -> dict[NestedKey, torch.Tensor]:
    """Return the dims that never change by more than the rounding of their dtype.

    An observation (or a latent) that differs only between episodes, such as a goal, does not
    change: predicting that nothing happens is right. A reward changes if it takes two
    values.

    Args:
        recording: the episodes.

    Returns:
        ``[D]`` bool for each entry that is compared, in the order of the flattened entry.
    """
    steps, valid = recording.steps, recording.valid
    follows = valid[:, 1:] & valid[:, :-1] & ~recording.done[:, :-1]
    out = {}
    try:
        real = recording.real(steps)
    except ValueError:  # there is nothing to compare; the comparison raises the error
        real = {}
    for key, value in real.items():
        value = _numbers(value)
        changes = [(value[:, 1:] - value[:, :-1])[follows]]
        before = steps.get(key, None) if key in recording.keys else None
        if before is not None and before.flatten(2).shape == value.shape:
            changes.append((value - _numbers(before))[valid])
        change = torch.cat(changes)
        if len(change):  # else nothing is known
            out[key] = _is_rounding(change.abs().amax(0), value[valid])
    for key, value in recording.rewards(steps).items():
        rows = _numbers(value)[valid]
        if len(rows):
            out[key] = _is_rounding(rows.amax(0) - rows.amin(0), rows)
    return out


def names_of(
    dims: Mapping[NestedKey, torch.Tensor],
    labels: Mapping[NestedKey, Sequence[str]],
) -> list[str]:
    """Return the names of the dims; of an entry with many of them, their number."""
    out = []
    for key, dropped in dims.items():
        count, total = int(dropped.sum()), len(dropped)
        if not count:
            continue
        given = labels.get(key)
        chosen = choose_dims(key, [total], dropped.nonzero().flatten().tolist(), given)
        if count <= _NAMED:
            out += chosen.labels
        else:
            name = choose_dims(key, [1], None, None).labels[0]
            out.append(f"{count:,} of the {total:,} dims of {name}")
    return out


def _numbers(value: torch.Tensor) -> torch.Tensor:
    """Return ``[N, T, *feature]`` as floats ``[N, T, D]``."""
    value = value.flatten(2) if value.ndim > 2 else value.unsqueeze(-1)
    return value if value.is_floating_point() else value.float()


def _is_rounding(change: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return whether changes ``[D]`` are no more than the last digit of values ``[M, D]``."""
    return change <= torch.finfo(rows.dtype).eps * rows.abs().amax(0)
