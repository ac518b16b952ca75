"""Gaussian outputs whose variance stays within bounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BoundedLogVar(nn.Module):
    """Learned bounds of log-variances, which themselves have limits.

    The bounds are soft (PETS, arXiv 1805.12114, appendix A.1): away from the data a network's
    log-variance would otherwise be anything. They are learned together with the
    network and pulled together by :meth:`width` as part of the loss. Log-variances pass the
    upper bound by up to 0.7 where the two are close. Neither they nor the bounds ever leave
    ``limits``.

    Args:
        features: the number of features ``F``.
        low, high: the initial bounds.
        limits: the range of bounds and log-variances.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import BoundedLogVar
        >>> bounded = BoundedLogVar(1, low=-10.0, high=0.5)
        >>> bounded(torch.tensor([[-1e6], [1e6]])).flatten().tolist()
        [-10.0, 0.5000...]
    """

    def __init__(
        self,
        features: int,
        *,
        low: float = -10.0,
        high: float = 0.5,
        limits: tuple[float, float] = (-20.0, 10.0),
    ) -> None:
        super().__init__()
        if not limits[0] <= low < high <= limits[1]:
            raise ValueError(
                f"The bounds low={low} < high={high} must lie within limits={limits}."
            )
        self.low = nn.Parameter(torch.full((features,), float(low)))
        self.high = nn.Parameter(torch.full((features,), float(high)))
        self.limits = limits

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Map any numbers, ``[*B, F]``, to log-variances within the bounds."""
        low, high = self.low.clamp(*self.limits), self.high.clamp(*self.limits)
        value = high - F.softplus(high - raw)
        value = low + F.softplus(value - low)
        # The soft bounds add up to more than the upper one where they are close. The gradient
        # stays: without it nothing would lead back from the limit.
        return value.detach().clamp_max(self.limits[1]) + (value - value.detach())

    def width(self) -> torch.Tensor:
        """Return the sum of the distances of the bounds, a scalar; a part of the loss.

        Bounds that have crossed have no distance: a loss that pulled them on would fall
        without end, and no variance would follow the data again.
        """
        return (self.high - self.low).relu().sum()
