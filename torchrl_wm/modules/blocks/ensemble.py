"""Several networks as one, with one batched matmul per layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import nn

from torchrl_wm.modules.blocks.gaussian import BoundedLogVar
from torchrl_wm.modules.modes import draws


class EnsembleLinear(nn.Module):
    """The linear layers of ``E`` members, as one batched matmul.

    Args:
        members: ``E``.
        in_features, out_features: as for :class:`torch.nn.Linear`.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import EnsembleLinear
        >>> layer = EnsembleLinear(5, 3, 2)
        >>> layer(torch.randn(5, 10, 3)).shape
        torch.Size([5, 10, 2])
    """

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.members, self.in_features = members, in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(members, 1, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each member's weights by themselves, as PETS does; biases are zero."""
        std = 1 / (2 * sqrt(self.in_features))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)

    def forward(
        self, value: torch.Tensor, members: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map ``[E, N, in]`` to ``[E, N, out]``; with ``members``, ``[n]`` int64, only by these."""
        weight, bias = self.weight, self.bias
        if members is not None:
            weight, bias = weight[members], bias[members]
        return torch.baddbmm(bias, value, weight)

    def extra_repr(self) -> str:
        return f"{self.members}, {self.in_features}, {self.out_features}"


class EnsembleMLP(nn.Module):
    """``E`` multilayer perceptrons of one shape.

    Args:
        members: ``E``.
        in_features, out_features: the sizes of input and output.
        hidden: the sizes of the hidden layers.
        activation: the class of the activations between layers.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import EnsembleMLP
        >>> network = EnsembleMLP(7, 3, 2, hidden=(64, 64))
        >>> network(torch.randn(4, 5, 3)).shape  # one input for all
        torch.Size([7, 4, 5, 2])
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (200, 200, 200, 200),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(
                f"An ensemble needs at least one member, got members={members}."
            )
        self.members, self.in_features = members, in_features
        sizes = [in_features, *hidden, out_features]
        self.layers = nn.ModuleList(
            EnsembleLinear(members, *pair) for pair in zip(sizes, sizes[1:])
        )
        self.activation = activation()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return the members' outputs.

        Args:
            value: ``[*B, in]``, the same for all members.

        Returns:
            ``[E, *B, out]``.
        """
        shared = value.reshape(1, -1, self.in_features)
        out = self.members_apart(shared.expand(self.members, -1, -1))
        return out.reshape(self.members, *value.shape[:-1], out.shape[-1])

    def members_apart(
        self, value: torch.Tensor, members: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map inputs for each member, or each of ``members``, ``[E, N, in]`` to ``[E, N, out]``."""
        *inner, last = self.layers
        for layer in inner:
            value = self.activation(layer(value, members))
        return last(value, members)

    def drawn(
        self, value: torch.Tensor, members: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run each row through one member, drawn anew: ``[*B, in]`` to ``[*B, out]``.

        The members share the rows equally, so this is ``E`` times less work than
        :meth:`forward`.

        Args:
            value: the rows.
            members: the members to draw from, ``[n]`` int64; all by default.
        """
        rows = value.reshape(-1, self.in_features)
        tables = self.members if members is None else len(members)
        share = -(-len(rows) // tables)
        # Rows sit down at random at one table for each member, all equally large. Not by
        # randperm, which torch 2.13 does not compile as an index: a compiled rollout would
        # draw other numbers than an eager one.
        seats = torch.rand(tables * share, device=rows.device).argsort()[: len(rows)]
        seated = rows.new_zeros(tables * share, self.in_features)
        seated = seated.index_copy(0, seats, rows).unflatten(0, (tables, share))
        out = self.members_apart(seated, members).flatten(0, 1).index_select(0, seats)
        return out.reshape(*value.shape[:-1], out.shape[-1])


class DrawnMember(nn.Module):
    """An ensemble that runs each row through one member, drawn anew each time.

    It takes the place of a single network, for example in a head. Each gradient step shows
    each member other rows. Members that began differently disagree where there is no data,
    so that predictions are uncertain there. Under any ``set_interaction_type`` but
    ``"random"``, it returns the members' average.

    Args:
        ensemble: the members.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import DrawnMember, EnsembleMLP
        >>> network = DrawnMember(EnsembleMLP(5, 3, 1, hidden=(16,)))
        >>> network(torch.randn(4, 7, 3)).shape
        torch.Size([4, 7, 1])
    """

    def __init__(self, ensemble: EnsembleMLP) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Map ``[*B, in]`` to ``[*B, out]``."""
        if draws():
            return self.ensemble.drawn(value)
        return self.ensemble(value).mean(0)


class GaussianEnsemble(nn.Module):
    """``E`` networks that each predict a Gaussian: PETS's probabilistic ensemble (arXiv 1805.12114).

    Args:
        members, in_features: as for :class:`EnsembleMLP`.
        out_features: the number of Gaussians, ``D``.

    Keyword Args:
        log_var: keeps the log-variance within bounds; a :class:`BoundedLogVar` by default.
        network: ``hidden`` and ``activation``, as for :class:`EnsembleMLP`.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import GaussianEnsemble
        >>> ensemble = GaussianEnsemble(5, 3, 2, hidden=(64, 64))
        >>> loc, log_var = ensemble(torch.randn(10, 3))
        >>> loc.shape, log_var.shape
        (torch.Size([5, 10, 2]), torch.Size([5, 10, 2]))
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        out_features: int,
        *,
        log_var: BoundedLogVar | None = None,
        **network: Any,
    ) -> None:
        super().__init__()
        self.members, self.out_features = members, out_features
        self.network = EnsembleMLP(members, in_features, 2 * out_features, **network)
        self.bounds = BoundedLogVar(out_features) if log_var is None else log_var

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the members' Gaussians.

        Args:
            value: ``[*B, in]``.

        Returns:
            Means and log-variances, ``[E, *B, D]`` each.
        """
        return self._gaussians(self.network(value))

    def drawn(
        self, value: torch.Tensor, members: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the Gaussians ``[*B, D]`` of a member for each row, as :meth:`EnsembleMLP.drawn`."""
        return self._gaussians(self.network.drawn(value, members))

    def _gaussians(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, raw = value.chunk(2, -1)
        return loc, self.bounds(raw)
