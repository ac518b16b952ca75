"""TD-MPC2's policy prior."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from torchrl_wm.models.building import resolve_config
from torchrl_wm.models.policy_actions import choice_distribution, policy_action
from torchrl_wm.models.tdmpc2 import TDMPC2Config
from torchrl_wm.modules import NormedMLP
from torchrl_wm.modules.blocks.squashed_normal import squashed_normal

_LATENT = "latent"


def make_tdmpc2_policy(
    env: EnvBase, config: TDMPC2Config | None = None, **overrides: Any
) -> ProbabilisticActor:
    """Make the policy that belongs to :func:`make_tdmpc2_world_model` (arXiv 2310.16828).

    The policy is a normed MLP of the latent. Its outputs are the mean and the logarithm of the
    standard deviation of a Gaussian that tanh squashes into the bounds of the action. Another
    tanh keeps the logarithm between ``log_std_min`` and ``log_std_max``. For an action that is a
    choice, which the paper does not have, the outputs are the logits of the options.

    :class:`~torchrl_wm.objectives.PolicyPriorLoss` trains it.

    Args:
        env: the env whose specs are read.
        config: the settings; those of the world model.
        overrides: settings by name.

    Returns:
        The policy. It reads ``"latent"`` and writes the action, a sample unless the exploration
        type is another; ``get_dist`` returns the distribution.

    Raises:
        ValueError: if the env has several actions, or the action is neither continuous within
            finite bounds nor a single choice.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_tdmpc2_policy, TDMPC2Config
        >>> config = TDMPC2Config(latent_size=64, num_cells=64)
        >>> policy = make_tdmpc2_policy(GymEnv("Pendulum-v1"), config)
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy(TensorDict({"latent": torch.randn(5, 64)}, [5]))["action"].shape
        torch.Size([5, 1])
    """
    config = resolve_config(TDMPC2Config, config, overrides)
    key, spec, is_choice = policy_action(env, "make_tdmpc2_policy")
    policy = (_choosing if is_choice else _continuous)(config, spec, key)
    return policy if env.device is None else policy.to(env.device)


def _continuous(config: TDMPC2Config, spec: TensorSpec, key: Any) -> ProbabilisticActor:
    """Return the policy of a bounded action."""
    network = NormedMLP(config.latent_size, 2 * spec.shape.numel(), config.cells)
    module = _Gaussian(network, spec, config.log_std_min, config.log_std_max)
    return ProbabilisticActor(
        TensorDictModule(module, [_LATENT], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[key],
        spec=spec,
        distribution_class=squashed_normal(),
        distribution_kwargs={
            "low": spec.space.low.clone(),
            "high": spec.space.high.clone(),
            "event_dims": len(spec.shape),
        },
    )


def _choosing(config: TDMPC2Config, spec: TensorSpec, key: Any) -> ProbabilisticActor:
    """Return the policy of a choice."""
    options = int(spec.space.n)
    return ProbabilisticActor(
        TensorDictModule(
            NormedMLP(config.latent_size, options, config.cells), [_LATENT], ["logits"]
        ),
        in_keys=["logits"],
        out_keys=[key],
        spec=spec,
        distribution_class=choice_distribution(spec),
    )


class _Gaussian(nn.Module):
    """A network whose outputs are mean and standard deviation of an action.

    Args:
        network: maps latents to both, ``[*B, 2 * n]``.
        spec: the spec of the action.
        low, high: the bounds of the standard deviation's logarithm.
    """

    def __init__(
        self, network: nn.Module, spec: TensorSpec, low: float, high: float
    ) -> None:
        super().__init__()
        self.network, self.shape, self.dtype = network, tuple(spec.shape), spec.dtype
        self.low, self.high = low, high

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, ``[*B, *A]`` each, for latents ``[*B, L]``."""
        loc, share = self.network(latent).chunk(2, -1)
        scale = (self.low + 0.5 * (self.high - self.low) * (share.tanh() + 1)).exp()
        shape = (*latent.shape[:-1], *self.shape)
        return tuple(part.reshape(shape).to(self.dtype) for part in (loc, scale))
