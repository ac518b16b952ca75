"""How good plans are, on problems whose optimum is known.

    python benchmarks/planning_quality.py --out docs/benchmarks/planning_quality.md

Each problem is a world model written by hand, so that planning alone is measured. A score of 1
is the optimum; for the pendulum it is the mean return of whole episodes under TorchRL's true
dynamics.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.custom.pendulum import PendulumEnv

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPCPlanner, MPPIPlanner

MakePlanner = Callable[..., MPCPlanner]


class Specs(EnvBase):
    """A reference env that only has specs."""

    def __init__(self, latent: int, action: TensorSpec) -> None:
        super().__init__()
        self.observation_spec = Composite(latent=Unbounded((latent,)))
        self.action_spec = action
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict, **kwargs):
        raise NotImplementedError

    def _step(self, tensordict):
        raise NotImplementedError

    def _set_seed(self, seed):
        return seed


def make_env(
    latent: int,
    action: TensorSpec,
    dynamics: Callable,
    reward: Callable,
    terminated: Callable | None = None,
) -> WorldModelEnv:
    """An env of known functions.

    Args:
        latent: the size of the state.
        action: the action spec.
        dynamics: the next state from state and action.
        reward: the reward ``[*B, 1]`` from state, action and next state.
        terminated: bool ``[*B, 1]`` from the next state.
    """
    latent_next = ("next", "latent")
    done = None
    if terminated is not None:
        done = Mod(terminated, [latent_next], [("next", "terminated")])
    model = WorldModel(
        Mod(nn.Identity(), ["latent"], ["latent"]),
        Mod(dynamics, ["latent", "action"], [latent_next]),
        Mod(reward, ["latent", "action", latent_next], [("next", "reward")]),
        done_head=done,
    )
    return WorldModelEnv(model, Specs(latent, action))


@dataclass
class Problem:
    """An env, where to start, and what a plan can reach at most.

    Args:
        env: the env.
        start: the state ``[L]``.
        horizon: the number of steps.
        score: how good a return is: 1 is the optimum.
    """

    env: WorldModelEnv
    start: torch.Tensor
    horizon: int
    score: Callable[[torch.Tensor], torch.Tensor]

    def of(self, planner: MPCPlanner, rows: int) -> torch.Tensor:
        """The scores ``[rows]`` of plans, as the env itself judges them."""
        start = TensorDict({"latent": self.start.expand(rows, -1)}, [rows])
        actions = planner.plan(start)["actions"]
        imagined = self.env.imagine(self.horizon, tensordict=start, actions=actions)
        valid = imagined["collector", "mask"].unsqueeze(-1)
        return self.score((imagined["next", "reward"] * valid).sum((1, 2)))


def quadratic(low: float, high: float, horizon: int = 8) -> Problem:
    """Every action should be at four fifths of its range."""
    target, size = low + 0.8 * (high - low), high - low
    env = make_env(
        1,
        Bounded(low, high, (1,)),
        lambda latent, action: latent,
        lambda latent, action, following: 1 - ((action - target) / size) ** 2,
    )
    return Problem(env, torch.zeros(1), horizon, lambda total: total / horizon)


def cliff(horizon: int = 15) -> Problem:
    """Walk to 0.8 and stay; behind the cliff at 1 is more, which nobody lives to collect."""

    def reward(latent, action, following):
        behind = 20.0 * (following > 1)
        return behind * (latent > 1) + (1 - (following - 0.8).abs()).clamp_min(0)

    env = make_env(
        1,
        Bounded(-0.2, 0.2, (1,)),
        lambda latent, action: latent + action,
        reward,
        lambda following: following > 1,
    )
    # Four steps of 0.2 to get there, then 1 at each step.
    best = 0.4 + 0.6 + 0.8 + (horizon - 3)
    return Problem(env, torch.zeros(1), horizon, lambda total: total / best)


def chain(one_hot: bool, horizon: int = 10, goal: int = 5) -> Problem:
    """Left, stay or right: a little reward at the start, all of it at the far end."""
    spec = OneHot(3) if one_hot else Categorical(3, (1,))

    def move(latent, action):
        index = action.int().argmax(-1, True) if one_hot else action
        return (latent + index.to(latent.dtype) - 1).clamp(0, goal)

    env = make_env(
        1,
        spec,
        move,
        lambda latent, action, following: 0.1 * (following == 0) + (following == goal),
    )
    best = horizon - goal + 1
    return Problem(env, torch.zeros(1), horizon, lambda total: total / best)


def double_integrator(horizon: int = 15) -> Problem:
    """Bring a mass to rest at the origin; the optimum is the linear-quadratic regulator's."""
    a = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    b = torch.tensor([[0.005], [0.1]])
    q, r = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.01]])
    start = torch.tensor([1.0, 0.0])

    def reward(latent, action, following):
        state = ((following @ q) * following).sum(-1, keepdim=True)
        return -(state + r[0, 0] * action**2)

    env = make_env(
        2,
        Bounded(-10.0, 10.0, (1,)),
        lambda latent, action: latent @ a.T + action @ b.T,
        reward,
    )
    cost = q.clone()  # of the state after the last step
    for _ in range(horizon):
        # Riccati: what a state costs before its step, with the cost of arriving in `cost`.
        gain = torch.linalg.solve(r + b.T @ cost @ b, b.T @ cost @ a)
        before = a.T @ cost @ a - a.T @ cost @ b @ gain
        cost = q + before
    optimum = start @ before @ start
    return Problem(env, start, horizon, lambda total: optimum / -total)


def problems() -> dict[str, Problem]:
    """All of them, by name."""
    bounds = [(-1.0, 1.0), (100.0, 200.0), (0.0, 0.01), (-5.0, 20.0)]
    return {
        **{
            f"quadratic in [{low:g}, {high:g}]": quadratic(low, high)
            for low, high in bounds
        },
        "deceptive cliff": cliff(),
        "chain, one-hot": chain(True),
        "chain, categorical": chain(False),
        "double integrator": double_integrator(),
    }


#: The settings of the table; what is not said is the planners' default.
PLANNERS: dict[str, tuple[MakePlanner, dict]] = {
    "CEM": (CEMPlanner, {}),
    "iCEM": (ICEMPlanner, {}),
    "MPPI": (MPPIPlanner, {}),
}
BUDGET = {"optim_steps": 10, "num_candidates": 500, "top_k": 10}


@torch.no_grad()
def scores(name: str, problem: Problem, seeds: int) -> torch.Tensor:
    """One score for each seed, ``[seeds]``."""
    make, options = PLANNERS[name]
    planner = make(
        env=problem.env, planning_horizon=problem.horizon, **BUDGET, **options
    )
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found.append(problem.of(planner, 1))
    return torch.cat(found)


@torch.no_grad()
def pendulum_returns(name: str, seeds: int, steps: int = 200) -> torch.Tensor:
    """Returns of whole episodes, planned in the true dynamics, ``[seeds]``."""
    make, options = PLANNERS[name]
    env = PendulumEnv()
    torch.manual_seed(0)
    state = env.reset(env.gen_params(batch_size=[seeds]), set_state=True)
    planner = make(
        env=env,
        planning_horizon=20,
        optim_steps=4,
        num_candidates=150,
        top_k=15,
        **options,
    )
    total = torch.zeros(seeds)
    for _ in range(steps):
        step = env.step(planner(state))
        total += step["next", "reward"].squeeze(-1)
        state = env.step_mdp(step)
    return total


def main() -> None:
    """Run all, print and, if asked, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        f"Scores of {args.seeds} seeds, mean (lowest): 1 is the optimum. {BUDGET}.",
        "",
        "| problem | " + " | ".join(PLANNERS) + " |",
        "|---|" + "---|" * len(PLANNERS),
    ]
    for title, problem in problems().items():
        cells = []
        for name in PLANNERS:
            found = scores(name, problem, args.seeds)
            cells.append(f"{found.mean():.3f} ({found.min():.3f})")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    cells = []
    for name in PLANNERS:
        found = pendulum_returns(name, args.seeds)
        cells.append(f"{found.mean():.0f} ({found.min():.0f})")
    lines.append("| pendulum, mean return | " + " | ".join(cells) + " |")
    print(lines[-1])
    if args.out is not None:
        args.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
