"""Calls of a model without side effects: no graph, own random numbers, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchrl_wm import _upstream

_CPU = torch.default_generator
_get_state, _set_state = _CPU.get_state, _CPU.set_state
_set_grad = _upstream.grad_setter()
#: Longer containers hold data, which no reset should search for modules.
_MOST = 1000


class Isolation:
    """A context in which one env calls its model.

    Within it, no autograd graph is kept, torch draws from a random state that
    belongs to this env, and the model's modules are in evaluation mode. Afterwards all three
    are as they were, so that calls change neither the caller's random numbers nor its training.

    Args:
        model: the model. Its modules are those in it and in its attributes, also in
            lists, tuples and dictionaries there.
        device: the device of the model, whose random state is isolated, too.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self._cuda = None
        if device.type == "cuda":
            index = (
                torch.cuda.current_device() if device.index is None else device.index
            )
            self._cuda = torch.device("cuda", index)
        self._cuda_state: torch.Tensor | None = None
        self._modes: dict[nn.Module, bool] = {}
        self.refresh()
        self.seed(0)

    def __getstate__(self) -> dict:
        held = {"_modes", "_modules", "_roots", "_outer", "_outer_cuda"}
        return {k: v for k, v in self.__dict__.items() if k not in held}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._modes = {}
        self.refresh()

    def refresh(self) -> None:
        """Find the modules of the model again."""
        model = self.model
        if isinstance(model, nn.Module):
            self._roots = [model]
        else:
            self._roots = (
                list(_modules_in(list(vars(model).values())))
                if hasattr(model, "__dict__")
                else []
            )
        self._modules = [module for root in self._roots for module in root.modules()]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Enter the context without moving on the env's random numbers."""
        state, cuda_state = self._state, self._cuda_state
        try:
            with self:
                yield
        finally:
            self._state, self._cuda_state = state, cuda_state

    def seed(self, seed: int) -> None:
        """Seed the env's own random numbers."""
        self._state = torch.Generator().manual_seed(seed).get_state()
        if self._cuda is not None:
            generator = torch.Generator(self._cuda).manual_seed(seed)
            self._cuda_state = generator.get_state()

    def __enter__(self) -> None:
        # Every step of every env runs this: it has as few calls as possible.
        self._outer_grad = torch.is_grad_enabled()
        _set_grad(False)
        self._outer = _get_state()
        _set_state(self._state)
        if self._cuda is not None:
            self._outer_cuda = self._cuda_generator().get_state()
            self._cuda_generator().set_state(self._cuda_state)
        for root in self._roots:
            if root.training:
                self._modes = {m: m.training for m in self._modules}
                for module in self._modes:
                    # module.training = False, without the cost of nn.Module.__setattr__.
                    module.__dict__["training"] = False
                break

    def __exit__(self, *error: Any) -> None:
        if self._modes:
            for module, mode in self._modes.items():
                module.__dict__["training"] = mode
            self._modes = {}
        self._state = _get_state()
        _set_state(self._outer)
        if self._cuda is not None:
            self._cuda_state = self._cuda_generator().get_state()
            self._cuda_generator().set_state(self._outer_cuda)
        _set_grad(self._outer_grad)

    def _cuda_generator(self) -> torch.Generator:
        return torch.cuda.default_generators[self._cuda.index]


def _modules_in(tree: Any) -> Iterator[nn.Module]:
    """Yield the modules in plain containers, which may contain each other in a circle."""
    seen: set[int] = set()
    left = [tree]
    while left:
        value = left.pop()
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            if len(value) > _MOST:
                continue
            left.extend(value.values() if isinstance(value, dict) else value)
