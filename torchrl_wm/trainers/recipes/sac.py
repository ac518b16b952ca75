"""A soft actor-critic (arXiv 1812.05905) for an env: TorchRL's loss and its networks."""

from __future__ import annotations

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import SACLoss

from torchrl_wm.modules.blocks.squashed_normal import squashed_normal
from torchrl_wm.modules.keys import as_tuple
from torchrl_wm.trainers.env_checks import (
    check_policy_action,
    check_policy_observations,
)


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

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat(values, -1))
