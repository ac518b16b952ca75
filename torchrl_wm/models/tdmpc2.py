"""The latent world model of TD-MPC2, from an env's specs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm.models.building import build, register, resolve_config
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.heads import end_head, two_hot_reward_head
from torchrl_wm.models.networks import ObservationEncoder, WithActions
from torchrl_wm.models.specs import read_specs
from torchrl_wm.modules import (
    Mish,
    NormedMLP,
    QEnsemble,
    SimNorm,
    SymlogTwoHot,
    TerminationHead,
    WorldModel,
)
from torchrl_wm.modules.blocks.latent import NormedLinear
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import ConsistencyTerm, DoneTerm, TwoHotTerm, WorldModelLoss

_LATENT = "latent"


@dataclass
class TDMPC2Config:
    """The settings of :func:`make_tdmpc2_world_model`; the defaults are the paper's.

    Args:
        latent_size: the size of the latent, ``L``.
        group: the size of the latent's simplices; a divisor of ``latent_size``.
        num_cells: the size of the hidden layers of dynamics and heads.
        depth: the number of these layers.
        encoder_cells: the size of the encoder's layers.
        encoder_depth: the number of these layers, without the last one, whose output is
            the latent.
        pixel_depth: the channels of the image encoders.
        pixel_multipliers: the factors on these channels, one for each stage; chosen by
            the images' size if None.
        bins: the number of bins of the two-hot reward and values.
        limit: the bins span ``[-limit, limit]`` in symlog space.
        done_head: predict the end of episodes.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        consistency_weight, reward_weight, done_weight: the weights of the losses.
        decay: the weight of a step relative to the one before it.
        num_q: the number of action values.
        q_dropout: the dropout in their first layer.
        log_std_min: the least logarithm of the policy's standard deviation.
        log_std_max: the greatest one.
        observation_keys: the observations to model; all by default.

    Raises:
        ValueError: if ``group`` does not divide ``latent_size``, and for sizes, numbers and
            shares with which the model could not learn.
    """

    latent_size: int = 512
    group: int = 8
    num_cells: int = 512
    depth: int = 2
    encoder_cells: int = 256
    encoder_depth: int = 1
    pixel_depth: int = 16
    pixel_multipliers: tuple[int, ...] | None = None
    bins: int = 101
    limit: float = 10.0
    done_head: bool = True
    termination_threshold: float = 0.5
    sample_termination: bool = False
    consistency_weight: float = 20.0
    reward_weight: float = 0.1
    done_weight: float = 1.0
    decay: float = 0.5
    num_q: int = 5
    q_dropout: float = 0.01
    log_std_min: float = -10.0
    log_std_max: float = 2.0
    observation_keys: tuple[NestedKey, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("group", 2),  # a simplex of one number is always 1
            ("latent_size", 1),
            ("num_cells", 1),
            ("depth", 0),
            ("encoder_cells", 1),
            ("encoder_depth", 1),
            ("pixel_depth", 1),
            ("num_q", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if self.latent_size % self.group:
            raise ValueError(
                f"group={self.group} does not divide latent_size={self.latent_size}: SimNorm "
                f"splits the latent into groups of equal size."
            )
        if not 0 <= self.q_dropout < 1:
            raise ValueError(
                f"q_dropout={self.q_dropout} must be at least 0 and less than 1."
            )
        if not self.log_std_min < self.log_std_max:
            raise ValueError(
                f"log_std_min={self.log_std_min} must be less than "
                f"log_std_max={self.log_std_max}."
            )

    @property
    def cells(self) -> list[int]:
        """The sizes of the hidden layers of dynamics and heads."""
        return [self.num_cells] * self.depth


def make_tdmpc2_world_model(
    env: EnvBase, config: TDMPC2Config | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make TD-MPC2's world model of ``env`` (arXiv 2310.16828), and the loss that trains it.

    The latent, ``"latent"``, lies on simplices. Dynamics, reward and termination are
    normed MLPs; there is no decoder. The loss encodes the first observation of a
    sequence ``[*B, T]`` (the paper's ``T`` is 3), predicts the latents from its actions,
    and compares latents with encodings, and rewards and terminations with the real
    ones. Step ``t`` has the weight ``decay ** t``.

    :func:`make_tdmpc2_q_ensemble` makes the paper's action values, which join the loss
    as a :class:`~torchrl_wm.objectives.ValueTerm`, and :func:`make_tdmpc2_policy` its policy.

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
        >>> from torchrl_wm.models import make_tdmpc2_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, loss_module = make_tdmpc2_world_model(
        ...     real_env, latent_size=64, num_cells=64
        ... )
        >>> data = real_env.rollout(30).reshape(10, 3)
        >>> sorted(loss_module(data).keys())
        ['loss_consistency', 'loss_done', 'loss_reward']
        >>> env = WorldModelEnv(world_model, real_env, start_states=real_env)
        >>> env.imagine(5)["next", "reward"].shape
        torch.Size([5, 1])
    """
    return build("tdmpc2", env, config, overrides)


def make_tdmpc2_q_ensemble(
    env: EnvBase, config: TDMPC2Config | None = None, **overrides: Any
) -> QEnsemble:
    """Make the action values that go with :func:`make_tdmpc2_world_model`.

    Args:
        env: the env whose specs are read; it is neither reset nor stepped.
        config, overrides: the settings of the world model, as a whole and by name.

    Returns:
        The action values, on the device of ``env``.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for an entry that the values cannot serve; the message names it.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_tdmpc2_q_ensemble, TDMPC2Config
        >>> config = TDMPC2Config(latent_size=64, num_cells=64)
        >>> q = make_tdmpc2_q_ensemble(GymEnv("Pendulum-v1"), config)
        >>> q.in_keys, q.out_keys[-1], q.num_networks
        (['latent', 'action'], 'state_action_value', 5)
    """
    config = resolve_config(TDMPC2Config, config, overrides)
    specs = read_specs(env, observation_keys=config.observation_keys)
    ensemble = QEnsemble(
        {_LATENT: config.latent_size},
        specs.actions,
        num_networks=config.num_q,
        num_cells=config.cells,
        two_hot=SymlogTwoHot(config.bins, config.limit),
        dropout=config.q_dropout,
    )
    return ensemble if env.device is None else ensemble.to(env.device)


@register("tdmpc2", TDMPC2Config, reserved=(_LATENT,))
def _wire(specs: EnvSpecs, config: TDMPC2Config) -> tuple[WorldModel, WorldModelLoss]:
    simplices = partial(SimNorm, config.group)
    size = config.latent_size
    with_action = size + specs.action_size
    observed = [_LATENT, *specs.action_keys]
    bins = SymlogTwoHot(config.bins, config.limit)
    rewards = NormedMLP(with_action, specs.reward.size * config.bins, config.cells)
    done_head = None
    if config.done_head:
        network = NormedMLP(size, specs.done.size, config.cells)
        reads = [join("next", _LATENT)]
        done_head = end_head(TerminationHead, network, reads, specs, config)
    world_model = WorldModel(
        TensorDictModule(_Encoder(specs, config), specs.observation_keys, [_LATENT]),
        TensorDictModule(
            WithActions(
                NormedMLP(with_action, size, config.cells, activation=simplices), specs
            ),
            observed,
            [join("next", _LATENT)],
        ),
        two_hot_reward_head(WithActions(rewards, specs), bins, observed, specs),
        done_head=done_head,
    )
    losses = [
        ConsistencyTerm(weight=config.consistency_weight),
        TwoHotTerm(config.reward_weight),
    ]
    if config.done_head:
        losses.append(DoneTerm(weight=config.done_weight))
    loss = WorldModelLoss(
        world_model, losses=losses, multi_step=True, decay=config.decay
    )
    loss.set_keys(**specs.loss_keys)
    return world_model, loss


class _Encoder(nn.Module):
    """The encoder of observations to a latent on simplices."""

    def __init__(self, specs: EnvSpecs, config: TDMPC2Config) -> None:
        super().__init__()
        hidden = [config.encoder_cells] * (config.encoder_depth - 1)
        self.features = ObservationEncoder(
            specs,
            lambda n, m: NormedMLP(n, m, hidden, activation=Mish),
            config.encoder_cells,
            config,
        )
        self.latent = NormedLinear(
            self.features.out_features,
            config.latent_size,
            activation=partial(SimNorm, config.group),
        )

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        return self.latent(self.features(*observations))
