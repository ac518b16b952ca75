"""Processes that are interrupted or killed, and runs that go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from _real_envs import PETS

from torchrl_wm.trainers import PETSTrainer, RunFolder

pytest.importorskip("tyro")

HERE = Path(__file__).parents[1]
SETTINGS = {**PETS, "env": "_real_envs:make_stopping", "trials": 4}


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "torchrl_wm.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )


def options() -> list[str]:
    words = ["--no-report"]
    for name, value in SETTINGS.items():
        words += [f"--{name.replace('_', '-')}"]
        words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return words


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(how, tmp_path) -> None:
    run = tmp_path / "run"
    words = ["train", "pets", "--run", str(run), *options()]
    # Episodes have 12 steps: in the midst of the third.
    stopped = command(*words, STOP_AT_STEP=f"{how.name}:29")
    assert len(RunFolder.open(run).metrics()) == 2, stopped.stderr
    assert "Initialized" not in stopped.stdout + stopped.stderr
    assert "Traceback" not in stopped.stderr
    if how == signal.SIGINT:
        assert stopped.returncode == 130
        assert "Saved up to step 24" in stopped.stderr
        assert f"torchrl-wm train --resume {run}" in stopped.stderr
    else:
        assert stopped.returncode == -signal.SIGKILL
    from torchrl_wm.cli import main

    assert main(["train", "--resume", str(run), "--no-report"]) == 0
    whole = PETSTrainer(**SETTINGS)
    whole.train()
    again = PETSTrainer.resume(run)
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert (again.data[:] == whole.data[:]).all()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "begin",
    [
        "from torchrl_wm.cli import main; main(['--help'])",
        "from torchrl_wm.trainers import make_real_env as make; make('CartPole-v1', pixels=16)",
    ],
    ids=["command", "pixels"],
)
def test_a_process_that_draws_ends_by_sigterm(begin) -> None:
    pytest.importorskip("pygame")
    code = f"""
{begin}
import os, signal, time
import gymnasium
env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
env.reset()
env.render()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""
    drawn = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert drawn.returncode == -signal.SIGTERM


def test_a_run_without_a_checkpoint_begins_again(tmp_path) -> None:
    from torchrl_wm.cli import main

    PETSTrainer.start(tmp_path / "run", **SETTINGS)  # and nothing more
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-report"]) == 0
    assert len(RunFolder.open(tmp_path / "run").metrics()) == 6


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from torchrl_wm.cli import main
for words in (["--help"], ["train", "--help"], ["play", "--help"]):
    assert main(words) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
