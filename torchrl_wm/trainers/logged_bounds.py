"""The bounds of logged actions that are quantities: given, or read off the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Union

import torch
from tensordict import NestedKey
from torchrl.data import Bounded

#: The lower and the upper bounds of actions: numbers, or one for each dim.
ActionBounds = tuple[
    Union[float, Sequence[float], torch.Tensor],
    Union[float, Sequence[float], torch.Tensor],
]
#: What is added on both sides, as a share of the range of the data.
MARGIN = 0.05
#: Bounds that people choose, times a power of ten.
_ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
#: Data that reach this share of a round number on both sides were bounded by it.
_NEAR = 0.98
_SAY = "action_bounds=(low, high), on the command line --action-bounds LOW,HIGH"


def observed_bounds(
    key: NestedKey, value: torch.Tensor, *, stacklevel: int = 1
) -> Bounded:
    """Return the bounds that recorded quantities suggest, with a warning that names them.

    For each dim these are the least and the greatest value, with a margin of 5 % of the range
    between them, which does not go beyond zero. Values that reach a round number on both sides,
    at 98 % of it (such as from -1 to 1, or from 0 to 0.5), have that number for a bound. If more
    than half of the dims are bounded by the same two, so are the others that lie between.
    A dim that never changes is bounded by its value on both sides.

    Args:
        key: the key of the actions, for messages.
        value: ``[N, *A]`` floats. NaN and infinite values are passed over.

    Keyword Args:
        stacklevel: whose line the warning names, 1 for the caller of this function.

    Returns:
        The spec, of the shape ``A`` and the dtype of ``value``.

    Raises:
        ValueError: if a dim has no finite value.

    Examples:
        >>> import torch, warnings
        >>> from torchrl_wm.trainers.logged_bounds import observed_bounds
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     spec = observed_bounds("action", torch.tensor([[-1.0, 2.0], [0.999, 4.0]]))
        >>> spec.space.low.tolist(), [round(high, 6) for high in spec.space.high.tolist()]
        ([-1.0, 1.899999976158142], [1.0, 4.1])
    """
    flat = value.reshape(len(value), -1).double()
    finite = flat.isfinite()
    empty = (~finite.any(0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"The actions {key!r} have no finite value in the dims {empty}: they are NaN or "
            f"infinite at every step. Leave those dims out, or repair them."
        )
    least = flat.masked_fill(~finite, torch.inf).amin(0).tolist()
    most = flat.masked_fill(~finite, -torch.inf).amax(0).tolist()
    bounds = _shared([_dim_bounds(*pair) for pair in zip(least, most)], least, most)
    low, high = torch.tensor(bounds, dtype=torch.float64, device=value.device).unbind(
        -1
    )
    _warn(key, low, high, stacklevel + 1)
    low, high = (b.to(value.dtype).reshape(value.shape[1:]) for b in (low, high))
    return Bounded(low, high, shape=value.shape[1:], dtype=value.dtype)


def given_bounds(key: NestedKey, value: torch.Tensor, bounds: ActionBounds) -> Bounded:
    """Return the spec of quantities between given bounds.

    Args:
        key: the key of the actions, for messages.
        value: ``[N, *A]``; integers are quantities as well, and become float32.
        bounds: ``(low, high)``, numbers or values of the shape ``A``.

    Raises:
        ValueError: if the bounds do not fit the shape, are not finite, or the data reach beyond
            them by more than a thousandth of the range.
    """
    dtype = value.dtype if value.is_floating_point() else torch.float32
    shape = value.shape[1:]
    try:
        low, high = bounds
        # A column [N] or [N, 1] has one bound, however it is written.
        low, high = (
            torch.as_tensor(bound, dtype=torch.float64, device=value.device)
            for bound in (low, high)
        )
        low, high = (
            bound.reshape(shape)
            if bound.numel() == shape.numel()
            else bound.expand(shape)
            for bound in (low, high)
        )
    except (TypeError, ValueError, RuntimeError) as err:
        raise ValueError(
            f"action_bounds must be (low, high), two numbers or two of the shape {tuple(shape)} "
            f"of the actions {key!r} per step, got {bounds!r} ({err})."
        ) from err
    if not (low.isfinite().all() and high.isfinite().all() and (low < high).all()):
        raise ValueError(
            f"action_bounds must be finite, and the lower ones below the upper ones, got "
            f"{_shown(low)} and {_shown(high)}."
        )
    slack = 1e-3 * (high - low)
    beyond = (value < low - slack) | (value > high + slack)
    if beyond.any():
        row = int(beyond.reshape(len(value), -1).any(-1).long().argmax())
        raise ValueError(
            f"The actions {key!r} are said to lie between {_shown(low)} and {_shown(high)} "
            f"(action_bounds), and do not in {int(beyond.sum())} of {beyond.numel()} places, first "
            f"in row {row}: {value[row].tolist()}. Widen the bounds, or, if the env clips its "
            f"actions, clip those of the data."
        )
    low, high = (bound.to(dtype).clone() for bound in (low, high))
    return Bounded(low, high, shape=shape, dtype=dtype)


def _dim_bounds(least: float, most: float) -> tuple[float, float]:
    """Return the bounds of one dim between whose extremes the data lie."""
    if least == most:
        return least, most
    size = _round_up(max(abs(least), abs(most)))
    near = _NEAR * size
    if least <= -near and most >= near:
        return min(-size, least), max(size, most)
    if 0 <= least <= size - near and most >= near:
        return 0.0, max(size, most)
    if size - near >= -most >= 0 and least <= -near:
        return min(-size, least), 0.0
    margin = MARGIN * (most - least)
    low, high = least - margin, most + margin
    return (max(low, 0.0) if least >= 0 else low), (
        min(high, 0.0) if most <= 0 else high
    )


def _round_up(size: float) -> float:
    """Return the least round number that is not below a size, but for rounding errors."""
    power = 10.0 ** math.floor(math.log10(size))
    for number in (*_ROUND, 10.0):
        if size <= number * power * (1 + 1e-6):
            return number * power
    return 10.0 * power


def _shared(
    bounds: list[tuple[float, float]], least: list[float], most: list[float]
) -> list[tuple[float, float]]:
    """Return the bounds with those that most dims have in place of narrower ones."""
    common = max(set(bounds), key=bounds.count)
    low, high = common
    if 2 * bounds.count(common) <= len(bounds) or low != -high or low == high:
        return bounds
    return [
        common if a < b and low <= a and b <= high else own
        for own, a, b in zip(bounds, least, most)
    ]


def _warn(
    key: NestedKey, low: torch.Tensor, high: torch.Tensor, stacklevel: int
) -> None:
    same = low == high
    constant = same.nonzero().flatten().tolist()
    text = (
        f"The bounds of the actions {key!r} are read off the data: from {_shown(low)} to "
        f"{_shown(high)}. If the env has others, give them: {_SAY}; or name the env, env=... or "
        f"--env."
    )
    if constant:
        text += (
            f" Of the {len(low)} dims {constant} never change: the model cannot learn what they "
            f"do, and nothing is to be chosen. Leave them out of the actions, or record others."
        )
    warnings.warn(text, UserWarning, stacklevel=stacklevel + 1)


def _shown(bound: torch.Tensor) -> str:
    """Return a bound as short text: one number if all dims have it."""
    values = [f"{value:.6g}" for value in bound.flatten().tolist()]
    return values[0] if len(set(values)) == 1 else f"[{', '.join(values)}]"
