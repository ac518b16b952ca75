"""Run a world model once on zeros, leaving no trace in it, to learn its shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torch.nn.parameter import is_lazy

from torchrl_wm.modules.keys import missing_from, unique
from torchrl_wm.modules.modes import evaluation_mode


@contextmanager
def undisturbed(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Eval mode, no autograd graph, and the random state as before afterwards.

    Lazy parameters are the exception: what runs a lazy model first also
    initialises it, and that draws from the caller's random state, so that two
    models made one after the other do not get the same weights.
    """
    lazy = any(is_lazy(parameter) for parameter in model.parameters())
    cuda = [device] if device is not None and device.type == "cuda" else []
    forked = torch.random.fork_rng(devices=cuda, enabled=not lazy)
    with torch.no_grad(), forked, evaluation_mode(model):
        yield


def run_components(
    components: Mapping[str, nn.Module], tensordict: TensorDictBase
) -> TensorDictBase:
    """Run the components in order, and name the one that fails.

    Raises:
        KeyError: if an entry that a component reads is not there.
        RuntimeError: if a component raises.
    """
    for name, module in components.items():
        missing = missing_from(tensordict, unique(module.in_keys))
        if missing:
            raise KeyError(f"{name} reads {missing}, which nothing supplies.")
        try:
            tensordict = module(tensordict)
        except Exception as err:
            raise RuntimeError(
                f"{name} failed on inputs of the shapes that the env's specs give: "
                f"{describe(tensordict, module.in_keys)} (batch size "
                f"{tuple(tensordict.batch_size)}). It raised {type(err).__name__}: {err}"
            ) from err
    return tensordict


def describe(tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> str:
    """``{key: (shape, dtype)}`` for error messages."""
    parts = []
    for key in unique(keys):
        value = tensordict.get(key, None)
        if value is not None:
            parts.append(f"{key!r}: {tuple(value.shape)} {value.dtype}")
    return "{" + ", ".join(parts) + "}"
