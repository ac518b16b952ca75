"""Compiled imagination: one graph for a horizon, kept as long as it is true."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from torchrl_wm.envs.step import StepKernel
from torchrl_wm.modules.program import Program, Values

Run = Callable[[Values, "Values | None"], tuple]


class Compiler:
    """Compiles calls of :func:`~torchrl_wm.envs.unroll.imagined`, and keeps the graphs.

    Args:
        options: for :func:`torch.compile`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._graphs: dict[tuple, tuple[tuple, Run]] = {}
        self._failed = False

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
        if self._failed or (act is not None and program is None):
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
            self._graphs[key] = (held, torch.compile(run, **self.options))
        graph = self._graphs[key][1]

        def call(values: Values, actions: Values | None) -> tuple:
            try:
                return graph(values, actions)
            except torch._dynamo.exc.BackendCompilerFailed as err:
                self._failed = True
                warnings.warn(
                    f"imagine could not be compiled and stays eager ({type(err).__name__}: "
                    f"{str(err).splitlines()[0]}). Is there a C++ compiler? env.eager() "
                    f"silences this.",
                    stacklevel=3,
                )
                return run(values, actions)

        return call
