"""Tensordicts as flat entries, and flat entries as tensordicts again, to the bit."""

from __future__ import annotations

from collections.abc import Collection

import torch
from tensordict import (
    is_leaf_nontensor,
    NestedKey,
    TensorDict,
    TensorDictBase,
    unravel_key,
)

from torchrl_wm import _upstream
from torchrl_wm.modules.keys import join, strip_next
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement


def flat_tensors(
    tensordict: TensorDictBase,
    without: Collection[NestedKey] = (),
    prefix: tuple[str, ...] = (),
) -> FlatTensors | None:
    """Return the entries by flat key; None if these would not say all that is there.

    That is so of entries that are no tensors, of empty nested tensordicts, and of containers
    that are not plain TensorDicts.

    Args:
        tensordict: ``[*B]``.
        without: keys of entries, or of nested tensordicts, to leave out.
        prefix: where the tensordict stands.
    """
    if type(tensordict) is not TensorDict:
        return None
    values: FlatTensors = {}
    for name, value in tensordict.items():
        key = (*prefix, name) if prefix else name
        if key in without:
            continue
        if isinstance(value, torch.Tensor):
            values[key] = value
            continue
        nested = isinstance(value, TensorDictBase)
        below = flat_tensors(value, without, (*prefix, name)) if nested else None
        if not below:
            return None
        values.update(below)
    return values


def only_tensors(tensordict: TensorDictBase, origin: str) -> FlatTensors:
    """Return the entries of any tensordict by flat key.

    Args:
        tensordict: ``[*B]``; it may be lazily stacked, or have empty nested tensordicts.
        origin: who has these entries, for the error.

    Raises:
        TypeError: if some are no tensors, which cannot be stacked over time.
    """
    values = flat_tensors(tensordict)
    if values is None:
        values = flat_tensors(tensordict.to_tensordict().filter_empty_())
    if values is None:
        others = [
            key
            for key, value in tensordict.items(True, True, is_leaf=is_leaf_nontensor)
            if not isinstance(value, torch.Tensor)
        ]
        raise TypeError(
            f"imagine carries only tensors, and {origin} {others}, which are none. Leave "
            f"them out: td.exclude(*{others})."
        )
    return values


def assemble(
    flat: FlatTensors, nested: dict[NestedKey, torch.Size], at: Placement
) -> TensorDict:
    """Return the tensordict ``[*B, T]`` of stacked entries, its last dim named "time".

    The entries are known to fit: nothing is checked again.

    Args:
        flat: the entries, ``[*B, T, ...]`` by flat key.
        nested: the dims that nested tensordicts have beside the batch dims, by their keys
            at the root or below "next".
        at: the batch size ``*B`` and the device.
    """
    dim = len(at.batch_size)
    size = torch.Size(next(iter(flat.values())).shape[: dim + 1])

    def build(
        flat: FlatTensors, prefix: tuple[str, ...], dims: torch.Size
    ) -> TensorDict:
        source: dict[str, torch.Tensor | TensorDict] = {}
        below: dict[str, FlatTensors] = {}
        for key, value in flat.items():
            if isinstance(key, str):
                source[key] = value
                continue
            name, *rest = key
            below.setdefault(name, {})[unravel_key(tuple(rest))] = value
            source.setdefault(name, None)  # keeps the order of the keys
        for name, entries in below.items():
            path = (*prefix, name)
            if source[name] is not None:
                raise KeyError(
                    f"{unravel_key(path)!r} is a tensor and has {sorted(entries, key=str)} below "
                    f"it. One of them was written by the policy: give it another key."
                )
            source[name] = build(entries, path, nested.get(strip_next(path), dims))
        names = [None] * dim + ["time"] + [None] * len(dims)
        return _upstream.new_tensordict(source, size + dims, at.device, names)

    return build(flat, (), torch.Size([]))


def nested_dims(
    tensordict: TensorDictBase, prefix: tuple[str, ...] = (), lead: int | None = None
) -> dict[NestedKey, torch.Size]:
    """Return the dims that nested tensordicts have beside the batch dims, by their keys.

    Args:
        tensordict: the whole, or the part at ``prefix``.
        prefix: where it stands.
        lead: the number of batch dims of the whole.
    """
    lead = tensordict.batch_dims if lead is None else lead
    found: dict[NestedKey, torch.Size] = {}
    for name, value in tensordict.items():
        if isinstance(value, TensorDictBase):
            path = (*prefix, name)
            found[join(*path)] = value.batch_size[lead:]
            found.update(nested_dims(value, path, lead))
    return found
