"""Logged values as tensors of numbers, with errors that name what is none."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """Return values as a tensor, which may share their memory.

    Raises:
        ValueError: if there are values other than numbers; the message names the first.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    array = _as_array(name, value)
    if array.dtype.kind == "O":
        array = _of_objects(name, array)
    if array.dtype.kind not in "biuf":
        first = array.reshape(-1)[:1].tolist()
        raise ValueError(
            f"{name} must be an array of numbers, got {array.dtype} such as "
            f"{first[0] if first else None!r}."
        )
    if not array.dtype.isnative or array.dtype.itemsize > 8:
        array = array.astype(f"{array.dtype.kind}{min(array.dtype.itemsize, 8)}")
    if (
        array.dtype.kind == "u" and array.dtype.itemsize > 1
    ):  # torch counts with few of them
        array = array.astype(np.int64)
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _as_array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"{name} must be an array of numbers, got {type(value).__name__} ({err})."
        ) from err
    # numpy makes text of numbers beside text.
    return array if array.dtype.kind not in "US" else np.asarray(value, dtype=object)


def _of_objects(name: str, array: np.ndarray) -> np.ndarray:
    """Return objects as numbers: numbers of several kinds, or one array in each row."""
    for row, item in enumerate(array if array.ndim == 1 else array.reshape(-1)):
        if isinstance(item, (list, tuple, np.ndarray)) and array.ndim == 1:
            return _rows(name, array)
        if not isinstance(item, (Number, np.bool_)) or isinstance(item, complex):
            row = row // max(1, array[:1].size)
            raise ValueError(
                f"{name} must be an array of numbers, and row {row} has {item!r} "
                f"({type(item).__name__}). Leave that episode out, or repair it."
            )
    return np.array(array.tolist())


def _rows(name: str, array: np.ndarray) -> np.ndarray:
    """Return a column with an array in each row as one array."""
    shape = np.shape(array[0])
    for row, item in enumerate(array):
        if np.shape(item) != shape:
            raise ValueError(
                f"{name} must have the same shape in each row: it is {shape} in row 0, and "
                f"{np.shape(item)} in row {row}."
            )
    out = np.stack([np.asarray(item) for item in array])
    return _of_objects(name, out) if out.dtype.kind == "O" else out


def numbers(name: str, value: Any, what: str) -> torch.Tensor:
    """Return one number for each step, ``[N, 1]``."""
    tensor = as_tensor(f"{name} of {what}", value)
    if tensor.ndim not in (1, 2) or (tensor.ndim == 2 and tensor.shape[1] != 1):
        raise ValueError(
            f"{name} of {what} must be one number for each step, [N], got "
            f"{tuple(tensor.shape)}. Several episodes are a list of dictionaries."
        )
    return tensor.reshape(-1, 1)


def flags(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return 0 and 1 of any dtype as bool; refuse other values, NaN included."""
    wrong = ~((value == 0) | (value == 1))
    if wrong.any():
        step = wrong.flatten(1) if wrong.ndim > 1 else wrong.unsqueeze(-1)
        raise ValueError(
            f"{name} must be 0 or 1, and are {value[wrong][0].item()} in {int(wrong.sum())} of "
            f"{wrong.numel()} places, first in row "
            f"{int(step.any(-1).long().argmax())}. Leave those episodes out, or repair them."
        )
    return value.bool()
