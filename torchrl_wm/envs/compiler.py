"""Compiled imagination: graphs that are kept as long as they are true."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from torchrl_wm.modules.world_model.compiling import GraphMaker

Run = TypeVar("Run", bound=Callable)

#: How many graphs are kept: a policy that is made anew again and again would leave its own.
MOST_GRAPHS = 64


class Compiler:
    """Compiles functions on tensors, and keeps the graphs as long as they are true.

    Args:
        options: for :func:`torch.compile`.
        what: what is compiled, for the warning where nothing can be.
        undo: the call that makes it eager again, for the warning.
    """

    def __init__(self, options: dict[str, Any], what: str, undo: str) -> None:
        self._maker = GraphMaker(options, what, undo)
        self._graphs: OrderedDict[tuple, tuple[tuple, Callable]] = OrderedDict()
        self._model: tuple = ()

    def wrap(
        self,
        run: Run,
        model: Sequence[object],
        policy: Sequence[object],
        key: Hashable,
    ) -> Run:
        """The compiled ``run``, or ``run`` itself where it cannot be compiled.

        Args:
            run: the function.
            model: the objects of the model that a graph of it is made for, by identity.
                Graphs for others than these are let go.
            policy: the same, of the policy. Graphs of the latest ones are kept.
            key: what else tells one graph from another.
        """
        if self._maker.failed:
            return run
        if tuple(map(id, model)) != tuple(map(id, self._model)):
            self._graphs.clear()
            self._model = tuple(model)
        # What a graph was made for is held, so that no id is used again.
        key = (*map(id, policy), key, torch.is_grad_enabled())
        if key not in self._graphs:
            self._graphs[key] = (tuple(policy), self._maker.compile(run))
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph = self._graphs[key][1]

        def call(*args: Any) -> Any:
            out = self._maker.attempt(lambda: graph(*args), lambda: run(*args))
            return run(*args) if out is None else out

        return call
