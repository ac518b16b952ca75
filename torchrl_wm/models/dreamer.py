"""Actor and critic of the Dreamers, on the latents of a recurrent state space model."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import (
    DreamerV3DiscreteActor,
    DreamerV3MLP,
    IndependentNormal,
    MLP,
    SymExpTwoHot,
)

from torchrl_wm.models.building import resolve_config
from torchrl_wm.models.policy_actions import choice_distribution, policy_action
from torchrl_wm.models.rssm import LATENTS, RSSMConfig
from torchrl_wm.modules import TwoHotHead
from torchrl_wm.modules.blocks.squashed_normal import squashed_normal

#: The standard deviation of a V3 actor's action, as a share of half the range (arXiv 2301.04104,
#: the authors' code).
STD = (0.1, 1.0)
#: The least standard deviation of the first Dreamer's actor (arXiv 1912.01603).
_LEAST_STD = 1e-4
_INITIAL_STD = 5.0


def make_dreamer_actor_critic(
    env: EnvBase, config: RSSMConfig | None = None, **overrides: Any
) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    """Make the actor and the critic that belong to :func:`make_rssm_world_model`.

    With ``normed=True``, the default, they are DreamerV3's (arXiv 2301.04104). The actor of a
    choice is TorchRL's :class:`~torchrl.modules.DreamerV3DiscreteActor`. That of a continuous
    action is a Gaussian whose mean lies within the bounds of the action, by a tanh, and whose
    standard deviation lies between 0.1 and 1 times half their distance. Its samples may lie
    outside the bounds: the model clips them on the way in, and so should whatever acts in the
    real env. With ``normed=False`` the networks are plain, and the Gaussian is squashed by a
    tanh, as in the first Dreamer (arXiv 1912.01603).

    With ``reward_bins`` the critic's value is a distribution over as many bins, which starts at
    zero; ``DreamerV3ValueLoss(critic, "two_hot", num_value_bins=...)`` trains it. Without bins
    it is a number.

    Args:
        env: the env whose specs are read.
        config: the settings; those of the world model. The sizes of the latents,
            ``num_cells``, ``depth``, ``normed``, ``unimix`` and ``reward_bins`` are used.
        overrides: settings by name.

    Returns:
        The actor, which reads ``"state"`` and ``"belief"`` and writes the action, a sample
        unless the exploration type is another; and the critic, which writes ``"state_value"``,
        ``[*B, 1]``, and with bins ``"state_value_logits"``, ``[*B, bins]``.

    Raises:
        ValueError: if the env has several actions, or the action is neither continuous within
            finite bounds nor a single choice.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_dreamer_actor_critic, RSSMConfig
        >>> config = RSSMConfig(belief_size=8, categoricals=4, classes=4)
        >>> actor, critic = make_dreamer_actor_critic(GymEnv("Pendulum-v1"), config)
        >>> latents = TensorDict({"state": torch.randn(5, 16), "belief": torch.randn(5, 8)}, [5])
        >>> critic(actor(latents))["state_value"].shape, latents["action"].shape
        (torch.Size([5, 1]), torch.Size([5, 1]))
    """
    config = resolve_config(RSSMConfig, config, overrides)
    key, spec, is_choice = policy_action(env, "make_dreamer_actor_critic")
    make = _choosing if is_choice else _continuous
    actor, critic = make(config, spec, key), _critic(config)
    if env.device is not None:
        actor, critic = actor.to(env.device), critic.to(env.device)
    return actor, critic


def _choosing(
    config: RSSMConfig, spec: TensorSpec, key: NestedKey
) -> ProbabilisticTensorDictSequential:
    """Return the actor of a choice."""
    options = int(spec.space.n)
    network = TensorDictModule(_network(config, options), LATENTS, ["logits"])
    if config.normed:
        # Its network; its distribution cannot be traced by torch.compile.
        network = DreamerV3DiscreteActor(
            config.features,
            options,
            depth=config.depth,
            num_cells=config.num_cells,
            unimix=config.unimix,
            in_keys=LATENTS,
        )[0]
    return _actor(network, {"logits": "logits"}, key, choice_distribution(spec))


def _continuous(
    config: RSSMConfig, spec: TensorSpec, key: NestedKey
) -> ProbabilisticTensorDictSequential:
    """Return the actor of a bounded action."""
    low, high = spec.space.low, spec.space.high
    network = _network(config, 2 * spec.shape.numel())
    if config.normed:
        module: nn.Module = _BoundedMean(network, low.clone(), high.clone())
        kind, settings = IndependentNormal, {"event_dim": len(spec.shape)}
    else:
        module = _Squashed(network, tuple(spec.shape))
        kind = squashed_normal()
        settings = {"low": low.clone(), "high": high.clone()}
        settings["event_dims"] = len(spec.shape)
    module = TensorDictModule(module, LATENTS, ["loc", "scale"])
    return _actor(module, ["loc", "scale"], key, kind, settings)


def _actor(
    module: TensorDictModule,
    reads: Any,
    key: NestedKey,
    kind: type,
    settings: dict[str, Any] | None = None,
) -> ProbabilisticTensorDictSequential:
    return ProbabilisticTensorDictSequential(
        module,
        ProbabilisticTensorDictModule(
            reads,
            [key],
            distribution_class=kind,
            distribution_kwargs=settings or {},
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def _critic(config: RSSMConfig) -> TensorDictModule:
    """Return the critic."""
    if config.reward_bins is None:
        return TensorDictModule(_network(config, 1), LATENTS, ["state_value"])
    bins = SymExpTwoHot(config.reward_bins)
    head = TwoHotHead(_network(config, config.reward_bins), bins)
    return TensorDictModule(head, LATENTS, ["state_value_logits", "state_value"])


def _network(config: RSSMConfig, out_features: int) -> nn.Module:
    """Return a network that joins the latents, with small first outputs."""
    if config.normed:
        return DreamerV3MLP(
            config.features,
            out_features,
            depth=config.depth,
            num_cells=config.num_cells,
            outscale=0.01,
        )
    return MLP(
        config.features,
        out_features,
        num_cells=[config.num_cells] * config.depth,
        activation_class=nn.ELU,
    )


class _BoundedMean(nn.Module):
    """A network whose outputs are mean and standard deviation of an action in a range.

    Args:
        network: maps latents to both, ``[*B, 2 * n]``.
        low, high: the bounds of the action, ``[*A]``.
    """

    def __init__(
        self, network: nn.Module, low: torch.Tensor, high: torch.Tensor
    ) -> None:
        super().__init__()
        self.network = network
        # Derived from the spec, so not part of the state.
        self.register_buffer("middle", (high + low) / 2, persistent=False)
        self.register_buffer("reach", (high - low) / 2, persistent=False)

    def forward(self, *latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, ``[*B, *A]`` each."""
        mean, share = self.network(*latents).chunk(2, -1)
        least, most = STD
        std = least + (most - least) * (share + 2).sigmoid()
        mean, std = (x.unflatten(-1, self.reach.shape or (1,)) for x in (mean, std))
        if not self.reach.ndim:
            mean, std = mean.squeeze(-1), std.squeeze(-1)
        return self.middle + self.reach * mean.tanh(), self.reach * std


class _Squashed(nn.Module):
    """A network whose outputs are mean and standard deviation before a tanh.

    Args:
        network: maps latents to both, ``[*B, 2 * n]``.
        shape: the shape of the action.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, *latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, ``[*B, *A]`` each."""
        mean, share = self.network(*latents).chunk(2, -1)
        # The mean is kept within 5, and the first standard deviation is 5.
        mean = 5 * (mean / 5).tanh()
        begin = torch.tensor(_INITIAL_STD).expm1().log()
        std = nn.functional.softplus(share + begin.to(share)) + _LEAST_STD
        size = (*mean.shape[:-1], *self.shape)
        return mean.reshape(size), std.reshape(size)
