"""Networks without the parameters that they do not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def without_unused(module: nn.Module) -> Iterator[None]:
    """Empty the parameters of a module that are not used inside, such as those of a decoder."""
    used = _Used()
    with used:
        yield
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            if id(value) not in used.found:
                empty = nn.Parameter(value.detach().new_empty(0), requires_grad=False)
                setattr(part, name, empty)


class _Used(TorchFunctionMode):
    """A context that notes which tensors are used.

    Attributes:
        found: the identities of these tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.found.update(map(id, _parameters((*args, *kwargs.values()))))
        return func(*args, **kwargs)


def _parameters(values: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _parameters(value)
