"""Pictures of what a policy does in a model, beside the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from torchrl_wm.diagnostics.drawing import grid, measured, new_figure
from torchrl_wm.diagnostics.policy_verdicts import MOST_BEYOND

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_policy_departure(departure: TensorDictBase, *, name: str = "") -> Figure:
    """Draw how far a policy's imagined steps depart from the data, and how many go beyond it.

    Args:
        departure: what :func:`~torchrl_wm.diagnostics.policy_disagreement` or
            :func:`~torchrl_wm.diagnostics.policy_distance` returned.

    Keyword Args:
        name: what was measured.

    Returns:
        A matplotlib figure. The band is from the 5 % to the 95 % quantile.
    """
    quantiles = measured(departure, "quantiles", "quantiles")
    data = measured(departure, "data_quantiles", "data_quantiles")
    steps = torch.arange(1, len(quantiles) + 1)
    figure, (left, right) = grid(2, 4.6, 3.4, columns=2)
    left.fill_between(steps, quantiles[:, 0], quantiles[:, -1], alpha=0.25, color="C0")
    left.plot(steps, quantiles[:, 1], color="C0", label="imagined, median")
    left.axhline(float(data[1]), color="0.3", label="data, median")
    edge = float(departure["edge"])
    left.axhline(edge, color="0.3", linestyle="--", label="data, 99 % quantile")
    left.set(xlabel="imagined step", ylabel=name, ylim=(0, None))
    left.legend(fontsize="small")
    right.plot(steps, measured(departure, "beyond", "beyond"), color="C3")
    right.axhline(0.01, color="0.3", linestyle="--", label="the data")
    right.axhline(MOST_BEYOND, color="C3", linestyle=":", label="trust ends")
    right.set(xlabel="imagined step", ylabel="share beyond the 99 % quantile")
    right.set_ylim(-0.02, 1.02)
    right.legend(fontsize="small")
    return figure


def plot_policy_return(returns: TensorDictBase) -> Figure:
    """Draw what a model promises a policy over horizons, with and without a penalty.

    Args:
        returns: what :func:`~torchrl_wm.diagnostics.policy_return` returned.

    Returns:
        A matplotlib figure. The bands are two standard errors of the mean wide on each side.
    """
    figure = new_figure(6, 3.6)
    place = figure.add_subplot()
    for key, label, color in (
        ("return", "without penalty", "C0"),
        ("penalised", "with penalty", "C1"),
    ):
        if returns.get(key, None) is None:
            continue
        values = measured(returns, key, key)  # [S, H]
        steps = torch.arange(1, values.shape[1] + 1)
        mean = values.mean(0)
        error = 2 * values.std(0, unbiased=False) / len(values) ** 0.5
        place.fill_between(steps, mean - error, mean + error, alpha=0.25, color=color)
        place.plot(steps, mean, color=color, label=label)
    place.set(xlabel="imagined steps", ylabel="discounted return")
    place.grid(alpha=0.3)
    place.legend()
    return figure
