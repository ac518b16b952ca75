"""An ensemble of action values over latents, each a distribution over bins (TD-MPC2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import dispatch, TensorDictModuleBase
from torch import nn

from torchrl_wm.modules.blocks.activations import Mish
from torchrl_wm.modules.blocks.ensemble import EnsembleLinear
from torchrl_wm.modules.blocks.entries import Entry, JoinEntries
from torchrl_wm.modules.blocks.two_hot import SymlogTwoHot

Reduce = Literal["mean", "min"]


class QEnsemble(TensorDictModuleBase):
    """Action values of an ensemble of two-hot networks (TD-MPC2, arXiv 2310.16828).

    Each network is an MLP of dropout, layer norm and Mish whose logits over bins
    stand for a scalar. All are one batched matmul per layer. ``Q`` is their
    number; the last layers start at zero, and so do the values.

    :class:`~torchrl_wm.objectives.ValueTerm` trains them, and keeps the target networks.

    Args:
        latents: the keys of the latents that are read, with their sizes.
        actions: the actions that are read.
        num_networks: ``Q``.
        num_cells: sizes of the hidden layers.
        two_hot: the bins; :class:`SymlogTwoHot` by default.
        dropout: the probability of dropout after the first layer.
        reduce: the value is the ``"mean"`` or the ``"min"`` of the networks.
        subset: the number of networks to reduce, drawn anew at each call; all by default.
        logits_key: the key of the logits, ``[*B, Q, bins]``.
        value_key: the key of the value, ``[*B, 1]``.

    Raises:
        ValueError: for an unknown ``reduce``, more networks in ``subset`` than there
            are, or none at all.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_wm.modules import Entry, QEnsemble
        >>> q = QEnsemble(
        ...     {"latent": 8}, [Entry.from_spec("action", Bounded(-1, 1, (2,)))],
        ...     num_networks=3, num_cells=[16],
        ... )
        >>> logits, value = q(latent=torch.randn(5, 8), action=torch.randn(5, 2))
        >>> logits.shape, value.shape
        (torch.Size([5, 3, 101]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        latents: dict[NestedKey, int],
        actions: Sequence[Entry],
        *,
        num_networks: int = 5,
        num_cells: Sequence[int] = (256, 256),
        two_hot: nn.Module | None = None,
        dropout: float = 0.01,
        reduce: Reduce = "mean",
        subset: int | None = None,
        logits_key: NestedKey = "state_action_value_logits",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        super().__init__()
        if num_networks < 1:
            raise ValueError(f"num_networks={num_networks} must be at least 1.")
        self.num_networks = num_networks
        self.reduce, self.subset = _check_reduce(reduce, subset, num_networks)
        self.latent_keys = list(latents)
        self.actions = JoinEntries(actions)
        self.two_hot = SymlogTwoHot() if two_hot is None else two_hot
        self.in_keys = [*self.latent_keys, *(entry.key for entry in actions)]
        self.out_keys = [logits_key, value_key]
        sizes = [sum(latents.values()) + self.actions.out_features, *num_cells]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip(sizes, sizes[1:])):
            layers.append(_linears(num_networks, before, after))
            if dropout and not number:
                layers.append(nn.Dropout(dropout))
            layers += [_LayerNorms(num_networks, after), Mish()]
        last = _linears(num_networks, sizes[-1], self.two_hot.num_bins, std=0.0)
        self.networks = nn.Sequential(*layers, last)

    def logits(
        self, latents: Sequence[torch.Tensor], actions: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the logits of all networks.

        Args:
            latents: ``[*B, L]`` each.
            actions: as their specs say, ``[*B, ...]``.

        Returns:
            ``[*B, Q, bins]``.
        """
        joined = torch.cat([*latents, self.actions(*actions)], -1)
        size = joined.shape[:-1]
        rows = joined.reshape(1, -1, joined.shape[-1])  # [1, N, n]
        out = self.networks(rows.expand(self.num_networks, -1, -1))  # [Q, N, bins]
        return out.movedim(0, 1).reshape(*size, *out.shape[::2])

    def value(
        self,
        logits: torch.Tensor,
        reduce: Reduce | None = None,
        subset: int | None = None,
    ) -> torch.Tensor:
        """Return the value that the networks' logits stand for together.

        Args:
            logits: ``[*B, Q, bins]``.
            reduce: ``"mean"`` or ``"min"``; the ensemble's own by default.
            subset: the number of networks, drawn at random; likewise.

        Returns:
            ``[*B, 1]``.
        """
        reduce, subset = _check_reduce(
            self.reduce if reduce is None else reduce,
            self.subset if subset is None else subset,
            self.num_networks,
        )
        if subset is not None:
            drawn = torch.randperm(self.num_networks, device=logits.device)[:subset]
            logits = logits.index_select(-2, drawn)
        values = self.two_hot.decode(logits)  # [*B, Q]
        if reduce == "min":
            return values.amin(-1, keepdim=True)
        return values.mean(-1, keepdim=True)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write logits and value of the latents and actions in ``tensordict``, ``[*B]``."""
        count = len(self.latent_keys)
        values = [tensordict.get(key) for key in self.in_keys]
        logits = self.logits(values[:count], values[count:])
        tensordict.set(self.out_keys[0], logits)
        return tensordict.set(self.out_keys[1], self.value(logits))


def _linears(
    networks: int, in_features: int, out_features: int, std: float = 0.02
) -> EnsembleLinear:
    """Return the linear layers of all networks, initialised as TD-MPC2 does."""
    layer = EnsembleLinear(networks, in_features, out_features)
    if std:
        nn.init.trunc_normal_(layer.weight, std=std)
    else:
        nn.init.zeros_(layer.weight)
    return layer


class _LayerNorms(nn.Module):
    """As many layer norms as there are networks."""

    def __init__(self, networks: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(networks, 1, features))
        self.bias = nn.Parameter(torch.zeros(networks, 1, features))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        # One call for each network, with its weights: passes for the weights take longer.
        size = value.shape[-1:]
        parts = zip(value.unbind(0), self.weight, self.bias)
        return torch.stack([F.layer_norm(v, size, w[0], b[0]) for v, w, b in parts])


def _check_reduce(
    reduce: str, subset: int | None, networks: int
) -> tuple[str, int | None]:
    """Check and return how values are reduced."""
    if reduce not in ("mean", "min"):
        raise ValueError(f"Unknown reduce={reduce!r}. Valid are ['mean', 'min'].")
    if subset is not None and not 1 <= subset <= networks:
        raise ValueError(
            f"subset={subset} networks cannot be drawn from {networks}. Give 1 to {networks}, or "
            f"None for all."
        )
    return reduce, subset
