"""What a checkpoint costs, and that it does not grow with what the replay holds.

    python benchmarks/checkpoints.py

Each row saves a checkpoint after 1,000 new transitions, with few and with many stored before,
and prints the ratio of bytes and of seconds: many to few, the minimum of interleaved rounds.
"""

from __future__ import annotations

import tempfile
import time

import torch
from tensordict import TensorDict

from torchrl_wm.trainers import RunFolder
from torchrl_wm.trainers.recipe import make_replay

NEW, ROUNDS = 1_000, 3


def transitions(
    number: int, entries: dict[str, torch.Size], dtype: torch.dtype
) -> TensorDict:
    """Transitions with the same entries before and after the step."""

    def some() -> dict[str, torch.Tensor]:
        if dtype is torch.uint8:
            draw = lambda shape: torch.randint(0, 256, shape, dtype=dtype)  # noqa: E731
        else:
            draw = torch.randn
        return {name: draw((number, *shape)) for name, shape in entries.items()}

    rows = TensorDict({**some(), "action": torch.randn(number, 6)}, [number])
    after = TensorDict({**some(), "reward": torch.randn(number, 1)}, [number])
    return rows.set("next", after)


def cost(stored: int, entries: dict, dtype: torch.dtype) -> tuple[int, float]:
    """Bytes and seconds of a checkpoint after ``NEW`` transitions beyond those stored."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(f"{folder}/run", {"algorithm": "none"})
        replay = make_replay(stored + 10 * NEW)
        run.bind({"network": torch.nn.Linear(256, 256), "replay": replay})
        while len(replay) < stored:
            replay.extend(
                transitions(min(10_000, stored - len(replay)), entries, dtype)
            )
        run.save(stored)
        replay.extend(transitions(NEW, entries, dtype))
        before, began = run.size, time.perf_counter()
        run.save(stored + NEW)
        seconds = time.perf_counter() - began
        return run.size - before, seconds


def main() -> None:
    cases = (
        ("vectors of 17", {"observation": (17,)}, torch.float32, 10_000, 1_000_000),
        ("images 64x64x3", {"pixels": (64, 64, 3)}, torch.uint8, 1_000, 10_000),
    )
    print(
        "| replay of | few | many | bytes, few | bytes, many / few | seconds, many / few |"
    )
    print("|---|---|---|---|---|---|")
    for name, entries, dtype, few, many in cases:
        rounds = [
            (cost(few, entries, dtype), cost(many, entries, dtype))
            for _ in range(ROUNDS)
        ]
        (size, seconds), (size_many, seconds_many) = (
            tuple(min(values) for values in zip(*side)) for side in zip(*rounds)
        )
        print(
            f"| {name} | {few:,} | {many:,} | {size:,} | {size_many / size:.2f} | "
            f"{seconds_many / seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
