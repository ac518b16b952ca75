"""What a plan costs: ratios to a hand-written tensor loop, everything measured in this process.

    python benchmarks/planning.py --out docs/benchmarks/planning_cost.md

The hand loop is the cross-entropy method over the same networks on bare tensors. "TorchRL" is
TorchRL's CEMPlanner over TorchRL's ModelBasedEnvBase, wired as in the planner's own example;
TorchRL's WorldModelEnv, with its fixed batch size, cannot be planned in.
"""

from __future__ import annotations

from collections.abc import Callable

import common
import torch
from common import ACTION, LATENT, Loop, machine, make_parts, measure, Reference
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import ModelBasedEnvBase
from torchrl.modules import CEMPlanner as TorchRLPlanner, SafeModule, WorldModelWrapper

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.planners import CEMPlanner, GoalDistance

HORIZON, STEPS, CANDIDATES, ELITES = 15, 5, 500, 50


class TorchRLEnv(ModelBasedEnvBase):
    """TorchRL's env as its planners' examples wire it: root keys, no done head."""

    def __init__(self, parts: dict) -> None:
        dynamics, reward = parts["dynamics"].module, parts["reward_head"].module
        super().__init__(
            WorldModelWrapper(
                SafeModule(dynamics, in_keys=["latent", "action"], out_keys=["latent"]),
                SafeModule(reward, in_keys=["latent"], out_keys=["reward"]),
            )
        )
        self.state_spec = Composite(latent=Unbounded((LATENT,)))
        self.observation_spec = Composite(latent=Unbounded((LATENT,)))
        self.action_spec = Bounded(-1.0, 1.0, (ACTION,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict, **kwargs):
        raise NotImplementedError


def hand_loop(
    parts: dict,
    start: torch.Tensor,
    add: Callable[..., torch.Tensor],
    *goals: torch.Tensor,
) -> Loop:
    """The cross-entropy method on tensors, for the states ``[B, L]``.

    ``add`` adds what a latent is worth to the total so far, given the goals ``[B, L]``, too.
    """
    dynamics = parts["dynamics"].module
    batch = start.shape[0]
    rows = torch.arange(batch).unsqueeze(1)

    def plan() -> torch.Tensor:
        mean = torch.zeros(batch, 1, HORIZON, ACTION)
        std = torch.ones_like(mean)
        states, *rows_of_goals = (
            each.repeat_interleave(CANDIDATES, 0) for each in (start, *goals)
        )
        for _ in range(STEPS):
            noise = torch.randn(batch, CANDIDATES, HORIZON, ACTION)
            actions = (mean + std * noise).clamp(-1, 1)
            latent, total = states, 0.0
            for action in actions.flatten(0, 1).unbind(1):
                latent = dynamics(latent, action)
                total = add(total, latent, *rows_of_goals)
            best = total.reshape(batch, CANDIDATES).topk(ELITES).indices
            elites = actions[rows, best]
            mean = elites.mean(1, keepdim=True)
            std = elites.std(1, keepdim=True, unbiased=False)
        return mean[:, 0, 0]

    return plan


def goal_variants(batch: int) -> dict[str, Loop]:
    """Plans for goals: the hand loop, and a planner whose reward head nobody reads."""
    parts = make_parts(False, False, nn.SiLU)
    parts.pop("policy")
    reference = Reference([])
    reference.action_spec = Bounded(-1.0, 1.0, (ACTION,))
    states = {name: torch.randn(batch, LATENT) for name in ("latent", "goal")}
    start = TensorDict(states, [batch])
    numbers = (HORIZON, STEPS, CANDIDATES, ELITES)
    env = WorldModelEnv(WorldModel(**parts), reference)
    planner = CEMPlanner(env, *numbers, score=GoalDistance("latent", goal="goal"))

    def near(total: torch.Tensor, latent: torch.Tensor, goal: torch.Tensor):
        return total - (latent - goal).square().mean(-1)

    return {
        "hand loop": hand_loop(parts, start["latent"], near, start["goal"]),
        "CEMPlanner": lambda: planner(start.clone()),
    }


def variants(batch: int, *, compiled: bool = False) -> dict[str, Loop]:
    """Plans to compare, for ``batch`` states at once; the first is the reference."""
    # SiLU, as PETS and Dreamer have it. Of tanh, inductor's code for CPUs is slower
    # than eager torch, whatever is planned with it.
    parts = make_parts(False, False, nn.SiLU)
    parts.pop("policy")
    reference = Reference([])
    reference.action_spec = Bounded(-1.0, 1.0, (ACTION,))
    start = TensorDict({"latent": torch.randn(batch, LATENT)}, [batch])
    numbers = (HORIZON, STEPS, CANDIDATES, ELITES)
    ours = CEMPlanner(WorldModelEnv(WorldModel(**parts), reference), *numbers)
    reward = parts["reward_head"].module
    judged = hand_loop(parts, start["latent"], lambda total, z: total + reward(z))
    loops = {"hand loop": judged}
    if compiled:
        ours.compile()
        return {**loops, "compiled": lambda: ours(start.clone())}
    theirs = TorchRLPlanner(TorchRLEnv(parts), *numbers)
    return {
        **loops,
        "CEMPlanner": lambda: ours(start.clone()),
        "TorchRL": lambda: theirs(start.clone()),
    }


def rows(batches: list[int], seconds: float) -> list[str]:
    """The table."""
    lines = [
        "| states at once | hand loop, ms | CEMPlanner | compiled CEMPlanner | TorchRL "
        "| TorchRL / CEMPlanner |",
        "|---|---|---|---|---|---|",
    ]
    for batch in batches:
        eager = measure(variants(batch), seconds)
        graph = measure(variants(batch, compiled=True), seconds)
        floor = eager["hand loop"]
        lines.append(
            f"| {batch} | {floor * 1e3:.0f} | {eager['CEMPlanner'] / floor:.2f} "
            f"| {graph['compiled'] / graph['hand loop']:.2f} | {eager['TorchRL'] / floor:.2f} "
            f"| {eager['TorchRL'] / eager['CEMPlanner']:.2f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "For the distance to a goal in place of the reward:",
        "",
        "| states at once | hand loop, ms | CEMPlanner |",
        "|---|---|---|",
    ]
    for batch in batches:
        goals = measure(goal_variants(batch), seconds)
        floor = goals["hand loop"]
        ratio = goals["CEMPlanner"] / floor
        lines.append(f"| {batch} | {floor * 1e3:.0f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure, print and, if asked, write the table."""
    parser = common.parser(__doc__, seconds=20.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    common.begin(args)
    text = [
        f"Machine: {machine()}.",
        "",
        f"A plan of the cross-entropy method: {CANDIDATES} candidates, horizon {HORIZON}, {STEPS} "
        f"iterations, networks of two layers of 256 (SiLU), the median over rounds in which all take turns; "
        f"ratios to the hand loop.",
        "",
        *rows(args.batches, args.seconds),
        "",
    ]
    common.finish(args, text)


if __name__ == "__main__":
    main()
