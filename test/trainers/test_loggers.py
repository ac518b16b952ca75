"""Where metrics go: metrics.csv always, and TorchRL's loggers by name."""

from __future__ import annotations

import csv
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torchrl.record.loggers.mlflow
import torchrl.record.loggers.wandb
from _runs import interrupt, PETS, without_times

from torchrl_wm.trainers import PETSTrainer, resume_run, RunFolder, start_run
from torchrl_wm.trainers.loggers import make_loggers, MetricsTable

# What the two packages are to TorchRL's loggers. Each call is noted.
WANDB = """
calls, active = [], None

class Run:
    def __init__(self, **settings):
        self.id, self.config, self.settings = settings["id"], self, settings
    def update(self, *args, **kwargs):
        pass
    def define_metric(self, *args, **kwargs):
        pass
    def log(self, values, **kwargs):
        calls.append(("log", self.id, dict(values), kwargs))
    def finish(self):
        global active
        active = None
        calls.append(("finish", self.id))

def init(**settings):
    global active
    if active is None:  # else the run that is open is returned, as wandb does
        active = Run(**settings)
    calls.append(("init", settings))
    return active
"""
MLFLOW = """
import os
from types import SimpleNamespace as Named

calls, experiments, runs, active = [], {}, {}, []
uri = None

def set_tracking_uri(value):
    global uri
    uri = value

def get_experiment_by_name(name):
    found = experiments.get((uri, name))
    return None if found is None else Named(experiment_id=found)

def create_experiment(name, artifact_location, tags):
    experiments[uri, name] = f"experiment-{len(experiments)}"
    calls.append(("create", uri, name, artifact_location, tags))
    return experiments[uri, name]

def search_runs(ids, max_results, output_format):
    return [run for run in runs.values() if run.experiment in ids][:max_results]

def start_run(experiment_id):
    if active:
        raise Exception("Run is already active")
    run_id = os.environ.pop("MLFLOW_RUN_ID", None) or f"run-{len(runs)}"
    runs[run_id] = Named(info=Named(run_id=run_id), experiment=experiment_id)
    active.append(run_id)
    calls.append(("start", run_id))
    return runs[run_id]

def set_experiment(experiment_id):
    pass

def log_metric(key, value, step=None):
    calls.append(("log", active[0], key, value, step))

def log_metrics(metrics, step=None, **kwargs):
    for key, value in metrics.items():
        log_metric(key, value, step)

def end_run():
    active.clear()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Make a stand-in of a package importable, for TorchRL, too."""

    def make(name: str, code: str):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        logger = getattr(torchrl.record.loggers, name)
        monkeypatch.setattr(logger, f"_has_{name}", True)
        return module

    return make


def rows_of(path: Path) -> list[dict]:
    with open(path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# The table ------------------------------------------------------------------


def test_the_table_is_there_whatever_the_loggers(tmp_path) -> None:
    trainer = start_run("pets", tmp_path / "run", **PETS)
    trainer.train()
    rows = rows_of(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [12, 24, 36, 48, 60]
    assert not (tmp_path / "run" / "tensorboard").exists()
    # What is read is what was written, to the last digit.
    assert RunFolder.open(tmp_path / "run").metrics() == trainer.metrics


def test_columns_come_with_rows(tmp_path) -> None:
    table = MetricsTable(tmp_path)
    table.log_metrics({"return": 0.1 + 0.2}, step=1)
    table.log_metrics({"loss": float("nan"), "name": "a,b"}, step=2)
    table.log_scalar("return", torch.tensor(3.0), step=3)
    again = MetricsTable(tmp_path).rows
    assert again[0] == {"step": 1, "return": 0.1 + 0.2}
    assert again[1]["loss"] != again[1]["loss"] and again[1]["name"] == "a,b"
    assert again[2] == {"step": 3, "return": 3.0}
    assert list(rows_of(tmp_path)[0]) == ["step", "return", "loss", "name"]
    table.restore(again[:1])
    assert rows_of(tmp_path) == [{"step": "1", "return": repr(0.1 + 0.2)}]
    table.log_metrics({"return": 4.0}, step=4)
    assert MetricsTable(tmp_path).rows[-1] == {"step": 4, "return": 4.0}


def test_films_stand_beside_the_table(tmp_path) -> None:
    pytest.importorskip("PIL")
    run = RunFolder.create(tmp_path / "run", {"config": {"logger": ["csv"]}})
    run.log_film("policy", torch.zeros(4, 16, 20, 3, dtype=torch.uint8), 120)
    (film,) = (tmp_path / "run" / "films").iterdir()
    assert film.name == "policy-000000120.gif"


def test_a_row_that_was_cut_off_is_forgotten(tmp_path) -> None:
    whole = PETSTrainer(**PETS)
    whole.train()
    interrupt(start_run("pets", tmp_path / "run", **PETS), 40)
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("36,1.2")  # by a kill
    again = resume_run(tmp_path / "run")
    again.train()
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert RunFolder.open(tmp_path / "run").metrics() == again.metrics


def test_a_table_that_was_edited(tmp_path) -> None:
    trainer = start_run("pets", tmp_path / "run", **{**PETS, "trials": 1})
    trainer.train()
    path = tmp_path / "run" / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    for cut, message in (
        ([*lines[:2], lines[2].strip() + ",7\n", *lines[3:]], "row 2 has more values"),
        (lines[:-1], f"has {len(lines) - 2} rows, and had {len(lines) - 1}"),
    ):
        path.write_text("".join(cut))
        with pytest.raises(ValueError, match=message):
            resume_run(tmp_path / "run")
    path.write_text("".join(lines))
    assert resume_run(tmp_path / "run").metrics == trainer.metrics


# TensorBoard ----------------------------------------------------------------


def test_tensorboard_has_the_numbers_and_forgets_what_is_done_again(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {**PETS, "logger": "tensorboard", "checkpoint_interval": 2}
    interrupt(start_run("pets", tmp_path / "run", **settings), 40)  # 3 rows, 2 kept
    again = resume_run(tmp_path / "run")
    assert len(again.metrics) == 2
    again.train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = [(each.step, each.value) for each in events.Scalars("return")]
    expected = [(row["step"], row["return"]) for row in again.metrics]
    assert [step for step, _ in points] == [step for step, _ in expected]
    for (_, value), (_, true) in zip(points, expected):
        assert value == pytest.approx(true)


# Weights & Biases, MLflow -----------------------------------------------------


def test_wandb_goes_on_with_the_same_run(stand_in, tmp_path) -> None:
    wandb = stand_in("wandb", WANDB)
    settings = {**PETS, "logger": ["wandb"], "trials": 2}
    start_run("pets", tmp_path / "one", **{**settings, "trials": 1}).train()
    resume_run(tmp_path / "one", trials=2).train()
    start_run("pets", tmp_path / "other", **settings).train()
    inits = [call[1] for call in wandb.calls if call[0] == "init"]
    ids = [each["id"] for each in inits]
    assert ids[0] == ids[1] == RunFolder.open(tmp_path / "one").config["id"] != ids[2]
    assert {each["resume"] for each in inits} == {"allow"}
    assert [each["name"] for each in inits] == ["one", "one", "other"]
    assert Path(inits[0]["dir"]) == tmp_path / "one"  # also where offline runs stand
    # Each is finished, else the next would be logged into it.
    assert [call[1] for call in wandb.calls if call[0] == "finish"] == ids
    logged = [call for call in wandb.calls if call[0] == "log" and "return" in call[2]]
    assert [call[1] for call in logged] == [ids[0]] * 4 + [ids[2]] * 4
    returns = RunFolder.open(tmp_path / "one").metrics()
    assert [call[2]["return"] for call in logged[:4]] == [r["return"] for r in returns]


def test_mlflow_goes_on_with_the_same_run(stand_in, tmp_path) -> None:
    mlflow = stand_in("mlflow", MLFLOW)
    settings = {**PETS, "logger": "mlflow"}
    start_run("pets", tmp_path / "one", **{**settings, "trials": 1}).train()
    resume_run(tmp_path / "one", trials=2).train()
    start_run("pets", tmp_path / "other", **{**settings, "trials": 1}).train()
    starts = [call[1] for call in mlflow.calls if call[0] == "start"]
    assert starts[0] == starts[1] != starts[2] and not mlflow.active
    assert "MLFLOW_RUN_ID" not in os.environ
    created = [call for call in mlflow.calls if call[0] == "create"]
    assert [call[2] for call in created] == ["one", "other"]
    # All of it is in the run's folder: no server is asked.
    assert created[0][1] == f"sqlite:///{tmp_path / 'one' / 'mlflow.db'}"
    assert created[0][3] == (tmp_path / "one" / "mlflow").as_uri()
    logged = [call for call in mlflow.calls if call[0] == "log" and call[2] == "return"]
    rows = RunFolder.open(tmp_path / "one").metrics()
    assert [(call[1], call[3], call[4]) for call in logged[:4]] == [
        (starts[0], row["return"], row["step"]) for row in rows
    ]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(name, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "torchrl_wm.trainers.loggers.find_spec",
        lambda package: None if package == name else find(package),
    )
    with pytest.raises(ImportError, match=f"pip install {name}.*--logger csv"):
        start_run("pets", tmp_path / "run", **{**PETS, "logger": name})
    assert not (tmp_path / "run").exists()
    with pytest.raises(ImportError, match=f"pip install {name}"):
        make_loggers(["csv", name], tmp_path, "id")


def test_a_run_that_goes_on_where_its_logger_is_not_installed(
    tmp_path, monkeypatch
) -> None:
    pytest.importorskip("tensorboard")
    settings = {**PETS, "logger": "tensorboard", "trials": 1}
    start_run("pets", tmp_path / "run", **settings).train()
    monkeypatch.setattr("torchrl_wm.trainers.loggers.find_spec", lambda name: None)
    again = resume_run(tmp_path / "run", trials=2)  # can be looked at
    with pytest.raises(ImportError, match="pip install tensorboard"):
        again.train()
    assert again.collected_frames == 36  # nothing was spent before
