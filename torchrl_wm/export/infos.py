"""The infos of models for many envs: a row for each env, and the envs for which it holds."""

from __future__ import annotations

from typing import Any

import numpy as np

#: By name, a value ``[N, ...]`` (or a dictionary of such) and the envs with it, ``[N]`` bool.
Infos = dict[str, tuple[Any, np.ndarray]]


def in_rows(info: dict[str, Any], rows: int, name: str = "info") -> dict[str, Any]:
    """Return a model's info with a row for each env.

    Args:
        info: arrays and lists have a row for each env; any other value holds for all.
        rows: the number of envs ``N``.
        name: the name of the info, for messages.

    Raises:
        ValueError: if an array or a list has another length.
    """
    return {key: _rows(value, rows, f"{name}[{key!r}]") for key, value in info.items()}


def _rows(value: Any, rows: int, name: str) -> Any:
    if isinstance(value, dict):
        return in_rows(value, rows, name)
    if isinstance(value, (bool, int, float, complex, np.generic)) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    ):
        return np.full(rows, value)
    if isinstance(value, (np.ndarray, list, tuple)):
        if len(value) != rows:
            raise ValueError(
                f"{name} has the length {len(value)}, and there are {rows} envs: give it a row "
                f"for each, or one value for all."
            )
        return value if isinstance(value, np.ndarray) else _objects(value)
    return _objects([value] * rows)


def _objects(values: Any) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        out[i] = value
    return out


def holding(info: dict[str, Any], mask: np.ndarray) -> Infos:
    """Return a copy of an info that holds for the envs in ``mask``."""
    return {
        key: (
            holding(value, mask) if isinstance(value, dict) else value.copy(),
            mask.copy(),
        )
        for key, value in info.items()
    }


def merge(where: np.ndarray, new: Infos, old: Infos) -> Infos:
    """Return the rows of ``new`` in ``where``, else those of ``old``.

    A key that only one of them has holds only in its rows.
    """
    out: Infos = {}
    for key in {**old, **new}:
        fresh, fresh_mask = new.get(key, (None, np.zeros(len(where), bool)))
        kept, kept_mask = old.get(key, (None, np.zeros(len(where), bool)))
        if isinstance(fresh, dict) or isinstance(kept, dict):
            value: Any = merge(where, fresh or {}, kept or {})
        else:
            value = _merged(where, fresh, kept)
        out[key] = value, np.where(where, fresh_mask, kept_mask)
    return out


def _merged(where: np.ndarray, new: Any, old: Any) -> np.ndarray:
    if new is None:
        new = _nothing(old)
    if old is None:
        old = _nothing(new)
    if new.shape != old.shape:  # no array holds rows of two shapes
        new, old = _objects(list(new)), _objects(list(old))
    return np.where(where.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _nothing(like: np.ndarray) -> np.ndarray:
    """Return rows without information: zeros, or None among objects, as in Gymnasium."""
    return np.full_like(like, None if like.dtype == object else 0)


def with_masks(infos: Infos) -> dict[str, Any]:
    """Return Gymnasium's form: each key, and ``_key`` for the envs that have it."""
    out: dict[str, Any] = {}
    for key, (value, mask) in infos.items():
        out[key] = with_masks(value) if isinstance(value, dict) else value
        out[f"_{key}"] = mask
    return out


def row_of(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the info of one env from infos in Gymnasium's form."""
    return {
        key: row_of(value, index) if isinstance(value, dict) else value[index]
        for key, value in infos.items()
        if f"_{key}" in infos and infos[f"_{key}"][index]
    }
