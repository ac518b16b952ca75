"""Joint-embedding world models, from an env's specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm._checks import check_choice
from torchrl_wm.models.building import build, register
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.latents import (
    LatentDecoder,
    LatentEncoder,
    plain_mlp,
    ResidualDynamics,
    termination_head,
    unit_size,
)
from torchrl_wm.models.networks import WithActions
from torchrl_wm.modules import DenormalizedNetwork, WorldModel
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import (
    DoneTerm,
    LatentTerm,
    LossTerm,
    ProbeTerm,
    RewardTerm,
    SIGRegTerm,
    VICRegTerm,
    WorldModelLoss,
)

_LATENT = "latent"


@dataclass(frozen=True)
class JEPAConfig:
    """The settings of :func:`make_jepa_world_model`.

    The defaults are for small problems, :meth:`le_world_model` gives a paper's settings.

    Args:
        observation_keys: the observations to model; all by default.
        latent_size: ``L``, at least 2.
        unit_latents: keep latents, encoded and predicted, at a root mean square of 1. Without
            it nothing bounds what is predicted open loop.
        hidden: the sizes of the hidden layers of every network.
        activation: ``"silu"``, ``"relu"``, ``"elu"``, ``"gelu"``, ``"mish"`` or ``"tanh"``.
        normalize: normalise vector observations and rewards.
        pixel_depth, pixel_multipliers: the ``depth`` and the ``multipliers`` of the image
            networks; see :class:`~torchrl_wm.modules.PixelEncoder`.
        regularizer: what keeps latents from collapsing: ``"sigreg"``
            (:class:`~torchrl_wm.objectives.SIGRegTerm`) or ``"vicreg"``
            (:class:`~torchrl_wm.objectives.VICRegTerm`).
        regularizer_weight: its weight. By default 0.01 for SIGReg and 0.1 for VICReg: the
            papers' weights, 0.09 and 1, fold the latents of small problems, so that distances
            in them say less of how far a goal is.
        projections, knots: the settings of SIGReg.
        reward: predict rewards.
        termination: ``"learned"``, or ``"none"`` if only a time limit ends episodes, or nobody
            asks for ends.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        probe: train a decoder on detached latents, which shapes nothing but itself, to look at
            what is imagined.
        multi_step: train open loop over sequences ``[*B, T]``, in place of single
            transitions.
        decay: the weight of a step relative to the one before it, with ``multi_step``.
        latent_weight, reward_weight, done_weight, probe_weight: the weights of the losses.

    Raises:
        ValueError: if ``latent_size`` is below 2, or ``regularizer`` is unknown.
    """

    observation_keys: tuple[NestedKey, ...] | None = None
    latent_size: int = 64
    unit_latents: bool = True
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "silu"
    normalize: bool = True
    pixel_depth: int = 16
    pixel_multipliers: tuple[int, ...] | None = None
    regularizer: Literal["sigreg", "vicreg"] = "sigreg"
    regularizer_weight: float | None = None
    projections: int = 256
    knots: int = 17
    reward: bool = False
    termination: Literal["learned", "none"] = "none"
    termination_threshold: float = 0.5
    sample_termination: bool = False
    probe: bool = False
    multi_step: bool = False
    decay: float = 1.0
    latent_weight: float = 1.0
    reward_weight: float = 1.0
    done_weight: float = 1.0
    probe_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("regularizer", self.regularizer, ("sigreg", "vicreg"))
        if self.latent_size < 2:
            raise ValueError(
                f"latent_size must be at least 2, got {self.latent_size}: latents have a fixed "
                f"length, and one number would keep only its sign."
            )

    @classmethod
    def le_world_model(cls, **settings: Any) -> JEPAConfig:
        """Return the latent and the losses of LeWorldModel (arXiv 2603.19312).

        Its networks are transformers over three frames; these are convolutions and MLPs of a
        single observation.
        """
        paper = {
            "latent_size": 192,
            "hidden": (1024, 1024),
            "pixel_depth": 48,
            "projections": 1024,
            "knots": 17,
            "regularizer_weight": 0.09,
        }
        return cls(**{**paper, **settings})


def make_jepa_world_model(
    env: EnvBase, config: JEPAConfig | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make a joint-embedding world model of ``env``: it predicts encodings and decodes nothing.

    Observations of all kinds are encoded as one latent, ``"latent"``; a network of the latent
    and the action predicts its change. The loss compares the predicted latent with the encoding
    of the next observation and trains both sides, and a regulariser keeps the encodings from
    collapsing to a point: SIGReg (LeJEPA, arXiv 2511.08544; LeWorldModel, 2603.19312) or VICReg
    (2105.04906). Neither needs rewards: a planner reaches goals in the model's latents
    (:class:`~torchrl_wm.planners.GoalDistance`). Rewards, ends and a decoder to look through
    are settings.

    The model predicts from a single observation. Where that hides speeds, stack frames
    (:class:`torchrl.envs.CatFrames`). Fit the normalisers of vector observations and rewards
    before training, by :func:`~torchrl_wm.modules.fit_normalizers`.

    Args:
        env: the env whose specs are read. Vector, dictionary and image
            observations, continuous, discrete and multi-dimensional actions.
        config, overrides: the settings, as a whole and by name.

    Returns:
        The model and its loss.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for an entry that the model cannot serve; the message names it.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_jepa_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> from torchrl_wm.planners import CEMPlanner, GoalDistance
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, loss = make_jepa_world_model(real_env, hidden=(32,), latent_size=8)
        >>> batch = real_env.rollout(100)
        >>> fit_normalizers(world_model, batch)
        >>> sorted(loss(batch).keys())
        ['loss_latent', 'loss_sigreg']
        >>> planner = CEMPlanner(
        ...     WorldModelEnv(world_model, real_env),
        ...     planning_horizon=5,
        ...     optim_steps=2,
        ...     num_candidates=16,
        ...     top_k=4,
        ...     score=GoalDistance("latent", goal={"observation": "goal"}),
        ... )
        >>> state = real_env.reset()
        >>> state["goal"] = batch["observation"][50]
        >>> planner(state)["action"].shape
        torch.Size([1])
    """
    return build("jepa", env, config, overrides)


@register("jepa", JEPAConfig, reserved=(_LATENT,))
def _wire(specs: EnvSpecs, config: JEPAConfig) -> tuple[WorldModel, WorldModelLoss]:
    size = config.latent_size
    with_action = size + specs.action_size
    observed = [_LATENT, *specs.action_keys]
    reward = decoder = reward_head = probe = None
    if config.reward:
        reward = DenormalizedNetwork(
            WithActions(plain_mlp(config, with_action, specs.reward.size), specs),
            [specs.float_reward("make_jepa_world_model with reward=True")],
            normalize=config.normalize,
        )
        next_reward = join("next", specs.reward.key)
        reward_head = TensorDictModule(reward, observed, [next_reward])
    if config.probe:
        decoder = LatentDecoder(specs, config)
        probe = TensorDictModule(decoder, [_LATENT], specs.observation_keys)
    dynamics = ResidualDynamics(
        WithActions(plain_mlp(config, with_action, size), specs), _norm(config)
    )
    world_model = WorldModel(
        TensorDictModule(
            LatentEncoder(specs, config, _norm(config)),
            specs.observation_keys,
            [_LATENT],
        ),
        TensorDictModule(dynamics, observed, [join("next", _LATENT)]),
        reward_head,
        done_head=termination_head(specs, config, _LATENT, size),
        decoder=probe,
    )
    terms = [
        LatentTerm(weight=config.latent_weight, stop_gradient=False),
        _regularizer(config),
    ]
    if reward is not None:
        terms.append(RewardTerm(weight=config.reward_weight, scale=reward.scale))
    if world_model.done_head is not None:
        terms.append(DoneTerm(weight=config.done_weight))
    if decoder is not None:
        terms.append(ProbeTerm(weight=config.probe_weight, scale=decoder.scale))
    loss = WorldModelLoss(
        world_model, losses=terms, multi_step=config.multi_step, decay=config.decay
    )
    loss.set_keys(**specs.loss_keys)
    return world_model, loss


def _norm(config: JEPAConfig) -> nn.Module:
    """Return the last layer of encoder and dynamics."""
    return unit_size(config.latent_size) if config.unit_latents else nn.Identity()


def _regularizer(config: JEPAConfig) -> LossTerm:
    """Return the term that keeps latents from collapsing."""
    weight = config.regularizer_weight
    if config.regularizer == "vicreg":
        return VICRegTerm(0.1 if weight is None else weight)
    return SIGRegTerm(
        0.01 if weight is None else weight,
        projections=config.projections,
        knots=config.knots,
    )
