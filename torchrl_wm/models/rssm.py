"""Recurrent state space models, as in PlaNet and Dreamer, from an env's specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import (
    DreamerV3MLP,
    MLP,
    RSSMPosterior,
    RSSMPosteriorV3,
    RSSMPrior,
    RSSMPriorV3,
    SymExpTwoHot,
)

from torchrl_wm.models.building import build, register
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.heads import end_head, two_hot_reward_head
from torchrl_wm.models.networks import (
    ObservationDecoder,
    ObservationEncoder,
    Shaped,
    UnitActions,
)
from torchrl_wm.modules import ContinueHead, RSSMDynamics, RSSMPosteriorHead, WorldModel
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import (
    KLTerm,
    LossTerm,
    ObservationTerm,
    RewardTerm,
    TwoHotTerm,
    WorldModelLoss,
)

_STATE, _BELIEF, _EMBEDDING = "state", "belief", "embedding"
#: The latents of a recurrent state space model.
LATENTS = [_STATE, _BELIEF]


@dataclass
class RSSMConfig:
    """The settings of :func:`make_rssm_world_model`.

    The defaults are DreamerV3's architecture and losses in a size for small
    problems. :meth:`planet`, :meth:`dreamer_v2` and :meth:`dreamer_v3` give the
    papers' settings, some of which you may replace: ``RSSMConfig.planet(
    belief_size=100)``.

    Args:
        latent: the kind of stochastic state: ``"categorical"`` or ``"gaussian"``. For
            observations of a few numbers, ``"gaussian"`` is more exact after a short
            training.
        recurrent: the cell of a categorical model: ``"block_gru"`` (DreamerV3) or
            ``"gru"``. Gaussian models have a GRU.
        belief_size: the size of the deterministic state.
        state_size: the size of a Gaussian state.
        categoricals: the number of distributions of a categorical state.
        classes: the number of classes of each distribution.
        blocks: the number of blocks of the block GRU; a divisor of ``belief_size``.
        hidden_size: the size of the hidden layer of prior and posterior.
        num_cells: the size of the hidden layers of encoder, decoder and heads.
        depth: the number of these layers.
        normed: RMS-normed SiLU layers (DreamerV3) in place of plain ELU layers.
        pixel_depth: the channels of the image networks.
        pixel_multipliers: the factors on these channels, one for each stage; chosen by
            the images' size if None.
        symlog: encode and compare vector observations in symlog space.
        reward_bins: the number of bins of the two-hot reward head; None predicts the
            reward itself.
        continue_head: predict the end of episodes.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        kl_balance: the weights of the dynamics' and the representation's KL; None for
            the plain KL.
        free_nats: the free nats of the KL, per step.
        unimix: the uniform share of categorical distributions.
        kl_weight, reconstruction_weight, reward_weight, continue_weight: the weights of
            the losses.
        observation_keys: the observations to model; all by default.

    Raises:
        ValueError: for unknown choices, and if ``blocks`` does not divide
            ``belief_size``.
    """

    latent: Literal["categorical", "gaussian"] = "categorical"
    recurrent: Literal["block_gru", "gru"] = "block_gru"
    belief_size: int = 256
    state_size: int = 30
    categoricals: int = 16
    classes: int = 16
    blocks: int = 8
    hidden_size: int = 128
    num_cells: int = 128
    depth: int = 2
    normed: bool = True
    pixel_depth: int = 16
    pixel_multipliers: tuple[int, ...] | None = None
    symlog: bool = True
    reward_bins: int | None = 255
    continue_head: bool = True
    termination_threshold: float = 0.5
    sample_termination: bool = False
    kl_balance: tuple[float, float] | None = (1.0, 0.1)
    free_nats: float = 1.0
    unimix: float = 0.01
    kl_weight: float = 1.0
    reconstruction_weight: float = 1.0
    reward_weight: float = 1.0
    continue_weight: float = 1.0
    observation_keys: tuple[NestedKey, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("latent", ("categorical", "gaussian")),
            ("recurrent", ("block_gru", "gru")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Unknown {name}={getattr(self, name)!r}. Valid are {list(known)}."
                )
        if self._grouped and self.belief_size % self.blocks:
            raise ValueError(
                f"blocks={self.blocks} do not divide belief_size={self.belief_size}, as the "
                f"block GRU needs. Change one of them, or take recurrent='gru'."
            )

    @property
    def _grouped(self) -> bool:
        return self.latent == "categorical" and self.recurrent == "block_gru"

    @property
    def stochastic_size(self) -> int:
        """The length of the stochastic state as a vector."""
        if self.latent == "gaussian":
            return self.state_size
        return self.categoricals * self.classes

    @property
    def features(self) -> int:
        """The length of both latents side by side."""
        return self.stochastic_size + self.belief_size

    @classmethod
    def planet(cls, **settings: Any) -> RSSMConfig:
        """Return the settings of PlaNet (arXiv 1811.04551) and the first Dreamer (1912.01603)."""
        paper = {
            "latent": "gaussian",
            "belief_size": 200,
            "state_size": 30,
            "hidden_size": 200,
            "num_cells": 200,
            "normed": False,
            "symlog": False,
            "reward_bins": None,
            "continue_head": False,
            "kl_balance": None,
            "free_nats": 3.0,
            "unimix": 0.0,
            # The negative log-likelihood of a Gaussian with unit variance.
            "reconstruction_weight": 0.5,
            "reward_weight": 0.5,
        }
        return cls(**{**paper, **settings})

    @classmethod
    def dreamer_v2(cls, **settings: Any) -> RSSMConfig:
        """Return the settings of DreamerV2 (arXiv 2010.02193): categorical, with KL balancing."""
        paper = {
            "recurrent": "gru",
            "belief_size": 600,
            "categoricals": 32,
            "classes": 32,
            "hidden_size": 600,
            "num_cells": 400,
            "depth": 4,
            "normed": False,
            "symlog": False,
            "reward_bins": None,
            "kl_balance": (0.8, 0.2),
            "free_nats": 0.0,
            "unimix": 0.0,
            "kl_weight": 0.1,
            "reconstruction_weight": 0.5,
            "reward_weight": 0.5,
        }
        return cls(**{**paper, **settings})

    @classmethod
    def dreamer_v3(cls, **settings: Any) -> RSSMConfig:
        """Return the settings of DreamerV3 (arXiv 2301.04104) with 12 million parameters."""
        paper = {
            "belief_size": 2048,
            "categoricals": 32,
            "classes": 16,
            "hidden_size": 256,
            "num_cells": 256,
            "depth": 3,
        }
        return cls(**{**paper, **settings})


def make_rssm_world_model(
    env: EnvBase, config: RSSMConfig | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make a recurrent state space model of ``env``, and the loss that trains it.

    The latents are ``"state"``, which is drawn from a distribution, and ``"belief"``,
    which is deterministic. TorchRL's RSSM networks are the dynamics and the posterior.
    All observations are encoded together, and decoded. The reward is two-hot, and a
    continue head predicts the end of episodes, unless the config says otherwise.

    The loss takes sequences, ``[*B, T]``. It filters the observations
    (:meth:`~torchrl_wm.WorldModel.observe`), compares the observations, rewards and
    continuations that the filtered latents predict with the real ones, and the
    posterior with the prior.

    Args:
        env: the env whose specs are read; it is neither reset nor stepped.
        config, overrides: the settings, as a whole and by name.

    Returns:
        The model and its loss.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for an entry that the model cannot serve; the message names it.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_rssm_world_model
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, loss_module = make_rssm_world_model(real_env, belief_size=64)
        >>> world_model.latent_keys
        ['state', 'belief']
        >>> data = real_env.rollout(10, break_when_any_done=False)
        >>> sorted(loss_module(data).keys())
        ['loss_done', 'loss_kl', 'loss_reconstruction', 'loss_reward']
        >>> env = WorldModelEnv(world_model, real_env, start_states=real_env)
        >>> env.imagine(5)["next", "reward"].shape
        torch.Size([5, 1])
    """
    return build("rssm", env, config, overrides)


@register(
    "rssm",
    RSSMConfig,
    reserved=(
        _STATE,
        _BELIEF,
        _EMBEDDING,
        *(
            f"{d}_{n}"
            for d in ("prior", "posterior")
            for n in ("mean", "std", "logits")
        ),
    ),
)
def _wire(specs: EnvSpecs, config: RSSMConfig) -> tuple[WorldModel, WorldModelLoss]:
    features = config.features
    next_latents = [join("next", key) for key in (_STATE, _BELIEF)]
    encoder = ObservationEncoder(
        specs,
        lambda n, m: _mlp(config, n, m),
        config.num_cells,
        config,
        squash=config.symlog,
    )
    decoder = ObservationDecoder(
        specs,
        features,
        lambda n, m: _mlp(config, n, m),
        config,
        squash=config.symlog,
    )
    done_head = None
    if config.continue_head:
        network = _mlp(config, features, specs.done.size)
        done_head = end_head(ContinueHead, network, next_latents, specs, config)
    dynamics, posterior = _rssm(specs, config, encoder.out_features)
    world_model = WorldModel(
        TensorDictModule(encoder, specs.observation_keys, [_EMBEDDING]),
        dynamics,
        _reward_head(specs, config, features, next_latents),
        done_head=done_head,
        decoder=TensorDictModule(decoder, [_STATE, _BELIEF], specs.observation_keys),
        posterior=posterior,
        initial_state=TensorDict(
            {
                _STATE: torch.zeros(config.stochastic_size),
                _BELIEF: torch.zeros(config.belief_size),
            }
        ),
    )
    loss = WorldModelLoss(
        world_model, losses=_terms(specs, config), done_weight=config.continue_weight
    )
    loss.set_keys(**specs.loss_keys)
    return world_model, loss


def _rssm(
    specs: EnvSpecs, config: RSSMConfig, embedding: int
) -> tuple[TensorDictModule, TensorDictModule]:
    """Wire TorchRL's networks as dynamics and posterior."""
    actions = UnitActions(specs.actions)
    if config.latent == "gaussian":
        names = ("mean", "std")
        prior = RSSMPrior(
            Unbounded((specs.action_size,)),
            # TorchRL's prior takes a belief of the size of its hidden layer.
            hidden_dim=config.belief_size,
            rnn_hidden_dim=config.belief_size,
            state_dim=config.state_size,
            action_dim=specs.action_size,
        )
        posterior = RSSMPosterior(
            hidden_dim=config.hidden_size,
            state_dim=config.state_size,
            rnn_hidden_dim=config.belief_size,
            obs_embed_dim=embedding,
        )
    else:
        names = ("logits",)
        prior = RSSMPriorV3(
            action_shape=(specs.action_size,),
            action_dim=specs.action_size,
            hidden_dim=config.hidden_size,
            rnn_hidden_dim=config.belief_size,
            num_categoricals=config.categoricals,
            num_classes=config.classes,
            recurrent_model=config.recurrent,
            num_blocks=config.blocks,
            unimix=config.unimix,
        )
        posterior = RSSMPosteriorV3(
            hidden_dim=config.hidden_size,
            rnn_hidden_dim=config.belief_size,
            obs_embed_dim=embedding,
            num_categoricals=config.categoricals,
            num_classes=config.classes,
            use_rms_norm=config.normed,
            unimix=config.unimix,
        )
    dynamics = TensorDictModule(
        RSSMDynamics(prior, actions),
        [_STATE, _BELIEF, *specs.action_keys],
        [
            *[join("next", f"prior_{name}") for name in names],
            join("next", _STATE),
            join("next", _BELIEF),
        ],
    )
    correction = TensorDictModule(
        RSSMPosteriorHead(posterior),
        [join("next", _BELIEF), join("next", _EMBEDDING)],
        [*[join("next", f"posterior_{name}") for name in names], join("next", _STATE)],
    )
    return dynamics, correction


def _reward_head(
    specs: EnvSpecs, config: RSSMConfig, features: int, reads: list[NestedKey]
) -> TensorDictModule:
    if config.reward_bins is None:
        reward = specs.float_reward("make_rssm_world_model with reward_bins=None")
        network = Shaped(
            _mlp(config, features, reward.size), reward.shape, reward.dtype
        )
        return TensorDictModule(network, reads, [join("next", reward.key)])
    bins = config.reward_bins
    network = _mlp(config, features, specs.reward.size * bins)
    return two_hot_reward_head(network, SymExpTwoHot(bins), reads, specs)


def _terms(specs: EnvSpecs, config: RSSMConfig) -> list[str | LossTerm]:
    terms: list[str | LossTerm] = [
        ObservationTerm(
            weight=config.reconstruction_weight,
            symlog=specs.vector_keys if config.symlog else False,
            scale={entry.key: entry.scale for entry in specs.pixels},
        ),
        RewardTerm(weight=config.reward_weight)
        if config.reward_bins is None
        else TwoHotTerm(config.reward_weight),
        KLTerm(
            config.kl_weight,
            balance=config.kl_balance,
            free_nats=config.free_nats,
            unimix=config.unimix if config.latent == "categorical" else 0.0,
        ),
    ]
    return [*terms, "done"] if config.continue_head else terms


def _mlp(config: RSSMConfig, in_features: int, out_features: int) -> nn.Module:
    """Return a network that joins its inputs."""
    if config.normed:
        return DreamerV3MLP(
            in_features, out_features, depth=config.depth, num_cells=config.num_cells
        )
    return MLP(
        in_features,
        out_features,
        num_cells=[config.num_cells] * config.depth,
        activation_class=nn.ELU,
    )
