"""A plan and an update of TD-MPC2 beside the authors' code, everything measured in this process.

    git clone https://github.com/nicklashansen/tdmpc2 ../tdmpc2
    python benchmarks/tdmpc2.py --checkout ../tdmpc2 --compile --out docs/benchmarks/tdmpc2_cost.md

The authors' code asks for a GPU by name; its sources are read with that name replaced, and are
not changed on the disk. Networks, batches and plans have the same sizes, without a termination
head, as theirs by default. An update is model, values, policy and targets on a batch that is
there already; a plan is from one observation to the action. With --compile, plans and updates of
this package are measured as graphs, too, with the seconds of their first call.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

# The first call of a graph is measured as it is on a new machine.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import common
import gymnasium
import numpy as np
import torch
from common import Loop, machine, measure
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.trainers import TDMPC2Trainer

OBSERVATION, ACTION, HORIZON = 17, 6, 3
#: Theirs, in the order in which they import each other.
MODULES = ("math", "init", "layers", "scale", "world_model")
#: What stands in the way on a CPU.
_REPLACED = {
    "cuda:0": "cpu",
    "capturable=True": "capturable=False",
    "WorldModel(cfg).to(self.device)": "WorldModel(cfg)",
}
SIZES = {
    "0.2M": {"latent": 64, "cells": 128, "encoder": 128, "q": 2},
    "0.7M": {"latent": 128, "cells": 256, "encoder": 256, "q": 2},
    "1.9M": {"latent": 128, "cells": 384, "encoder": 256, "q": 5},
}


class Still(gymnasium.Env):
    """An env that is all specs."""

    observation_space = gymnasium.spaces.Box(-10, 10, (OBSERVATION,))
    action_space = gymnasium.spaces.Box(-1, 1, (ACTION,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(OBSERVATION, np.float32), {}

    def step(self, action):
        return np.zeros(OBSERVATION, np.float32), 0.0, False, False, {}


def ours(size: dict, args: argparse.Namespace, compiled: bool = False):
    """The recipe of this package."""
    return TDMPC2Trainer(
        env=Still,
        device="cpu",
        preset="1M",
        latent_size=size["latent"],
        num_cells=size["cells"],
        encoder_cells=size["encoder"],
        num_q=size["q"],
        batch_size=args.batch,
        num_candidates=args.candidates,
        optim_steps=args.iterations,
        termination="none",
        horizon=HORIZON,
        gamma=0.99,
        replay_capacity=10_000,
        compile=compiled,
    ).recipe


@contextmanager
def imported(checkout: Path):
    """Give the authors' agent, read from a checkout."""
    root = checkout / "tdmpc2" if (checkout / "tdmpc2").is_dir() else checkout
    taken = {name: sys.modules.get(name) for name in ("common", "tdmpc2")}
    try:
        package = sys.modules["common"] = ModuleType("common")
        package.__path__ = []
        for name in (*(f"common.{name}" for name in MODULES), "tdmpc2"):
            source = (root / f"{name.replace('.', '/')}.py").read_text()
            for there, here in _REPLACED.items():
                source = source.replace(there, here)
            module = sys.modules[name] = ModuleType(name)
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
            if name != "tdmpc2":
                setattr(package, name.partition(".")[2], module)
        yield sys.modules["tdmpc2"].TDMPC2
    finally:
        for name, module in taken.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def theirs(size: dict, args: argparse.Namespace):
    """The authors' agent, in the same size."""
    config = SimpleNamespace(
        obs="state",
        obs_shape={"state": (OBSERVATION,)},
        action_dim=ACTION,
        episode_length=500,
        task_dim=0,
        multitask=False,
        episodic=False,
        compile=False,
        mpc=True,
        batch_size=args.batch,
        reward_coef=0.1,
        value_coef=0.1,
        termination_coef=1,
        consistency_coef=20,
        rho=0.5,
        lr=3e-4,
        enc_lr_scale=0.3,
        grad_clip_norm=20,
        tau=0.01,
        discount_denom=5,
        discount_min=0.95,
        discount_max=0.995,
        iterations=args.iterations,
        num_samples=args.candidates,
        num_elites=64,
        num_pi_trajs=24,
        horizon=HORIZON,
        min_std=0.05,
        max_std=2,
        temperature=0.5,
        log_std_min=-10,
        log_std_max=2,
        entropy_coef=1e-4,
        num_bins=101,
        vmin=-10,
        vmax=10,
        bin_size=0.2,
        num_enc_layers=2,
        enc_dim=size["encoder"],
        mlp_dim=size["cells"],
        latent_dim=size["latent"],
        num_q=size["q"],
        dropout=0.01,
        simnorm_dim=8,
    )
    with imported(args.checkout) as kind:
        return kind(config)


def loops(size: dict, args: argparse.Namespace) -> dict[str, dict[str, Loop]]:
    """Return the loops to compare, for a plan and for an update: theirs, ours, ours compiled."""
    agent = theirs(size, args)
    recipes = {"ours": ours(size, args)}
    if args.compile:
        recipes["compiled"] = ours(size, args, compiled=True)
    batch = args.batch
    observed = torch.randn(batch, HORIZON + 1, OBSERVATION)
    action = torch.rand(batch, HORIZON, ACTION) * 2 - 1
    reward = torch.randn(batch, HORIZON, 1)
    never = torch.zeros(batch, HORIZON, 1, dtype=torch.bool)
    rows = {
        "observation": observed[:, :-1],
        "action": action,
        "is_init": never,
        "next": {"observation": observed[:, 1:], "reward": reward},
    }
    for name in ("done", "terminated", "truncated"):
        rows["next"][name] = never
    rows = TensorDict(rows, [batch, HORIZON])
    start = TensorDict({"observation": torch.randn(OBSERVATION)}, [])
    turned = [part.movedim(0, 1).contiguous() for part in (observed, action, reward)]

    def plan(recipe) -> Loop:
        @torch.no_grad()
        def run() -> None:
            with set_exploration_type(ExplorationType.RANDOM):
                recipe.planner(start.copy())

        return run

    def update(recipe) -> Loop:
        recipe.sample = rows.copy
        recipe.counts.updates = 1  # the random steps are over
        return torch.enable_grad()(lambda: recipe.learn(SimpleNamespace(count=1)))

    plans = {"theirs": lambda: agent.act(start["observation"])}
    updates = {
        "theirs": torch.enable_grad()(lambda: agent._update(*turned, turned[2] * 0))
    }
    for name, recipe in recipes.items():
        plans[name], updates[name] = plan(recipe), update(recipe)
    return {"plan": plans, "update": updates}


def rows(args: argparse.Namespace) -> list[str]:
    """The table."""
    names = ["parameters", "", "theirs, ms", "ours, ms", "ours / theirs"]
    if args.compile:
        names += [
            "compiled, ms",
            "compiled / ours",
            "compiled / theirs",
            "first call, s",
        ]
    table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name in args.sizes:
        for what, compared in loops(SIZES[name], args).items():
            cells = [name, what, *measured(compared, args.seconds)]
            table.append(f"| {' | '.join(cells)} |")
            print(table[-1], flush=True)
    return table


def measured(compared: dict[str, Loop], seconds: float) -> list[str]:
    """Return the cells of one row: times, and their ratios."""
    began = time.perf_counter()
    if "compiled" in compared:
        compared["compiled"]()
    first = time.perf_counter() - began
    times = measure(compared, seconds)
    theirs_, ours_ = times["theirs"], times["ours"]
    cells = [f"{1e3 * theirs_:.1f}", f"{1e3 * ours_:.1f}", f"{ours_ / theirs_:.2f}"]
    if "compiled" in times:
        compiled = times["compiled"]
        cells += [f"{1e3 * compiled:.1f}", f"{compiled / ours_:.2f}"]
        cells += [f"{compiled / theirs_:.2f}", f"{first:.0f}"]
    return cells


def main() -> None:
    """Measure, print and, if asked, write the table."""
    parser = common.parser(__doc__, seconds=20.0)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="compile ours, too")
    args = parser.parse_args()
    common.begin(args)
    text = [
        f"Machine: {machine()}.",
        "",
        f"A plan: {args.candidates} candidates, {args.iterations} iterations, 24 of the policy, "
        f"horizon {HORIZON}. An update: {args.batch} sequences of {HORIZON} steps. Observations of "
        f"{OBSERVATION} numbers, actions of {ACTION}.",
        "",
        *rows(args),
        "",
    ]
    common.finish(args, text)


if __name__ == "__main__":
    main()
