"""Probabilistic ensembles over observations, as in PETS and MBPO, from an env's specs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm._checks import check_choice
from torchrl_wm.models.building import activation, build, register, Same
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.heads import end_head
from torchrl_wm.modules import (
    BoundedLogVar,
    DrawnMember,
    EnsembleDynamics,
    EnsembleMLP,
    Entry,
    FunctionHead,
    GaussianEnsemble,
    NormalizedNetwork,
    TerminationHead,
    with_propagation,
    WorldModel,
)
from torchrl_wm.modules.blocks.ensemble_dynamics import Propagation
from torchrl_wm.modules.keys import join, sibling
from torchrl_wm.objectives import DoneTerm, GaussianNLLTerm, WorldModelLoss


@dataclass(frozen=True)
class EnsembleConfig:
    """The settings of :func:`make_ensemble_world_model`.

    Args:
        observation_keys: the observations to model; all by default.
        members: the number of networks of the ensemble, ``E``.
        elites: the number of members that predict after
            :meth:`~torchrl_wm.modules.EnsembleDynamics.choose_elites`; by default 5, or
            all if there are fewer.
        hidden: the sizes of the members' hidden layers.
        activation: ``"silu"``, ``"relu"``, ``"elu"``, ``"gelu"``, ``"mish"`` or ``"tanh"``.
        target: ``"delta"``, the members predict changes, or ``"absolute"``.
        propagation: ``"ts1"``, ``"tsinf"``, ``"expectation"`` or ``"mean"``;
            :func:`~torchrl_wm.modules.with_propagation` gives the same model with another.
        normalize: normalise inputs and targets.
        bootstrap: train each member on a bootstrap sample of its own.
        beta: the power of the variance that weights the likelihood
            (:class:`~torchrl_wm.objectives.GaussianNLLTerm`).
        log_var_low, log_var_high: the first values of the learned bounds of the
            log-variance, in units of the normalised targets.
        termination: ``"learned"``, by a head on the next observation, or ``"none"`` if only
            a time limit ends episodes.
        termination_hidden: the sizes of that head's hidden layers.
        termination_members: the number of networks of that head. A network drawn at
            random predicts each row, so that states on which they disagree end some of the
            imagined episodes.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        reward_function: the known reward, ``f(observation, action, next_observation)``;
            the members predict the reward if None.
        termination_function: the same for terminations, a bool.
    """

    observation_keys: tuple[NestedKey, ...] | None = None
    members: int = 7
    elites: int | None = None
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    activation: str = "silu"
    target: Literal["delta", "absolute"] = "delta"
    propagation: Propagation = "ts1"
    normalize: bool = True
    bootstrap: bool = True
    beta: float = 0.0
    log_var_low: float = -10.0
    log_var_high: float = 0.5
    termination: Literal["learned", "none"] = "learned"
    termination_hidden: tuple[int, ...] = (200, 200)
    termination_members: int = 1
    termination_threshold: float = 0.5
    sample_termination: bool = False
    reward_function: Callable[..., torch.Tensor] | None = None
    termination_function: Callable[..., torch.Tensor] | None = None


def make_ensemble_world_model(
    env: EnvBase, config: EnsembleConfig | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make a probabilistic ensemble over the observations of ``env``, and its loss.

    The latents are the observations themselves (PETS, arXiv 1805.12114; MBPO, arXiv
    1906.08253), so real and imagined transitions fit one replay buffer. The loss
    has the term ``"nll"``, which trains all members on transitions, and ``"done"`` if
    terminations are learned.

    Fit the normalisers before training, and choose the elites after it::

        fit_normalizers(world_model, batch)
        ...
        world_model.dynamics.choose_elites(held_out)

    Args:
        env: the env whose specs are read. Vector and dictionary observations of
            float dtypes, continuous, discrete and multi-dimensional actions.
        config, overrides: the settings, as a whole and by name.

    Returns:
        The model and its loss.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for an entry that the model cannot serve, such as an image; the message
            names it.

    Examples:
        >>> import torch
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, loss = make_ensemble_world_model(real_env, members=5, hidden=(64, 64))
        >>> batch = real_env.rollout(200, break_when_any_done=False)
        >>> fit_normalizers(world_model, batch)
        >>> optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> for _ in range(3):
        ...     loss(batch).sum(reduce=True).backward()
        ...     optimizer.step(), optimizer.zero_grad()
        (None, None)
        (None, None)
        (None, None)
        >>> errors = world_model.dynamics.choose_elites(batch)
        >>> env = WorldModelEnv(world_model, real_env)
        >>> env.imagine(5, tensordict=batch[:8].exclude("next")).batch_size
        torch.Size([8, 5])
    """
    return build("ensemble", env, config, overrides)


@register(
    "ensemble",
    EnsembleConfig,
    reserved=("loc", "log_var", "disagreement", "member", "ensemble_reward"),
)
def _wire(specs: EnvSpecs, config: EnsembleConfig) -> tuple[WorldModel, WorldModelLoss]:
    name = "make_ensemble_world_model"
    specs.without_pixels(name).only_floats(name)
    latents, actions = specs.vectors, specs.actions
    known = config.reward_function is not None
    reward = None if known else specs.float_reward(name)
    outputs = specs.vector_size + (0 if reward is None else reward.size)
    ensemble = GaussianEnsemble(
        config.members,
        specs.vector_size + specs.action_size,
        outputs,
        hidden=config.hidden,
        activation=activation(config.activation),
        log_var=BoundedLogVar(
            outputs, low=config.log_var_low, high=config.log_var_high
        ),
    )
    dynamics = EnsembleDynamics(
        ensemble,
        latents,
        actions,
        reward=reward,
        target=config.target,
        elites=min(5, config.members) if config.elites is None else config.elites,
        normalize=config.normalize,
    )
    world_model = WorldModel(
        TensorDictModule(Same(), specs.vector_keys, specs.vector_keys),
        dynamics,
        _reward_head(specs, config),
        done_head=_done_head(specs, config),
    )
    if config.propagation != dynamics.propagation:
        world_model = with_propagation(world_model, config.propagation)
    terms = [GaussianNLLTerm(bootstrap=config.bootstrap, beta=config.beta)]
    if isinstance(world_model.done_head, TerminationHead):
        terms.append(DoneTerm(real_next=True))
    loss = WorldModelLoss(world_model, losses=terms)
    loss.set_keys(**specs.loss_keys)
    return world_model, loss


def _reward_head(specs: EnvSpecs, config: EnsembleConfig) -> TensorDictModule:
    if config.reward_function is not None:
        return FunctionHead(
            config.reward_function, specs.vectors, specs.actions, specs.reward
        )
    key = specs.reward.key
    predicted = join("next", sibling(key, "ensemble_reward"))
    return TensorDictModule(nn.Identity(), [predicted], [join("next", key)])


def _done_head(specs: EnvSpecs, config: EnsembleConfig) -> TensorDictModule | None:
    if config.termination_function is not None:
        flag = Entry(specs.terminated_key, specs.done.shape, torch.bool)
        return FunctionHead(
            config.termination_function, specs.vectors, specs.actions, flag
        )
    check_choice(
        "termination",
        config.termination,
        ("learned", "none"),
        ", or give a termination_function",
    )
    if config.termination == "none":
        return None
    network = DrawnMember(
        EnsembleMLP(
            config.termination_members,
            specs.vector_size,
            specs.done.size,
            hidden=config.termination_hidden,
            activation=activation(config.activation),
        )
    )
    network = NormalizedNetwork(specs.vectors, network, normalize=config.normalize)
    reads = [join("next", key) for key in specs.vector_keys]
    return end_head(TerminationHead, network, reads, specs, config)
