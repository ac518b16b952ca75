"""What imagination costs, as a ratio to the bare networks.

    python benchmarks/bench_rollout.py

The reference is a loop that calls the same networks on the same inputs and
keeps nothing. All variants run in this process, in turn, and the minimum over
the rounds counts. "TorchRL" is TorchRL's own WorldModelEnv with its specs
repaired, without which its latent stands still.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.model_based import WorldModelEnv as TorchRLEnv
from torchrl.modules import MLP, WorldModel as TorchRLModel

from torchrl_wm import WorldModel, WorldModelEnv

LATENT, ACTION = 64, 6


class Reference(EnvBase):
    """An env that only has specs."""

    def __init__(self, batch_size: list[int]) -> None:
        super().__init__(batch_size=batch_size)
        size = self.batch_size
        self.observation_spec = Composite(latent=Unbounded((*size, LATENT)), shape=size)
        self.action_spec = Unbounded((*size, ACTION))  # TorchRL refuses a Bounded one
        self.reward_spec = Unbounded((*size, 1))

    def _reset(self, tensordict, **kwargs):
        raise NotImplementedError

    def _step(self, tensordict):
        raise NotImplementedError

    def _set_seed(self, seed):
        return seed


class RepairedTorchRLEnv(TorchRLEnv):
    """TorchRL's env with whole specs and the latent among its observations."""

    def __init__(self, world_model, base_env: EnvBase) -> None:
        super().__init__(
            world_model, base_env, observation_spec=base_env.observation_spec.clone()
        )
        self.full_action_spec = base_env.full_action_spec.clone()
        self.full_reward_spec = base_env.full_reward_spec.clone()
        self.full_done_spec = base_env.full_done_spec.clone()


def variants(batch: int, horizon: int) -> dict[str, Callable[[], None]]:
    """The loops to compare, by name; the first is the reference."""
    hidden = {"num_cells": [256, 256]}
    parts = (
        Mod(torch.nn.Identity(), ["observation"], ["latent"]),
        Mod(
            MLP(LATENT + ACTION, LATENT, **hidden),
            ["latent", "action"],
            [("next", "latent")],
        ),
        Mod(MLP(LATENT, 1, **hidden), [("next", "latent")], [("next", "reward")]),
    )
    policy = Mod(MLP(LATENT, ACTION, **hidden), ["latent"], ["action"])
    reference = Reference([batch])
    ours = WorldModelEnv(WorldModel(*parts), reference)
    theirs = RepairedTorchRLEnv(TorchRLModel(*parts), reference)
    start = TensorDict({"latent": torch.randn(batch, LATENT)}, [batch])
    dynamics, reward, act = parts[1].module, parts[2].module, policy.module

    def networks() -> None:
        latent = start["latent"]
        for _ in range(horizon):
            latent = dynamics(latent, act(latent))
            reward(latent)

    return {
        "networks": networks,
        "rollout": lambda: ours.rollout(horizon, policy, tensordict=start.clone()),
        "imagine": lambda: ours.imagine(horizon, policy, start),
        "TorchRL": lambda: theirs.rollout(horizon, policy, tensordict=start.clone()),
    }


@torch.no_grad()
def measure(batch: int, horizon: int, rounds: int) -> dict[str, float]:
    """Seconds of one call, the minimum over interleaved rounds."""
    loops = variants(batch, horizon)
    best = dict.fromkeys(loops, float("inf"))
    for _ in range(rounds + 1):  # the first round warms up
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horizon", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pandas = importlib.util.find_spec("pandas") is not None
    print(f"torch {torch.__version__}, 1 thread, pandas importable: {pandas}")
    print(f"horizon {args.horizon}; time as a ratio to the bare networks\n")
    print(f"{'batch':>6} {'networks':>12} {'rollout':>8} {'imagine':>8} {'TorchRL':>8}")
    for batch in (1, 16, 256):
        best = measure(batch, args.horizon, args.rounds)
        floor = best.pop("networks")
        ratios = " ".join(f"{value / floor:8.2f}" for value in best.values())
        print(f"{batch:6d} {floor * 1e6 / args.horizon:7.0f} us/st {ratios}")


if __name__ == "__main__":
    main()
