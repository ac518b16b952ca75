"""The examples run, print what they promise and write their pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *options: object) -> str:
    """What an example prints."""
    command = [sys.executable, EXAMPLES / name, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pendulum(tmp_path: Path) -> None:
    """The demo, shortened until it only shows that every part of it works."""
    short = "--episodes 5 --episode-steps 25 --train-steps 30".split()
    out = run("pendulum.py", "--out", tmp_path, *short)
    for step in range(1, 6):
        assert f"\n{step}. " in f"\n{out}"
    assert re.search(r"mean return: planned -?\d+, random -?\d+", out)
    assert re.search(r"20 +\d+\.\d+ +\d+\.\d+", out), "no 20-step error"
    for name in ("prediction.png", "open_loop_error.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


SHORT = "--episodes 3 --episode-steps 25 --train-steps 30 --imagined-steps 64 --evaluations 2"


def gap(out: str) -> tuple[float, float, float, float]:
    """Real, random and imagined return, and the exploitation gap."""
    real, random = re.search(
        r"real return: +(-?[\d.]+) +\(.*: (-?[\d.]+)\)", out
    ).groups()
    imagined = re.search(r"imagined return: +(-?[\d.]+)", out)[1]
    gap = re.search(r"exploitation gap: +(-?[\d.]+)", out)[1]
    return float(real), float(random), float(imagined), float(gap)


def test_sb3_in_a_model() -> None:
    """Shortened until it only shows that every part of it works."""
    pytest.importorskip("stable_baselines3")
    real, _, imagined, difference = gap(run("sb3_in_a_model.py", *SHORT.split()))
    assert abs(imagined - real - difference) < 0.2


@pytest.mark.slow
def test_sb3_in_a_model_learns_what_works_in_the_real_env() -> None:
    """The policy never acted in the real env, and is much better there than chance."""
    pytest.importorskip("stable_baselines3")
    real, random, _, difference = gap(run("sb3_in_a_model.py"))
    assert real > random + 600 and abs(difference) < 300


def test_ray_world_model() -> None:
    """Two learners and two collectors, for two rounds: the model predicts what it never saw."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'torchrl-wm[ray]'")
    out = run("ray_world_model.py", *"--steps 400 --updates 60".split())
    before, after = re.search(r"before ([\d.]+), after ([\d.]+)", out).groups()
    assert float(after) < 0.75 * float(before)
    assert out.count("200 real steps") == 2
