"""Runs in folders: what they leave behind, and how they go on after an interruption."""

from __future__ import annotations

import csv
import json
import os
import random

import gymnasium
import numpy as np
import pytest
import torch
from _real_envs import make_reacher, Reacher1D
from _runs import assert_same, interrupt, MBPO, PETS, RECIPES, without_times

from torchrl_wm.trainers import (
    MBPOTrainer,
    NonFiniteLossError,
    PETSTrainer,
    resume_run,
    RunFolder,
    start_run,
)


@RECIPES
@pytest.mark.parametrize("after", [31, 57])
def test_a_run_that_goes_on_equals_one_that_was_not_interrupted(
    kind, settings, after, tmp_path
) -> None:
    whole = kind(**settings)
    whole.train()
    interrupt(kind.start(tmp_path / "run", **settings), after)
    torch.manual_seed(99)  # another process has other random states
    again = kind.resume(tmp_path / "run")
    assert 0 < again.collected_frames < whole.collected_frames
    again.train()
    assert_same(again, whole)


@RECIPES
def test_checkpoints_at_intervals(kind, settings, tmp_path) -> None:
    interrupt(
        kind.start(tmp_path / "run", **settings, checkpoint_interval=2), 12 * 3 + 5
    )
    again = kind.resume(tmp_path / "run")
    assert again.episodes == 2


def test_what_a_run_leaves_behind(tmp_path) -> None:
    trainer = PETSTrainer.start(tmp_path / "run", **PETS)
    trainer.train()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["algorithm"] == "pets"
    assert config["config"]["trials"] == 3 and config["config"]["noise_beta"] == 2.0
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [12, 24, 36, 48, 60]
    assert rows[0]["loss_nll"] == "" and float(rows[-1]["loss_nll"]) != 0
    saved = RunFolder.open(tmp_path / "run").saved()
    assert [path.name for path in saved] == [
        "checkpoint-000000000048",
        "checkpoint-000000000060",
    ]
    for path in saved:
        parts = [file.parent.name for file in path.rglob("*.pt")]
        assert sorted(part.partition("-")[2] for part in parts) == [
            "episodes",
            "learner",
            "random",
            "replay",
            "trainer",
        ]
        for file in path.rglob("*.pt"):
            torch.load(file, weights_only=True)


def test_a_run_that_is_over_stays_over(tmp_path) -> None:
    PETSTrainer.start(tmp_path / "run", **PETS).train()
    again = PETSTrainer.resume(tmp_path / "run")
    again.train()
    assert len(again.metrics) == 5
    assert len(again.evaluate(1)[0]) == 12


def test_functions_and_envs_of_ones_own_are_given_again(tmp_path) -> None:
    def reward(observation, action, next_observation):
        return -next_observation["place"][..., 0].abs()

    own = {"env": make_reacher, "reward_function": reward}
    trainer = PETSTrainer.start(tmp_path / "run", **{**PETS, **own})
    trainer.train()
    again = PETSTrainer.resume(tmp_path / "run", **own)
    assert (again.data[:] == trainer.data[:]).all()


# What goes wrong -----------------------------------------------------------


def test_a_folder_that_exists_is_left_alone(tmp_path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="--resume"):
        PETSTrainer.start(tmp_path, **PETS)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_empty_folder_is_taken(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    assert PETSTrainer.start(tmp_path / "run", **PETS).run.config["config"]["seed"] == 0


def test_an_env_that_does_not_exist_leaves_no_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match="There is no env"):
        PETSTrainer.start(tmp_path / "run", **{**PETS, "env": "Foo-v1"})
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_runs(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        PETSTrainer.resume(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        PETSTrainer.resume(tmp_path)


def test_runs_of_another_recipe(tmp_path) -> None:
    PETSTrainer.start(tmp_path / "run", **PETS)
    with pytest.raises(ValueError, match="'pets' .*, and this is 'mbpo'"):
        MBPOTrainer.resume(tmp_path / "run")


def test_a_run_without_a_checkpoint_begins_again(tmp_path) -> None:
    whole = PETSTrainer(**PETS)
    whole.train()
    interrupt(PETSTrainer.start(tmp_path / "run", **PETS, checkpoint_interval=3), 30)
    assert RunFolder.open(tmp_path / "run").metrics()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        PETSTrainer.resume(tmp_path / "run").load()
    again = PETSTrainer.resume(tmp_path / "run")
    assert again.metrics == []
    again.train()
    assert without_times(again.metrics) == without_times(whole.metrics)
    kept = RunFolder.open(tmp_path / "run").metrics()
    assert without_times(kept) == without_times(whole.metrics)


class Poisoned(Reacher1D):
    """Its rewards become infinite after a while."""

    total = 0

    def step(self, action):
        observation, reward, *rest = super().step(action)
        type(self).total += 1
        return observation, float("inf") if self.total > 40 else reward, *rest


@RECIPES
def test_losses_that_are_not_finite(kind, settings, tmp_path) -> None:
    settings = dict(settings)
    rate = "model_learning_rate" if kind is PETSTrainer else "learning_rate"
    settings[rate] = 1e30
    trainer = kind.start(tmp_path / "run", **settings)
    with pytest.raises(NonFiniteLossError, match="(?s)gradient step.*bad_batch.pt"):
        trainer.train()  # where latents are filtered, they show it before the next update
    batch = torch.load(tmp_path / "run" / "bad_batch.pt", weights_only=True)
    assert "action" in batch
    assert RunFolder.open(tmp_path / "run").saved()
    assert os.path.getsize(tmp_path / "run" / "metrics.csv")


def test_rewards_that_are_not_finite_are_named_before_anything_learns(tmp_path) -> None:
    Poisoned.total = 0
    env = lambda: gymnasium.wrappers.TimeLimit(Poisoned(), 12)  # noqa: E731
    settings = {**MBPO, "env": env, "evaluation_interval": 0}
    trainer = MBPOTrainer.start(tmp_path / "run", **settings)
    with pytest.raises(NonFiniteLossError, match="(?s)reward.*real step 41.*bad_batch"):
        trainer.train()
    assert MBPOTrainer.resume(tmp_path / "run", env=env).collected_frames == 36


def test_what_a_run_was_given_from_python_must_be_given_again(tmp_path) -> None:
    def reward(observation, action, next_observation):
        return -next_observation["place"][..., 0].abs()

    PETSTrainer.start(
        tmp_path / "run", **{**PETS, "env": make_reacher, "reward_function": reward}
    )
    with pytest.raises(
        ValueError, match=r"\['env', 'reward_function'\].*reward_function=\.\.\."
    ):
        PETSTrainer.resume(tmp_path / "run")
    PETSTrainer.resume(tmp_path / "run", env=make_reacher, reward_function=reward)


def test_a_run_goes_on_in_its_own_env(tmp_path) -> None:
    MBPOTrainer.start(tmp_path / "run", **MBPO)
    MBPOTrainer.resume(tmp_path / "run", env="Pendulum-v1")
    with pytest.raises(ValueError, match=r"\['env'\]. For other settings start a new"):
        MBPOTrainer.resume(tmp_path / "run", env="MountainCarContinuous-v0")


def test_a_trainer_has_what_its_recipe_has() -> None:
    trainer = MBPOTrainer(**MBPO)
    assert trainer.optimizer is trainer.recipe.optimizer
    assert trainer.imagined is trainer.recipe.imagined
    with pytest.raises(AttributeError, match="MBPOTrainer has no attribute 'planner'"):
        trainer.planner


def test_modules_are_found_where_they_were(tmp_path, monkeypatch) -> None:
    """In a folder beside Python's own, as /usr/src/app is with a Python in /usr."""
    app, installed = tmp_path / "src" / "app", tmp_path / "lib" / "site-packages"
    for path in (app, installed):
        path.mkdir(parents=True)
        monkeypatch.syspath_prepend(str(path))
    monkeypatch.setattr("sys.base_prefix", str(tmp_path))
    paths = MBPOTrainer.start(tmp_path / "run", **MBPO).run.config["python_path"]
    assert str(app) in paths and str(installed) not in paths
    assert os.path.dirname(os.__file__) not in paths


def test_a_run_that_reached_its_goal_is_saved_and_over(tmp_path) -> None:
    settings = {**MBPO, "stop_return": -1e6, "evaluation_interval": 25}
    trainer = MBPOTrainer.start(tmp_path / "run", **settings)
    trainer.train()
    assert trainer.collected_frames == 25  # in the midst of the second episode
    again = MBPOTrainer.resume(tmp_path / "run")
    assert again.is_over and again.collected_frames == 25
    for mine, theirs in zip(again.policy.parameters(), trainer.policy.parameters()):
        assert torch.equal(mine, theirs)


def test_a_run_that_was_interrupted_goes_on_from_its_folder(tmp_path) -> None:
    trainer = MBPOTrainer.start(tmp_path / "run", **MBPO)
    interrupt(trainer, 22)
    with pytest.raises(RuntimeError, match="MBPOTrainer.resume"):
        trainer.train()


def test_a_later_end_that_is_no_end(tmp_path) -> None:
    start_run("pets", tmp_path / "run", **PETS).train()
    with pytest.warns(UserWarning, match="has made 60 steps and is over with.*steps"):
        resume_run(tmp_path / "run", steps=50)
    again = resume_run(tmp_path / "run", steps=61)
    again.train()
    assert again.collected_frames == 72


def test_a_folder_that_does_not_say_of_which_recipe_it_is(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"version": 2, "config": {}}')
    with pytest.raises(ValueError, match="no 'algorithm'"):
        resume_run(tmp_path)


def test_the_seed_decides_what_numpy_and_python_draw() -> None:
    drawn = []
    for seed in (3, 3, 4):
        PETSTrainer(**{**PETS, "seed": seed})
        drawn.append((np.random.rand(), random.random()))
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]


def test_a_run_that_ends_before_it_learns_says_so() -> None:
    with pytest.warns(UserWarning, match="steps=10, before.*random_steps=20"):
        MBPOTrainer(**{**MBPO, "steps": 10})


def test_a_run_that_another_process_writes_is_left_alone(tmp_path) -> None:
    first = start_run("pets", tmp_path / "run", **PETS)
    first.run.go_on()  # as at the beginning of its training
    with pytest.raises(RuntimeError, match=f"going on in process {os.getpid()}"):
        resume_run(tmp_path / "run").train()
    first.run.close()
    again = resume_run(tmp_path / "run")
    again.train()
    assert again.collected_frames == 60
