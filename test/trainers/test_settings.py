"""Settings of runs: what they take, what they refuse, and how a run is made longer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from _runs import interrupt, MBPO, PETS

from torchrl_wm.trainers import (
    MBPOConfig,
    MBPOTrainer,
    PETSConfig,
    PETSTrainer,
    resume_run,
    RunConfig,
    RunFolder,
    start_run,
)
from torchrl_wm.trainers.settings import AtLeast, resolve_device, Settings


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
        ({"model_learning_rate": 0.0}, "model_learning_rate must be above 0, got 0"),
        ({"model_weight_decay": -1.0}, "model_weight_decay must be at least 0, got -1"),
        ({"beta": float("nan")}, "beta must be a number, got nan"),
        ({"beta": "0.5"}, "beta must be a number, got '0.5'"),
        ({"env": 3.0}, "env must be a string, got 3.0"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"num_envs": 2.0}, "num_envs must be an int, got 2.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"action_repeat": 0}, "action_repeat must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"stop_return": "high"}, "stop_return must be a number, got 'high'"),
        ({"collector": "threads"}, "Unknown collector 'threads'.*'single', 'process"),
        ({"logger": "wandbb"}, "Unknown logger 'wandbb'.*'wandb'"),
        ({"logger": ("csv", "x")}, "Unknown logger 'x'"),
        ({"device": "gpu"}, "device='gpu' is unknown. Give 'auto', 'cpu'"),
        ({"device": None}, "device must be a string, got None"),
    ],
)
def test_values_that_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PETSConfig(**settings)
    if "env" not in settings:
        with pytest.raises(ValueError, match=message):
            PETSTrainer(PETSConfig(**PETS), **settings)


def test_numbers_of_other_libraries_are_numbers(tmp_path) -> None:
    settings = {"members": np.int64(3), "beta": np.float32(0.5), "hidden": [16]}
    config = PETSConfig(**settings, elites=None, model_learning_rate=1)
    assert (config.members, config.beta, config.hidden) == (3, 0.5, (16,))
    assert (type(config.members), type(config.beta)) == (int, float)
    PETSTrainer.start(tmp_path / "run", **{**PETS, **settings})
    assert RunFolder.open(tmp_path / "run").config["config"]["members"] == 3


def test_a_logger_is_one_or_several() -> None:
    assert RunConfig(logger="csv").logger == ("csv",)
    assert RunConfig(logger=["wandb", "csv"]).logger == ("wandb", "csv")


@dataclass(frozen=True, kw_only=True)
class Odd(Settings):
    """Settings of other types than our recipes have."""

    rate: int | float = 1
    either: Annotated[int, AtLeast(3)] | str | None = None
    table: dict[str, float] | None = None
    folder: Path = Path(".")
    anything: Any = None


def test_settings_of_other_types() -> None:
    odd = Odd(rate=0.5, either=3, table={"a": 1.0}, folder=Path("x"), anything=object)
    assert (odd.rate, odd.either, odd.table) == (0.5, 3, {"a": 1.0})
    assert Odd(either="three").either == "three" and Odd().either is None
    for wrong in ({"rate": "x"}, {"table": 3}, {"folder": 3}, {"either": 2.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Odd(**wrong)


# Those of other recipes -----------------------------------------------------


def test_settings_of_another_recipe() -> None:
    for kind, other in ((PETSTrainer, MBPOConfig()), (MBPOTrainer, PETSConfig())):
        with pytest.raises(TypeError, match=f"{type(other).__name__}"):
            kind(other)
    with pytest.raises(TypeError, match="MBPOConfig has no setting 'trials'"):
        MBPOTrainer(**MBPO, trials=3)
    with pytest.raises(TypeError, match="PETSConfig has no setting 'gamma'"):
        PETSConfig.make(None, {"gamma": 0.9})
    with pytest.raises(TypeError, match="no setting 'num_env'.*'num_envs'"):
        PETSTrainer(**PETS, num_env=3)


def test_no_recipe_has_the_settings_of_another() -> None:
    common = {"env", "seed", "device", "steps", "num_envs", "collector", "logger"}
    common |= {"random_steps", "max_episode_steps", "action_repeat", "stop_return"}
    common |= {"evaluation_interval", "evaluation_episodes", "checkpoint_interval"}
    assert common <= set(asdict(RunConfig()))
    assert not set(asdict(RunConfig())) & {"members", "trials", "gamma", "planner"}


def test_settings_come_back_from_a_file() -> None:
    config = MBPOConfig(hidden=(3, 4), logger="csv", stop_return=5.0)
    content = {**asdict(config), "hidden": [3, 4], "logger": ["csv"]}
    assert MBPOConfig.from_json(content) == config
    with pytest.raises(ValueError, match=r"\['leaves'\].*does not know"):
        MBPOConfig.from_json({**content, "leaves": 3})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        MBPOConfig.from_json({**content, "batch_size": 0})


# Devices -------------------------------------------------------------------


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("meta") == torch.device("meta")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == auto


@pytest.mark.parametrize("name", ["cuda:99", "mps", "xpu:3"])
def test_devices_that_are_not_here(name) -> None:
    with pytest.raises(ValueError, match=f"(?s)device='{name}' is not on this machine"):
        PETSTrainer(**{**PETS, "device": name})


# Longer runs ----------------------------------------------------------------


def test_only_longer() -> None:
    config = MBPOConfig(steps=100)
    assert config.lengthened({"steps": 200}).steps == 200
    assert config.lengthened({}) == config
    with pytest.raises(ValueError, match="steps=99 .*before the 100"):
        config.lengthened({"steps": 99})
    with pytest.raises(ValueError, match=r"only ends later.*'gamma', 'seed'"):
        config.lengthened({"seed": 3, "gamma": 0.5, "steps": 200})


def test_trials_and_steps_are_two_ways_to_end() -> None:
    config = PETSConfig()
    assert (config.trials, config.steps) == (10, None)
    assert PETSConfig(steps=500).trials is None
    longer = config.lengthened({"trials": 12})
    assert (longer.trials, longer.steps) == (12, None)
    by_steps = config.lengthened({"steps": 9000})
    assert (by_steps.trials, by_steps.steps) == (None, 9000)
    with pytest.raises(ValueError, match="trials=3 .*before the 10"):
        config.lengthened({"trials": 3})


@pytest.mark.parametrize(
    "name, settings, longer",
    [("pets", {**PETS, "trials": 1}, {"trials": 3}), ("mbpo", MBPO, {"steps": 90})],
)
def test_a_finished_run_that_was_made_longer(name, settings, longer, tmp_path) -> None:
    start_run(name, tmp_path / "run", **settings).train()
    again = resume_run(tmp_path / "run", **longer)
    rows = len(again.metrics)
    interrupt(again, 2)  # it is known to be longer from here on
    last = resume_run(tmp_path / "run")
    last.train()
    assert len(last.metrics) > rows and last.is_over
    (end,) = longer
    assert getattr(last.config, end) == longer[end]
    with pytest.raises(ValueError, match="can only be made longer"):
        resume_run(tmp_path / "run", **{end: longer[end] - 1})
    with pytest.raises(ValueError, match="start a new run"):
        resume_run(tmp_path / "run", members=9)


def test_a_run_that_was_only_looked_at_is_not_longer(tmp_path) -> None:
    start_run("pets", tmp_path / "run", **{**PETS, "trials": 1}).train()
    content = (tmp_path / "run" / "config.json").read_text()
    resume_run(tmp_path / "run", trials=9, device="cpu")
    assert (tmp_path / "run" / "config.json").read_text() == content


def test_settings_do_not_change() -> None:
    config = PETSConfig()
    with pytest.raises(AttributeError):
        config.seed = 3
    assert replace(config, seed=3).seed == 3


def test_a_return_that_nobody_looks_at() -> None:
    with pytest.raises(ValueError, match="evaluation_interval"):
        RunConfig(stop_return=-100.0)
