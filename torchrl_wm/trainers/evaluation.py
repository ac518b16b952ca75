"""Run a policy in a real env."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm._interrupts import check_interrupt
from torchrl_wm.modules import memory_apart
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.real_envs import episode_seeds

#: The most steps of an episode without a time limit.
MAX_STEPS = 10_000


@contextmanager
def forked_random(seed: int | None = None) -> Iterator[None]:
    """Leave all global random states as they were: torch's on all devices, NumPy's and Python's.

    Args:
        seed: the seed inside; None goes on from the current states.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


@torch.no_grad()
def run_episodes(
    env: EnvBase,
    policy: Callable | None,
    episodes: int,
    *,
    first_episode: int | None = None,
    max_steps: int = MAX_STEPS,
    callback: Callable | None = None,
    exploration: ExplorationType = ExplorationType.DETERMINISTIC,
) -> list[TensorDictBase]:
    """Return whole episodes of a policy, by default without exploration.

    Args:
        env: a real env of batch size ``[]``.
        policy: the policy, on any device; modules act in eval mode. None acts at random.
        episodes: how many episodes to run.

    Keyword Args:
        first_episode: the number of the first episode. The numbers and the seed of the env, one
            of :func:`~torchrl_wm.trainers.make_real_env`, determine how episodes begin.
        max_steps: where to cut episodes that do not end.
        callback: as for :meth:`torchrl.envs.EnvBase.rollout`.
        exploration: the exploration type of the policy.

    Returns:
        The episodes, ``[T]`` each. The global random states are left as they were.

    Examples:
        >>> from torchrl_wm.trainers import make_real_env, run_episodes
        >>> env = make_real_env("Pendulum-v1", seed=0)
        >>> [len(episode) for episode in run_episodes(env, None, 2, first_episode=0)]
        [200, 200]
    """
    if first_episode is not None:
        episode_seeds(env).episode = first_episode

    def after_step(*args: Any) -> None:
        check_interrupt()
        if callback is not None:
            callback(*args)

    moves = device_of(policy) not in (None, torch.device("cpu"))
    mode = evaluation_mode(policy)
    apart = memory_apart(policy)
    with forked_random(), set_exploration_type(exploration), mode, apart:
        return [
            env.rollout(
                max_steps, policy, callback=after_step, auto_cast_to_device=moves
            )
            for _ in range(episodes)
        ]


def episode_return(env: EnvBase, episode: TensorDictBase) -> float:
    """Return the sum of an episode's rewards."""
    return episode.get(join("next", env.reward_key)).sum().item()


def device_of(policy: Any) -> torch.device | None:
    """Return where a policy's parameters are."""
    parameters = getattr(policy, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    return getattr(first, "device", None)
