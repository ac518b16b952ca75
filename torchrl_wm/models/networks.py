"""Networks between the entries of an env and one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, log
from typing import Any

import torch
from torch import nn
from torchrl.modules import symexp, symlog

from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.reference import ActionEntry
from torchrl_wm.modules import JoinEntries, PixelDecoder, PixelEncoder, SplitEntries

#: Makes a network with so many inputs and outputs.
MakeNetwork = Callable[[int, int], nn.Module]


class ObservationEncoder(nn.Module):
    """An encoder of observations to one vector.

    The vector observations together go through one network, and each image through a network
    of its own.

    Args:
        specs: the entries of the env. Their ``observation_keys`` are the order of
            the inputs.
        make: makes the network of the vector observations.
        out_features: the number of outputs of that network.
        config: the settings; ``pixel_depth`` and ``pixel_multipliers`` are used.
        squash: apply symlog to the vector observations first.
    """

    def __init__(
        self,
        specs: EnvSpecs,
        make: MakeNetwork,
        out_features: int,
        config: Any,
        *,
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.squash = squash
        self.join = JoinEntries(specs.vectors)
        self.vectors = None
        if specs.vectors:
            self.vectors = make(self.join.out_features, out_features)
        self.images = _image_networks(PixelEncoder, specs, config)
        #: The length of the vector.
        self.out_features = sum(image.out_features for image in self.images)
        self.out_features += out_features if specs.vectors else 0

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        """Encode observations ``[*B, *feature]`` as ``[*B, out_features]``."""
        count = len(observations) - len(self.images)
        parts = []
        if self.vectors is not None:
            joined = self.join(*observations[:count])
            parts.append(self.vectors(symlog(joined) if self.squash else joined))
        images = zip(self.images, observations[count:])
        parts += [encode(image) for encode, image in images]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class ObservationDecoder(nn.Module):
    """A decoder of latents to observations, in the units of the env and as floats.

    Args:
        specs: the entries of the env. Their ``observation_keys`` are the order of
            the outputs.
        in_features: the size of all latents together.
        make, config: as those of :class:`ObservationEncoder`.
        squash: apply symexp to the output of the network of the vector observations.

    Raises:
        ValueError: if an observation is a class number; the message names it.
    """

    #: Imagined envs read this: they round such outputs to bytes, bits and one-hot entries.
    in_env_units = True

    def __init__(
        self,
        specs: EnvSpecs,
        in_features: int,
        make: MakeNetwork,
        config: Any,
        *,
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.squash = squash
        numbers = [entry.key for entry in specs.vectors if entry.classes]
        if numbers:
            raise ValueError(
                f"The observations {numbers} are class numbers, which a decoder cannot predict "
                f"as numbers. Make them one-hot (GymEnv(..., "
                f"categorical_action_encoding=False) does), or leave them out: "
                f"observation_keys=[...]."
            )
        # One-hot vectors and integers are decoded as floats, which can be trained.
        dtype = torch.get_default_dtype()
        entries = [
            e if e.dtype.is_floating_point else replace(e, dtype=dtype)
            for e in specs.vectors
        ]
        self.split = SplitEntries(entries)
        self.vectors = None
        if entries:
            self.vectors = make(in_features, self.split.in_features)
        self.images = _image_networks(PixelDecoder, specs, config, in_features)

    def forward(
        self, *latents: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Decode latents ``[*B, n]`` to observations ``[*B, *feature]``."""
        out = []
        if self.vectors is not None:
            vector = self.vectors(*latents)
            parts = self.split(_unsquashed(vector) if self.squash else vector)
            out += parts if isinstance(parts, tuple) else (parts,)
        out += [decode(*latents) for decode in self.images]
        return out[0] if len(out) == 1 else tuple(out)


def _image_networks(
    kind: type[nn.Module], specs: EnvSpecs, config: Any, *sizes: int
) -> nn.ModuleList:
    """Return a network of ``kind`` for each image; its sizes stand before the image's shape."""
    return nn.ModuleList(
        kind(
            *sizes,
            entry.chw,
            layout=entry.layout,
            scale=entry.scale,
            depth=config.pixel_depth,
            multipliers=config.pixel_multipliers,
        )
        for entry in specs.pixels
    )


def _unsquashed(value: torch.Tensor) -> torch.Tensor:
    """Return a finite ``symexp``, with the gradient of the unclamped one.

    Losses take its symlog. At infinity that has no gradient, and the gradient of a clamped
    output is zero and would never make it smaller.
    """
    limit = 0.9 * log(torch.finfo(value.dtype).max)
    return symexp(value + (value.clamp(-limit, limit) - value).detach())


class WithActions(nn.Module):
    """A network of a latent and of actions, which are joined to one float vector.

    Args:
        network: a network of both, joined or as two inputs.
        specs: the entries of the env. Their ``action_keys`` are the order of the
            inputs after the latent.
    """

    def __init__(self, network: nn.Module, specs: EnvSpecs) -> None:
        super().__init__()
        self.network = network
        self.actions = JoinEntries(specs.actions)

    def forward(self, latent: torch.Tensor, *actions: torch.Tensor) -> torch.Tensor:
        """Return the network's output for a latent ``[*B, L]`` and actions ``[*B, *feature]``."""
        return self.network(latent, self.actions(*actions))


class UnitActions(JoinEntries):
    """Actions as one float vector, those within finite bounds as numbers between -1 and 1.

    TorchRL's block GRU takes no larger ones: it clips them. Actions beyond their bounds are
    clipped as well, as envs do.

    Args:
        actions: the actions, in the order in which they are given and joined.
    """

    def __init__(self, actions: Sequence[ActionEntry]) -> None:
        super().__init__(actions)
        middle, reach, limit = [], [], []
        for entry in actions:
            ends = list(zip(entry.low, entry.high)) if entry.kind == "bounded" else []
            if not entry.dtype.is_floating_point or not _are_finite(ends):
                ends = []
            middle += [(low + high) / 2 for low, high in ends] or [0.0] * entry.size
            reach += [(high - low) / 2 for low, high in ends] or [1.0] * entry.size
            limit += ([1.0] if ends else [inf]) * entry.size
        #: Whether any number is scaled.
        self.is_scaled = 1.0 in limit
        # Derived from the entries, so not part of the state.
        for name, values in (("middle", middle), ("reach", reach), ("limit", limit)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Join actions ``[*B, *feature]`` to ``[*B, out_features]``."""
        joined = super().forward(*values)
        if not self.is_scaled:
            return joined
        share = (joined - self.middle) / self.reach
        return share.clamp(-self.limit, self.limit)


def _are_finite(ends: Sequence[tuple[float, float]]) -> bool:
    most = torch.finfo(torch.float32).max / 4
    return all(-most < low < high < most for low, high in ends)


class Shaped(nn.Module):
    """A network whose output gets the shape and the dtype of an entry.

    Args:
        network: a network with the output ``[*B, n]``.
        shape: the feature shape of the entry, with ``n`` elements.
        dtype: the dtype of the entry.
    """

    def __init__(
        self, network: nn.Module, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network, self.shape, self.dtype = network, tuple(shape), dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the network's output as ``[*B, *shape]``."""
        return self.network(*inputs).unflatten(-1, self.shape).to(self.dtype)
