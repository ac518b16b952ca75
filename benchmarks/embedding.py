"""What a joint embedding's loss step costs: ratios, everything measured in this process.

    python benchmarks/embedding.py --out docs/benchmarks/embedding.md

Forward and backward of the loss of ``make_jepa_world_model``, beside the same networks and terms
written by hand on tensors, without masks and keys. Both draw the same directions and give the same
loss. On one CPU thread it is the processor's time that counts, so that other work on the machine
does not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Loop, machine, measure, Reference
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl_wm import WorldModelLoss
from torchrl_wm.models import make_jepa_world_model
from torchrl_wm.modules import fit_normalizers

PROJECTIONS, KNOTS, WEIGHT = 256, 17, 0.01
#: The observation of each row of the table, and the batch.
CASES = {
    "vector of 17, `[256]`": (Unbounded((17,)), (256,)),
    "vector of 17, `[32, 8]`": (Unbounded((17,)), (32, 8)),
    "image of 16 x 16, `[32, 5]`": (
        Bounded(0, 255, (16, 16, 1), dtype=torch.uint8),
        (32, 5),
    ),
}


def loss_and_batch(
    observation: Unbounded | Bounded, size: tuple[int, ...]
) -> tuple[WorldModelLoss, TensorDictBase]:
    """A loss, and transitions to train it on, ``[B]`` or ``[B, T]``."""
    torch.manual_seed(0)
    env = Reference([])
    env.observation_spec = Composite(observation=observation)
    world_model, loss = make_jepa_world_model(
        env, multi_step=len(size) > 1, projections=PROJECTIONS, knots=KNOTS
    )
    specs = env.full_observation_spec, env.full_action_spec
    batch = specs[0].rand(size).update(specs[1].rand(size))
    batch["next"] = specs[0].rand(size).update(env.full_done_spec.zero(size))
    fit_normalizers(world_model, batch)
    return loss, batch


def by_hand(loss: WorldModelLoss, batch: TensorDictBase) -> torch.Tensor:
    """The same loss on tensors."""
    encode, step = (
        loss.world_model.encoder.module,
        loss.world_model.dynamics.module,
    )
    actions, target = batch["action"], encode(batch["next", "observation"])
    if batch.ndim == 1:
        predicted = step(encode(batch["observation"]), actions)
    else:
        latent, latents = encode(batch["observation"][:, 0]), []
        for action in actions.unbind(1):
            latent = step(latent, action)
            latents.append(latent)
        predicted = torch.stack(latents, 1)
    rows = target.flatten(0, -2)
    directions = torch.randn(rows.shape[-1], PROJECTIONS)
    along = rows @ (directions / directions.norm(dim=0))
    width = 3 / (KNOTS - 1)
    t = width * torch.arange(1, KNOTS)
    gaussian, step_ = torch.exp(-t.square() / 2), torch.full_like(t, 2 * width)
    step_[-1] /= 2
    angle = t[:, None, None] * along
    off = (angle.cos().mean(1) - gaussian[:, None]).square()
    off = off + angle.sin().mean(1).square()
    sigreg = len(rows) * ((gaussian * step_) @ off).mean()
    return (predicted - target).square().mean() + WEIGHT * sigreg


def loops_of(case: str) -> dict[str, Loop]:
    """Forward and backward of each, by name."""
    loss, batch = loss_and_batch(*CASES[case])
    functions = {
        "by hand": lambda: by_hand(loss, batch),
        "ours": lambda: loss(batch).sum(reduce=True),
    }
    values = []
    for function in functions.values():
        torch.manual_seed(1)
        values.append(function())
    for value in values:
        torch.testing.assert_close(value, values[0], rtol=1e-4, atol=1e-5)
    parameters = list(loss.parameters())

    def forward_and_backward(function: Loop) -> Loop:
        @torch.enable_grad()
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            function().backward()

        return run

    return {name: forward_and_backward(f) for name, f in functions.items()}


def rows(seconds: float) -> list[str]:
    """The table, a row for each case."""
    table = [
        "| observation, batch | by hand, ms | ours |",
        "|---|---|---|",
    ]
    for case in CASES:
        best = measure(loops_of(case), seconds)
        floor = best["by hand"]
        table.append(f"| {case} | {floor * 1e3:.1f} | {best['ours'] / floor:.2f} |")
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        f"Forward and backward of a joint embedding's loss, {PROJECTIONS} projections, as ratios "
        f"to the step by hand. {machine()}.",
        "",
        *rows(arguments.seconds),
    ]
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
