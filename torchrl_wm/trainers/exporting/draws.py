"""The random numbers that a policy draws, taken from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: The functions whose draws can be given, and what they draw.
_FUNCTIONS: dict[Callable, str] = {
    torch.rand: "uniform",
    torch.rand_like: "uniform",
    torch.randn: "normal",
    torch.randn_like: "normal",
}
#: The middle of each distribution, and values far away from it on both sides.
_MIDDLE = {"uniform": 0.5, "normal": 0.0}
_APART = {"uniform": (0.0, 1 - 1e-6), "normal": (-3.0, 3.0)}
#: Called with the kind, the whole shape and the dtype of a draw; returns it.
Give = Callable[[str, torch.Size, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """A draw that a policy makes.

    Args:
        kind: "uniform", in [0, 1), or "normal".
        shape: the shape for each row of a batch.
        dtype: the dtype.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def middle(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the middle of its distribution, everywhere."""
        return torch.full(shape, _MIDDLE[self.kind], dtype=self.dtype)


class GivenDraws(TorchFunctionMode):
    """A context in which ``torch.rand`` and ``torch.randn`` return what is given.

    Args:
        give: called for each draw, in order.

    Examples:
        >>> import torch
        >>> from torchrl_wm.trainers.exporting.draws import GivenDraws
        >>> with GivenDraws(lambda kind, shape, dtype: torch.full(shape, 0.5)):
        ...     print(torch.rand(2), torch.ones(2) + 1)
        tensor([0.5000, 0.5000]) tensor([2., 2.])
    """

    def __init__(self, give: Give) -> None:
        super().__init__()
        self._give = give

    def __torch_function__(
        self,
        func: Callable,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = _FUNCTIONS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        if func in (torch.rand_like, torch.randn_like):
            like = args[0] if args else kwargs["input"]
            shape, dtype, device = like.shape, like.dtype, like.device
        else:
            sizes = args or (kwargs["size"],)
            one = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
            shape, dtype = tuple(sizes[0] if one else sizes), torch.get_default_dtype()
            device = None
        dtype = kwargs.get("dtype") or dtype
        given = self._give(kind, shape, dtype)
        return given.to(kwargs.get("device") or device or given.device)


def draws_of(function: Callable[[], Any], rows: int) -> list[Draw]:
    """Return the draws that a function makes, in order.

    Args:
        function: the function.
        rows: the size of the batch that it works on.

    Raises:
        ValueError: if a draw is not one for each row.
    """
    found: list[Draw] = []

    def give(kind: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if not shape or shape[0] != rows:
            raise ValueError(
                f"The policy draws {kind} numbers of the shape {tuple(shape)} for {rows} "
                f"observations. Those of an exported policy are given from outside, so that each "
                f"observation has its own: draw [{rows}, ...]."
            )
        found.append(Draw(kind, tuple(shape[1:]), dtype))
        return found[-1].middle(shape)

    with GivenDraws(give):
        function()
    return found


def rows_touched(
    function: Callable[[], Mapping[str, torch.Tensor]], draws: Sequence[Draw], rows: int
) -> list[torch.Tensor]:
    """Return where each draw makes a difference, ``[rows]`` bool.

    Args:
        function: makes the draws, and returns tensors ``[rows, ...]``.
        draws: what :func:`draws_of` returns.
        rows: the size of the batch.
    """

    def outputs(changed: int | None = None, value: float = 0.0) -> torch.Tensor:
        left = iter(enumerate(draws))

        def give(kind: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            number, draw = next(left)
            made = draw.middle(shape)
            return torch.full_like(made, value) if number == changed else made

        with GivenDraws(give):
            out = function()
        return torch.cat([v.reshape(rows, -1).double() for v in out.values()], -1)

    usual, found = outputs(), []
    for number, draw in enumerate(draws):
        others = [outputs(number, value) for value in _APART[draw.kind]]
        found.append(sum((other != usual).any(-1) for other in others).bool())
    return found
