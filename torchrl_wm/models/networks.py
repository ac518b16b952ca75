"""Networks between the entries of an env and one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

import torch
from torch import nn
from torchrl.modules import symexp, symlog

from torchrl_wm.models.specs import EnvSpecs
from torchrl_wm.modules import JoinEntries, PixelDecoder, PixelEncoder, SplitEntries

#: Makes a network from its numbers of inputs and outputs.
MakeNetwork = Callable[[int, int], nn.Module]


class ObservationEncoder(nn.Module):
    """Observations as one vector: vectors together through a network, each image through its own.

    Args:
        specs: the entries of the env. Their ``observation_keys`` are the order of
            the inputs.
        make: makes the network for the vectors.
        out_features: its size.
        squash: whether the vectors go through symlog first.
        pixel_depth: channels of the image encoders.
        pixel_multipliers: of their stages.
    """

    def __init__(
        self,
        specs: EnvSpecs,
        make: MakeNetwork,
        out_features: int,
        *,
        squash: bool = False,
        pixel_depth: int = 16,
        pixel_multipliers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.squash = squash
        self.join = JoinEntries(specs.vectors)
        self.vectors = None
        if specs.vectors:
            self.vectors = make(self.join.out_features, out_features)
        self.images = nn.ModuleList(
            PixelEncoder(
                entry.chw,
                layout=entry.layout,
                scale=entry.scale,
                depth=pixel_depth,
                multipliers=pixel_multipliers,
            )
            for entry in specs.pixels
        )
        #: The length of the vector.
        self.out_features = sum(image.out_features for image in self.images)
        self.out_features += out_features if specs.vectors else 0

    def forward(self, *observations: torch.Tensor) -> torch.Tensor:
        """``[*B, *feature]`` each, as ``[*B, out_features]``."""
        count = len(observations) - len(self.images)
        parts = []
        if self.vectors is not None:
            joined = self.join(*observations[:count])
            parts.append(self.vectors(symlog(joined) if self.squash else joined))
        images = zip(self.images, observations[count:])
        parts += [encode(image) for encode, image in images]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class ObservationDecoder(nn.Module):
    """Latents as observations, in the units of the env and as floats.

    Args:
        specs: the entries of the env. Their ``observation_keys`` are the order of
            the outputs.
        in_features: the size of the latents together.
        make, pixel_depth, pixel_multipliers: as the encoder's.
        squash: whether the vectors' network speaks in symlog space.

    Raises:
        ValueError: if an observation is a class number; the message names it.
    """

    #: What an imagined env asks: bytes, bits and one-hot entries may be had by rounding.
    in_env_units = True

    def __init__(
        self,
        specs: EnvSpecs,
        in_features: int,
        make: MakeNetwork,
        *,
        squash: bool = False,
        pixel_depth: int = 16,
        pixel_multipliers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.squash = squash
        numbers = [entry.key for entry in specs.vectors if entry.classes]
        if numbers:
            raise ValueError(
                f"The observations {numbers} are class numbers, which a decoder cannot tell "
                f"apart as numbers. Make them one-hot (GymEnv(..., "
                f"categorical_action_encoding=False) does), or leave them out: "
                f"observation_keys=[...]."
            )
        # One-hot vectors and integers are decoded as floats: only these can be trained.
        dtype = torch.get_default_dtype()
        entries = [
            e if e.dtype.is_floating_point else replace(e, dtype=dtype)
            for e in specs.vectors
        ]
        self.split = SplitEntries(entries)
        self.vectors = None
        if entries:
            self.vectors = make(in_features, self.split.in_features)
        self.images = nn.ModuleList(
            PixelDecoder(
                in_features,
                entry.chw,
                layout=entry.layout,
                scale=entry.scale,
                depth=pixel_depth,
                multipliers=pixel_multipliers,
            )
            for entry in specs.pixels
        )

    def forward(
        self, *latents: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """``[*B, n]`` each, as one ``[*B, *feature]`` for each observation."""
        out = []
        if self.vectors is not None:
            vector = self.vectors(*latents)
            parts = self.split(_unsquashed(vector) if self.squash else vector)
            out += parts if isinstance(parts, tuple) else (parts,)
        out += [decode(*latents) for decode in self.images]
        return out[0] if len(out) == 1 else tuple(out)


def _unsquashed(value: torch.Tensor) -> torch.Tensor:
    """``symexp``, which stays finite, and whose gradient always leads back.

    Losses take the symlog of it: of infinity that has no gradient, and of a constant
    none that would ever make the network's output smaller.
    """
    limit = 0.9 * log(torch.finfo(value.dtype).max)
    return symexp(value + (value.clamp(-limit, limit) - value).detach())


class WithActions(nn.Module):
    """A network of a latent and of actions, which become one float vector first.

    Args:
        network: reads both, joined or as two inputs.
        specs: the entries of the env. Their ``action_keys`` are the order of the
            inputs after the latent.
    """

    def __init__(self, network: nn.Module, specs: EnvSpecs) -> None:
        super().__init__()
        self.network = network
        self.actions = JoinEntries(specs.actions)

    def forward(self, latent: torch.Tensor, *actions: torch.Tensor) -> torch.Tensor:
        """A latent ``[*B, L]`` and actions ``[*B, *feature]``, as what the network makes of them."""
        return self.network(latent, self.actions(*actions))


class Shaped(nn.Module):
    """A network whose vector is given the shape and the dtype of an entry.

    Args:
        network: its inputs as ``[*B, n]``.
        shape: the feature shape, of ``n`` numbers.
        dtype: the entry's.
    """

    def __init__(
        self, network: nn.Module, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network, self.shape, self.dtype = network, tuple(shape), dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The inputs as ``[*B, *shape]``."""
        return self.network(*inputs).unflatten(-1, self.shape).to(self.dtype)
