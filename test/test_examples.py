"""The examples run, print what they promise and write their pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_pendulum(tmp_path: Path) -> None:
    """The demo, shortened until it only shows that every part of it works."""
    short = "--episodes 5 --episode-steps 25 --train-steps 30".split()
    done = subprocess.run(
        [sys.executable, EXAMPLES / "pendulum.py", "--out", tmp_path, *short],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for step in range(1, 6):
        assert f"\n{step}. " in f"\n{out}"
    assert re.search(r"mean return: planned -?\d+, random -?\d+", out)
    assert re.search(r"20 +\d+\.\d+ +\d+\.\d+", out), "no 20-step error"
    for name in ("prediction.png", "open_loop_error.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
