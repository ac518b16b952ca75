"""Run a model in evaluation mode and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import nn


@contextmanager
def evaluation_mode(*given: Any) -> Iterator[None]:
    """Put models in eval mode for a while; afterwards each module has its own mode again.

    Args:
        given: models and policies. Those that are no modules, such as functions, have no mode.
    """
    models = [model for model in given if isinstance(model, nn.Module)]
    modules = {module for model in models for module in _modules(model)}
    training = [module for module in modules if module.training]
    try:
        if training:
            for model in models:
                model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model; the sequence of a world model is no submodule of it."""
    for module in model.modules():
        yield module
        sequence = module.__dict__.get("sequence")
        if isinstance(sequence, nn.Module):
            yield from sequence.modules()


def draws() -> bool:
    """Return whether to sample: True unless the interaction type is a mode, mean or median."""
    return interaction_type() in (None, InteractionType.RANDOM)
