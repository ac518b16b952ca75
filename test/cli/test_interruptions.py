"""Processes that are interrupted or killed, and runs that go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _real_envs import PETS

from torchrl_wm.trainers import PETSTrainer, RunFolder

pytest.importorskip("tyro")

SETTINGS = {**PETS, "trials": 4}


def command(*words: str) -> subprocess.Popen:
    """Start the command line in a process of its own."""
    # A signal ignored by the parent, as by shells for what runs in the background, stays so.
    return subprocess.Popen(
        [sys.executable, "-m", "torchrl_wm.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def options() -> list[str]:
    words = ["--no-report"]
    for name, value in SETTINGS.items():
        words += [f"--{name.replace('_', '-')}"]
        words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return words


def stop_midway(path: Path, how: int) -> tuple[int, str, str]:
    """Start a run, and send it a signal after its second episode."""
    process = command("train", "pets", "--run", str(path), *options())
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            if len(list((path / "checkpoints").glob("*.pt"))) >= 2:
                break
            time.sleep(0.01)
        process.send_signal(how)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(how, tmp_path) -> None:
    run = tmp_path / "run"
    code, out, err = stop_midway(run, how)
    episodes = len(RunFolder.open(run).metrics())
    assert 2 <= episodes < 6, f"stopped too late to say anything: {out}{err}"
    assert "Initialized" not in out + err and "Traceback" not in err
    if how == signal.SIGINT:
        assert code == 130
        assert "Saved up to step" in err
        assert f"torchrl-wm train --resume {run}" in err
    else:
        assert code == -signal.SIGKILL
    from torchrl_wm.cli import main

    assert main(["train", "--resume", str(run), "--no-report"]) == 0
    whole = PETSTrainer(**SETTINGS)
    whole.train()
    again = PETSTrainer.resume(run)
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert (again.data[:] == whole.data[:]).all()


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
