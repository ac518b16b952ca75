"""Memory: what a step carries on and nothing records, such as the cache of a transformer.

A start has all of it or none. A component may write into memory that nobody else can see
(:func:`write_memory`); whoever begins steps owns what they begin with (:func:`owned`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys, missing_from
from torchrl_wm.modules.world_model.flat import FlatTensors, where


def write_memory(
    memory: torch.Tensor, dim: int, index: torch.Tensor | int, value: torch.Tensor
) -> torch.Tensor:
    """Return memory with a new value in one place, without a copy of the rest where that is safe.

    That is where no gradient flows and the memory is not shared between rows, as the candidates
    of a plan share what they start from.

    Args:
        memory: any shape, with batch dims ``[*B]`` first.
        dim: the dim in which the value has a place, not negative.
        index: the place: an int, or int64 ``[*B]``. It is not looked at.
        value: of the shape of ``memory`` without ``dim``.

    Returns:
        The memory to hand on. What was given must not be used any more.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import write_memory
        >>> write_memory(torch.zeros(2, 3), 1, torch.tensor([0, 2]), torch.ones(2))
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """
    value = value.unsqueeze(dim).to(memory.dtype)
    place = torch.as_tensor(index, device=memory.device)
    place = place.reshape(*place.shape, *(1,) * (memory.ndim - place.ndim))
    place = place.expand_as(value)
    if torch.is_grad_enabled() or is_shared(memory):
        return memory.scatter(dim, place, value)
    return memory.scatter_(dim, place, value)


def is_shared(memory: torch.Tensor) -> bool:
    """Return whether several places of a tensor are one, as those of an expanded one are."""
    return any(
        stride == 0 and size > 1 for size, stride in zip(memory.shape, memory.stride())
    )


def owned(memory: torch.Tensor) -> torch.Tensor:
    """Return memory that may be written to: a copy, or what is shared, of which a writer makes one."""
    return memory if is_shared(memory) else memory.clone()


def check_all_or_none(
    what: str, keys: Sequence[NestedKey], tensordict: TensorDictBase
) -> bool:
    """Return whether a tensordict has these entries, which belong to one moment.

    Raises:
        MissingEntryError: if it has some of them.
    """
    missing = missing_from(tensordict, keys)
    if not missing or len(missing) == len(keys):
        return not missing and bool(keys)
    given = [key for key in keys if key not in missing]
    raise MissingEntryError(
        f"The tensordict has the {what} {given} and lacks {missing}, which belong to the same "
        f"moment: give all of them; or none, tensordict.exclude(*{given}), and they begin anew. It "
        f"has {leaf_keys(tensordict)}."
    )


class HeldMemory:
    """The memory that belongs to the latents handed out last, for steps made one by one."""

    def __init__(self) -> None:
        self.latents: FlatTensors = {}
        self.memory: FlatTensors = {}
        #: The memory that a caller gave last, which may still stand in a tensordict of theirs.
        self.given: FlatTensors = {}

    def __getstate__(self) -> dict:
        return {"latents": {}, "memory": {}, "given": {}}  # a copy begins anew

    def copied(self) -> HeldMemory:
        """Return another one, whose memory may be written to."""
        other = HeldMemory()
        memory = {key: value.clone() for key, value in self.memory.items()}
        other.keep(self.latents, memory)
        return other

    def keep(self, latents: FlatTensors, memory: FlatTensors) -> None:
        """Hold memory from now on, and the latents ``[*B, ...]`` to which it belongs."""
        # The caller's latents may change in place, and are others then.
        self.latents = {key: value.detach().clone() for key, value in latents.items()}
        self.memory = memory

    def forget(self) -> None:
        """Hold nothing."""
        self.latents, self.memory = {}, {}

    def begin(
        self, rows: torch.Tensor, latents: FlatTensors, memory: FlatTensors
    ) -> None:
        """Hold other memory in the rows in which something else begins, ``[*B]`` bool."""
        if self.memory and _size(self.latents, latents, rows.ndim):
            latents = where(rows, latents, self.latents)
            memory = where(rows, memory, self.memory)
        self.keep(latents, memory)

    def find(
        self, latents: FlatTensors, besides: torch.Tensor | None = None
    ) -> FlatTensors | None:
        """Return the memory that belongs to these latents, by key; None if it is not held.

        Args:
            latents: by key, ``[*B, ...]``.
            besides: rows that may differ, ``[*B]`` bool.
        """
        if not self.memory or latents.keys() != self.latents.keys():
            return None
        for key, value in latents.items():
            held = self.latents[key]
            if held.shape != value.shape or held.dtype != value.dtype:
                return None
            same = (held == value) | ((held != held) & (value != value))
            if besides is not None:
                same |= besides.reshape(
                    *besides.shape, *(1,) * (value.ndim - besides.ndim)
                )
            if not same.all():
                return None
        # Who detached the latents wants no gradient through what was before.
        flows = torch.is_grad_enabled() and any(
            value.requires_grad for value in latents.values()
        )
        if flows:
            return dict(self.memory)
        return {key: value.detach() for key, value in self.memory.items()}

    def note_given(self, tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> None:
        """Note the memory that a caller's tensordict has."""
        found = [tensordict.get(key, None) for key in keys]
        self.given = dict(zip(keys, found)) if all(v is not None for v in found) else {}

    def was_given(self, tensordict: TensorDictBase) -> bool:
        """Return whether a tensordict still has the memory that was given before."""
        found = {key: tensordict.get(key, None) for key in self.given}
        return bool(found) and all(
            value is not None and value.data_ptr() == self.given[key].data_ptr()
            for key, value in found.items()
        )

    def as_tensordict(
        self, size: torch.Size, device: torch.device | None
    ) -> TensorDict:
        """Return a copy of the memory, ``[*B]``."""
        out = TensorDict({}, batch_size=size, device=device)
        for key, value in self.memory.items():
            out.set(key, value.clone())
        return out


def _size(one: FlatTensors, other: FlatTensors, dims: int) -> bool:
    """Return whether both are of one batch size."""
    sizes = [next(iter(part.values())).shape[:dims] for part in (one, other)]
    return sizes[0] == sizes[1]
