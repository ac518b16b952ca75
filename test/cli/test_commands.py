"""The commands on a tiny run: what they print, leave behind and exit with."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.envs import GymEnv

from torchrl_wm.cli import main
from torchrl_wm.cli.console import plain_notes
from torchrl_wm.models import load_world_model
from torchrl_wm.trainers import PETSTrainer, RunFolder

pytest.importorskip("tyro")

PETS = """--max-episode-steps 12 --random-steps 20 --trials 2 --model-steps 6 --model-batch-size 16
    --members 3 --hidden 16 --planning-horizon 4 --optim-steps 2 --num-candidates 12 --top-k 4
    --num-particles 2""".split()
MBPO = """--env Pendulum-v1 --max-episode-steps 15 --random-steps 20 --steps 40 --members 3 --elites 2
    --hidden 16 --model-interval 10 --model-steps 4 --model-batch-size 16 --rollouts 20
    --updates-per-step 2 --batch-size 16 --policy-hidden 16 --evaluation-interval 20
    --evaluation-episodes 1""".split()

OWN_ENV = """
import gymnasium
import numpy as np


class Point(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-2, 2, 1).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.2 * action, -9, 9).astype(np.float32)
        return self.place.copy(), -abs(float(self.place[0])), False, False, {}

    def render(self):
        frame = np.zeros((16, 32, 3), np.uint8)
        frame[:, int(self.place[0] + 9)] = 255
        return frame


def make(render_mode=None):
    return Point(render_mode)


def broken():
    return Broken()


class Broken(Point):
    def step(self, action):
        raise ValueError("the motor is on fire")
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, out of which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A finished run that no test may change."""
    path = str(tmp_path_factory.mktemp("runs") / "run")
    assert main(["train", "pets", "--run", path, "--no-report", *PETS]) == 0
    return path


@pytest.mark.parametrize("recipe, options", [("pets", PETS), ("mbpo", MBPO)])
def test_train_leaves_a_whole_run(recipe, options, here, capsys) -> None:
    assert main(["train", recipe, "--run", "run", *options]) == 0
    out = capsys.readouterr().out
    settings = json.loads((here / "run" / "config.json").read_text())
    assert settings["algorithm"] == recipe
    assert settings["config"]["hidden"] == [16]
    with open(here / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert f"step {row['step']}, " in out
    assert list((here / "run" / "tensorboard").iterdir())
    assert "<html" in (here / "run" / "report.html").read_text()
    report = (here / "run" / "report.html").read_text()
    assert "Learning curve" in report
    # A policy can act in the model alone; a planner of the real env does not.
    assert ("The model promises" in report) == (recipe == "mbpo")
    printed = re.findall(r"^  \w+ +(run/\S+)$", out, re.MULTILINE)
    assert len(printed) == 5
    assert all((here / path).exists() for path in printed)
    assert re.search(r"In all \d+\.\d MB in run\.", out)


@pytest.mark.parametrize("env", [[], ["--env", "Pendulum-v1"]], ids=["data", "env"])
def test_a_model_of_logged_arrays(env, here, capsys) -> None:
    real = GymEnv("Pendulum-v1")
    steps = [real.rollout(20) for _ in range(4)]
    columns = {
        "observations": "observation",
        "actions": "action",
        "next_observations": ("next", "observation"),
        "rewards": ("next", "reward"),
        "terminations": ("next", "terminated"),
    }
    arrays = {
        name: torch.cat([episode[key] for episode in steps]).numpy()
        for name, key in columns.items()
    }
    np.savez("log.npz", **arrays, truncations=np.arange(1, 81) % 20 == 0)
    short = "--steps 20 --interval 10 --members 2 --hidden 8 --held-out 0.25".split()
    assert main(["train", "model", "--data", "log.npz", *env, *short]) == 0
    out = capsys.readouterr().out
    assert "A world model of 80 transitions" in out and "held out error" in out
    found = re.findall(r"^  \w+ +(runs/model-log-0/\S+)$", out, re.MULTILINE)
    assert len(found) == 6 and all((here / path).exists() for path in found)
    model = load_world_model(here / "runs" / "model-log-0" / "model.pt")
    assert model.dynamics.ensemble.members == 2
    # A kill between the last checkpoint and the model.
    (here / "runs" / "model-log-0" / "model.pt").unlink()
    assert main(["train", "--resume", "runs/model-log-0", "--no-report"]) == 0
    again = load_world_model(here / "runs" / "model-log-0" / "model.pt")
    for mine, theirs in zip(again.parameters(), model.parameters()):
        assert torch.equal(mine, theirs)
    assert main(["evaluate", "runs/model-log-0", "--video", "film.gif"]) == 2
    assert "no policy to film" in capsys.readouterr().err
    assert "<html" in (here / "runs" / "model-log-0" / "report.html").read_text()


def test_a_model_that_cannot_be_trained_leaves_nothing(here, capsys) -> None:
    steps = {name: np.zeros((9, 1)) for name in ("observations", "actions")}
    flags = {"rewards": np.zeros(9), "terminations": np.zeros(9, bool)}
    np.savez("log.npz", **steps, **flags, next_observations=np.full((9, 1), np.nan))
    assert main(["train", "model", "--data", "log.npz", "--run", "run"]) == 2
    assert "NaN" in capsys.readouterr().err
    assert not (here / "run").exists()


def test_runs_go_on_with_the_settings_they_have(run, capsys) -> None:
    for words, message in (
        (["--noise-beta", "9"], "['noise_beta'].*start a new run"),
        (["--trials", "1"], "trials=1 ends the run before the 2"),
        (["--trials=soon"], "trials must be an int, got 'soon'"),
        (["--env", "CartPole-v1"], "['env'].*start a new run"),
        (["--checkpoint", "7"], "no checkpoint of step 7; there are"),
        (["--device", "gpu"], "device='gpu' is unknown"),
    ):
        assert main(["train", "--resume", run, *words]) == 2
        assert re.search(message.replace("[", r"\["), capsys.readouterr().err)


def test_a_run_that_is_over_goes_on_with_a_later_end(here, capsys) -> None:
    short = [*PETS, "--no-report", "--logger", "csv"]
    assert main(["train", "pets", "--run", "whole", *short, "--trials", "4"]) == 0
    assert main(["train", "pets", "--run", "run", *short]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--no-report"]) == 0
    assert "To make it longer: torchrl-wm train --resume run --trials 4" in (
        capsys.readouterr().out
    )
    assert main(["train", "--resume", "run", "--no-report", "--trials", "4"]) == 0
    runs = [RunFolder.open(path) for path in ("whole", "run")]
    for run in runs:
        assert run.config["config"]["trials"] == 4
    whole, longer = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics()]
        for run in runs
    )
    assert longer == whole and len(whole) == 6
    assert main(["train", "--resume", "run", "--no-report", "--steps", "80"]) == 0
    assert RunFolder.open("run").metrics()[-1]["step"] == 84


def test_a_run_that_reached_its_return_is_made_longer_as_it_says(here, capsys) -> None:
    goal = ["--evaluation-interval", "25", "--stop-return", "-1e6", "--logger", "csv"]
    train = ["train", "mbpo", "--run", "run", "--no-report", *MBPO, *goal]
    assert main(train) == 0
    assert main(["train", "--resume", "run", "--no-report"]) == 0
    steps = RunFolder.open("run").config["config"]["steps"]
    longer = f"train --resume run --steps {2 * steps} --stop-return none"
    assert f"To make it longer: torchrl-wm {longer}\n" in capsys.readouterr().out
    # A negative number with a fraction is one, too.
    end = ["--stop-return", "-0.5", "--no-report"]
    assert main(["train", "--resume", "run", *end]) == 0
    config = RunFolder.open("run").config["config"]
    assert (config["stop_return"], config["steps"]) == (-0.5, steps)
    over = RunFolder.open("run").metrics()[-1]["step"]
    assert over >= steps
    assert main([*longer.split(), "--no-report"]) == 0
    assert RunFolder.open("run").metrics()[-1]["step"] >= 2 * steps


def test_a_damaged_checkpoint_and_the_one_before(here, capsys) -> None:
    assert main(["train", "pets", "--run", "run", "--no-report", *PETS]) == 0
    rows = RunFolder.open("run").metrics()
    (before, last) = RunFolder.open("run").saved()
    (file,) = last.glob("components/*-learner/state.pt")
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["train", "--resume", "run", "--no-report"]) == 2
    error = capsys.readouterr().err
    assert "damaged" in error and "--checkpoint 36" in error
    assert main(["evaluate", "run", "--checkpoint", "36", "--episodes", "1"]) == 0
    assert main(["train", "--resume", "run", "--no-report", "--checkpoint", "36"]) == 0
    for one, two in zip(RunFolder.open("run").metrics(), rows, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_model_of_nothing(here, capsys) -> None:
    assert main(["train", "model", "--data", "absent.npz"]) == 2
    assert "absent.npz" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_the_default_folder_and_one_that_exists(here, capsys) -> None:
    command = ["train", "pets", "--no-report", "--seed", "3", *PETS]
    assert main(command) == 0
    assert (here / "runs" / "pets-Pendulum-v1-3" / "config.json").is_file()
    before = (here / "runs" / "pets-Pendulum-v1-3" / "metrics.csv").read_bytes()
    assert main([*command, "--run", "runs/pets-Pendulum-v1-3"]) == 2
    assert "--resume runs/pets-Pendulum-v1-3" in capsys.readouterr().err
    assert main(command) == 0  # again, beside the first
    assert (here / "runs" / "pets-Pendulum-v1-3-2" / "config.json").is_file()
    after = (here / "runs" / "pets-Pendulum-v1-3" / "metrics.csv").read_bytes()
    assert before == after


def test_envs_of_ones_own(here, capsys) -> None:
    (here / "my_env_module.py").write_text(OWN_ENV)
    own = ["--env", "my_env_module:make", *PETS]
    assert main(["train", "pets", "--run", "run", "--no-report", *own]) == 0
    assert main(["evaluate", "run", "--episodes", "1"]) == 0
    capsys.readouterr()
    assert main(["play", "run"]) == 0
    assert "Only the real env is filmed" in capsys.readouterr().out
    assert (here / "run" / "film.gif").read_bytes().startswith(b"GIF8")
    # What goes wrong in it is said with its place, and nothing of a traceback.
    assert main(["train", "pets", "--env", "my_env_module:broken", *PETS]) == 2
    err = capsys.readouterr().err
    assert "the motor is on fire" in err and "my_env_module.py, line" in err
    assert "Traceback" not in err
    assert (
        main(
            ["train", "pets", "--run", "b", "--debug", "--env", "my_env_module:broken"]
        )
        == 2
    )
    assert "Traceback" in capsys.readouterr().err


def test_evaluate_repeats_itself_and_heeds_the_seed(run, capsys) -> None:
    def returns(*options: str) -> str:
        assert main(["evaluate", run, "--episodes", "2", *options]) == 0
        return capsys.readouterr().out

    capsys.readouterr()
    first = returns()
    assert returns() == first and returns("--seed", "1") != first
    numbers = [float(value) for value in re.findall(r"return (\S+),", first)]
    assert len(numbers) == 2
    mean, std = re.search(r"mean (\S+), std (\S+),", first).groups()
    assert float(mean) == pytest.approx(sum(numbers) / 2, rel=1e-3)
    assert float(std) == pytest.approx(
        abs(numbers[0] - numbers[1]) / 2**0.5, rel=1e-3
    )


OWN_RECIPE = """
from torchrl_wm.trainers import PETS, register_recipe


@register_recipe("calm-pets")
class CalmPETS(PETS):
    '''PETS that plans for the mean of the members.'''
"""


def test_a_recipe_in_a_module_of_ones_own(here, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torchrl_wm._registry._REGISTERED", {})
    (here / "my_recipe_module.py").write_text(OWN_RECIPE)
    words = ["train", "my_recipe_module:CalmPETS", "--run", "run", "--no-report", *PETS]
    assert main(words) == 0
    assert "calm-pets on Pendulum-v1" in capsys.readouterr().out
    # Another process knows its name from the folder alone, wherever it is.
    (here / "elsewhere").mkdir()
    for words in (
        ["evaluate", str(here / "run"), "--episodes", "1"],
        ["train", "--resume", str(here / "run"), "--trials", "3", "--no-report"],
    ):
        outcome = subprocess.run(
            [sys.executable, "-m", "torchrl_wm", *words],
            cwd=here / "elsewhere",
            capture_output=True,
            text=True,
        )
        assert outcome.returncode == 0, outcome.stderr
        assert "calm-pets" in outcome.stdout or "step 60" in outcome.stdout
    assert main(["train", "my_recipe_module:Nothing"]) == 2
    assert "my_recipe_module:Nothing" in capsys.readouterr().err


def test_warnings_are_plain_notes(here, capsys, monkeypatch) -> None:
    """Those of other packages keep their place in the code."""
    rng = np.random.default_rng(0)
    rows = {"observations": rng.normal(size=(60, 1)), "rewards": rng.normal(size=60)}
    rows.update(actions=rng.uniform(-1, 1, (60, 1)), dones=np.arange(1, 61) % 20 == 0)
    np.savez(here / "log.npz", **rows)

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        # pytest keeps warnings to itself.
        sys.stderr.write(
            warnings.formatwarning(message, category, filename, lineno, line)
        )

    words = "train model --data log.npz --steps 2 --members 2 --hidden 8 --no-report"
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        monkeypatch.setattr(warnings, "showwarning", show)
        assert main([*words.split(), "--no-progress"]) == 0
        with plain_notes():
            warnings.warn_explicit("theirs", UserWarning, "/elsewhere/x.py", 3)
    assert warnings.formatwarning is before
    said = capsys.readouterr().err
    notes = [line for line in said.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 2 and "--action-bounds" in notes[1], said
    own, theirs = said.split("/elsewhere/x.py:3: UserWarning: theirs")
    assert "UserWarning" not in own and "warnings.warn" not in own


def test_evaluate_in_json(run, here, capsys) -> None:
    capsys.readouterr()
    words = ["evaluate", run, "--episodes", "2", "--json", "--video", "film.gif"]
    assert main(words) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["steps"] == 48 and numbers["lengths"] == [12, 12]
    assert numbers["mean"] == pytest.approx(sum(numbers["returns"]) / 2)
    assert (here / "film.gif").read_bytes().startswith(b"GIF8")


def test_looking_at_a_run_changes_nothing_of_it(run, here, capsys) -> None:
    def content() -> dict:
        files = (path for path in Path(run).rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files}

    before = content()
    assert main(["evaluate", run, "--episodes", "1"]) == 0
    assert main(["report", run, "--out", "r.html", "--episodes", "1"]) == 0
    assert (
        main(["play", run, "--out", "f.gif", "--horizon", "5", "--height", "64"]) == 0
    )
    assert content() == before
    assert "Real beside imagined" in (here / "r.html").read_text()
    assert (here / "f.gif").read_bytes().startswith(b"GIF8")
    out = capsys.readouterr().out
    assert "r.html" in out and "f.gif" in out


def test_a_policy_is_taken_home(run, here, capsys, monkeypatch) -> None:
    assert main(["train", "mbpo", "--run", "runs/mbpo", "--no-report", *MBPO]) == 0
    capsys.readouterr()
    missing = "torchrl_wm.trainers.exporting.formats.find_spec"
    monkeypatch.setattr(missing, lambda name: name != "onnxruntime")
    words = ["export", "runs/mbpo", "--out", "home", "--steps", "5"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "Without ONNX" in err and "onnxruntime" in err and "[export]" in err
    assert "home/policy.pt2" in out and "of 5 real steps deviate" in out
    assert re.search(r"in +observation +\[N, 3\] float32", out)
    assert sorted(p.name for p in Path("home").iterdir()) == [
        "policy.json",
        "policy.pt2",
    ]
    described = json.loads(Path("home/policy.json").read_text())
    assert (described["recipe"], described["steps"]) == ("mbpo", 45)
    assert main([*words, "--format", "both"]) == 2
    assert "onnxruntime" in capsys.readouterr().err
    assert main(["export", run]) == 2
    assert (
        "is a planner" in capsys.readouterr().err and not Path(run, "export").exists()
    )


def test_films_of_both_have_one_frame_for_each_step(run, here) -> None:
    image = pytest.importorskip("PIL.Image")
    assert (
        main(["play", run, "--horizon", "5", "--height", "64", "--out", "f.gif"]) == 0
    )
    assert main(["play", run, "--real-only", "--out", "r.gif"]) == 0
    both, real = image.open(here / "f.gif"), image.open(here / "r.gif")
    assert both.n_frames == real.n_frames == 13  # the start and 12 steps
    assert both.size[0] > 2.9 * both.size[1] * 64 / 82


def test_reading_a_run_that_goes_on_does_not_cut_its_metrics(here) -> None:
    settings = "--checkpoint-interval 3 --no-report --run run".split()
    assert main(["train", "pets", *PETS, *settings]) == 0
    shutil.rmtree(RunFolder.open("run").saved()[-1])  # as if killed after episode 4
    assert main(["evaluate", "run", "--episodes", "1"]) == 0
    assert len(RunFolder.open("run").metrics()) == 4
    assert PETSTrainer.resume("run").episodes == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ("train", "Say what to train"),
        ("train pets --env Foo-v1", "There is no env 'Foo-v1'"),
        ("train pets --env no_such_module:make", "no_such_module"),
        ("train mbpo --env CartPole-v1", "torchrl-wm train pets"),
        ("train pets --reward pendelum", "Unknown reward 'pendelum'"),
        ("train --resume nowhere", "not the folder of a run"),
        ("train pets --resume nowhere", "not the folder of a run"),
        ("evaluate nowhere", "not the folder of a run"),
        ("report nowhere", "not the folder of a run"),
        ("play nowhere", "not the folder of a run"),
    ],
)
def test_errors_are_one_message(words, message, here, capsys) -> None:
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "foo",
        "train foo",
        "train pets --trails 3",
        "train pets --trials many",
        "evaluate",
        # The settings of a run are in its folder.
        "train pets --resume nowhere --trials 3",
    ],
)
def test_words_that_are_not_understood(words, capsys) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err


def test_bad_numbers_and_endings(run, capsys) -> None:
    for words, message in (
        (["evaluate", run, "--episodes", "0"], "--episodes must be at least 1"),
        (["play", run, "--out", "film.avi"], "ending"),
        (["play", run, "--horizon", "0"], "horizon"),
        (["train", "mbpo", "--resume", run], "is a run of pets, not of mbpo"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_help_lists_every_setting(capsys) -> None:
    assert main(["train", "pets", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--planning-horizon" in out and "--random-steps" in out
    assert "how many steps to act at random first" in out
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("train", "evaluate", "report", "play", "demo"):
        assert name in out


def test_demo(here, capsys) -> None:
    """Shortened until it only shows that every part of it works."""
    short = "--trials 2 --episode-steps 15 --model-steps 5 --num-candidates 30".split()
    assert main(["demo", *short]) == 0
    out = capsys.readouterr().out
    signs = {".png": b"\x89PNG", ".gif": b"GIF8"}
    pictures = re.findall(r"runs/demo/\S+\.(?:png|gif)", out)
    assert len(pictures) == 3
    for path in pictures:
        assert (here / path).read_bytes().startswith(signs[Path(path).suffix])
    assert "Return at random" in out
    assert main(["demo", *short]) == 0  # again, beside the first
    assert (here / "runs" / "demo-2" / "learning_curve.png").is_file()


def test_a_model_of_some_of_the_observations(here, capsys) -> None:
    """Of a dictionary with class numbers, which the ensemble does not predict."""
    rng = np.random.default_rng(0)
    np.savez(
        "rows.npz",
        **{
            "observations/arm/place": rng.normal(size=(61, 2)),
            "observations/gear": rng.integers(0, 3, size=(61, 2)),
        },
        actions=rng.uniform(-1, 1, size=(60, 1)),
        rewards=np.zeros(60),
        terminations=np.zeros(60, bool),
    )
    words = "train model --data rows.npz --steps 4 --interval 2 --members 2 --hidden 8".split()
    assert main([*words, "--no-report"]) == 2
    assert "observation_keys" in capsys.readouterr().err
    assert main([*words, "--observation-keys", "arm/place", "--run", "some"]) == 0
    world_model = load_world_model("some/model.pt")
    (key,) = world_model.latent_keys
    assert key[-2:] == ("arm", "place") and Path("some/report.html").is_file()


def test_dream_serves_a_page(run, here, capsys, monkeypatch) -> None:
    served = []

    def serve(server):
        served.append(server.session.step("policy"))
        raise KeyboardInterrupt

    monkeypatch.setattr("torchrl_wm.trainers.DreamServer.serve", serve)
    assert main(["dream", run, "--no-open", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^pets on Pendulum-v1: http://127.0.0.1:\d+/$", out, re.MULTILINE)
    assert "Only this machine" in out and served[0].actor == "policy"
    (here / "drawing.py").write_text(
        "def draw(x):\n    return [[0.0, 1.0], [1.0, 0.0]]"
    )
    assert main(["dream", run, "--no-open", "--render", "drawing:draw"]) == 0
    assert served[1].imagined.frame != served[0].imagined.frame
    assert main(["dream", run, "--no-open", "--port", "70000"]) == 2
    assert "port must be" in capsys.readouterr().err
    assert main(["dream", str(here)]) == 2


def test_dream_needs_a_model_that_has_learnt(here, capsys) -> None:
    trainer = PETSTrainer.start(
        "run", max_episode_steps=12, random_steps=24, trials=1, first_model_steps=1
    )
    trainer.save()
    assert main(["dream", "run", "--no-open"]) == 2
    assert "has not learnt anything yet" in capsys.readouterr().err
