"""Run a model in evaluation mode and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode for a while; afterwards each module has its own mode again."""
    modules = {module for model in models for module in model.modules()}
    training = [module for module in modules if module.training]
    try:
        if training:
            for model in models:
                model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def draws() -> bool:
    """Return whether to sample: True unless the interaction type is a mode, mean or median."""
    return interaction_type() in (None, InteractionType.RANDOM)
