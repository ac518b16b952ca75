"""One world model, trained by two learners on Ray, with two collectors, on Pendulum-v1.

Two Ray workers act in real envs by planning through the model, and send what they see to a
replay buffer, a Ray worker, too. Two learners draw slices from it and average their gradients;
after each round the collectors get the new model, which stands in their planner. The driver
shows how the error of the model falls on episodes that nobody has trained on.

    pip install "torchrl-wm[ray]"
    python examples/ray_world_model.py --seed 0

The same script uses a cluster: start it with ``--address auto`` on one of its machines.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl._utils import logger as torchrl_logger
from torchrl.collectors.distributed import RayCollector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.trainers import Trainer

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.diagnostics import open_loop_error
from torchrl_wm.models import make_mlp_world_model
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.planners import CEMPlanner

EPISODE, SLICE, HORIZON = 100, 5, 10
LEARNERS, COLLECTORS = 2, 2
#: What each worker reserves. Ray only counts: these CPUs need not exist.
WORKER = {"num_cpus": 1, "num_gpus": 0, "memory": 256 * 2**20}


def make_env() -> GymEnv:
    return GymEnv("Pendulum-v1")


def random_episodes(seed: int, count: int) -> TensorDictBase:
    """Real episodes under random actions, ``[count, EPISODE]``."""
    env = make_env()
    env.set_seed(seed)
    return torch.stack([env.rollout(EPISODE) for _ in range(count)])


def held_out_error(
    world_model: WorldModel, episodes: TensorDictBase, of: str = "model"
) -> float:
    """The mean error of predictions 1 to HORIZON steps ahead."""
    env = WorldModelEnv(world_model, make_env(), decode=True)
    error = open_loop_error(env, episodes, HORIZON)
    return error[of, "observation"].mean().item()


def make_trainer(
    loss: WorldModelLoss, planner: nn.Module, args: argparse.Namespace
) -> Trainer:
    """TorchRL's trainer, with its collectors, its replay buffer and its learners on Ray."""
    first = random_episodes(args.seed, 2)
    fit_normalizers(loss.world_model, first)  # before the learners get their copies
    replay = TensorDictReplayBuffer(
        storage=partial(LazyTensorStorage, 10_000),
        sampler=partial(
            SliceSampler,
            slice_len=SLICE,
            end_key=("next", "done"),
            strict_length=True,
            init_key=None,
        ),
        batch_size=50 * SLICE,
        service_backend="ray",
        service_backend_options={"remote_config": WORKER},
    )
    replay.extend(first.reshape(-1))
    collector = RayCollector(
        [make_env] * COLLECTORS,
        policy=planner,
        frames_per_batch=COLLECTORS * EPISODE,
        total_frames=args.steps,
        remote_configs=WORKER,
        # The last step of a batch ends its trajectory: no slice goes on in another env.
        collector_kwargs={"set_truncated": True},
        sync=True,
    )
    trainer = Trainer(
        collector=collector,
        replay_buffer=replay,
        total_frames=args.steps,
        frame_skip=1,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
        optim_steps_per_batch=args.updates,
        learner_backend="ray",
        learner_backend_options={
            "world_size": LEARNERS,
            "resources_per_rank": {"num_cpus": 1},
            "backend": "gloo",
            "setup_timeout": 300,  # seconds, for a busy machine
            "command_timeout": 300,
        },
        progress_bar=False,
    )

    def report(batch: TensorDictBase) -> None:
        reward = batch["next", "reward"].mean()
        print(f"   {batch.numel()} real steps, mean reward {reward:.2f}", flush=True)

    def fetch() -> None:
        # The driver's model is the one it began with: the trained one is in the collectors.
        states = collector.state_dict()
        planner.load_state_dict(states[0]["policy_state_dict"])

    trainer.register_op("pre_steps_log", report)
    trainer.register_op("shutdown", fetch)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800, help="real steps")
    parser.add_argument("--updates", type=int, default=100, help="after each batch")
    parser.add_argument("--address", help="of a running cluster; starts Ray by default")
    args = parser.parse_args()
    # Ray runs workers behind all other programs: on a busy machine they take minutes to start.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError:
        parser.exit(1, "This example needs Ray: pip install 'torchrl-wm[ray]'\n")
    torchrl_logger.setLevel("WARNING")
    torch.manual_seed(args.seed)
    began = time.monotonic()

    held_out = random_episodes(args.seed + 1000, 3)
    world_model, loss = make_mlp_world_model(
        make_env(), latent_size=16, hidden=(64, 64)
    )
    planner = CEMPlanner(
        WorldModelEnv(world_model, make_env()),
        planning_horizon=8,
        optim_steps=2,
        num_candidates=64,
        top_k=8,
    )
    loss = WorldModelLoss(
        world_model, losses=loss.terms, multi_step=True, slice_len=SLICE, policy=planner
    )

    print(
        f"1. Starting Ray, {COLLECTORS} collectors and {LEARNERS} learners", flush=True
    )
    workers = LEARNERS + COLLECTORS + 1
    local = {"num_cpus": workers, "include_dashboard": False}
    ray.init(args.address, log_to_driver=False, **({} if args.address else local))
    trainer = make_trainer(loss, planner, args)
    before = held_out_error(world_model, held_out)

    print(f"2. Collecting {args.steps} real steps and training on them", flush=True)
    trainer.train()

    after = held_out_error(world_model, held_out)
    print(f"3. Mean error 1 to {HORIZON} steps ahead on 3 held-out episodes")
    still = held_out_error(world_model, held_out, "persistence")
    print(
        f"   before {before:.3f}, after {after:.3f} (that nothing moves: {still:.3f})"
    )
    trainer.replay_buffer.shutdown()
    ray.shutdown()
    print(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
