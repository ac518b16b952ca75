"""The memory that a long log needs to be read, beside the log: less than three times its size."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Read logs of many rows in a process of its own, and print the peak of its memory for each.
SCRIPT = """
import pathlib, sys, tempfile, warnings
import numpy as np
from torchrl_wm.trainers import load_transitions

warnings.simplefilter("ignore")
rows, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])


def memory(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) * 1024


def log(dtype):
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(rows, 11)).astype(dtype),
        "actions": random.uniform(-1, 1, (rows, 3)).astype(dtype),
        "rewards": random.normal(size=rows).astype(dtype),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(1, rows + 1) % 1000 == 0,
    }


def table(path):
    # As whole blocks of text, as formatting number by number takes minutes.
    data, block = log(np.float32), 1000
    names = [*(f"obs_{n}" for n in range(11)), *(f"action_{n}" for n in range(3))]
    with open(path, "w") as file:
        file.write(",".join([*names, "reward", "terminated", "truncated", "episode"]) + "\\n")
        columns = (data["observations"], data["actions"], data["rewards"][:, None])
        first = np.concatenate([column[:block] for column in columns], -1)
        lines = [",".join(map(repr, row)) for row in first.tolist()]
        for number in range(rows // block):
            end = [f",0,{int(n == block - 1)},{number}" for n in range(block)]
            file.write("\\n".join(map(str.__add__, lines, end)) + "\\n")
    return path


def sources():
    np.savez(folder / "single.npz", **log(np.float32))
    yield "npz", folder / "single.npz", (folder / "single.npz").stat().st_size
    np.savez(folder / "double.npz", **log(np.float64))
    yield "npz double", folder / "double.npz", (folder / "double.npz").stat().st_size
    path = table(folder / "log.csv")
    yield "csv", path, path.stat().st_size
    arrays = log(np.float32)
    size = sum(value.nbytes for value in arrays.values())
    yield "arrays", arrays, size
    episodes = [
        {name: value[start : start + 1000] for name, value in arrays.items()}
        for start in range(0, rows, 1000)
    ]
    yield "episodes", episodes, size


load_transitions(  # what is loaded only once
    {"obs": np.zeros((4, 1)), "act": np.eye(4), "reward": np.zeros(4), "done": np.eye(4)[3]}
)
for name, source, size in sources():
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    data = load_transitions(source)
    print(f"{name}: {(memory('VmHWM') - before) / size:.2f}")
    assert len(data) == rows - rows // 1000
    del data, source
"""


def shares(rows: int, folder) -> dict[str, float]:
    """The most memory that was needed beside the source, as a share of the log's size."""
    # So that memory is given back as soon as it is free, and the peak is that of what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rows), str(folder)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    return {name: float(share) for name, share in lines}


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory"
)
@pytest.mark.parametrize(
    "rows", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)]
)
def test_less_than_three_times_the_log(rows, tmp_path) -> None:
    found = shares(rows, tmp_path)
    assert set(found) == {"npz", "npz double", "csv", "arrays", "episodes"}
    assert max(found.values()) < 3, found
    assert min(found.values()) > 0.5, found  # it is measured at all
