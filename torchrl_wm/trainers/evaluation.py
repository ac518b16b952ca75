"""Run a policy in a real env."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.modules.keys import join
from torchrl_wm.trainers.real_envs import episode_seeds

#: The longest episode where nobody limits it.
MAX_STEPS = 10_000


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
    """Whole episodes of a policy, which does not explore unless asked to.

    Args:
        env: a real env of batch size ``[]``.
        policy: what acts; random actions if None.
        episodes: how many.

    Keyword Args:
        first_episode: the number of the first one, which with the seed of the env says how
            they begin; needs an env of :func:`~torchrl_wm.trainers.make_real_env`.
        max_steps: where to cut episodes that do not end.
        callback: as of :meth:`torchrl.envs.EnvBase.rollout`.
        exploration: how the policy acts.

    Returns:
        The episodes, ``[T]`` each. The global random state is left as it was.

    Examples:
        >>> from torchrl_wm.trainers import make_real_env, run_episodes
        >>> env = make_real_env("Pendulum-v1", seed=0)
        >>> [len(episode) for episode in run_episodes(env, None, 2, first_episode=0)]
        [200, 200]
    """
    if first_episode is not None:
        episode_seeds(env).episode = first_episode
    with torch.random.fork_rng(devices=[]), set_exploration_type(exploration):
        return [
            env.rollout(max_steps, policy, callback=callback) for _ in range(episodes)
        ]


def episode_return(env: EnvBase, episode: TensorDictBase) -> float:
    """The sum of an episode's rewards."""
    return episode.get(join("next", env.reward_key)).sum().item()
