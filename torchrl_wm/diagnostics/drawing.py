"""Helpers of all figures: matplotlib without pyplot, and the dims that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, leaf_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many dims a figure shows by default.
MAX_DIMS = 6


class Dims(NamedTuple):
    """The dims of an entry that a figure shows.

    Args:
        shown: their numbers in the flattened entry.
        labels: their names.
        note: what was left out; empty if nothing was.
    """

    shown: list[int]
    labels: list[str]
    note: str


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    try:
        # The object API draws without a display, and does not change pyplot's state.
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ImportError(
            "Plots need matplotlib: pip install 'torchrl-wm[plot]'."
        ) from err
    return Figure(figsize=(width, height), layout="constrained")


def name_of(key: NestedKey) -> str:
    """Return a key with its parts joined by dots."""
    return ".".join(as_tuple(key))


def choose_dims(
    key: NestedKey,
    shape: Sequence[int],
    dims: Sequence[int] | None,
    labels: Sequence[str] | None,
    cap: int = MAX_DIMS,
) -> Dims:
    """Return the dims of an entry to show: those given, by default the first ones.

    Args:
        key: the entry.
        shape: its feature shape.
        dims: numbers in the flattened entry.
        labels: one name for each dim of the flattened entry.
        cap: how many are shown by default.

    Raises:
        ValueError: if there is no such dim, or there is not one label for each.
    """
    total = torch.Size(shape).numel()
    if labels is not None and len(labels) != total:
        raise ValueError(
            f"{name_of(key)} has {total} dims, and {len(labels)} labels were given: "
            f"{list(labels)}."
        )
    wrong = [dim for dim in dims or () if not 0 <= dim < total]
    if wrong or (dims is not None and not len(dims)):
        raise ValueError(
            f"{name_of(key)} has {total} dims, numbered from 0; dims={list(dims)}."
        )
    shown = list(range(min(cap, total))) if dims is None else list(dims)
    if labels is None:
        name = name_of(key)
        places = list(product(*(range(size) for size in shape)))
        labels = [
            f"{name}[{', '.join(map(str, place))}]" if total > 1 else name
            for place in places
        ]
    left = total - len(set(shown))
    note = "" if not left else f"{len(shown)} of {total} dims shown, {left} left out"
    return Dims(shown, [labels[dim] for dim in shown], note)


def measured(
    tensordict: TensorDictBase, key: NestedKey, wanted: NestedKey, hint: str = ""
) -> torch.Tensor:
    """Return an entry of what was measured, on the CPU."""
    value = tensordict.get(key, None)
    if not isinstance(value, torch.Tensor):
        raise MissingEntryError(
            f"{wanted!r} was not measured; there are {leaf_keys(tensordict)}. {hint}".strip()
        )
    return value.detach().cpu()


def grid(count: int, width: float, height: float, columns: int = 3) -> tuple[Any, list]:
    """Return a figure with ``count`` axes side by side, and the axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def pixels_of(figure: Figure) -> np.ndarray:
    """Return what a figure looks like, ``[height, width, 3]`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def annotate(figure: Figure, note: str) -> None:
    """Say below the figure what it leaves out."""
    if note:
        figure.supxlabel(note, fontsize="small", color="0.4")
