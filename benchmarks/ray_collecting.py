"""How many more steps a second several workers of Ray collect than one, of an env that waits.

    python benchmarks/ray_collecting.py [--workers 1 4 8] [--out docs/benchmarks/ray.md]

The env sleeps 20 ms at each step, as one does that waits for a simulator elsewhere: that needs no
core. The policy is a small network, and nothing is learnt. All collectors are alive at once and take
turns, with six batches in a round, the first of which is not counted: it was made before the
round began. The ratios are medians over the rounds; the reference is the bare env in this process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import torch
from common import begin, finish, machine, parser
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm.trainers import make_real_env, RunConfig
from torchrl_wm.trainers.collectors import real_steps

SLEEP, BATCH, COUNTED = 0.02, 10, 5


class Sleeping(gymnasium.Env):
    """Each step takes 20 ms, and no core."""

    observation_space = gymnasium.spaces.Box(-1, 1, (8,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(8, np.float32), {}

    def step(self, action):
        time.sleep(SLEEP)
        return np.zeros(8, np.float32), 0.0, False, False, {}


def make_sleeping() -> Sleeping:
    # By value, as workers do not find this script.
    return Sleeping()


def collecting(workers: int) -> tuple[Iterator[TensorDictBase], Callable[[], None]]:
    """The steps of so many workers, and what ends them."""
    config = RunConfig(
        collector="ray",
        num_envs=workers,
        ray_cpus=0.0,  # they wait
        ray_batch=BATCH,
        random_steps=1,
        max_episode_steps=100,
        logger="csv",
    )
    env = make_real_env(make_sleeping, max_episode_steps=100)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2), nn.Tanh())
    policy = TensorDictModule(net, ["observation"], ["action"])
    collector = real_steps(config, make_sleeping, env, policy, torch.device("cpu"))
    collector.begin()

    def steps() -> Iterator[TensorDictBase]:
        total = 0
        for new in collector:
            total += len(new)
            collector.finished(collector.count(new, total), 0)
            yield new

    return steps(), collector.shutdown


def bare(seconds: float) -> float:
    """The steps a second of the env alone, in this process."""
    env, steps = make_sleeping(), 0
    env.reset()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        env.step(None)
        steps += 1
    return steps / (time.perf_counter() - began)


def resident(process: int) -> float:
    """Megabytes of a process that are in memory, without pages of files."""
    with open(f"/proc/{process}/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def memory_of_workers() -> float:
    """The mean memory of a worker, in megabytes."""
    sizes = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline") as file:
                if "ray::EnvWorker" in file.read():
                    sizes.append(resident(int(process)))
        except OSError:
            continue
    return statistics.mean(sizes)


def main() -> None:
    args = parser(__doc__, 60.0)
    args.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
    args = args.parse_args()
    begin(args)
    import ray

    # All workers may be there at once.
    os.environ["RAY_worker_niceness"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    made = {number: collecting(number) for number in args.workers}
    for steps, _ in made.values():
        next(steps)  # they have started
    rounds: list[dict[int, float]] = []
    until = time.perf_counter() + args.seconds
    while time.perf_counter() < until or len(rounds) < 3:
        rounds.append({0: bare(0.5)})
        for number, (steps, _) in made.items():
            for _ in range(BATCH):
                next(steps)
            began = time.perf_counter()
            for _ in range(COUNTED * BATCH):
                next(steps)
            spent = time.perf_counter() - began
            rounds[-1][number] = number * COUNTED * BATCH / spent
    memory = memory_of_workers()
    for _, end in made.values():
        end()
    ray.shutdown()

    def ratio(number: int, to: int) -> float:
        return statistics.median(each[number] / each[to] for each in rounds)

    first = args.workers[0]
    text = [
        f"{machine()}, Ray {ray.__version__}; {len(rounds)} rounds.",
        "",
        f"| workers | steps a second, to the bare env | to {first} worker |",
        "|---|---|---|",
        *(
            f"| {number} | {ratio(number, 0):.2f} | {ratio(number, first):.2f} |"
            for number in args.workers
        ),
        "",
        f"A worker takes {memory:.0f} MB of memory of its own, most of it TorchRL and torch.",
        "",
    ]
    print("\n".join(text))  # noqa: T201
    finish(args, text)


if __name__ == "__main__":
    main()
