"""Networks between observations and one latent of unit size: those of models that are no RSSM."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey
from torch import nn
from torchrl.modules import MLP

from torchrl_wm.models.building import activation
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.networks import ObservationDecoder, ObservationEncoder
from torchrl_wm.modules import JoinEntries, Normalizer
from torchrl_wm.modules.keys import unique


class LatentEncoder(nn.Module):
    """The encoder of observations to a latent.

    Args:
        specs: the entries of the env.
        config: the settings: ``latent_size``, ``hidden``, ``activation``, ``normalize``,
            ``pixel_depth`` and ``pixel_multipliers``.
    """

    def __init__(self, specs: EnvSpecs, config: Any) -> None:
        super().__init__()
        width = config.hidden[-1] if config.hidden else config.latent_size
        self.normalizer = None
        if config.normalize and specs.vectors:
            self.normalizer = Normalizer(specs.vector_size)

        def vectors(in_features: int, out_features: int) -> nn.Module:
            network = hidden_mlp(config, in_features, out_features)
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
            unit_size(config),
        )

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        """Encode observations ``[*B, *feature]`` as a latent ``[*B, L]``."""
        return self.latent(self.features(*observations))

    def fit_normalizer(self, *observations: torch.Tensor) -> None:
        """Fit the normaliser of vectors to observations ``[*B, *feature]``."""
        if self.normalizer is not None:
            join = self.features.join
            self.normalizer.fit(join(*observations[: len(join.entries)]))


class LatentDecoder(nn.Module):
    """The decoder of a latent to observations.

    Args:
        specs: the entries of the env.
        config: as that of :class:`LatentEncoder`.
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
            network = hidden_mlp(config, in_features, out_features)
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
        """Fit the normaliser of vectors to observations ``[*B, *feature]``."""
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


def unit_size(config: Any) -> nn.Module:
    """Return a module that keeps latents at a root mean square of 1.

    Otherwise latents grow, which helps the heads. The errors of the predicted latents grow
    with them, until training diverges.
    """
    return nn.RMSNorm(config.latent_size, eps=1e-6, elementwise_affine=False)


def hidden_mlp(config: Any, in_features: int, out_features: int) -> MLP:
    """Return a network with the hidden layers and the activation of the settings."""
    return MLP(
        in_features,
        out_features,
        num_cells=list(config.hidden),
        activation_class=activation(config.activation),
    )
