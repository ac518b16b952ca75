"""Mish and the softmax over small groups, several times faster than torch's on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchrl_wm import _upstream

#: For smaller tensors torch's functions, which are one call each, are faster.
_LEAST_MISH = 16384
_LEAST_SOFTMAX = 4096
_FULL = (torch.float32, torch.float64)
#: The number of elements that stay in the cache from one pass over them to the next.
_BLOCK = 65536


class Mish(nn.Mish):
    """``x * tanh(softplus(x))`` (arXiv 1908.08681), with one exponential.

    With ``s = sigmoid(x)`` and ``p = s (2 - s)`` it is ``x p / (2 - p)``, for all ``x``. On a
    CPU this form takes about a third of the time of :class:`torch.nn.Mish`, and a fifth in
    compiled graphs. On other devices, for small tensors and in half precision torch's is used.
    The two agree to some units in the last place, and so do their gradients.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import Mish
        >>> x = torch.randn(64, 128)
        >>> torch.testing.assert_close(Mish()(x), torch.nn.functional.mish(x))
    """

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return Mish of each element, ``[*B]``."""
        if _is_served(value, _LEAST_MISH):
            return _Mish.apply(value)
        if torch.compiler.is_compiling() and value.dtype in _FULL:
            share = value.sigmoid()
            part = share * (2 - share)
            return value * part / (2 - part)
        return F.mish(value)


def group_softmax(value: torch.Tensor, group: int) -> torch.Tensor:
    """Return the softmax over each ``group`` of neighbouring elements.

    torch's own is not vectorised over rows that are shorter than a register. Here the elements
    of a group stand one row apart, and maximum, exponential and sum go over whole rows.

    Args:
        value: ``[*B, L]``, with ``L`` a multiple of ``group``.
        group: the number of elements in a group.

    Returns:
        ``[*B, L]``.
    """
    if _is_served(value, _LEAST_SOFTMAX):
        return _GroupSoftmax.apply(value, group)
    return value.unflatten(-1, (-1, group)).softmax(-1).flatten(-2)


def _is_served(value: torch.Tensor, least: int) -> bool:
    """Return whether the functions of this file are faster than torch's."""
    # Asked first: a graph for batches of any size must not depend on their sizes.
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and value.dtype in _FULL
        and value.numel() >= least
        and not _upstream.is_transformed()
    )


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.save_for_forward(value)
        out = torch.empty_like(value, memory_format=torch.contiguous_format)
        for x, share, other in _blocks(value, out, scratch=1):
            torch.sigmoid(x, out=share)
            share.mul_(torch.sub(2, share, out=other))  # p
            share.div_(torch.sub(2, share, out=other)).mul_(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (value,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient may be differentiated, too
            return _plain_slope(value) * grad
        slope = _slope(value)
        return slope * grad if _upstream.is_batched(grad) else slope.mul_(grad)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return _plain_slope(*ctx.saved_tensors) * tangent


def _plain_slope(value: torch.Tensor) -> torch.Tensor:
    """Return the derivative of Mish so that it can be differentiated."""
    share, ratio = value.sigmoid(), F.softplus(value).tanh()
    return ratio + value * share * (1 - ratio * ratio)


def _slope(value: torch.Tensor) -> torch.Tensor:
    """Return the derivative of Mish.

    It is ``s (1 + q + 4 x q^2 / d) / d`` with ``q = 1 - s`` and ``d = 1 + q^2``.
    """
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    for x, rest, share, square, below in _blocks(value, out, scratch=3):
        torch.sigmoid(x, out=share)
        torch.sub(1, share, out=rest)  # q
        torch.mul(rest, rest, out=square)
        torch.add(square, 1, out=below)  # d
        rest.add_(1).addcdiv_(square.mul_(x), below, value=4)
        rest.div_(below).mul_(share)
    return out


class _GroupSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: int) -> torch.Tensor:
        out = torch.empty_like(value, memory_format=torch.contiguous_format)
        for x, y in _blocks(value, out, width=value.shape[-1]):
            rows = _apart(x, group).contiguous()
            rows.sub_(rows.amax(0)).exp_()
            _apart(y, group).copy_(rows.div_(rows.sum(0)))
        ctx.group = group
        ctx.save_for_backward(out)
        ctx.save_for_forward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _through(*ctx.saved_tensors, grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        return _through(*ctx.saved_tensors, tangent, ctx.group)


def _through(output: torch.Tensor, grad: torch.Tensor, group: int) -> torch.Tensor:
    """Return the product of a softmax's Jacobian, which is symmetric, with ``grad``."""
    shares = _apart(output, group).contiguous()
    weighed = shares * _apart(grad, group)
    rows = torch.addcmul(weighed, shares, weighed.sum(0), value=-1)
    return rows.permute(1, 2, 0).reshape(output.shape)


def _apart(value: torch.Tensor, group: int) -> torch.Tensor:
    """Return a view or copy of ``[*B, L]`` as ``[group, N, L / group]``."""
    return value.reshape(-1, value.shape[-1] // group, group).permute(2, 0, 1)


def _blocks(
    *tensors: torch.Tensor, width: int = 1, scratch: int = 0
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield blocks ``[n, width]`` of tensors of one shape, and ``scratch`` more to write into."""
    flat = [tensor.reshape(-1, width) for tensor in tensors]
    rows = max(1, _BLOCK // width)
    blocks = [flat] if len(flat[0]) <= rows else zip(*(t.split(rows) for t in flat))
    spare: list[torch.Tensor] = []
    for block in blocks:
        size = len(block[0])
        spare = spare or [torch.empty_like(block[0]) for _ in range(scratch)]
        yield *block, *(s if len(s) == size else s[:size] for s in spare)
