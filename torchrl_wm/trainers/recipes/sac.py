"""A soft actor-critic (arXiv 1812.05905) for an env: TorchRL's loss and its networks."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from torchrl_wm.modules.blocks.squashed_normal import squashed_normal
from torchrl_wm.modules.keys import as_tuple
from torchrl_wm.trainers.env_checks import (
    check_policy_action,
    check_policy_observations,
)
from torchrl_wm.trainers.learning import descend
from torchrl_wm.trainers.recipe import Counts


class SoftActorCritic:
    """A policy with its values, their optimizer and their targets, as MBPO and MOPO train them.

    Args:
        env: the real env, or its specs.
        observation_keys: the observations that policy and values read.

    Keyword Args:
        hidden, alpha_init, gamma, device: see :func:`make_sac`.
        learning_rate: the learning rate of policy, values and temperature.
        tau: the share of the values that is mixed into their targets in an update.

    Attributes:
        policy: the actor.
        loss: TorchRL's loss.
        optimizer: its optimizer.
        counts: ``counts.updates`` is how many updates have been made.

    Raises:
        ValueError: if the actions are not continuous and bounded, or entries are not vectors.
    """

    def __init__(
        self,
        env: EnvBase,
        observation_keys: list[NestedKey],
        *,
        hidden: tuple[int, ...],
        alpha_init: float,
        gamma: float,
        tau: float,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        actor, loss = make_sac(
            env,
            observation_keys,
            hidden=hidden,
            alpha_init=alpha_init,
            gamma=gamma,
            device=device,
        )
        self.policy, self.loss = actor.to(device), loss.to(device)
        self.optimizer = torch.optim.Adam(
            loss.parameters(), lr=learning_rate, fused=True
        )
        self.targets = SoftUpdate(loss, tau=tau)
        self.counts = Counts(updates=0)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of a checkpoint."""
        return {"counts": self.counts, "sac": self.loss, "optimizer": self.optimizer}

    def update(self, batch: TensorDictBase) -> dict[str, torch.Tensor]:
        """Make an update of policy, values, temperature and targets; return the losses.

        Args:
            batch: transitions, ``[batch_size]``.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        losses = self.loss(batch)
        terms = losses.select(*(key for key in losses.keys() if "loss" in key))
        descend(terms, self.optimizer, batch, "The policy", self.counts.updates)
        self.targets.step()
        self.counts.updates += 1
        return dict(terms.detach().items())


def make_sac(
    env: EnvBase,
    observation_keys: list,
    *,
    hidden: tuple[int, ...],
    alpha_init: float,
    gamma: float,
    device: torch.device,
) -> tuple[ProbabilisticActor, SACLoss]:
    """Return a squashed Gaussian policy with twin values, and TorchRL's loss for them.

    Args:
        env: the real env.
        observation_keys: the observations that policy and values read.

    Keyword Args:
        hidden: the sizes of the hidden layers.
        alpha_init: the initial temperature.
        gamma: the discount.
        device: the device that they will be on.

    Raises:
        ValueError: if the actions are not continuous and bounded, or entries are not vectors.
    """
    spec = env.full_action_spec_unbatched[env.action_key]
    check_policy_action(env)
    check_policy_observations(env, observation_keys)
    observation_size = sum(
        env.full_observation_spec_unbatched[key].shape.numel()
        for key in observation_keys
    )
    size = spec.shape.numel()
    cells = list(hidden)
    actor_net = nn.Sequential(
        MLP(observation_size, 2 * size, num_cells=cells, activation_class=nn.ReLU),
        NormalParamExtractor(),
    )
    actor = ProbabilisticActor(
        TensorDictModule(_Joined(actor_net), observation_keys, ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[env.action_key],
        spec=spec,
        distribution_class=squashed_normal(),
        distribution_kwargs={
            "low": spec.space.low.to(device),
            "high": spec.space.high.to(device),
        },
        return_log_prob=False,
    )
    value_net = MLP(
        observation_size + size, 1, num_cells=cells, activation_class=nn.ReLU
    )
    # Named, as TorchRL knows only the key "action" as that of an action.
    value = ValueOperator(
        _Joined(value_net),
        in_keys=[*observation_keys, env.action_key],
        out_keys=["state_action_value"],
    )
    sac = SACLoss(
        actor, value, action_spec=spec, num_qvalue_nets=2, alpha_init=alpha_init
    )
    done = env.done_keys[0]
    terminated = [key for key in env.done_keys if as_tuple(key)[-1] == "terminated"]
    sac.set_keys(
        action=env.action_key,
        reward=env.reward_key,
        done=done,
        terminated=terminated[-1] if terminated else done,
    )
    sac.make_value_estimator(gamma=gamma)
    return actor, sac


class _Joined(nn.Module):
    """A network over several inputs side by side."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dtype = next(network.parameters()).dtype

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        # Large numbers are recorded in float64.
        return self.network(torch.cat(values, -1).to(self.dtype))
