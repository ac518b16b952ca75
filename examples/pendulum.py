"""From nothing to planning in a learned model, on Pendulum-v1.

Collects real transitions, trains a world model on them, shows how well it
predicts episodes it has not seen, imagines a batch of trajectories for a replay
buffer and a value estimator, and acts in the real env by planning through the
model with the cross-entropy method.

    python examples/pendulum.py --seed 0 --out runs/pendulum
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl._utils import logger as torchrl_logger
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, SerialEnv
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives.value import GAE

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.diagnostics import (
    open_loop_error,
    plot_open_loop_error,
    plot_prediction,
)
from torchrl_wm.planners import CEMPlanner
from tqdm import tqdm

LABELS = ["cos(angle)", "sin(angle)", "velocity"]


class DeltaNet(nn.Module):
    """Predicts the change of the observation, in units of its typical change."""

    def __init__(self, scale: torch.Tensor, delta_scale: torch.Tensor) -> None:
        super().__init__()
        self.net = MLP(4, 3, num_cells=[128, 128], activation_class=nn.SiLU)
        self.register_buffer("scale", scale)
        self.register_buffer("delta_scale", delta_scale)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        delta = self.net(observation / self.scale, action / 2)
        return observation + self.delta_scale * delta


class RewardNet(nn.Module):
    """Predicts the reward of an action in a state."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.net = MLP(4, 1, num_cells=[128, 128], activation_class=nn.SiLU)
        self.register_buffer("scale", scale)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return 8 * self.net(observation / self.scale, action / 2)


def make_world_model(data: TensorDictBase) -> WorldModel:
    """A model whose latent is the observation itself, as in PETS and MBPO."""
    observation = data["observation"]
    delta = data["next", "observation"] - observation
    scale, delta_scale = observation.std(0), delta.std(0)
    inputs = ["observation", "action"]
    return WorldModel(
        encoder=TensorDictModule(nn.Identity(), ["observation"], ["observation"]),
        dynamics=TensorDictModule(
            DeltaNet(scale, delta_scale), inputs, [("next", "observation")]
        ),
        reward_head=TensorDictModule(RewardNet(scale), inputs, [("next", "reward")]),
    )


def collect(seed: int, episodes: int, steps: int) -> TensorDictBase:
    """Real episodes under random actions, ``[episodes, steps]``."""
    env = GymEnv("Pendulum-v1")
    env.set_seed(seed)
    bar = tqdm(range(episodes), desc="real episodes", leave=False)
    return torch.stack([env.rollout(steps) for _ in bar])


def train(world_model: WorldModel, data: TensorDictBase, steps: int) -> TensorDictBase:
    """Fit the model to real transitions; returns the last losses."""
    loss_module = WorldModelLoss(
        world_model, losses=["latent", "reward"], latent_weight=10.0
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(data.numel()), batch_size=256
    )
    buffer.extend(data.reshape(-1))
    optimizer = torch.optim.AdamW(loss_module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(range(steps), desc="training", leave=False)
    for step in bar:
        losses = loss_module(buffer.sample())
        optimizer.zero_grad()
        losses.sum(reduce=True).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix({k: f"{v.item():.2e}" for k, v in losses.items()})
    return losses.detach()


def imagine_for_learning(
    env: WorldModelEnv, data: TensorDictBase
) -> tuple[TensorDictBase, TensorDictReplayBuffer]:
    """Imagined trajectories with advantages, and a replay buffer that holds them."""
    rows = data.reshape(-1)
    starts = rows[torch.randint(len(rows), (256,))]
    imagined = env.imagine(horizon=15, tensordict=starts)
    value = ValueOperator(MLP(3, 1, num_cells=[64]), in_keys=["observation"])
    GAE(gamma=0.99, lmbda=0.95, value_network=value)(imagined)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=256)
    buffer.extend(imagined.reshape(-1))
    return imagined, buffer


def act(policy: nn.Module | None, seed: int, steps: int) -> torch.Tensor:
    """Returns of one real episode in each of 3 envs that start differently."""
    real = SerialEnv(3, lambda: GymEnv("Pendulum-v1"))
    real.set_seed(seed)
    with tqdm(total=steps, desc="acting", leave=False) as bar:
        rollout = real.rollout(steps, policy, callback=lambda *_: bar.update())
    return rollout["next", "reward"].sum((-2, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/pendulum"))
    parser.add_argument("--episodes", type=int, default=15)
    parser.add_argument("--episode-steps", type=int, default=200)
    parser.add_argument("--train-steps", type=int, default=4000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torchrl_logger.setLevel("WARNING")  # keep its notes out of the report
    began = time.monotonic()

    print(f"1. Collecting {args.episodes} real episodes of Pendulum-v1, 3 held out")
    episodes = collect(args.seed, args.episodes, args.episode_steps)
    data, held_out = episodes[:-3].reshape(-1), episodes[-3:]
    print(f"   {data.numel()} transitions to train on, {held_out.numel()} held out")

    print(f"2. Training a world model for {args.train_steps} steps")
    world_model = make_world_model(data)
    losses = train(world_model, data, args.train_steps)
    print("   " + ", ".join(f"{k} {v.item():.2e}" for k, v in losses.items()))

    print("3. Open-loop prediction of the held-out episodes (RMSE, mean over dims)")
    env = WorldModelEnv(world_model, GymEnv("Pendulum-v1"))
    error = open_loop_error(env, held_out, horizon=20)
    print("   steps ahead   model   persistence")
    for k in (1, 5, 10, 20):
        model = error["model", "observation"][k - 1].mean()
        persistence = error["persistence", "observation"][k - 1].mean()
        print(f"   {k:11d} {model:7.3f} {persistence:13.3f}")

    print("4. Imagining for a replay buffer and for GAE")
    imagined, buffer = imagine_for_learning(env, data)
    print(
        f"   {tuple(imagined.shape)} imagined steps, advantages {tuple(imagined['advantage'].shape)}"
        f", {len(buffer)} transitions in the buffer"
    )

    print("5. Planning through the model in the real env, 3 episodes")
    planner = CEMPlanner(
        env, planning_horizon=20, optim_steps=4, num_candidates=200, top_k=20
    )
    planned = act(planner, args.seed, args.episode_steps)
    random = act(None, args.seed, args.episode_steps)
    print(f"   planned returns {[round(r) for r in planned.tolist()]}")
    print(f"   random returns  {[round(r) for r in random.tolist()]}")
    print(f"   mean return: planned {planned.mean():.0f}, random {random.mean():.0f}")

    horizon = min(50, args.episode_steps)
    real = held_out[:, :horizon]
    with torch.no_grad():
        starts = real[:, 0].exclude("next")
        guess = env.imagine(horizon, tensordict=starts, actions=real["action"])
    pictures = {
        "prediction.png": plot_prediction(real, guess, "observation", LABELS),
        "open_loop_error.png": plot_open_loop_error(error, "observation"),
    }
    for name, figure in pictures.items():
        figure.savefig(args.out / name, dpi=120)
        print(f"   {args.out / name}")
    print(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
