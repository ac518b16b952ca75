"""What a replay of images takes in memory, and how fast sequences of it are sampled.

    python benchmarks/replay.py [--transitions 100000] [--disk]

A row for a replay of the recipes and one for TorchRL's LazyTensorStorage, each filled with the same
transitions, ``image`` and ``("next", image)`` of 64x64x3 bytes, in episodes of 500 steps. The memory
is the growth of the process's resident memory. The time is that of 16 sequences of 64 steps, the
minimum of interleaved rounds, and its ratio to LazyTensorStorage.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from torchrl_wm.trainers.recipe import make_replay
from torchrl_wm.trainers.sequences import sample_sequences

SHAPE, EPISODE = (64, 64, 3), 500
SEQUENCES, LENGTH, ROUNDS = 16, 64, 30


def resident() -> float:
    """Gigabytes of this process that are in memory, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (anonymous,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(anonymous) / 1e6


def fill(replay: ReplayBuffer, transitions: int) -> float:
    """Write episodes step by step, as a run does; return the seconds of a step."""
    torch.manual_seed(0)
    spent, written = 0.0, 0
    while written < transitions:
        image = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
        for _ in range(min(EPISODE, transitions - written)):
            after = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
            row = TensorDict({"pixels": image, "action": torch.zeros(6)}, [])
            row["next"] = {"pixels": after, "reward": torch.zeros(1)}
            began = time.perf_counter()
            replay.extend(row.unsqueeze(0))
            spent += time.perf_counter() - began
            image, written = after, written + 1
    return spent / transitions


def sampled(replay: ReplayBuffer) -> tuple[float, TensorDictBase]:
    began = time.perf_counter()
    batch = sample_sequences(replay, SEQUENCES, LENGTH)
    return time.perf_counter() - began, batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--disk", action="store_true", help="keep images on the disk")
    options = parser.parse_args()
    capacity = options.transitions
    makers = {
        "make_replay": lambda: make_replay(
            capacity, images="disk" if options.disk else "memory"
        ),
        "LazyTensorStorage": lambda: TensorDictReplayBuffer(
            storage=LazyTensorStorage(capacity)
        ),
    }
    replays, memory, writing = {}, {}, {}
    for name, make in makers.items():
        gc.collect()
        before = resident()
        replays[name] = make()
        writing[name] = fill(replays[name], options.transitions)
        gc.collect()
        memory[name] = resident() - before
    seconds = {name: float("inf") for name in makers}
    for number in range(ROUNDS):
        batches = {}
        for name, replay in replays.items():
            torch.manual_seed(number)
            spent, batches[name] = sampled(replay)
            seconds[name] = min(seconds[name], spent)
        ours, plain = batches.values()
        assert all((ours[key] == plain[key]).all() for key in ours.keys(True, True))
    print("| replay | GB | us to write a step | ms to sample | ratio |")
    print("|---|---|---|---|---|")
    for name in makers:
        ratio = seconds[name] / seconds["LazyTensorStorage"]
        print(
            f"| {name} | {memory[name]:.2f} | {1e6 * writing[name]:.0f} | "
            f"{1e3 * seconds[name]:.1f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
