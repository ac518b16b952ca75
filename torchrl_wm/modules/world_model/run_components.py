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
        MissingEntryError: if an entry that a component reads is missing.
        RuntimeError: if a component raises; the message has the shapes and dtypes of
            its inputs.
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
            raise failure(name, module, tensordict, tensordict.batch_size, err) from err
    return tensordict


def failure(
    name: str,
    module: nn.Module,
    inputs: TensorDictBase | Mapping[NestedKey, torch.Tensor],
    batch_size: torch.Size,
    err: Exception,
) -> RuntimeError:
    """Return the error that names a component and the shapes of what it read."""
    return RuntimeError(
        f"{name} failed on {describe(inputs, module.in_keys)} (batch size "
        f"{tuple(batch_size)}): {type(err).__name__}: {err}"
    )


def describe(
    entries: TensorDictBase | Mapping[NestedKey, torch.Tensor],
    keys: Iterable[NestedKey],
) -> str:
    """Return ``{key: shape dtype}`` of the entries under ``keys``, for error messages."""
    parts = []
    for key in unique(keys):
        value = entries.get(key, None)
        if value is not None:
            parts.append(f"{key!r}: {tuple(value.shape)} {value.dtype}")
    return "{" + ", ".join(parts) + "}"
