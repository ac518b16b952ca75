"""What the Gymnasium export costs: ratios, everything measured in this process.

    python benchmarks/export.py --out docs/benchmarks/export.md

- A vector env of N imagined envs against Gymnasium's SyncVectorEnv over N single envs of the
  same model, and Stable-Baselines3's DummyVecEnv over them against our SB3 VecEnv.
- What one step of a single env, and of a vector env, adds to the bare call of the model: what
  a caller of the model cannot do without, who has the action as numpy and wants numpy back.
- How often the model is called in a vector step.
"""

from __future__ import annotations

from collections.abc import Callable

import common
import gymnasium
import numpy as np
import torch
from common import machine, measure, Reference
from gymnasium.vector import SyncVectorEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.modules import MLP

from torchrl_wm import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    WorldModel,
    WorldModelEnv,
)

ACTION = 2


class Adapted(nn.Module):
    """The same networks as an object with methods, for the adapters."""

    def __init__(self, dynamics: nn.Module, reward: nn.Module, latent: int) -> None:
        super().__init__()
        self.dynamics, self.reward, self.latent = dynamics, reward, latent

    def reset(self):
        state = torch.zeros(self.latent)
        return state, state

    def step(self, state, action):
        state = self.dynamics(state, action)
        return state, state, self.reward(state)


class Still(nn.Module):
    """A model that costs nothing: what remains is the adapters' own time."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.state, self.reward = torch.zeros(latent), torch.zeros(1)

    def reset(self):
        return self.state, self.state

    def step(self, state, action):
        return self.state, self.state, self.reward


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(*inputs)


def make(latent: int, hidden: int) -> tuple[WorldModelEnv, Adapted]:
    """A model of one hidden layer, in both forms, with the same networks."""
    dynamics = MLP(latent + ACTION, latent, num_cells=[hidden])
    reward = MLP(latent, 1, num_cells=[hidden])
    world_model = WorldModel(
        Mod(nn.Identity(), ["latent"], ["latent"]),
        Mod(dynamics, ["latent", "action"], [("next", "latent")]),
        Mod(reward, [("next", "latent")], [("next", "reward")]),
    ).eval()
    start = TensorDict({"latent": torch.zeros(1, latent)}, [1])
    env = WorldModelEnv(world_model, Reference([], latent, ACTION), start_states=start)
    return env, Adapted(dynamics, reward, latent).eval()


def spaces_of(latent: int) -> tuple[gymnasium.Space, gymnasium.Space]:
    box = gymnasium.spaces.Box
    return box(-np.inf, np.inf, (latent,)), box(-np.inf, np.inf, (ACTION,))


def stepping(env) -> Callable[[], object]:
    """One step after another, without ends."""
    env.reset()
    shape, lead = env.action_space.shape, getattr(env, "num_envs", None)
    if lead is not None and not hasattr(env, "single_action_space"):  # SB3's
        shape = (lead, *shape)
    action = np.zeros(shape, np.float32)
    return lambda: env.step(action)


def vector_rows(
    models: list[tuple[int, int]], counts: list[int], seconds: float
) -> list[str]:
    """The vector env against single envs in turn, by Gymnasium and by Stable-Baselines3."""
    rows = [
        "| envs | latent | hidden | vector env, us/step | SyncVectorEnv / vector env "
        "| ... over adapters | DummyVecEnv / SB3VecEnv | vector env / bare call |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for latent, hidden in models:
        for count in counts:
            env, adapted = make(latent, hidden)
            loops = {
                "ours": stepping(GymWorldModelVectorEnv(env, num_envs=count)),
                "sync": stepping(
                    SyncVectorEnv([lambda e=env: GymWorldModelEnv(e)] * count)
                ),
                "adapters": stepping(
                    SyncVectorEnv(
                        [lambda m=adapted, n=latent: GymWorldModelEnv(m, *spaces_of(n))]
                        * count
                    )
                ),
                "bare": bare(adapted, (count,)),
            }
            try:
                from stable_baselines3.common.vec_env import DummyVecEnv

                from torchrl_wm.export import SB3VecEnv

                loops["dummy"] = stepping(
                    DummyVecEnv([lambda e=env: GymWorldModelEnv(e)] * count)
                )
                loops["sb3"] = stepping(SB3VecEnv(env, num_envs=count))
            except ImportError:
                pass
            best = measure(loops, seconds)
            dummy = f"{best['dummy'] / best['sb3']:.0f}" if "sb3" in best else "-"
            rows.append(
                f"| {count} | {latent} | {hidden} | {best['ours'] * 1e6:.0f} "
                f"| {best['sync'] / best['ours']:.0f} | {best['adapters'] / best['ours']:.0f} "
                f"| {dummy} | {best['ours'] / best['bare']:.2f} |"
            )
            print(rows[-1], flush=True)
    return rows


def bare(model: nn.Module, lead: tuple[int, ...] = ()) -> Callable[[], object]:
    """What every caller of the model does, and nothing more.

    An action as numpy in, the state moved on without a graph, observation and reward as numpy out.
    No copies, no checks, no random numbers of its own.
    """
    state, action = torch.zeros(*lead, model.latent), np.zeros((*lead, ACTION), "f4")

    def step() -> tuple[np.ndarray, object]:
        nonlocal state
        with torch.no_grad():
            state, observation, reward = model.step(state, torch.from_numpy(action))
        return observation.numpy(), reward.numpy() if lead else float(reward)

    return step


def repeated(loop: Callable[[], object], times: int = 10) -> Callable[[], None]:
    """Several steps, as an episode makes them: one alone finds cold caches."""

    def run() -> None:
        for _ in range(times):
            loop()

    return run


def single_rows(models: list[tuple[int, int]], seconds: float) -> list[str]:
    """What a single env's step adds to the model's."""
    rows = [
        "| latent | hidden | bare call, us | adapters add, us | as a ratio | WorldModelEnv adds, us "
        "| as a ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for latent, hidden in [(4, None), *models]:
        if hidden is None:
            env, adapted = None, Still(latent)
        else:
            env, adapted = make(latent, hidden)
        loops = {
            "bare": bare(adapted),
            "adapters": stepping(GymWorldModelEnv(adapted, *spaces_of(latent))),
        }
        if env is not None:
            loops["world model"] = stepping(GymWorldModelEnv(env))
        best = measure({k: repeated(loop) for k, loop in loops.items()}, seconds)
        best = {name: seconds / 10 for name, seconds in best.items()}
        floor = best["bare"]
        added = " | ".join(
            f"{(best[k] - floor) * 1e6:.1f} | {best[k] / floor - 1:.2f}"
            if k in best
            else "- | -"
            for k in ("adapters", "world model")
        )
        name = "no network" if hidden is None else hidden
        rows.append(f"| {latent} | {name} | {floor * 1e6:.1f} | {added} |")
        print(rows[-1], flush=True)
    return rows


def calls_per_step(count: int = 256, steps: int = 100) -> float:
    """Calls of the dynamics in a vector step, episodes that end and begin among them."""
    env, _ = make(4, 64)
    net = env.world_model.dynamics.module
    env.world_model.dynamics.module = counted = Counted(net)
    calls = []
    for mode in ("NextStep", "SameStep"):
        envs = GymWorldModelVectorEnv(
            env, num_envs=count, max_episode_steps=7, autoreset_mode=mode
        )
        step = stepping(envs)
        counted.calls = 0
        for _ in range(steps):
            step()
        calls.append(counted.calls / steps)
    return max(calls)


def main() -> None:
    parser = common.parser(__doc__, seconds=3.0)
    parser.add_argument("--envs", type=int, nargs="+", default=[16, 256])
    args = parser.parse_args()
    common.begin(args)
    models = [(4, 64), (32, 256), (256, 512)]
    calls = calls_per_step()
    print(f"model calls for each vector step: {calls:g}")
    text = [
        f"Machine: {machine()}.",
        "",
        "Vector envs against single envs of the same model one after the other (the median over "
        "rounds in which all take turns, in one process; microseconds are the least).",
        "",
        *vector_rows(models, args.envs, args.seconds),
        "",
        f"Model calls for each vector step of 256 envs, ends and beginnings among them: "
        f"{calls:g}.",
        "",
        "What a single env's step adds to the bare call of the model: the action from numpy, no "
        "graph, observation and reward back to numpy, without copies, checks or random numbers of "
        "its own. Larger networks push other code out of the processor's caches, so the same "
        "code around them takes longer than around a model that does nothing.",
        "",
        *single_rows(models, args.seconds),
        "",
    ]
    common.finish(args, text)


if __name__ == "__main__":
    main()
