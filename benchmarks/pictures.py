"""The pictures of README and of the gallery that no learning run has drawn.

    make demo
    torchrl-wm play runs/demo --horizon 40 --max-steps 120 --height 180 \\
        --out docs/pictures/real_beside_imagined.gif
    python -m benchmarks.pictures

The last draws how the held-out error of a model falls that is learnt from a log: 20 random
episodes of the pendulum, two of which are held out, seed 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchrl.envs import GymEnv

from torchrl_wm.trainers import train_world_model

OUT = Path(__file__).parents[1] / "docs" / "pictures"


def held_out_errors(seed: int = 0) -> tuple[list[int], list[float]]:
    """Return gradient steps and held-out errors, as shares of the error of "nothing changes"."""
    torch.manual_seed(seed)
    env = GymEnv("Pendulum-v1")
    env.set_seed(seed)
    log = torch.cat([env.rollout(200) for _ in range(20)])
    _, metrics = train_world_model(log, env=env, steps=2000, interval=100, seed=seed)
    rows = [row for row in metrics if "held_out_error" in row]
    return [row["step"] for row in rows], [row["held_out_error"] for row in rows]


def draw(steps: list[int], errors: list[float]) -> Figure:
    """Return the curve."""
    drawn = Figure(figsize=(6.5, 4), layout="constrained")
    axes = drawn.add_subplot()
    axes.semilogy(steps, errors, marker=".", label="held-out episodes")
    axes.axhline(1, color="0.6", ls=":", lw=1, label='"nothing changes"')
    axes.set(
        title="A model of 20 random episodes of Pendulum-v1",
        xlabel="gradient steps",
        ylabel="one-step error, as a share",
    )
    axes.legend(fontsize="small")
    return drawn


def main() -> None:
    OUT.mkdir(exist_ok=True)
    draw(*held_out_errors()).savefig(OUT / "model_pendulum.png", dpi=110)


if __name__ == "__main__":
    main()
