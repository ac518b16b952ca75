"""Compiled imagination: graphs that are kept as long as they are true."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from torchrl_wm.modules.compiled import GraphMaker

Run = TypeVar("Run", bound=Callable)


class Compiler:
    """Compiles functions on tensors, and keeps the graphs as long as they are true.

    Args:
        options: for :func:`torch.compile`.
        what: what is compiled, for the warning where nothing can be.
        undo: the call that makes it eager again, for the warning.
    """

    def __init__(self, options: dict[str, Any], what: str, undo: str) -> None:
        self._maker = GraphMaker(options, what, undo)
        self._graphs: dict[tuple, tuple[tuple, Callable]] = {}

    def wrap(self, run: Run, held: Sequence[object], key: Hashable) -> Run:
        """The compiled ``run``, or ``run`` itself where it cannot be compiled.

        Args:
            run: the function.
            held: the objects that a graph of it is made for, by identity.
            key: what else tells one graph from another.
        """
        if self._maker.failed:
            return run
        # What the graph was made for is held, so that no id is used again.
        key = (*map(id, held), key, torch.is_grad_enabled())
        if key not in self._graphs:
            self._graphs[key] = (tuple(held), self._maker.compile(run))
        graph = self._graphs[key][1]

        def call(*args: Any) -> Any:
            out = self._maker.attempt(lambda: graph(*args))
            return run(*args) if out is None else out

        return call
