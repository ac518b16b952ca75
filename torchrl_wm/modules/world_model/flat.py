"""Tensordicts taken apart: entries by flat key, with the batch size and device that they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

#: Entries by flat key: ``("next", "latent")``, not nested dictionaries.
FlatTensors = dict[NestedKey, torch.Tensor]


class Placement(NamedTuple):
    """The batch size and device of a tensordict, which its flat entries do not know.

    Args:
        batch_size: ``*B``.
        device: the device of entries that are written; None leaves them where they are.
        trusted: whether outputs of this shape were checked before.
    """

    batch_size: torch.Size
    device: torch.device | None
    trusted: bool = False


def to_tensordict(values: FlatTensors, at: Placement) -> TensorDict:
    """Return a tensordict with these entries, nested where the keys are."""
    out = TensorDict({}, batch_size=at.batch_size, device=at.device)
    for key, value in values.items():
        out.set(key, value)
    return out


def to_flat(tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> FlatTensors:
    """Return entries of a tensordict, by flat key.

    Raises:
        KeyError: if an entry is missing.
    """
    return {key: tensordict[key] for key in keys}


def where(mask: torch.Tensor, new: FlatTensors, old: FlatTensors) -> FlatTensors:
    """Return the entries of ``old``, with those of ``new`` in the rows of ``mask``, ``[*B]``."""
    out = {}
    for key, value in old.items():
        rows = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        out[key] = torch.where(rows, new[key], value)
    return out
