"""The networks of deterministic latent models: encoder, dynamics, decoder."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey
from torch import nn
from torchrl.modules import MLP

from torchrl_wm._checks import check_choice
from torchrl_wm.models.building import activation
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.heads import end_head
from torchrl_wm.models.networks import ObservationDecoder, ObservationEncoder
from torchrl_wm.modules import (
    DenormalizedNetwork,
    JoinEntries,
    Normalizer,
    TerminationHead,
    WorldModel,
)
from torchrl_wm.modules.keys import join, unique
from torchrl_wm.objectives import (
    DoneTerm,
    LatentTerm,
    LossTerm,
    ReconstructionTerm,
    RewardTerm,
)


class LatentEncoder(nn.Module):
    """An encoder of observations to a latent, ``[*B, L]``, which norms vector observations.

    Args:
        specs: the entries of the env. Their ``observation_keys`` are the order of
            the inputs.
        config: the settings; ``latent_size``, ``hidden``, ``activation``, ``normalize`` and those
            of images are used.
        norm: the last layer.
    """

    def __init__(self, specs: EnvSpecs, config: Any, norm: nn.Module) -> None:
        super().__init__()
        width = config.hidden[-1] if config.hidden else config.latent_size
        self.normalizer = None
        if config.normalize and specs.vectors:
            self.normalizer = Normalizer(specs.vector_size)

        def vectors(in_features: int, out_features: int) -> nn.Module:
            network = plain_mlp(config, in_features, out_features)
            if self.normalizer is None:
                return network
            return nn.Sequential(_Applied(self.normalizer), network)

        self.features = ObservationEncoder(
            specs,
            vectors,
            width,
            config,
        )
        self.latent = nn.Sequential(
            activation(config.activation)(),
            nn.Linear(self.features.out_features, config.latent_size),
            norm,
        )

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        """Encode observations ``[*B, *feature]`` as ``[*B, L]``."""
        return self.latent(self.features(*observations))

    def fit_normalizer(self, *observations: torch.Tensor) -> None:
        """Fit the normaliser to the vector observations, which come first."""
        if self.normalizer is not None:
            join = self.features.join
            self.normalizer.fit(join(*observations[: len(join.entries)]))


class LatentDecoder(nn.Module):
    """A decoder of a latent to observations, which undoes the norm of vector observations.

    Args:
        specs, config: as those of :class:`LatentEncoder`.
    """

    in_env_units = True

    def __init__(self, specs: EnvSpecs, config: Any) -> None:
        super().__init__()
        self.join = JoinEntries(specs.vectors)
        self.normalizer = None
        if config.normalize and specs.vectors:
            self.normalizer = Normalizer(specs.vector_size)
        self.image_scales = {entry.key: entry.scale for entry in specs.pixels}

        def vectors(in_features: int, out_features: int) -> nn.Module:
            network = plain_mlp(config, in_features, out_features)
            if self.normalizer is None:
                return network
            return nn.Sequential(network, _Applied(self.normalizer, inverse=True))

        self.observations = ObservationDecoder(
            specs, config.latent_size, vectors, config
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Decode a latent ``[*B, L]`` to observations ``[*B, *feature]``."""
        return self.observations(latent)

    def fit_output_normalizer(self, *observations: torch.Tensor) -> None:
        """Fit the normaliser to the vector observations, which come first."""
        if self.normalizer is not None:
            vectors = observations[: len(self.join.entries)]
            self.normalizer.fit(self.join(*vectors))

    def scale(self, key: NestedKey) -> torch.Tensor | float:
        """Return the unit of an observation's errors: its spread, or an image's largest value."""
        key = unique([key])[0]
        if key in self.image_scales:
            return self.image_scales[key]
        if self.normalizer is None:
            return 1.0
        std = self.observations.split(self.normalizer.std)
        std = std if isinstance(std, tuple) else (std,)
        return std[[entry.key for entry in self.join.entries].index(key)]


class _Applied(nn.Module):
    """The use of a normaliser within a network; the module around it owns and fits it."""

    def __init__(self, normalizer: Normalizer, *, inverse: bool = False) -> None:
        super().__init__()
        # Not registered: a state_dict holds each tensor once.
        self.__dict__["normalizer"] = normalizer
        self.inverse = inverse

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        apply = self.normalizer.inverse if self.inverse else self.normalizer
        return apply(value)


class ResidualDynamics(nn.Module):
    """Dynamics: a latent plus the change that a network predicts.

    Args:
        change: a network of the latent and the actions.
        norm: the last layer.
    """

    def __init__(self, change: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.change, self.norm = change, norm

    def forward(self, latent: torch.Tensor, *actions: torch.Tensor) -> torch.Tensor:
        """Return the next latent ``[*B, L]``."""
        return self.norm(latent + self.change(latent, *actions))


def unit_size(latent_size: int) -> nn.Module:
    """Return a module that keeps latents at a root mean square of 1.

    Otherwise latents grow, which helps the heads. The errors of the predicted latents grow
    with them, until training diverges.
    """
    return nn.RMSNorm(latent_size, eps=1e-6, elementwise_affine=False)


def termination_head(
    specs: EnvSpecs, config: Any, latent: NestedKey, size: int
) -> TerminationHead | None:
    """Return a head that predicts ends from a next latent; None for ``termination="none"``.

    Args:
        specs: the entries of the env.
        config: the settings; ``hidden``, ``activation`` and those of terminations are used.
        latent: the latent.
        size: its size.

    Raises:
        ValueError: for another ``termination``.
    """
    check_choice("termination", config.termination, ("learned", "none"))
    if config.termination == "none":
        return None
    network = plain_mlp(config, size, specs.done.size)
    return end_head(TerminationHead, network, [join("next", latent)], specs, config)


def predictive_terms(
    world_model: WorldModel,
    config: Any,
    reward: DenormalizedNetwork,
    decoder: LatentDecoder,
) -> list[LossTerm]:
    """Return the terms that compare predictions with what came: reward, observations, latents, ends.

    Args:
        world_model: the model.
        config: the settings; the weights of the terms are used.
        reward, decoder: its networks, which know the units of their errors.
    """
    terms: list[LossTerm] = [
        RewardTerm(weight=config.reward_weight, scale=reward.scale),
        ReconstructionTerm(
            weight=config.reconstruction_weight, target="next", scale=decoder.scale
        ),
        LatentTerm(weight=config.latent_weight),
    ]
    if world_model.done_head is not None:
        terms.append(DoneTerm(weight=config.done_weight))
    return terms


def plain_mlp(config: Any, in_features: int, out_features: int) -> MLP:
    """Return a network with the hidden layers of a config, which joins its inputs."""
    return MLP(
        in_features,
        out_features,
        num_cells=list(config.hidden),
        activation_class=activation(config.activation),
    )
