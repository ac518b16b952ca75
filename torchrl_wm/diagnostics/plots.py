"""Pictures of predictions over time. They need matplotlib (``pip install torchrl-wm[plot]``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.diagnostics.drawing import (
    annotate,
    choose_dims,
    grid,
    measured,
    name_of,
    new_figure,
)
from torchrl_wm.modules.keys import join

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECODE = "For decoded observations, measure with WorldModelEnv(..., decode=True)."
_BASELINES = {"model": "-", "persistence": "--", "mean": ":"}


def plot_open_loop_error(
    error: TensorDictBase,
    key: NestedKey,
    *,
    per_dim: bool = False,
    dims: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draw the error over the prediction horizon, beside the baselines.

    Args:
        error: what :func:`~torchrl_wm.diagnostics.open_loop_error` returned.
        key: the entry to draw.
        per_dim: draw each dim by itself, in place of the mean over the dims.
        dims: with ``per_dim``, the dims to draw, by their number in the flattened
            entry; the first six by default.
        labels: with ``per_dim``, a name for each dim of the entry.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        KeyError: if the entry was not measured.
        ValueError: if there is no such dim, or there is not one label for each.
    """
    model = measured(error, join("model", key), key, _DECODE)
    curves = {}
    for name in _BASELINES:
        values = error.get(join(name, key), None)
        if values is not None:
            curves[name] = values.detach().cpu().flatten(1)  # [H, D]
    note = ""
    if per_dim:
        chosen = choose_dims(key, model.shape[1:], dims, labels)
        note = chosen.note
        figure, axes = grid(len(chosen.shown), 3.4, 2.5)
        drawn = [
            (label, {name: values[:, dim] for name, values in curves.items()})
            for dim, label in zip(chosen.shown, chosen.labels)
        ]
    else:
        figure = new_figure(6, 4)
        axes = [figure.add_subplot()]
        means = {name: values.mean(-1) for name, values in curves.items()}
        drawn = [(f"RMSE of {name_of(key)}", means)]
        axes[0].set_title("open-loop prediction error")
    steps = torch.arange(1, len(model) + 1)
    for place, (label, lines) in zip(axes, drawn):
        for name, values in lines.items():
            place.plot(steps, values, _BASELINES[name], label=name)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set_xlabel("steps ahead")
        place.set_ylabel(f"RMSE of {label}" if per_dim else label)
        place.set_ylim(bottom=0)
    axes[0].legend()
    annotate(figure, note)
    return figure


def plot_prediction(
    real: TensorDictBase,
    imagined: TensorDictBase,
    key: NestedKey,
    labels: Sequence[str] | None = None,
    *,
    dims: Sequence[int] | None = None,
) -> Figure:
    """Draw imagined trajectories over the real ones they started with.

    Args:
        real: recorded transitions, ``[N, H]``; one column of plots for each of
            the ``N`` trajectories.
        imagined: what the model imagined from the same starts with the same
            actions, ``[N, H]``.
        key: the entry to draw, ``[N, H, *feature]`` under "next"; one row for each
            dim.
        labels: a name for each dim.
        dims: the dims to draw; the first six by default.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    true = measured(real, join("next", key), join("next", key))
    guess = measured(imagined, join("next", key), join("next", key), _DECODE)
    chosen = choose_dims(key, true.shape[2:], dims, labels)
    true, guess = true.flatten(2), guess.flatten(2)
    columns, horizon = true.shape[:2]
    rows = len(chosen.shown)
    figure = new_figure(3.2 * columns, 1.8 * rows + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    steps = torch.arange(1, horizon + 1)
    for row, dim in enumerate(chosen.shown):
        for column in range(columns):
            place = axes[row][column]
            place.plot(steps, true[column, :, dim], color="0.35", label="real")
            place.plot(steps, guess[column, :, dim], "--", color="C1", label="imagined")
        axes[row][0].set_ylabel(chosen.labels[row])
    for place in axes[-1]:
        place.set_xlabel("steps ahead")
    axes[0][0].legend()
    annotate(figure, chosen.note)
    return figure


def plot_prediction_fan(
    fan: TensorDictBase,
    key: NestedKey,
    *,
    dims: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    max_starts: int = 3,
) -> Figure:
    """Draw the quantiles of imagined futures of one start, and the truth.

    Args:
        fan: what :func:`~torchrl_wm.diagnostics.prediction_fan` returned, ``[*B, H]``; one
            column of plots for each start.
        key: the entry to draw; one row for each dim.
        dims: the dims to draw; the first six by default.
        labels: a name for each dim.
        max_starts: how many starts are drawn.

    Returns:
        A matplotlib figure. Steps after the end of the recorded episode are not drawn.
    """
    real = measured(fan, join("real", key), key, _DECODE)
    batch_dims = fan.batch_dims
    chosen = choose_dims(key, real.shape[batch_dims:], dims, labels)
    horizon = fan.batch_size[-1]
    total = fan.batch_size[:-1].numel()
    real = real.reshape(total, horizon, -1)
    mean = measured(fan, join("mean", key), key).reshape(total, horizon, -1)
    levels = measured(fan, "level", "level").flatten(0, -2)[0]
    quantiles = measured(fan, join("quantiles", key), key)
    quantiles = quantiles.reshape(total, horizon, len(levels), -1)
    mask = measured(fan, ("collector", "mask"), ("collector", "mask"))
    mask = mask.reshape(total, horizon)
    columns, rows = min(total, max_starts), len(chosen.shown)
    figure = new_figure(max(4.0 * columns, 5.5), 1.9 * rows + 0.7)
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    steps = torch.arange(1, horizon + 1)
    for row, dim in enumerate(chosen.shown):
        for column in range(columns):
            place, there = axes[row][column], mask[column]
            for low in range(len(levels) // 2):
                high = len(levels) - 1 - low
                share = float(levels[high] - levels[low])
                place.fill_between(
                    steps[there],
                    quantiles[column, there, low, dim],
                    quantiles[column, there, high, dim],
                    color="C1",
                    alpha=(0.2, 0.4)[min(low, 1)],
                    linewidth=0,
                    label=f"{share:.0%} of the particles",
                )
            place.plot(steps[there], mean[column, there, dim], "C1--", label="mean")
            place.plot(steps[there], real[column, there, dim], "0.2", label="real")
            place.margins(x=0)
        axes[row][0].set_ylabel(chosen.labels[row])
    for place in axes[-1]:
        place.set_xlabel("steps ahead")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize="small")
    starts = "" if total <= columns else f"{columns} of {total} starts shown"
    annotate(figure, ", ".join(filter(None, [chosen.note, starts])))
    return figure


def plot_reward_error(error: TensorDictBase, key: NestedKey = "reward") -> Figure:
    """Draw the error of rewards over the horizon, and the correlations.

    Args:
        error: what :func:`~torchrl_wm.diagnostics.reward_error` returned.
        key: the reward; the mean over its dims is drawn.

    Returns:
        A matplotlib figure.
    """
    rmse = measured(error, join("rmse", key), key)
    figure, (left, right) = grid(2, 4.4, 3.2, columns=2)
    steps = torch.arange(1, len(rmse) + 1)
    for name, style, label in (("rmse", "-", "model"), ("mean", ":", "mean")):
        values = measured(error, join(name, key), key).flatten(1).mean(-1)
        left.plot(
            steps, values, style, label=label, color="C0" if style == "-" else "C2"
        )
    left.set_ylabel(f"RMSE of {name_of(key)}")
    left.set_ylim(bottom=0)
    for name, style, label in (
        ("correlation", "-", "reward, k-th step"),
        ("return_correlation", "--", "sum of the first k"),
    ):
        values = measured(error, join(name, key), key).flatten(1).mean(-1)
        right.plot(
            steps, values, style, label=label, marker="." if len(rmse) < 3 else ""
        )
    right.set_ylabel("correlation with the real one")
    right.set_ylim(top=1.03)
    right.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    for place in (left, right):
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set_xlabel("steps ahead")
        place.legend(fontsize="small")
    return figure
