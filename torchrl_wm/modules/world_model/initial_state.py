"""The initial values of recurrent latents, for any batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Union

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import nn
from torchrl.data import Composite

from torchrl_wm.modules.keys import as_tuple, leaf_keys, unique

InitialStateLike = Union[
    TensorDictBase,
    Mapping[NestedKey, torch.Tensor],
    Composite,
    nn.Module,
    Callable[[torch.Size], TensorDictBase],
]


class InitialState(nn.Module):
    """The latents that an episode begins with, before anything is observed.

    Args:
        source: one of

            - a tensordict or mapping of values without batch dims; parameters
              among them are trained, other tensors are buffers,
            - a :class:`~torchrl.data.Composite` without batch dims: zeros,
            - a TensorDictModule that writes the latents into an empty
              tensordict of the batch size,
            - a function of the batch size that returns a tensordict.

    Raises:
        TypeError: if ``source`` is none of these.
    """

    def __init__(self, source: InitialStateLike) -> None:
        super().__init__()
        #: The attribute that holds each value, by key; empty for modules and functions.
        self.names: dict[NestedKey, str] = {}
        self.module: nn.Module | None = None
        self.function: Callable | None = None
        if isinstance(source, Composite):
            source = source.zero()
        if isinstance(source, Mapping) and not isinstance(source, TensorDictBase):
            source = TensorDict(dict(source))
        if isinstance(source, TensorDictBase):
            if source.batch_dims or source.is_empty():
                raise ValueError(
                    f"initial_state must be a tensordict of values without batch dims, got one "
                    f"of batch size {tuple(source.batch_size)} with {leaf_keys(source)}. It is "
                    f"expanded to any batch size."
                )
            for key in unique(source.keys(True, True)):
                name = "value/" + "/".join(as_tuple(key)).replace(".", "|")
                self.names[key] = name
                value = source.get(key)
                if isinstance(value, nn.Parameter):
                    self.register_parameter(name, value)
                else:
                    self.register_buffer(name, value)
        elif isinstance(source, nn.Module) and hasattr(source, "out_keys"):
            self.module = source
        elif callable(source) and not isinstance(source, nn.Module):
            self.function = source
        else:
            raise TypeError(
                f"initial_state must be a TensorDict or Composite without batch dims, a "
                f"TensorDictModule that writes the latents, or a function of the batch size, got "
                f"{type(source).__name__}."
            )

    def check(
        self,
        latents: list[NestedKey],
        memory: list[NestedKey],
        encoded: list[NestedKey],
    ) -> None:
        """Refuse values that no latent and no memory needs, and memory without a value.

        Raises:
            ValueError: if a key is neither latent nor memory, or one that the encoder writes, or
                if memory is missing.
        """
        if self.function is not None:
            return  # its keys are known when it is called
        given = self.keys()
        needed = [key for key in (*latents, *memory) if key not in encoded]
        unneeded = [key for key in given if key not in needed]
        if unneeded:
            raise ValueError(
                f"initial_state gives {unneeded}, which the model does not take from it: the "
                f"latents that the encoder does not write are {needed}."
            )
        missing = [key for key in memory if key not in given]
        if missing:
            raise ValueError(
                f"initial_state gives {given} and lacks the memory {missing}. Add its first "
                f"values, without batch dims: initial_state=TensorDict({{{missing[0]!r}: ...}})."
            )

    def keys(self) -> list[NestedKey]:
        """Return the keys of the latents that are supplied."""
        if self.names:
            return list(self.names)
        if self.module is not None:
            return unique(self.module.out_keys)
        return unique(self.function(torch.Size([])).keys(True, True))

    def forward(
        self, batch_size: torch.Size, device: torch.device | None = None
    ) -> TensorDictBase:
        """Return the initial latents, ``[*B, ...]``.

        Raises:
            ValueError: if a module or function gives another batch size.
        """
        if self.names:
            out = TensorDict({}, batch_size=batch_size, device=device)
            for key, name in self.names.items():
                value = getattr(self, name)
                out.set(key, value.expand(*batch_size, *value.shape))
            return out
        if self.module is not None:
            out = self.module(TensorDict({}, batch_size=batch_size, device=device))
        else:
            out = self.function(batch_size)
        for key in unique(out.keys(True, True)):
            shape = out.get(key).shape
            if shape[: len(batch_size)] != batch_size:
                raise ValueError(
                    f"initial_state gives {key!r} of shape {tuple(shape)} for the batch size "
                    f"{tuple(batch_size)}, which it must begin with."
                )
        return out if device is None else out.to(device)
