"""A worker of Ray: one real env, and a copy of the policy that acts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_wm.trainers.acting import Acting, prepared
from torchrl_wm.trainers.run_state import seed_all


@dataclass(frozen=True)
class Begin:
    """Where a worker begins.

    Args:
        seed: the seed of the run.
        env: the number of the worker's env.
        num_envs: ``N``.
        total: how many steps the run has made.
        random_steps, random_hold: those of the run's config.
    """

    seed: int
    env: int
    num_envs: int
    total: int
    random_steps: int
    random_hold: int


class EnvWorker(Collector):
    """TorchRL's Collector over one real env, in a process of Ray's.

    The worker knows by itself which of its episodes are random: all envs make their steps in
    turns, so that its own steps say how many the run has made.

    Args:
        create_env_fn: makes the env.
        policy: the policy, a copy of the run's.
        begin: where it begins.
        kwargs: for TorchRL's Collector.
    """

    def __init__(
        self,
        create_env_fn: Callable[[], EnvBase],
        policy: TensorDictModuleBase,
        *,
        begin: Begin,
        **kwargs: Any,
    ) -> None:
        # All processes would draw the same random numbers otherwise.
        state = np.random.SeedSequence([begin.seed, begin.env, begin.total])
        seed_all(int(state.generate_state(1)[0]))
        env = prepared(create_env_fn(), policy)
        acting = WorkerActing(policy, env, begin)
        super().__init__(env, acting, auto_register_policy_transforms=False, **kwargs)
        acting.restart()  # TorchRL may have tried it
        self._weights = named_tensors(policy)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights of the run's policy, those of :func:`named_tensors`.

        Raises:
            ValueError: if there are others, or other shapes, than when the worker was made.
        """
        mine, sent = (
            {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            for tensors in (self._weights, weights)
        )
        if mine != sent:
            raise ValueError(
                f"The policy has changed since its copy was sent to the workers of Ray: it has "
                f"{dict(sent.items() - mine.items())}, and the copy has "
                f"{dict(mine.items() - sent.items())} (parameters and buffers with their shapes). "
                f"Make all of them in the recipe's __init__, and change values in place; or use "
                f"collector='single'."
            )
        with torch.no_grad():
            for name, tensor in self._weights.items():
                tensor.copy_(weights[name])


class WorkerActing(Acting):
    """The policy of a worker, which counts its steps.

    Args:
        policy: the policy.
        env: the env.
        begin: where the worker begins.
    """

    def __init__(
        self, policy: TensorDictModuleBase, env: EnvBase, begin: Begin
    ) -> None:
        super().__init__(policy, env, WorkerEpisode(), begin.random_hold)
        self._begin = begin
        self.restart()

    def restart(self) -> None:
        """Forget the steps that were counted."""
        self._total = self._begin.total

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action of the env."""
        if tensordict.get("is_init").any():
            self.episodes.begin(self._total < self._begin.random_steps)
        tensordict = super().forward(tensordict)
        self.episodes.lengths += 1
        self._total += self._begin.num_envs
        return tensordict


class WorkerEpisode:
    """The episode that goes on in the env of a worker."""

    def __init__(self) -> None:
        self.lengths = torch.zeros(1, dtype=torch.long)
        self.random = torch.zeros(1, dtype=torch.bool)
        self.held: torch.Tensor | None = None

    def __len__(self) -> int:
        return 1

    def begin(self, random: bool) -> None:
        """Begin the next one."""
        self.lengths.zero_()
        self.random.fill_(random)


def named_tensors(policy: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a policy, each tensor once.

    The model inside a planner is among them, with its normalisers and the choice of its elites.
    """
    return dict(chain(policy.named_parameters(), policy.named_buffers()))
