"""States of any form: tensors, arrays, and containers of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``function`` to the leaves of containers of the same structure.

    Mappings, lists, tuples and tensordicts are containers; other values are leaves.
    """
    if isinstance(tree, TensorDictBase):
        return tree.apply(function, *rest)
    if isinstance(tree, Mapping):
        keys = list(tree)
        out = {k: map_leaves(function, tree[k], *[r[k] for r in rest]) for k in keys}
        return out if type(tree) is dict else _rebuilt(tree, out)
    if isinstance(tree, (list, tuple)):
        out = [map_leaves(function, *parts) for parts in zip(tree, *rest)]
        return type(tree)(*out) if hasattr(tree, "_fields") else type(tree)(out)
    return function(tree, *rest)


def _rebuilt(tree: Mapping, entries: dict) -> Mapping:
    try:
        return type(tree)(entries)
    except TypeError:
        return entries


def snapshot(tree: Any) -> Any:
    """Return a copy that shares no memory with ``tree`` and carries no autograd graph."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone() if tree.requires_grad else tree.clone()
    if isinstance(tree, np.ndarray):
        return tree.copy()
    return None if tree is None else map_leaves(_copy_leaf, tree)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone()
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return copy.deepcopy(leaf)


def detached(tree: Any) -> Any:
    """Return ``tree`` without autograd graphs; the memory is shared."""
    if isinstance(tree, torch.Tensor):
        return tree.detach() if tree.requires_grad else tree
    if isinstance(tree, np.ndarray) or tree is None:
        return tree
    return map_leaves(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, tree)


def to_numpy(tree: Any) -> Any:
    """Return a copy with numpy arrays in place of tensors, in plain dictionaries."""
    if isinstance(tree, torch.Tensor):
        return tensor_to_numpy(tree).copy()
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, (TensorDictBase, Mapping)):
        return {key: to_numpy(value) for key, value in tree.items()}
    return map_leaves(
        lambda x: to_numpy(x)
        if isinstance(x, (torch.Tensor, np.ndarray))
        else copy.deepcopy(x),
        tree,
    )


def tensor_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array, which may share its memory; bfloat16 becomes float32."""
    try:
        return tensor.numpy()  # takes a third of the time of force=True
    except (TypeError, RuntimeError):
        if tensor.dtype is torch.bfloat16:
            tensor = tensor.float()
        return tensor.numpy(force=True)


def to_device(tree: Any, device: torch.device) -> Any:
    """Return ``tree`` with its tensors on ``device``."""
    return map_leaves(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree
    )


def as_tensors(action: Any, device: torch.device) -> Any:
    """Return an action with tensors on ``device`` in place of arrays and numbers."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf
        array = np.asarray(leaf)
        if array.dtype == np.float64:  # torch's default for Python's floats
            array = array.astype(np.float32)
        tensor = torch.from_numpy(array) if array.ndim else torch.as_tensor(array[()])
        return tensor if device.type == "cpu" else tensor.to(device)

    if type(action) is np.ndarray:
        return convert(action)
    is_plain = isinstance(action, torch.Tensor)
    return convert(action) if is_plain else map_leaves(convert, action)


def holds_tensors(tree: Any) -> bool:
    """Return whether a state is a tensor, or has one among its leaves."""
    if isinstance(tree, (torch.Tensor, TensorDictBase)):
        return True
    if isinstance(tree, Mapping):
        return any(map(holds_tensors, tree.values()))
    return isinstance(tree, (list, tuple)) and any(map(holds_tensors, tree))


def expand_rows(tree: Any, rows: int) -> Any:
    """Return ``rows`` copies of a state, one for each env, along a new first dim."""

    def expand(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.expand(rows, *leaf.shape).clone()
        return np.repeat(np.asarray(leaf)[None], rows, 0)

    if isinstance(tree, TensorDictBase):
        return tree.expand(rows, *tree.batch_size).clone()
    return map_leaves(expand, tree)


def merge_rows(mask: np.ndarray, new: Any, old: Any) -> Any:
    """Return the rows of ``new`` in ``mask``, else those of ``old``.

    Args:
        mask: ``[N]`` bool.
        new: a state whose leaves are ``[N, ...]``.
        old: a state of the same structure.
    """
    if new is None:  # the model keeps its own state
        return None
    torch_mask = torch.from_numpy(mask)

    def merge(fresh: Any, kept: Any) -> Any:
        extra = (1,) * (fresh.ndim - 1)
        if isinstance(fresh, torch.Tensor):
            where = torch_mask.to(fresh.device).reshape(-1, *extra)
            return torch.where(where, fresh, torch.as_tensor(kept))
        return np.where(mask.reshape(-1, *extra), fresh, kept)

    return map_leaves(merge, new, old)
