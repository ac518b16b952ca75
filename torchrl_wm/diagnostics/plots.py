"""Pictures of predictions. Needs matplotlib (``pip install torchrl-wm[plot]``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _matplotlib() -> Any:
    try:
        # The object API draws without a display, and leaves pyplot's state alone.
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ImportError(
            "Plots need matplotlib: pip install 'torchrl-wm[plot]'."
        ) from err
    return Figure


def plot_open_loop_error(error: TensorDictBase, key: NestedKey) -> Figure:
    """Draw the error over the prediction horizon, beside the baselines.

    Args:
        error: what :func:`~torchrl_wm.diagnostics.open_loop_error` returned.
        key: the entry to draw; the mean over its dims is drawn.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    figure = _matplotlib()(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    if error.get(join("model", key), None) is None:
        raise MissingEntryError(
            f"The error of {key!r} was not measured; there are {leaf_keys(error)}. For decoded "
            f"observations, measure with WorldModelEnv(..., decode=True)."
        )
    axes.set_title("open-loop prediction error")
    axes.xaxis.get_major_locator().set_params(integer=True)
    steps = torch.arange(1, len(error) + 1)
    styles = {"model": "-", "persistence": "--", "mean": ":"}
    for name, style in styles.items():
        values = error.get(join(name, key), None)
        if values is not None:
            axes.plot(steps, values.flatten(1).mean(-1).cpu(), style, label=name)
    axes.set_xlabel("steps ahead")
    axes.set_ylabel(f"RMSE of {'.'.join(as_tuple(key))}")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_prediction(
    real: TensorDictBase,
    imagined: TensorDictBase,
    key: NestedKey,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draw imagined trajectories over the real ones they started with.

    Args:
        real: recorded transitions, ``[N, H]``; one column of plots for each of
            the ``N`` trajectories.
        imagined: what the model imagined from the same starts with the same
            actions, ``[N, H]``.
        key: the entry to draw, ``[N, H, D]`` under "next"; one row for each dim.
        labels: names of the ``D`` dims.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    true = real.get(join("next", key)).detach().cpu().flatten(2)
    guess = imagined.get(join("next", key)).detach().cpu().flatten(2)
    columns, horizon, rows = true.shape
    labels = labels or [f"{'.'.join(as_tuple(key))}[{i}]" for i in range(rows)]
    figure = _matplotlib()(
        figsize=(3.2 * columns, 1.8 * rows + 0.5), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    steps = torch.arange(1, horizon + 1)
    for row in range(rows):
        for column in range(columns):
            axes = grid[row][column]
            axes.plot(steps, true[column, :, row], color="0.35", label="real")
            axes.plot(steps, guess[column, :, row], "--", color="C1", label="imagined")
        grid[row][0].set_ylabel(labels[row])
    for axes in grid[-1]:
        axes.set_xlabel("steps ahead")
    grid[0][0].legend()
    return figure
