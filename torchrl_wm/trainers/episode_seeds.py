"""Episodes that are seeded one by one."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import Transform

from torchrl_wm import _upstream


class EpisodeSeeds(Transform):
    """A transform that seeds each episode of an env from ``(seed, number of the episode)``.

    The start of an episode then depends on nothing before it: a run that goes on from a
    checkpoint, or that trains differently in between, meets the same episodes. The global
    random state of torch is left as it was.

    Args:
        seed: the seed of the run.
        episode: the number of the episode that the next reset begins.
        stride: how much is added to the number at each reset: each of ``stride`` envs has
            every ``stride``-th episode.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> from torchrl_wm.trainers import EpisodeSeeds
        >>> env = TransformedEnv(GymEnv("Pendulum-v1"), EpisodeSeeds(seed=0))
        >>> first, second = env.reset(), env.reset()
        >>> env.transform.episode = 1
        >>> bool((env.reset()["observation"] == second["observation"]).all())
        True
    """

    def __init__(self, seed: int, episode: int = 0, stride: int = 1) -> None:
        _upstream.check_replaced(Transform)
        super().__init__()
        self.seed, self.episode, self.stride = seed, episode, stride
        self._outer_state: torch.Tensor | None = None

    def _reset_env_preprocess(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._outer_state = torch.get_rng_state()
        self.parent.set_seed(episode_seed(self.seed, self.episode), static_seed=True)
        self.episode += self.stride
        return tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        torch.set_rng_state(self._outer_state)
        return tensordict_reset


def episode_seed(seed: int, episode: int) -> int:
    """Return a seed of 31 bits for an episode of a run; different runs have unrelated seeds."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0] >> 1)
