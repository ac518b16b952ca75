"""Runs in folders: what they leave behind, and how they go on after an interruption."""

from __future__ import annotations

import csv
import json
import os

import gymnasium
import numpy as np
import pytest
import torch
from _real_envs import make_reacher, MBPO as SMALL_MBPO, PETS as SMALL_PETS, Reacher1D
from torchrl.data import ReplayBuffer

from torchrl_wm import _files
from torchrl_wm.trainers import (
    MBPOTrainer,
    NonFiniteLossError,
    PETSConfig,
    PETSTrainer,
    RunFolder,
)

PETS = {**SMALL_PETS, "trials": 3, "random_hold": 3, "model_interval": 5}
MBPO = {
    **SMALL_MBPO,
    "random_hold": 3,
    "horizon_schedule": (20, 75, 1, 3),
    "steps": 75,
    "evaluation_interval": 25,
    "evaluation_episodes": 1,
}
RECIPES = pytest.mark.parametrize(
    "kind, settings", [(PETSTrainer, PETS), (MBPOTrainer, MBPO)], ids=["pets", "mbpo"]
)


class Interrupted(Exception):
    pass


class Trap:
    """Makes a folder where somebody unpickles it."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def interrupt(trainer, after: int) -> None:
    """Have the run stop as by Ctrl-C, in the midst of the episode that follows."""
    acting, steps = trainer.acting.forward, []

    def forward(tensordict):
        steps.append(1)
        if len(steps) > after:
            raise Interrupted
        return acting(tensordict)

    trainer.acting.forward = forward
    with pytest.raises(Interrupted):
        trainer.train()


def transitions(trainer) -> ReplayBuffer:
    return trainer.data[:]


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


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
    assert (transitions(again) == transitions(whole)).all()
    for mine, theirs in zip(again.policy.parameters(), whole.policy.parameters()):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(
        again.world_model.state_dict().values(), whole.world_model.state_dict().values()
    ):
        assert torch.equal(mine, theirs)
    assert without_times(again.metrics) == without_times(whole.metrics)
    kept = RunFolder.open(tmp_path / "run").metrics()
    assert without_times(kept) == without_times(whole.metrics)


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
        "checkpoint_000000048.pt",
        "checkpoint_000000060.pt",
    ]
    for path in saved:
        torch.load(path, weights_only=True)


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


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_steps": 1.5}, "model_steps must be an int, got 1.5"),
        ({"members": "5"}, "members must be an int, got '5'"),
        ({"members": None}, "members must be an int, got None"),
        ({"trials": True}, "trials must be an int, got True"),
        ({"elites": 2.5}, "elites must be an int, got 2.5"),
        ({"hidden": 128}, "hidden must be a tuple of ints, got 128"),
        ({"hidden": (64, 1.5)}, "Each of hidden must be an int, got 1.5"),
        ({"beta": "0.5"}, "beta must be a number, got '0.5'"),
    ],
)
def test_settings_that_are_no_numbers(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PETSConfig(**settings)
    with pytest.raises(ValueError, match=message):
        PETSTrainer(**{**PETS, **settings})


def test_numbers_of_other_libraries_are_numbers(tmp_path) -> None:
    settings = {"members": np.int64(3), "beta": np.float32(0.5), "hidden": [16]}
    config = PETSConfig(**settings, elites=None, model_learning_rate=1)
    assert (config.members, config.beta, config.hidden) == (3, 0.5, (16,))
    PETSTrainer.start(tmp_path / "run", **{**PETS, **settings})
    assert RunFolder.open(tmp_path / "run").config["config"]["members"] == 3


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
    with pytest.raises(ValueError, match="'pets', and this is 'mbpo'"):
        MBPOTrainer.resume(tmp_path / "run")


def test_a_run_without_a_checkpoint_begins_again(tmp_path) -> None:
    whole = PETSTrainer(**PETS)
    whole.train()
    interrupt(PETSTrainer.start(tmp_path / "run", **PETS, checkpoint_interval=3), 30)
    assert RunFolder.open(tmp_path / "run").metrics()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        RunFolder.open(tmp_path / "run").load()
    again = PETSTrainer.resume(tmp_path / "run")
    assert again.metrics == []
    again.train()
    assert without_times(again.metrics) == without_times(whole.metrics)
    kept = RunFolder.open(tmp_path / "run").metrics()
    assert without_times(kept) == without_times(whole.metrics)


@pytest.fixture
def finished(tmp_path):
    PETSTrainer.start(tmp_path / "run", **PETS).train()
    return tmp_path / "run"


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_checkpoint_that_was_cut_off(finished, keep) -> None:
    before, last = RunFolder.open(finished).saved()
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"damaged.*{before.name}"):
        PETSTrainer.resume(finished)
    last.unlink()
    assert PETSTrainer.resume(finished).episodes == 4


def test_a_foreign_checkpoint_runs_no_code(finished, tmp_path) -> None:
    last = RunFolder.open(finished).saved()[-1]
    torch.save({"format": "torchrl_wm.run", "x": Trap(tmp_path / "hacked")}, last)
    with pytest.raises(ValueError, match="Nothing of it was executed"):
        PETSTrainer.resume(finished)
    assert not (tmp_path / "hacked").exists()
    torch.save({"weights": torch.zeros(3)}, last)
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        PETSTrainer.resume(finished)
    _files.write_plain({"format": "torchrl_wm.run", "version": 99}, last)
    with pytest.raises(ValueError, match="Update torchrl_wm"):
        PETSTrainer.resume(finished)


def test_a_checkpoint_that_does_not_fit(finished) -> None:
    config = json.loads((finished / "config.json").read_text())
    config["config"]["hidden"] = [32]
    (finished / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit the run's config"):
        PETSTrainer.resume(finished)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    trainer = PETSTrainer.start(tmp_path / "run", **PETS)
    write, written = torch.save, []

    def full(content, file, **kwargs):
        written.append(1)
        if len(written) > 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        return write(content, file, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left.*checkpoint_000000024.*--resume"):
        trainer.train()
    monkeypatch.undo()
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["checkpoint_000000012.pt", "checkpoint_000000024.pt"]
    again = PETSTrainer.resume(tmp_path / "run")
    again.train()
    assert [row["step"] for row in again.metrics] == [12, 24, 36, 48, 60]


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
    rate = "learning_rate" if kind is MBPOTrainer else "model_learning_rate"
    settings[rate] = 1e30
    trainer = kind.start(tmp_path / "run", **settings)
    with pytest.raises(NonFiniteLossError, match="(?s)gradient step.*bad_batch.pt"):
        trainer.train()
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
