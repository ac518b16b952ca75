"""Run a world model once on zeros, leaving no trace in it, to learn its shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchrl_wm.modules.blocks.normalizer import without_warnings
from torchrl_wm.modules.modes import evaluation_mode


@contextmanager
def undisturbed(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Run the model in eval mode, without an autograd graph, and restore the random state.

    Lazy parameters are the exception: what runs a lazy model first also
    initialises it, and that draws from the caller's random state, so that two
    models made one after the other do not get the same weights.
    """
    lazy = any(is_lazy(parameter) for parameter in model.parameters())
    cuda = [device] if device is not None and device.type == "cuda" else []
    forked = torch.random.fork_rng(devices=cuda, enabled=not lazy)
    quiet = without_warnings(model)
    with torch.no_grad(), forked, evaluation_mode(model), quiet:
        yield
