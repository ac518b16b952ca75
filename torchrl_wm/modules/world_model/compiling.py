"""torch.compile, with a way out where there is no compiler."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchrl_wm import _upstream

Result = TypeVar("Result")


class GraphMaker:
    """Compiles functions, until it turns out that nothing can be compiled here.

    Args:
        options: for :func:`torch.compile`; ``fullgraph`` is True and ``dynamic``
            False unless given.
        what: what is compiled, for the warning.
        undo: the call that makes it eager again, for the warning.
    """

    def __init__(self, options: dict[str, Any], what: str, undo: str) -> None:
        self.options = {"fullgraph": True, "dynamic": False, **options}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            # Or all graphs of a process would count towards one limit, of eight. Before
            # it was there, the limit was that of a code object.
            self.options.setdefault("isolate_recompiles", True)
        self.what, self.undo = what, undo
        self.failed = False

    def compile(self, function: Callable) -> Callable:
        """The compiled function."""
        if "isolate_recompiles" not in self.options:
            function = _with_code_of_its_own(function)
        return torch.compile(function, **self.options)

    def attempt(
        self, call: Callable[[], Result], eager: Callable[[], Any] | None = None
    ) -> Result | None:
        """What ``call`` returns; None, with a warning, where compiling failed.

        Args:
            call: calls what was compiled.
            eager: does the same without the compiler. What is wrong with an input or a
                network reads there as it was meant to, and not as what tracing made of it.
        """
        try:
            return call()
        except _upstream.backend_errors() as err:
            self.failed = True
            warnings.warn(
                f"{self.what} could not be compiled and stays eager ({type(err).__name__}: "
                f"{str(err).splitlines()[0]}). Is there a C++ compiler? {self.undo} "
                f"silences this.",
                stacklevel=4,
            )
            return None
        except _upstream.tracing_errors():
            if eager is not None:
                eager()
            raise


def _with_code_of_its_own(function: Callable) -> Callable:
    """Return ``function`` behind a code object that no other function has."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__code__ = call.__code__.replace()
    return call
