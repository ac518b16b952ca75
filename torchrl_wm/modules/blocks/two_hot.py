"""Scalars as distributions over bins: two-hot regression."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn
from torchrl.modules import symexp, SymExpTwoHot, symlog
from torchrl.objectives import two_hot_encode


class SymlogTwoHot(nn.Module):
    """Scalars as two neighbouring bins, evenly spaced in symlog space.

    TD-MPC2's representation (arXiv 2310.16828, section 3.1): a scalar ``x`` is
    spread over the two bins around ``symlog(x)``, and logits are read as
    ``symexp`` of their expectation. TorchRL's
    :class:`~torchrl.modules.SymExpTwoHot`, which is that of DreamerV3, interpolates between
    the raw values of its bins instead, over a wider range. Every ``two_hot`` argument takes
    either.

    Args:
        num_bins: the number of bins.
        limit: the bins span ``[-limit, limit]`` in symlog space; scalars beyond
            saturate. The default reaches about 22,000.

    Raises:
        ValueError: if there are fewer than 2 bins, or ``limit`` is not positive.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import SymlogTwoHot
        >>> two_hot = SymlogTwoHot()
        >>> x = torch.tensor([-10.0, 0.0, 0.3])
        >>> two_hot.decode(two_hot.encode(x).log()).allclose(x, atol=1e-4)
        True
    """

    def __init__(self, num_bins: int = 101, limit: float = 10.0) -> None:
        super().__init__()
        if num_bins < 2 or not limit > 0:
            raise ValueError(
                f"SymlogTwoHot needs at least 2 bins and a positive limit, got "
                f"num_bins={num_bins} and limit={limit}."
            )
        self.num_bins, self.limit = num_bins, limit
        bins = torch.linspace(-limit, limit, num_bins)
        # Rounding must not make them lopsided: equal logits stand for exactly 0.
        self.register_buffer("bins", (bins - bins.flip(0)) / 2)

    def encode(self, target: torch.Tensor) -> torch.Tensor:
        """Return scalars ``[*B]`` as distributions ``[*B, bins]``."""
        return two_hot_encode(symlog(target), self.bins)

    def decode(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits ``[*B, bins]`` as scalars ``[*B]``.

        Raises:
            ValueError: if there is not one logit for each bin.
        """
        if logits.shape[-1] != self.num_bins:
            raise ValueError(
                f"The logits have the shape {tuple(logits.shape)}, and there are {self.num_bins} "
                f"bins."
            )
        half = self.num_bins // 2
        shares = logits.softmax(-1)
        # Mirrored bins together: equal logits stand for exactly 0, in any order of summation.
        lean = shares[..., -half:] - shares[..., :half].flip(-1)
        return symexp((lean * self.bins[-half:].to(lean.dtype)).sum(-1))

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy ``[*B]`` of logits ``[*B, bins]`` and scalars ``[*B(, 1)]``.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if target.shape == (*logits.shape[:-1], 1):
            target = target.squeeze(-1)
        if target.shape != logits.shape[:-1] or logits.shape[-1] != self.num_bins:
            raise ValueError(
                f"The logits have the shape {tuple(logits.shape)} and the scalars "
                f"{tuple(target.shape)}; [*B, {self.num_bins}] and [*B] or [*B, 1] are expected."
            )
        # Only the two bins, in place of a distribution over all.
        x = symlog(target).clamp(-self.limit, self.limit)
        place = (x + self.limit) * ((self.num_bins - 1) / (2 * self.limit))
        lower = place.floor().clamp(0, self.num_bins - 2)
        share = place - lower
        index = lower.nan_to_num(0).long().unsqueeze(-1)  # NaN stays in the shares
        chosen = logits.gather(-1, torch.cat([index, index + 1], -1))
        shares = torch.stack([1 - share, share], -1)
        return logits.logsumexp(-1) - (shares * chosen).sum(-1)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Decode logits to scalars with a trailing dim, ``[*B, 1]``."""
        return self.decode(logits).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, limit={self.limit}"


def neighbouring_bins(
    target: torch.Tensor, bins: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two bins next to each scalar, and its shares of them.

    They say the same as TorchRL's ``two_hot_encode``, without its distribution over all bins.

    Args:
        target: scalars, ``[*B]``. Beyond the bins they saturate.
        bins: ascending, ``[bins]``.

    Returns:
        Indices, int64, and shares, which sum to 1: ``[*B, 2]`` each.
    """
    bins = bins.to(target)
    target = target.clamp(bins[0], bins[-1])
    lower = torch.bucketize(target, bins, right=True) - 1
    lower = lower.clamp(0, len(bins) - 2)
    below, above = bins[lower], bins[lower + 1]
    share = (target - below) / (above - below)
    return torch.stack([lower, lower + 1], -1), torch.stack([1 - share, share], -1)


#: The representations of scalars by bins.
TwoHot = (SymExpTwoHot, SymlogTwoHot)


class TwoHotHead(nn.Module):
    """A network that returns logits over bins, and the scalar that they stand for.

    In a world model the logits go to ``("next", "reward_logits")``, where
    :class:`~torchrl_wm.objectives.TwoHotTerm` trains them, and the scalar to
    ``("next", "reward")``, where an env reads it.

    Args:
        network: maps inputs ``[*B, n]`` to logits ``[*B, shape * bins]``.
        two_hot: the bins: TorchRL's :class:`~torchrl.modules.SymExpTwoHot`
            (DreamerV3) by default, or :class:`SymlogTwoHot` (TD-MPC2).
        shape: the feature shape of the scalar, ``(1,)`` by default.
        zero: start with the last linear layer at zero, so that the first
            predictions are 0. Without it, random logits mean astronomical rewards.
        dtype: the scalar's dtype; that of the logits by default.

    Raises:
        ValueError: if ``zero`` is True and the network has no linear layer.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import MLP, SymExpTwoHot
        >>> from torchrl_wm.modules import TwoHotHead
        >>> two_hot = SymExpTwoHot(41)
        >>> reward_head = Mod(
        ...     TwoHotHead(MLP(4, 41, num_cells=[32]), two_hot),
        ...     [("next", "latent")],
        ...     [("next", "reward_logits"), ("next", "reward")],
        ... )
        >>> logits, reward = reward_head(next_latent=torch.randn(5, 4))
        >>> logits.shape, reward.shape
        (torch.Size([5, 41]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        network: nn.Module,
        two_hot: nn.Module | None = None,
        *,
        shape: Sequence[int] = (1,),
        zero: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype
        self.two_hot = SymExpTwoHot() if two_hot is None else two_hot
        #: The feature shape of the scalar.
        self.shape = tuple(shape)
        # A trailing dim of 1 is the scalar's own, and the bins stand in its place.
        lead = self.shape[:-1] if self.shape[-1:] == (1,) else self.shape
        self._lead = (*lead, self.two_hot.num_bins)
        if zero:
            _zero_last_linear(network)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict logits and scalar.

        Args:
            inputs: those of the network, ``[*B, n]`` each.

        Returns:
            Logits ``[*B, bins]`` and their scalar ``[*B, 1]`` (for ``shape=(1,)``).

        Raises:
            ValueError: if the network does not give one number for each bin.
        """
        logits = self.network(*inputs)
        if logits.shape[-1] != prod(self._lead):
            raise ValueError(
                f"The network of a TwoHotHead gives {logits.shape[-1]} numbers; for the shape "
                f"{self.shape} and {self.two_hot.num_bins} bins it must give "
                f"{prod(self._lead)}."
            )
        size = logits.shape[:-1]
        logits = logits.reshape(*size, *self._lead)
        scalar = self.two_hot.decode(logits).reshape(*size, *self.shape)
        return logits, scalar if self.dtype is None else scalar.to(self.dtype)


def _zero_last_linear(network: nn.Module) -> None:
    """Set the last linear layer of a network to zero."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"TwoHotHead sets the last linear layer to zero, and {type(network).__name__} has "
            f"none. Do it yourself and pass zero=False."
        )
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.zero_()
