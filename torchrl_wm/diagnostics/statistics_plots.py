"""Pictures of predictions as a whole: scatter, calibration, gaps."""

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
    new_figure,
)
from torchrl_wm.modules.keys import join

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_POINTS = 2000


def plot_one_step(
    prediction: TensorDictBase,
    key: NestedKey,
    *,
    change: bool = True,
    dims: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draw the predictions of each member against what came true; the diagonal is right.

    Args:
        prediction: what :func:`~torchrl_wm.diagnostics.one_step_prediction` returned.
        key: the entry to draw; one plot for each dim.
        change: draw the change over the step, which is small beside the value itself
            and would look right whatever the model does. The value of rewards is drawn.
        dims: the dims to draw; the first six by default.
        labels: a name for each dim.

    Returns:
        A matplotlib figure. The title of each plot has the share of the variance that the
        members' mean explains (R squared). At most 2000 transitions are drawn.
    """
    real = measured(prediction, join("real", key), key)
    loc = measured(prediction, join("loc", key), key)  # [M, E, ...]
    chosen = choose_dims(key, real.shape[1:], dims, labels)
    real, loc = real.flatten(1).to(loc.dtype), loc.flatten(2)
    before = prediction.get(join("start", key), None)
    change = change and before is not None
    if change:
        before = before.detach().cpu().flatten(1).to(loc.dtype)
        real, loc = real - before, loc - before.unsqueeze(1)
    figure, axes = grid(len(chosen.shown), 3.2, 3.0)
    rows = _some_rows(len(real))
    members = loc.shape[1]
    for place, dim, label in zip(axes, chosen.shown, chosen.labels):
        for member in range(members):
            place.plot(
                real[rows, dim],
                loc[rows, member, dim],
                ".",
                markersize=3,
                alpha=0.5,
                label=f"member {member}" if members > 1 else "model",
                rasterized=True,
            )
        _diagonal(place, real[rows, dim])
        what = f"change of {label}" if change else label
        place.set_title(
            f"{what} (R² {r_squared(loc[:, :, dim].mean(1), real[:, dim]):.3f})",
            fontsize="medium",
        )
        place.set_xlabel("real")
        place.set_ylabel("predicted")
    if members > 1:
        axes[0].legend(fontsize="x-small", markerscale=2)
    points = "" if len(rows) == len(real) else f"{len(rows)} of {len(real)} transitions"
    annotate(figure, ", ".join(filter(None, [chosen.note, points])))
    return figure


def r_squared(predicted: torch.Tensor, real: torch.Tensor) -> float:
    """Return the share of the variance that a prediction explains; NaN without variance."""
    total = (real - real.mean()).double().pow(2).sum()
    if total == 0:
        return float("nan")
    return float(1 - (predicted - real).double().pow(2).sum() / total)


def plot_calibration(
    coverage: TensorDictBase,
    key: NestedKey,
    *,
    dims: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draw the share of the truth within predicted intervals against the nominal share.

    Args:
        coverage: what :func:`~torchrl_wm.diagnostics.calibration_curve` returned.
        key: the entry to draw: the mixture for each dim, on the left; each member,
            as the mean over the dims, on the right.
        dims: the dims to draw, and to take the mean over. By default the first six are drawn,
            and the mean is that over all.
        labels: a name for each dim.

    Returns:
        A matplotlib figure. Below the diagonal a model is overconfident.
    """
    mixture = measured(coverage, join("mixture", key), key)
    members = measured(coverage, join("members", key), key).flatten(2)
    members = (members if dims is None else members[..., list(dims)]).mean(-1)
    chosen = choose_dims(key, mixture.shape[1:], dims, labels)
    level = measured(coverage, "level", "level").flatten()
    mixture = mixture.flatten(1)
    figure, axes = grid(2, 4.2, 4.3, columns=2)
    lines = [
        (label, mixture[:, dim]) for dim, label in zip(chosen.shown, chosen.labels)
    ]
    single = [(f"member {i}", members[:, i]) for i in range(members.shape[1])]
    for place, title, curves in zip(axes, ("mixture", "each member"), (lines, single)):
        place.plot([0, 1], [0, 1], "--", color="0.6", linewidth=1)
        for label, values in curves:
            place.plot(level, values, marker=".", markersize=3, label=label)
        place.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
        place.set_xlabel("nominal: interval of this probability")
        place.text(0.97, 0.04, "overconfident", ha="right", color="0.5")
        place.legend(fontsize="small", loc="upper left")
    axes[0].set_ylabel("empirical: truth within it")
    annotate(figure, chosen.note)
    return figure


def plot_terminations(metrics: TensorDictBase, group: NestedKey = ()) -> Figure:
    """Draw how many steps terminate, are predicted to, both, or neither.

    Args:
        metrics: what :func:`~torchrl_wm.diagnostics.termination_metrics` returned.
        group: the group of the done entry, if the env has several.

    Returns:
        A matplotlib figure.
    """
    names = (
        ("true_positives", "false_negatives"),
        ("false_positives", "true_negatives"),
    )
    prefix = (group,) if isinstance(group, str) else tuple(group)

    def value(name: str) -> torch.Tensor:
        return measured(metrics, join(*prefix, name), join(*prefix, name))

    counts = torch.tensor([[int(value(name)) for name in row] for row in names])
    figure = new_figure(4.6, 3.6)
    axes = figure.add_subplot()
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.3)
    for row in range(2):
        for column in range(2):
            text = f"{counts[row, column]:,}\n({share[row, column]:.0%})"
            color = "white" if share[row, column] > 0.7 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_xticks([0, 1], ["end predicted", "going on predicted"])
    axes.set_yticks([0, 1], ["ends", "goes on"])
    scores = ("precision", "recall", "f1")
    axes.set_title(
        ", ".join(f"{name} {float(value(name)):.2f}" for name in scores),
        fontsize="medium",
    )
    return figure


def plot_disagreement(measurement: TensorDictBase, *, episode: int = 0) -> Figure:
    """Draw disagreement and error along an episode, and against each other.

    Args:
        measurement: what :func:`~torchrl_wm.diagnostics.disagreement` returned.
        episode: the row of the flattened ``*B`` that is drawn over time.

    Returns:
        A matplotlib figure.
    """
    mask = measured(measurement, ("collector", "mask"), ("collector", "mask"))
    length = mask.shape[-1]
    mask = mask.reshape(-1, length)
    if not 0 <= episode < len(mask):
        raise ValueError(f"There are {len(mask)} episodes; episode={episode}.")
    lines = {
        name: measured(measurement, name, name).reshape(-1, length)
        for name in ("disagreement", "error")
    }
    figure, (left, right) = grid(2, 4.6, 3.4, columns=2)
    steps = torch.arange(length)[mask[episode]]
    for (name, values), style in zip(lines.items(), ("C0-", "C3-")):
        along = values[episode, mask[episode]]
        left.plot(steps, along.clamp_min(1e-12), style, linewidth=1, label=name)
    left.set_yscale("log")
    left.set(xlabel="step of the episode", ylabel="in units of the data's spread")
    left.legend(fontsize="small")
    spread, error = (values[mask] for values in lines.values())
    rows = _some_rows(len(spread))
    right.loglog(
        spread[rows].clamp_min(1e-12),
        error[rows].clamp_min(1e-12),
        ".",
        markersize=3,
        alpha=0.5,
        rasterized=True,
    )
    rank = float(measured(measurement, "rank_correlation", "rank_correlation"))
    right.set(
        xlabel="disagreement", ylabel="error", title=f"rank correlation {rank:.2f}"
    )
    if len(rows) < len(spread):
        annotate(figure, f"right: {len(rows)} of {len(spread)} transitions")
    return figure


def plot_exploitation_gap(gap: TensorDictBase) -> Figure:
    """Draw the imagined against the real return of each episode.

    Args:
        gap: what :func:`~torchrl_wm.diagnostics.exploitation_gap` returned.

    Returns:
        A matplotlib figure. Above the diagonal the model promises too much.
    """
    real = measured(gap, "real_return", "real_return").flatten()
    imagined = measured(gap, "imagined_return", "imagined_return").flatten()
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.plot(real, imagined, "o", alpha=0.7)
    _diagonal(axes, torch.cat([real, imagined]))
    mean = float((imagined - real).mean())
    axes.set(xlabel="real return", ylabel="imagined return")
    axes.set_title(f"{len(real)} episodes, mean gap {mean:+.4g}", fontsize="medium")
    return figure


def _diagonal(axes: Axes, values: torch.Tensor) -> None:
    ends = [float(values.min()), float(values.max())]
    axes.plot(ends, ends, "--", color="0.3", linewidth=1, zorder=3)


def _some_rows(count: int) -> torch.Tensor:
    """Return rows spread evenly over all, the same ones at each call."""
    return torch.linspace(0, count - 1, min(count, _MAX_POINTS)).round().long()
