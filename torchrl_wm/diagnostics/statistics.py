"""Correlations over the first dim, whatever the others are."""

from __future__ import annotations

import torch


def correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation over the first dim; NaN where one of them is constant.

    Args:
        first, second: ``[N, *S]``.

    Returns:
        ``[*S]``, in [-1, 1].

    Examples:
        >>> import torch
        >>> from torchrl_wm.diagnostics.statistics import correlation
        >>> correlation(torch.arange(5.0), 3 - 2 * torch.arange(5.0))
        tensor(-1.)
    """
    first, second = first.double(), second.double()
    # The mean of a constant may differ from it in the last digit: compare with the first value.
    varies = (first != first[:1]).any(0) & (second != second[:1]).any(0)
    first, second = first - first.mean(0), second - second.mean(0)
    spread = first.pow(2).sum(0).sqrt() * second.pow(2).sum(0).sqrt()
    spread = torch.where(varies & (spread > 0), spread, torch.nan)
    return ((first * second).sum(0) / spread).clamp(-1, 1).float()


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return Spearman's correlation: that of the ranks, where ties share theirs.

    Args:
        first, second: ``[N]``.

    Returns:
        A scalar in [-1, 1]; NaN if one of them is constant.

    Examples:
        >>> import torch
        >>> from torchrl_wm.diagnostics.statistics import rank_correlation
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
        tensor(1.)
    """
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]  # the mean rank of equal values
