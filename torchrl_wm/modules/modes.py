"""Run a model in evaluation mode and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for a while; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def draws() -> bool:
    """Return whether to sample: True unless the interaction type is a mode, mean or median."""
    return interaction_type() in (None, InteractionType.RANDOM)
