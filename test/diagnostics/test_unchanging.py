"""Dims that never change: left out of what a report says, and named."""

from __future__ import annotations

import re

import pytest
import torch
from _diagnosed import line, walk, walk_env
from _models import clock_env, clock_model, SpecEnv
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import write_report
from torchrl_wm.diagnostics.recording import Recording
from torchrl_wm.diagnostics.statistics import correlation
from torchrl_wm.diagnostics.unchanging import unchanging_dims

pytest.importorskip("matplotlib")

GOAL = ("task", "goal")
SECTIONS = ("open_loop", "fan", "one_step", "calibration", "disagreement")


def with_constants(episodes, setpoint: float):
    """A dim that is ``setpoint``, and a goal that is another in each episode."""
    rows, length = episodes.batch_size
    out = episodes.clone()
    goal = torch.arange(1.0, rows + 1).reshape(-1, 1, 1).expand(rows, length, 1)
    for part in (out, out["next"]):
        place = part["observation"]
        part["observation"] = torch.cat(
            [place[..., :1], torch.full_like(goal, setpoint), place[..., 1:]], -1
        )
        part[GOAL] = goal.clone()
    return out


def env_with_constants(scale: float, off: float, *, growing: float = 0.0):
    """The walk, whose constants the model predicts with an error of ``off``."""

    def step(place, goal, action):
        move = torch.cat([action[..., :1], action[..., :1] * 0, action[..., 1:]], -1)
        shift = torch.tensor([[-0.1], [0.1], [0.3]])
        place = place + growing * torch.tensor([1.0, 0.0, 1.0])
        means = torch.cat([place + move, goal + off], -1).unsqueeze(-2) + torch.cat(
            [shift, off + 0 * shift, shift, 0 * shift], -1
        )
        variance = torch.full_like(means, 2 * torch.tensor(scale).log())
        mean = means.mean(-2)
        moving = torch.tensor([1.0, 0.0, 1.0, 0.0])
        drawn = mean + scale * moving * torch.randn_like(mean)
        return drawn[..., :3], drawn[..., 3:], means, variance

    keys = ["observation", GOAL]
    model = WorldModel(
        Mod(lambda *x: x, keys, keys),
        Mod(
            step,
            [*keys, "action"],
            [
                ("next", "observation"),
                ("next", *GOAL),
                ("next", "loc"),
                ("next", "log_var"),
            ],
        ),
        Mod(
            lambda x: x[..., ::2].sum(-1, True),
            [("next", "observation")],
            [("next", "reward")],
        ),
    )
    specs = SpecEnv(action_spec=Bounded(-1.0, 1.0, (2,)))
    specs.observation_spec = Composite(
        observation=Unbounded((3,)), task=Composite(goal=Unbounded((1,)))
    )
    return WorldModelEnv(model, specs)


def text_of(path) -> str:
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", path.read_text(encoding="utf-8"))
    return " ".join(page.split())


def small(path, env, episodes, **kwargs):
    return write_report(path, env, episodes, **{"horizon": 4, "particles": 8, **kwargs})


def test_verdicts_are_those_without_the_constants(tmp_path) -> None:
    torch.manual_seed(0)
    plain = walk(6, 40)
    report = small(
        tmp_path / "a.html", env_with_constants(1.0, 3e-7), with_constants(plain, 2.5)
    )
    labels = ["observation[1]", "task.goal"]
    assert list(report.constant) == labels
    assert "persistence" in report.verdicts["open_loop"]
    assert "does not beat" not in report.verdicts["open_loop"]
    assert "task.goal" not in report.verdicts["open_loop"]
    assert "well calibrated" in report.verdicts["calibration"]
    assert "as often as it should be" in report.verdicts["fan"]
    assert not any("goal" in name for name in report.numbers)
    # As of an ensemble of the walk alone, whose members are off by as much.
    alone = small(tmp_path / "b.html", walk_env((-0.1, 0.1, 0.3), 1.0), plain)
    for name in (
        "one_step/observation: lowest R²",
        "calibration/observation: mean distance from nominal",
    ):
        assert report.numbers[name] == pytest.approx(
            alone.numbers[name], abs=1e-5
        ), name
    words = text_of(report.path)
    assert "constant, left out of verdicts observation[1], task.goal" in words
    assert words.count("Left out of the verdict") == len(SECTIONS)
    assert "constant, left out" not in text_of(alone.path)


def test_labels_name_them(tmp_path) -> None:
    labels = {"observation": ["x", "setpoint", "y"]}
    report = small(
        tmp_path / "a.html",
        env_with_constants(1.0, 0.0),
        with_constants(walk(3, 12), -1.0),
        labels=labels,
    )
    assert report.constant == ("setpoint", "task.goal")


def test_episodes_in_which_nothing_changes(tmp_path) -> None:
    still = walk(3, 8)
    for part in (still, still["next"]):
        part["observation"] = torch.full((3, 8, 2), 0.1)
    still["next", "reward"].fill_(-0.1)
    report = small(tmp_path / "a.html", walk_env((0.0, 0.2), sample=True), still)
    assert "observation does not change" in report.left_out["open_loop"]
    assert "changes in the episodes" in report.left_out["calibration"]
    assert report.verdicts["one_step"] == "Nothing changes in the episodes."
    assert report.verdicts["fan"] == "Nothing changes in the episodes."
    assert "do not vary" in report.verdicts["rewards"]


def test_episodes_without_next_observations(tmp_path) -> None:
    env = WorldModelEnv(clock_model(), clock_env())
    episodes = line(12, 2.0).exclude(("next", "observation"))
    report = small(tmp_path / "a.html", env, episodes)
    assert "There is nothing to compare" in report.left_out["open_loop"]
    assert report.constant == ()


def test_one_page_says_one_thing_of_the_spread(tmp_path) -> None:
    """One step ahead the intervals are too wide; further on the errors outgrow them."""
    torch.manual_seed(1)
    episodes = walk(5, 60, noise=0.2)
    episodes["next", "reward"] = episodes["next", "reward"] * 0  # constant as well
    report = small(tmp_path / "a.html", drifting(0.3), episodes, horizon=30)
    fan, calibration = report.verdicts["fan"], report.verdicts["calibration"]
    assert "the fan is too narrow" in fan
    assert "intervals are too wide there, unlike the fan over 30 steps" in calibration
    assert "confident" not in calibration
    over = small(
        tmp_path / "b.html", walk_env((0.0, 0.1), 0.05, sample=True), walk(5, 60)
    )
    assert "the fan is too narrow" in over.verdicts["fan"]
    assert "the model is overconfident" in over.verdicts["calibration"]


def drifting(scale: float) -> WorldModelEnv:
    """A step with wide intervals, and a bias that adds up where noise averages out."""

    def step(place, action):
        means = (place + action + 0.15).unsqueeze(-2).expand(*place.shape[:-1], 2, 2)
        variance = torch.full_like(means, 2 * torch.tensor(2 * scale).log())
        mean = means.mean(-2)
        return mean + 0.05 * torch.randn_like(mean), means.clone(), variance

    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(
            step,
            ["observation", "action"],
            [("next", "observation"), ("next", "loc"), ("next", "log_var")],
        ),
        Mod(lambda x: x.sum(-1, True), [("next", "observation")], [("next", "reward")]),
    )
    specs = SpecEnv(observation=2, action_spec=Bounded(-1.0, 1.0, (2,)))
    return WorldModelEnv(model, specs)


def test_what_changes_by_its_last_digit_is_constant() -> None:
    episodes = walk(2, 20, dim=4)
    for part, shift in ((episodes, 0), (episodes["next"], 1)):
        time = torch.arange(20.0) + shift
        part["observation"] = torch.stack(
            [
                100 + 2.0**-17 * (time % 2),  # jitter
                100 + 2.0**-10 * time,
                torch.where(time < 30, 5.0, time),
                torch.tensor([[0.0], [7.0]]).expand(2, 20)[0] + time,
            ],
            -1,
        ).expand(2, 20, 4)
    recording = Recording.of(walk_env(dim=4), episodes, "test")
    found = unchanging_dims(recording)
    assert found["observation"].tolist() == [True, False, True, False]
    assert found["reward"].tolist() == [False]


def test_a_constant_correlates_with_nothing() -> None:
    constant = torch.full((211,), 0.1)
    assert correlation(constant, torch.randn(211)).isnan()
    assert correlation(torch.arange(3.0), torch.tensor([0.1, 0.2, 0.3])) == 1
