"""Deterministic latent models of multilayer perceptrons, from an env's specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torchrl.envs import EnvBase

from torchrl_wm.models.building import build, register
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.latents import (
    LatentDecoder,
    LatentEncoder,
    plain_mlp,
    predictive_terms,
    ResidualDynamics,
    termination_head,
    unit_size,
)
from torchrl_wm.models.networks import WithActions
from torchrl_wm.modules import DenormalizedNetwork, WorldModel
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import WorldModelLoss

_LATENT = "latent"


@dataclass(frozen=True)
class MLPConfig:
    """The settings of :func:`make_mlp_world_model`.

    Args:
        observation_keys: the observations to model; all by default.
        latent_size: ``L``, at least 2. Latents have a root mean square of 1.
        hidden: the sizes of the hidden layers of every network.
        activation: ``"silu"``, ``"relu"``, ``"elu"``, ``"gelu"``, ``"mish"`` or ``"tanh"``.
        normalize: normalise vector observations and rewards.
        pixel_depth, pixel_multipliers: the ``depth`` and the ``multipliers`` of the image
            networks; see :class:`~torchrl_wm.modules.PixelEncoder`.
        termination: ``"learned"``, or ``"none"`` if only a time limit ends episodes.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        multi_step: train open loop over sequences ``[*B, T]``, in place of single
            transitions.
        decay: the weight of a step relative to the one before it, with ``multi_step``.
        reward_weight, reconstruction_weight, latent_weight, done_weight: the weights of
            the losses.

    Raises:
        ValueError: if ``latent_size`` is below 2.
    """

    observation_keys: tuple[NestedKey, ...] | None = None
    latent_size: int = 64
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "silu"
    normalize: bool = True
    pixel_depth: int = 16
    pixel_multipliers: tuple[int, ...] | None = None
    termination: Literal["learned", "none"] = "learned"
    termination_threshold: float = 0.5
    sample_termination: bool = False
    multi_step: bool = False
    decay: float = 1.0
    reward_weight: float = 1.0
    reconstruction_weight: float = 1.0
    latent_weight: float = 1.0
    done_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.latent_size < 2:
            raise ValueError(
                f"latent_size must be at least 2, got {self.latent_size}: latents have a fixed "
                f"length, and one number would keep only its sign."
            )


def make_mlp_world_model(
    env: EnvBase, config: MLPConfig | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make a deterministic latent model of ``env``: the simplest one that serves all envs.

    Observations of all kinds are encoded as one latent, ``"latent"``. A network of the
    latent and the action predicts its change. The loss decodes the *predicted*
    latents and compares them with the next observations, in units of their own
    spread; it also compares the predicted latents with the encodings of the next
    observations, and trains reward and termination. Fit the normalisers before
    training::

        fit_normalizers(world_model, batch)

    Args:
        env: the env whose specs are read. Vector, dictionary and image
            observations, continuous, discrete and multi-dimensional actions.
        config, overrides: the settings, as a whole and by name.

    Returns:
        The model and its loss.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for an entry that the model cannot serve, such as class numbers among
            the observations; the message names it.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_mlp_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, loss = make_mlp_world_model(real_env, hidden=(32,), latent_size=8)
        >>> batch = real_env.rollout(100, break_when_any_done=False)
        >>> fit_normalizers(world_model, batch)
        >>> sorted(loss(batch).keys())
        ['loss_done', 'loss_latent', 'loss_reconstruction', 'loss_reward']
        >>> env = WorldModelEnv(world_model, real_env, start_states=real_env, decode=True)
        >>> env.imagine(5)["next", "observation"].shape
        torch.Size([5, 4])
    """
    return build("mlp", env, config, overrides)


@register("mlp", MLPConfig, reserved=(_LATENT,))
def _wire(specs: EnvSpecs, config: MLPConfig) -> tuple[WorldModel, WorldModelLoss]:
    size = config.latent_size
    with_action = size + specs.action_size
    observed = [_LATENT, *specs.action_keys]
    decoder = LatentDecoder(specs, config)
    reward = DenormalizedNetwork(
        WithActions(plain_mlp(config, with_action, specs.reward.size), specs),
        [specs.float_reward("make_mlp_world_model")],
        normalize=config.normalize,
    )
    world_model = WorldModel(
        TensorDictModule(
            LatentEncoder(specs, config, unit_size(size)),
            specs.observation_keys,
            [_LATENT],
        ),
        TensorDictModule(
            ResidualDynamics(
                WithActions(plain_mlp(config, with_action, size), specs),
                unit_size(size),
            ),
            observed,
            [join("next", _LATENT)],
        ),
        TensorDictModule(reward, observed, [join("next", specs.reward.key)]),
        done_head=termination_head(specs, config, _LATENT, size),
        decoder=TensorDictModule(decoder, [_LATENT], specs.observation_keys),
    )
    terms = predictive_terms(world_model, config, reward, decoder)
    loss = WorldModelLoss(
        world_model, losses=terms, multi_step=config.multi_step, decay=config.decay
    )
    loss.set_keys(**specs.loss_keys)
    return world_model, loss
