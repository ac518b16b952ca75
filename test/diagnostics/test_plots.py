"""The figures show the numbers, say what they leave out, and leave pyplot alone."""

from __future__ import annotations

import sys

import pytest
import torch
from _diagnosed import line, observed_clock, walk, walk_env
from tensordict import TensorDict

from torchrl_wm.diagnostics import (
    calibration_curve,
    disagreement,
    exploitation_gap,
    one_step_prediction,
    open_loop_error,
    plot_calibration,
    plot_disagreement,
    plot_exploitation_gap,
    plot_one_step,
    plot_open_loop_error,
    plot_prediction,
    plot_prediction_fan,
    plot_reward_error,
    plot_terminations,
    prediction_fan,
    reward_error,
)
from torchrl_wm.diagnostics.drawing import choose_dims

pytest.importorskip("matplotlib")
NESTED = ("agents", "position")


def curve(axes, label: str) -> list[float]:
    """What is drawn under a label."""
    (found,) = (one for one in axes.lines if one.get_label() == label)
    return [float(value) for value in found.get_ydata()]


def note(figure) -> str:
    return "" if figure._supxlabel is None else figure._supxlabel.get_text()


def test_open_loop_error_by_dim() -> None:
    error = open_loop_error(observed_clock(), line(20, 3.0), horizon=5)
    figure = plot_open_loop_error(error, "observation", per_dim=True, labels=["place"])
    (axes,) = figure.axes
    assert axes.get_ylabel() == "RMSE of place"
    assert curve(axes, "model") == [2, 4, 6, 8, 10]
    assert curve(axes, "persistence") == [3, 6, 9, 12, 15]


@pytest.mark.parametrize("dims, shown", [(None, 6), ([7, 1], 2)])
def test_many_dims(dims, shown) -> None:
    env, episodes = walk_env((0.0, 1.0), dim=9), walk(3, 12, dim=9)
    text = f"{shown} of 9 dims shown, {9 - shown} left out"
    error = open_loop_error(env, episodes, 4)
    figures = [
        plot_open_loop_error(error, "observation", per_dim=True, dims=dims),
        plot_prediction_fan(prediction_fan(env, episodes, 4), "observation", dims=dims),
        plot_one_step(one_step_prediction(env, episodes), "observation", dims=dims),
    ]
    for figure in figures:
        assert text in note(figure)
        labels = " ".join(a.get_ylabel() + a.get_title() for a in figure.axes)
        assert "observation[1]" in labels and "observation[8]" not in labels
    coverage = plot_calibration(
        calibration_curve(env, episodes), "observation", dims=dims
    )
    assert len(coverage.axes[0].lines) == shown + 1 and note(coverage) == text
    imagined = env.imagine(4, tensordict=episodes[:, 0].exclude("next"))
    figure = plot_prediction(episodes[:, :4], imagined, "observation", dims=dims)
    assert len(figure.axes) == 3 * shown and note(figure) == text


def test_dims_and_labels_that_are_not_there() -> None:
    error = open_loop_error(walk_env(), walk(12), 4)
    for kwargs in ({"dims": [2]}, {"dims": []}, {"labels": ["x"]}):
        with pytest.raises(ValueError, match="observation has 2 dims"):
            plot_open_loop_error(error, "observation", per_dim=True, **kwargs)
    names = choose_dims(("a", "b"), (2, 3), None, None)
    assert names.labels[5] == "a.b[1, 2]" and names.note == ""


@pytest.mark.parametrize("key", ["observation", NESTED])
def test_fan(key) -> None:
    episodes = walk(5, 9, key=key)
    fan = prediction_fan(walk_env(sample=True, key=key), episodes, 4, particles=20)
    figure = plot_prediction_fan(fan, key)
    assert "3 of 5 starts shown" in note(figure)
    assert len(figure.axes) == 2 * 3
    axes = figure.axes[1]  # the first dim of the second start
    real = episodes.get("next").get(key)[1, :4, 0]
    assert curve(axes, "real") == pytest.approx(real.tolist())
    assert len(axes.collections) == 2  # the 50% and the 90% band


def test_fan_stops_at_the_end_of_the_episode() -> None:
    fan = prediction_fan(observed_clock(), line(10, 1.0, ends=(3,)), 6, particles=2)
    assert curve(plot_prediction_fan(fan, "observation").axes[0], "real") == [
        1,
        2,
        3,
        4,
    ]


def test_scatter_of_each_member() -> None:
    episodes = walk(3000, 1, noise=0.0)
    prediction = one_step_prediction(walk_env((0.0, 1.0)), episodes)
    figure = plot_one_step(prediction, "observation")
    axes = figure.axes[0]
    assert len(curve(axes, "member 0")) == 2000 and "2000 of 3000" in note(figure)
    assert axes.get_title().startswith("change of observation[0] (R² ")
    (first,) = (one for one in axes.lines if one.get_label() == "member 0")
    torch.testing.assert_close(
        torch.as_tensor(first.get_ydata()), torch.as_tensor(first.get_xdata())
    )
    shift = torch.tensor(curve(axes, "member 1")) - torch.tensor(
        curve(axes, "member 0")
    )
    torch.testing.assert_close(shift, torch.ones(2000))
    whole = plot_one_step(prediction, "observation", change=False)
    assert whole.axes[0].get_title().startswith("observation[0] (R²")


def test_rewards_gap_terminations_and_disagreement() -> None:
    figure = plot_reward_error(reward_error(observed_clock(), line(20, 3.0), 4))
    assert curve(figure.axes[0], "model") == [3, 5, 7, 9]
    still = lambda td: td.set("action", torch.zeros(*td.batch_size, 1))  # noqa: E731
    gap = exploitation_gap(observed_clock(), still, line(3, 3.0), 3)
    axes = plot_exploitation_gap(gap).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[21, 6]]
    assert "mean gap -15" in axes.get_title()
    counts = {
        "true_positives": 7,
        "false_positives": 1,
        "false_negatives": 3,
        "true_negatives": 89,
    }
    scores = {"precision": 0.875, "recall": 0.7, "f1": 0.78}
    metrics = TensorDict(
        {"agents": {k: torch.tensor(v) for k, v in {**counts, **scores}.items()}}
    )
    axes = plot_terminations(metrics, "agents").axes[0]
    texts = [text.get_text().split("\n")[0] for text in axes.texts]
    assert texts == ["7", "3", "1", "89"] and "recall 0.70" in axes.get_title()
    measured = disagreement(walk_env((0.0, 1.0)), walk(2, 3, 8))
    left, right = plot_disagreement(measured, episode=4).axes
    expected = measured["error"].reshape(6, 8)[4]
    assert curve(left, "error") == pytest.approx(expected.tolist())
    assert len(right.lines[0].get_xdata()) == 48
    with pytest.raises(ValueError, match="There are 6 episodes"):
        plot_disagreement(measured, episode=6)


@pytest.mark.parametrize(
    "plot", [plot_calibration, plot_one_step, plot_open_loop_error, plot_prediction_fan]
)
def test_what_was_not_measured(plot) -> None:
    with pytest.raises(KeyError, match="'pixels' was not measured; there are"):
        plot(TensorDict({"level": torch.ones(3, 1)}, [3]), "pixels")


def test_pyplot_is_left_alone() -> None:
    def figures() -> list[int]:
        pyplot = sys.modules.get("matplotlib.pyplot")
        return pyplot.get_fignums() if pyplot else []

    before = figures()  # those of a notebook, if it ran in this process
    plot_reward_error(reward_error(observed_clock(), line(20, 3.0), 4))
    assert figures() == before
