"""Planning for many envs from one place, and what a run of many collectors needs per second.

    python benchmarks/scale.py --out docs/benchmarks/scale.md

The first table compares a plan for a batch of N envs with N plans of one env each, in turns. The
second is a budget for TD-MPC2 on paper: from the times and bytes measured here, what 1, 16 and 256
collectors make, send and need.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import common
import torch
from common import Loop, machine, measure
from tensordict import TensorDictBase

from torchrl_wm.trainers import TDMPC2Trainer
from torchrl_wm.trainers.recipes.tdmpc2 import TDMPC2

ENVS, COLLECTORS = (1, 4, 16, 64), (1, 16, 256)
#: The seconds that a real env takes for a step, and the steps between two pushes of weights.
ENV_SECONDS, PUSH = 0.02, 10
DAY, IMAGINED = 86_400, 1_000_000_000


def make_run() -> tuple[TDMPC2, TensorDictBase]:
    """TD-MPC2's small preset on Pendulum, with a replay of random steps, and a state of its env."""
    trainer = TDMPC2Trainer(env="Pendulum-v1", device="cpu", pretraining_updates=1)
    env, recipe = trainer.make_env(), trainer.recipe
    recipe.replay.extend(recipe.kept(env.rollout(200)))
    return recipe, env.reset().unsqueeze(0)


def planning(
    recipe: TDMPC2, state: TensorDictBase, args: argparse.Namespace
) -> tuple[list[str], float]:
    """The table of plans, and the seconds of a plan for one env."""
    table = [
        "| envs | one plan for all of them, ms | plans a second | a planner for each env | ratio |",
        "|---|---|---|---|---|",
    ]
    alone = 0.0
    for number in ENVS:
        batch = state.expand(number).clone()
        loops: dict[str, Loop] = {
            "one": lambda: recipe.policy(state.copy()),
            "all": lambda batch=batch: recipe.policy(batch.copy()),
        }
        times = measure(loops, args.seconds)
        alone = alone or times["one"]
        each, together = 1 / times["one"], number / times["all"]
        table.append(
            f"| {number} | {1e3 * times['all']:.0f} | {together:.0f} | {each:.0f} | "
            f"{together / each:.1f} |"
        )
        print(table[-1], flush=True)
    return table, alone


def budget(recipe: TDMPC2, plan: float, args: argparse.Namespace) -> list[str]:
    """The budget of runs with one update a step, from what is measured here."""
    steps = SimpleNamespace(count=1, total=len(recipe.replay))
    learn = torch.enable_grad()(lambda: recipe.learn(steps))
    update = measure({"update": learn}, args.seconds)["update"]
    sent = _bytes(recipe.replay[:1].values(True, True))
    weights = _bytes([*recipe.policy.parameters(), *recipe.policy.buffers()])
    planner = recipe.planner
    imagined = planner.num_candidates * planner.optim_steps * planner.planning_horizon
    each = 1 / (ENV_SECONDS + plan)
    text = [
        f"A plan takes {1e3 * plan:.0f} ms and imagines {imagined:,} steps, an update takes "
        f"{1e3 * update:.0f} ms, a step of the env {1e3 * ENV_SECONDS:.0f} ms. A step is "
        f"{sent:,} bytes, the weights of the policy, model included, are {weights:,}, and are "
        f"pushed every {PUSH} steps of each collector.",
        "",
        "| collectors | real steps a second | received, kB/s | weights sent, kB/s | learners for an "
        "update a step | updates a step with one learner |",
        "|---|---|---|---|---|---|",
    ]
    for number in COLLECTORS:
        rate = number * each
        cells = (
            f"{number}",
            f"{rate:.0f}",
            f"{rate * sent / 1e3:.1f}",
            f"{rate / PUSH * weights / 1e3:,.0f}",
            f"{rate * update:.1f}",
            f"{min(1.0, 1 / (rate * update)):.3f}",
        )
        text.append(f"| {' | '.join(cells)} |")
        print(text[-1], flush=True)
    per_second = IMAGINED / DAY
    cores = per_second / (imagined / plan)
    return [
        *text,
        "",
        f"{IMAGINED:.0e} imagined steps a day are {per_second:,.0f} a second: {cores:.2f} of this "
        f"core, in plans for one env at a time.",
    ]


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Measure, print and, if asked, write the tables."""
    parser = common.parser(__doc__, seconds=20.0)
    args = parser.parse_args()
    common.begin(args)
    recipe, state = make_run()
    table, plan = planning(recipe, state, args)
    text = [f"{machine()}.", "", *table, "", *budget(recipe, plan, args), ""]
    common.finish(args, text)


if __name__ == "__main__":
    main()
