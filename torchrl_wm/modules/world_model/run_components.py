"""Run components one after the other, and name the one that fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys, missing_from, unique


def run_components(
    components: Mapping[str, nn.Module], tensordict: TensorDictBase
) -> TensorDictBase:
    """Run the components in order.

    Raises:
        MissingEntryError: if an entry that a component reads is not there.
        RuntimeError: if a component raises; the message has its inputs' shapes
            and dtypes.
    """
    for name, module in components.items():
        missing = missing_from(tensordict, unique(module.in_keys))
        if missing:
            raise MissingEntryError(
                f"{name} reads {missing}, and the tensordict has {leaf_keys(tensordict)}."
            )
        try:
            tensordict = module(tensordict)
        except Exception as err:
            raise RuntimeError(
                f"{name} failed on {describe(tensordict, module.in_keys)} (batch size "
                f"{tuple(tensordict.batch_size)}): {type(err).__name__}: {err}"
            ) from err
    return tensordict


def describe(
    tensordict: TensorDictBase | Mapping[NestedKey, torch.Tensor],
    keys: Iterable[NestedKey],
) -> str:
    """``{key: shape dtype}`` for error messages."""
    parts = []
    for key in unique(keys):
        value = tensordict.get(key, None)
        if value is not None:
            parts.append(f"{key!r}: {tuple(value.shape)} {value.dtype}")
    return "{" + ", ".join(parts) + "}"
