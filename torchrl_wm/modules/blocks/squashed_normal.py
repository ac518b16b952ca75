"""A squashed Gaussian without checks of its bounds."""

from __future__ import annotations

import torch
from torch.distributions import AffineTransform, ComposeTransform
from torchrl.modules import TanhNormal
from torchrl.modules.distributions.continuous import SafeTanhTransform

from torchrl_wm import _upstream


class SquashedNormal(TanhNormal):
    """TorchRL's TanhNormal without its checks of the bounds, each of which waits for the device.

    The log-probability of an action that was just drawn is right at the bounds, too: it comes
    from what was drawn, which the action does not show there.

    Args:
        loc, scale: parameters of the normal distribution.
        low, high: the bounds, on the same device.
        event_dims: the number of dims of an event.
    """

    def __init__(
        self,
        loc: torch.Tensor,
        scale: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        event_dims: int = 1,
    ) -> None:
        self.tanh_loc = False
        self.device, self.low, self.high = loc.device, low, high
        stretched = AffineTransform(loc=(high + low) / 2, scale=(high - low) / 2)
        # Cached: the inverse of tanh does not find what was drawn near the bounds.
        squash = ComposeTransform([SafeTanhTransform(), stretched], cache_size=1)
        _upstream.set_tanh(self, squash, event_dims)
        self.update(loc, scale)


def squashed_normal() -> type[TanhNormal]:
    """Return the distribution to use: TorchRL's own if it is not the known one."""
    return SquashedNormal if _upstream.is_known_tanh(TanhNormal) else TanhNormal
