"""A run's policy as a program of torch.export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributions import Bernoulli, Distribution
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from torchrl_wm.trainers.exporting.program import PolicyProgram


@torch.no_grad()
def exported(program: PolicyProgram) -> ExportedProgram:
    """Return a policy as a program of torch.

    Raises:
        ValueError: if torch cannot export it, or it draws random numbers in another way than by
            ``torch.rand`` and ``torch.randn``.
    """
    with _unchecked_distributions():
        made = _exported(program)
    for node in _nodes(made):
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise ValueError(
                f"The policy draws random numbers by {node.target}. Those of an exported policy "
                f"are inputs, which replace torch.rand and torch.randn alone: draw by these, or "
                f"take a mode or a mean in evaluations."
            )
        node.meta.pop("stack_trace", None)  # lines of code and paths of this machine
    return made


def _nodes(made: ExportedProgram) -> Iterator[Node]:
    """Yield the nodes of a program, those under another mode of gradients among them."""
    for part in made.graph_module.modules():
        if isinstance(part, GraphModule):
            yield from part.graph.nodes


def _exported(program: PolicyProgram) -> ExportedProgram:
    inputs = program.example(2)
    for port in program.inputs:
        if port.draw is not None:
            inputs[port.name] = port.draw.middle((2, *port.shape))
    rows = Dim("batch", min=1)
    shapes = ({name: {0: rows} for name in inputs},)
    try:
        return torch.export.export(
            program, (inputs,), dynamic_shapes=shapes, strict=False
        )
    except Exception as err:  # whatever torch meets in the policy
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise ValueError(
            f"torch.export cannot follow the policy, a {type(program.policy).__name__} "
            f"({type(err).__name__}: {reason}). Branches on values of tensors and loops over rows "
            f"of a batch are what it does not know: write them with torch.where and operations on "
            f"whole tensors."
        ) from err


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """Let distributions not look at the values of their parameters, which a program cannot do."""
    try:
        Bernoulli(2.0)
        checked = False
    except ValueError:
        checked = True
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checked)
