"""Tensordicts taken apart: entries by flat key, with the batch size and device that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict

#: Entries by flat key: ``("next", "latent")``, not nested dictionaries.
FlatTensors = dict[NestedKey, torch.Tensor]


class Placement(NamedTuple):
    """What a tensordict knows and its flat entries do not.

    Args:
        batch_size: ``*B``.
        device: where what is written belongs; None leaves it where it is.
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
