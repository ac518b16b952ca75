"""Compiled imagination: one graph for a horizon, kept as long as it is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchrl_wm.envs.step import StepKernel
from torchrl_wm.modules.compiled import GraphMaker
from torchrl_wm.modules.program import Program, Values

Run = Callable[[Values, "Values | None"], tuple]


class Compiler:
    """Compiles calls of :func:`~torchrl_wm.envs.unroll.imagined`, and keeps the graphs.

    Args:
        options: for :func:`torch.compile`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._maker = GraphMaker(options, "imagine", "env.eager()")
        self._graphs: dict[tuple, tuple[tuple, Run]] = {}

    def wrap(
        self,
        run: Run,
        kernel: StepKernel,
        act: Callable | None,
        program: Program | None,
        horizon: int,
        batch_size: torch.Size,
    ) -> Run:
        """The compiled ``run``, or ``run`` itself where it cannot be compiled."""
        if self._maker.failed or (act is not None and program is None):
            return run
        # What the graph was made for is held here, so that no id is used again.
        held = (kernel, kernel.program, program)
        key = (
            id(kernel),
            id(kernel.program),
            None if program is None else program.made_for,
            horizon,
            batch_size,
            torch.is_grad_enabled(),
        )
        if key not in self._graphs:
            self._graphs[key] = (held, self._maker.compile(run))
        graph = self._graphs[key][1]

        def call(values: Values, actions: Values | None) -> tuple:
            out = self._maker.attempt(lambda: graph(values, actions))
            return run(values, actions) if out is None else out

        return call
