"""The report: one file, with what applies in it, numbers that are right, and text escaped."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from _diagnosed import line, observed_clock, padded, walk, walk_env
from _models import clock_env, clock_model, rssm_model, SpecEnv, transitions
from tensordict.nn import TensorDictModule as Mod

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import open_loop_error, ReportSection, write_report
from torchrl_wm.diagnostics.page import page

pytest.importorskip("matplotlib")


class Reader(HTMLParser):
    """The headings, pictures and text of a page; refuses tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.headings, self.pictures, self.words = [], [], [], []
        self.links: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs["src"])
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def read(path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def small(path, env, episodes, **kwargs):
    return write_report(path, env, episodes, **{"horizon": 4, "particles": 2, **kwargs})


def test_the_file_has_everything_in_it(tmp_path) -> None:
    env, episodes = walk_env((0.0, 0.3), sample=True), walk(4, 20)
    report = small(tmp_path / "new" / "report.html", env, episodes, title="a <b> & c")
    page = read(report.path)
    assert page.headings[:3] == ["a <b> & c", "In short", "Open-loop prediction error"]
    assert "Left out" in page.headings
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "#section-"))
    for picture in page.pictures:
        content = base64.b64decode(picture.split(",")[1], validate=True)
        assert content.startswith(b"\x89PNG")
    assert (
        len(page.pictures) == 7
    )  # error, fan twice, scatter, calibration, rewards, ...
    assert [p.name for p in report.path.parent.iterdir()] == ["report.html"]
    left = {"dreams", "terminations", "exploitation_gap", "video"}
    assert set(report.left_out) == left
    assert report.left_out["terminations"] == "the model has no termination head."
    text = " ".join(page.words)
    assert all(why in text for why in report.left_out.values())
    assert all(verdict in text for verdict in report.verdicts.values())


def test_the_numbers_are_the_diagnostics_own(tmp_path) -> None:
    env, episodes = observed_clock(), torch.stack([line(20, 3.0), line(20, 3.0)])
    report = small(tmp_path / "report.html", env, episodes)
    error = open_loop_error(env, episodes, 4)
    measured = report.measured["open_loop"]
    torch.testing.assert_close(measured["model"].to_dict(), error["model"].to_dict())
    share = error["model", "observation"] / error["mean", "observation"]
    numbers = report.numbers
    assert numbers["open_loop/observation: 4 steps"] == pytest.approx(float(share[-1]))
    assert numbers["open_loop/observation: beats persistence up to k"] == 4
    assert "and the mean at every step up to k = 4" in report.verdicts["open_loop"]
    assert f"{float(share[-1]):.4g}" in " ".join(read(report.path).words)
    assert "without noise" in report.verdicts["fan"]
    assert "calibration" in report.left_out and "disagreement" in report.left_out


@pytest.mark.parametrize(
    "slope, said, good",
    [(0.4, "does not beat persistence", "bad"), (1.0, "at every step", "good")],
)
def test_good_and_bad_are_marked(tmp_path, slope, said, good) -> None:
    """The clock moves by one a step, which is worse than nothing for 0.4."""
    report = small(tmp_path / "report.html", observed_clock(), line(20, slope))
    assert said in report.verdicts["open_loop"]
    text = report.path.read_text(encoding="utf-8")
    assert re.search(rf'class="verdict {good}">observation {said}', text) or re.search(
        rf'class="verdict {good}">observation beats .* {said}', text
    )


def test_beats_persistence_up_to(tmp_path) -> None:
    """Errors add up: ``k / 4 + (k * bias) ** 2``; persistence's are ``k / 4 + k / 3``."""
    bias = (1 / 3 / 3.5) ** 0.5  # as large at k = 3.5
    env, episodes = walk_env((bias,)), walk(600, 8, noise=0.5)
    report = small(tmp_path / "report.html", env, episodes, horizon=8, max_windows=600)
    assert report.numbers["open_loop/observation: beats persistence up to k"] == 3
    assert "up to k = 3 of 8" in report.verdicts["open_loop"]


@pytest.mark.parametrize("labels", [None, {"observation": ["level", "inflow"]}])
def test_dims_behind_persistence_are_named(tmp_path, labels) -> None:
    # The model is right about the first dim; actions do not move the second, and it thinks so.
    torch.manual_seed(0)
    env, episodes = walk_env(), walk(40, 12, noise=0.1)
    change = 0.5 * torch.randn(40, 12)
    episodes["observation"][..., 1] = change.cumsum(-1) - change
    episodes["next", "observation"][..., 1] = change.cumsum(-1)
    report = small(tmp_path / "report.html", env, episodes, labels=labels)
    assert report.numbers["open_loop/observation: beats persistence up to k"] == 4
    name = "inflow" if labels else "observation[1]"
    said = report.verdicts["open_loop"]
    assert f"of which {name} is behind persistence at most steps" in said
    assert 'class="verdict good">observation' not in report.path.read_text()


def test_all_sections(tmp_path) -> None:
    """A policy, its real env, a termination head, and something that draws."""
    pytest.importorskip("pygame")
    from torchrl.envs import GymEnv

    real_env = GymEnv("Pendulum-v1")
    from torchrl_wm.models import make_ensemble_world_model

    model, _ = make_ensemble_world_model(
        real_env, members=3, hidden=(8,), normalize=False
    )
    env = WorldModelEnv(model, real_env)
    policy = Mod(torch.nn.Linear(3, 1), ["observation"], ["action"])
    report = small(
        tmp_path / "report.html",
        env,
        torch.stack([real_env.rollout(25), real_env.rollout(25)]),
        policy=policy,
        real_env=real_env,
        policy_steps=5,
        policy_episodes=2,
        labels={"observation": ["cos", "sin", "speed"]},
    )
    assert report.left_out == {"dreams": "no image is predicted."}
    assert report.numbers["exploitation_gap/episodes"] == 2
    assert "no recorded step terminates" in report.verdicts["terminations"].lower()
    pictures = read(report.path).pictures
    assert sum(p.startswith("data:image/gif") for p in pictures) == 1
    assert len(report.measured["exploitation_gap"]) == 2


def test_sections_of_yours_come_first_and_are_escaped(tmp_path) -> None:
    evil = "<script>alert('x')</script>"
    figure = pytest.importorskip("matplotlib.figure").Figure()
    mine = ReportSection(
        evil, how=evil, verdict=evil, pictures=[figure], numbers={evil: 1.5, "b": 2}
    )
    report = small(
        tmp_path / "r.html",
        observed_clock(),
        line(20, 3.0),
        sections=[mine],
        title=evil,
    )
    text = report.path.read_text(encoding="utf-8")
    assert "<script" not in text
    page = read(report.path)
    assert page.headings[:3] == [evil, "In short", evil] and len(page.pictures) >= 3
    assert page.words.count(evil) >= 5 and "1.5" in page.words
    with pytest.raises(ValueError, match="neither a figure nor the bytes"):
        small(
            tmp_path / "other.html",
            observed_clock(),
            line(20, 3.0),
            sections=[ReportSection("a", pictures=[b"text"])],
        )
    assert not (tmp_path / "other.html").exists()


def test_short_episodes_padding_and_any_batch_dims(tmp_path) -> None:
    env, episodes = walk_env((0.0, 0.2)), walk(2, 3, 7)
    one = small(tmp_path / "a.html", env, episodes, horizon=50, particles=1)
    two = small(tmp_path / "b.html", env, padded(episodes, 4), horizon=50, particles=1)
    assert "open_loop/observation: 7 steps" in one.numbers
    assert one.numbers.keys() == two.numbers.keys()
    for name, value in one.numbers.items():
        same = two.numbers[name] == pytest.approx(value, abs=1e-5)
        assert same or (math.isnan(value) and math.isnan(two.numbers[name])), name


@pytest.mark.parametrize("key", [("agents", "position")])
def test_nested_keys(tmp_path, key) -> None:
    env, episodes = walk_env((0.0, 0.2), key=key), walk(3, 9, key=key)
    report = small(tmp_path / "r.html", env, episodes, labels={key: ["x", "y"]})
    assert "one_step/agents.position: lowest R²" in report.numbers


def test_recurrent_and_latent_models(tmp_path) -> None:
    decoded = WorldModelEnv(rssm_model(), SpecEnv(), decode=True)
    episodes = transitions(3, 8)
    for name in ("done", "terminated", "truncated"):
        episodes["next", name].zero_()
    report = small(tmp_path / "a.html", decoded, episodes)
    assert "open_loop/observation: 4 steps" in report.numbers
    assert not any("belief" in name for name in report.numbers)
    latent = WorldModelEnv(clock_model(), clock_env())
    report = small(tmp_path / "b.html", latent, line(12, 2.0))
    assert report.numbers["open_loop/latent: beats persistence up to k"] == 4


def test_terminations(tmp_path) -> None:
    model = observed_clock().world_model
    head = Mod(lambda x: x >= 5, [("next", "observation")], [("next", "terminated")])
    model = WorldModel(model.encoder, model.dynamics, model.reward_head, done_head=head)
    episodes = line(6, 1.0, ends=(5,)).expand(3, 6).clone()
    report = small(tmp_path / "r.html", WorldModelEnv(model, clock_env()), episodes)
    assert report.numbers["terminations/recall"] == 1
    assert report.numbers["terminations/precision"] == 0.5
    assert "100% of the ends are found, 50% of the" in report.verdicts["terminations"]


def test_a_report_comes_out_the_same_and_disturbs_no_random_numbers(tmp_path) -> None:
    env, episodes = walk_env(sample=True), walk(3, 12)
    state = torch.get_rng_state()
    small(tmp_path / "a.html", env, episodes)
    assert torch.get_rng_state().equal(state)
    torch.rand(3)
    small(tmp_path / "b.html", env, episodes)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_bad_arguments(tmp_path) -> None:
    env, episodes = observed_clock(), line(20, 3.0)
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        write_report(tmp_path, env, episodes)
    for name in ("horizon", "particles", "max_windows", "policy_episodes"):
        with pytest.raises(ValueError, match=f"{name} must be a positive int"):
            write_report(tmp_path / "r.html", env, episodes, **{name: 0})
    with pytest.raises(KeyError, match="lack the actions"):
        write_report(tmp_path / "r.html", env, episodes.exclude("action"))
    with pytest.raises(TypeError, match="needs a WorldModelEnv"):
        write_report(tmp_path / "r.html", env.world_model, episodes)
    assert not list(tmp_path.iterdir())


def test_a_page_without_sections() -> None:
    assert Reader(page("t", {}, [], {})).headings == ["t", "In short"]
