"""Stable-Baselines3 learns inside a model of the pendulum, and then acts in the real one.

Collects real transitions, trains a world model on them, lets SB3's PPO learn in
many imagined envs at once, and compares what the policy earns in the model with
what it earns in the real env from the same starts: the exploitation gap.

    pip install ".[cli,sb3]"
    python examples/sb3_in_a_model.py --seed 0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from pendulum import collect, make_world_model, train
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor
from torchrl._utils import logger as torchrl_logger
from torchrl.envs import GymEnv

from torchrl_wm import GymWorldModelVectorEnv, WorldModelEnv
from torchrl_wm.export import SB3VecEnv

Policy = Callable[[np.ndarray], np.ndarray]


def learn(env: WorldModelEnv, steps: int, episode_steps: int, seed: int) -> PPO:
    """PPO in 32 imagined envs that are stepped as one batch."""
    envs = VecMonitor(SB3VecEnv(env, num_envs=32, max_episode_steps=episode_steps))
    agent = PPO(
        "MlpPolicy",
        envs,
        n_steps=128,
        batch_size=256,
        learning_rate=1e-3,
        gamma=0.9,
        use_sde=True,
        sde_sample_freq=4,
        seed=seed,
        device="cpu",
    )
    return agent.learn(steps)


def real_returns(
    policy: Policy, episodes: int, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Real returns, and the observations that the episodes began with."""
    envs = gymnasium.make_vec("Pendulum-v1", episodes, vectorization_mode="sync")
    observations, _ = envs.reset(seed=seed)
    starts, total = observations.copy(), np.zeros(episodes)
    for _ in range(steps):
        observations, rewards, *_ = envs.step(policy(observations))
        total += rewards
    envs.close()
    return total, starts


def imagined_returns(
    policy: Policy, env: WorldModelEnv, starts: np.ndarray, steps: int
) -> np.ndarray:
    """What the model promises for episodes from the same starts."""
    envs = GymWorldModelVectorEnv(env, num_envs=len(starts))
    observations, _ = envs.reset(options={"observation": starts})
    total = np.zeros(len(starts))
    for _ in range(steps):
        observations, rewards, *_ = envs.step(policy(observations))
        total += rewards
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument("--episode-steps", type=int, default=200)
    parser.add_argument("--train-steps", type=int, default=4000)
    parser.add_argument("--imagined-steps", type=int, default=150_000)
    parser.add_argument("--evaluations", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torchrl_logger.setLevel("WARNING")  # keep its notes out of the report
    began = time.monotonic()

    print(f"1. Collecting {args.episodes} real episodes under random actions")
    data = collect(args.seed, args.episodes, args.episode_steps).reshape(-1)

    print(f"2. Training a world model on these {data.numel()} transitions")
    world_model = make_world_model(data)
    losses = train(world_model, data, args.train_steps)
    print("   " + ", ".join(f"{k} {v.item():.2e}" for k, v in losses.items()))

    print(f"3. SB3's PPO learns from {args.imagined_steps} imagined steps")
    env = WorldModelEnv(world_model, GymEnv("Pendulum-v1"), start_states=data)
    # Short episodes from replayed states: the model is right for a while only.
    limit = min(50, args.episode_steps)
    agent = learn(env, args.imagined_steps, limit, args.seed)

    print(f"4. {args.evaluations} episodes in the real env, and in the model")

    def act(observations: np.ndarray) -> np.ndarray:
        return agent.predict(observations, deterministic=True)[0]

    rng = np.random.default_rng(args.seed)

    def act_randomly(observations: np.ndarray) -> np.ndarray:
        return rng.uniform(-2, 2, (len(observations), 1)).astype(np.float32)

    size = (args.evaluations, args.episode_steps, args.seed + 1000)
    real, starts = real_returns(act, *size)
    imagined = imagined_returns(act, env, starts, args.episode_steps)
    random, _ = real_returns(act_randomly, *size)
    print(
        f"   real return:      {real.mean():8.1f}  (random actions: {random.mean():.1f})"
    )
    print(f"   imagined return:  {imagined.mean():8.1f}")
    print(f"   exploitation gap: {imagined.mean() - real.mean():8.1f}")
    print(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
