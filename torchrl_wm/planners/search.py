"""The state of a search: its proposal, its best plan and the candidates of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchrl_wm.planners.actions import Proposal


class Population(NamedTuple):
    """The candidates of one iteration.

    Args:
        samples: ``[B, N, H, ...]``.
        returns: their predicted returns, ``[B, N]``; -inf for a return that is not finite.
    """

    samples: torch.Tensor
    returns: torch.Tensor

    def best(self, number: int) -> Population:
        """Return the ``number`` best candidates, best first."""
        returns, index = self.returns.topk(number, dim=1)
        rows = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
        return Population(self.samples[rows, index], returns)


class Search(NamedTuple):
    """The state of a search between two iterations.

    Args:
        proposal: the distribution of the next candidates.
        best: the best candidate so far, ``[B, 1, H, ...]``, with its return.
        kept: candidates that stay, ``[B, K, H, ...]``; None if none do.
    """

    proposal: Proposal
    best: Population
    kept: torch.Tensor | None

    def best_with(self, population: Population) -> Population:
        """Return the best candidate so far, when a population has been judged, too."""
        both = (torch.cat(parts, 1) for parts in zip(self.best, population))
        return Population(*both).best(1)


def without_copies(returns: torch.Tensor, proposed: torch.Tensor) -> torch.Tensor:
    """Return the returns with -inf for proposals that equal the first one.

    A deterministic policy proposes one plan. If its copies were the whole elite, nothing would
    be left to search.

    Args:
        returns: ``[B, N]``, of the plan, the proposals and the other candidates, in this order.
        proposed: ``[B, P, H, ...]``.
    """
    copies = (proposed[:, 1:] == proposed[:, :1]).flatten(2).all(-1)
    others = returns[:, 2 : 1 + proposed.shape[1]]
    others = torch.where(copies, -torch.inf, others)
    rest = returns[:, 1 + proposed.shape[1] :]
    return torch.cat([returns[:, :2], others, rest], 1)


def course(populations: Sequence[Population], top_k: int) -> dict[str, torch.Tensor]:
    """Return the returns of the iterations of a search, ``[B, optim_steps]`` each.

    Args:
        populations: the candidates of each iteration.
        top_k: the number of elites.
    """
    tops = [population.returns.topk(top_k, 1).values for population in populations]
    returns = {
        "max_return": [top[:, 0] for top in tops],
        "mean_return": [finite_mean(population.returns) for population in populations],
        "elite_return": [finite_mean(top) for top in tops],
    }
    return {name: torch.stack(values, 1) for name, values in returns.items()}


def finite_mean(returns: torch.Tensor) -> torch.Tensor:
    """Return the mean of the finite returns of each row, ``[B]``."""
    finite = returns > -torch.inf
    total = torch.where(finite, returns, 0.0).sum(1)
    return total / finite.sum(1).clamp_min(1)
