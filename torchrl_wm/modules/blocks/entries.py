"""Entries of a tensordict as the one float vector that a network reads, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from tensordict import NestedKey
from torch import nn
from torchrl.data import Binary, Categorical, MultiCategorical, TensorSpec

from torchrl_wm.modules.keys import as_tuple, unique


@dataclass(frozen=True)
class Entry:
    """One entry of an env, as a network sees it; plain data.

    Args:
        key: its key.
        shape: its feature dims, without batch dims.
        dtype: its dtype.
        classes: for a categorical entry (class numbers), how many classes each of
            its elements has, in the order of the flattened entry; else empty.

    Examples:
        >>> from torchrl.data import MultiCategorical, Unbounded
        >>> from torchrl_wm.modules import Entry
        >>> Entry.from_spec("observation", Unbounded((2, 3))).size
        6
        >>> Entry.from_spec("action", MultiCategorical((2, 3))).size
        5
    """

    key: NestedKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    classes: tuple[int, ...] = ()

    @classmethod
    def from_spec(cls, key: NestedKey, spec: TensorSpec) -> Entry:
        """Return the entry of a spec without batch dims."""
        key, shape, classes = unique([key])[0], tuple(spec.shape), ()
        if isinstance(spec, MultiCategorical):
            nvec = spec.nvec.expand(spec.shape).reshape(-1)
            classes = tuple(int(n) for n in nvec)
        elif isinstance(spec, Categorical) and not (
            isinstance(spec, Binary) or spec.dtype is torch.bool
        ):
            classes = (int(spec.n),) * prod(shape)
        return cls(key, shape, spec.dtype, classes)

    @property
    def size(self) -> int:
        """The number of floats: one for each number, one for each class of a class number."""
        return sum(self.classes) if self.classes else prod(self.shape)

    @property
    def name(self) -> str:
        """The key with dots, for messages and module names."""
        return ".".join(as_tuple(self.key))


class JoinEntries(nn.Module):
    """Entries side by side as one float vector.

    Numbers and one-hot vectors become floats as they are, class numbers become
    one-hot vectors; feature dims are flattened. Batch dims stay.

    Args:
        entries: the entries, in the order in which they are given and joined.
        dtype: the vector's dtype; torch's default dtype by default. It follows ``.to()``,
            as that of the networks behind it does.

    Examples:
        >>> import torch
        >>> from torchrl.data import Binary, Categorical, Unbounded
        >>> from torchrl_wm.modules import Entry, JoinEntries
        >>> join = JoinEntries(
        ...     [Entry.from_spec("observation", Unbounded((2,))),
        ...      Entry.from_spec("action", Categorical(3))]
        ... )
        >>> join(torch.zeros(5, 2), torch.tensor([0, 1, 2, 0, 1]))[2]
        tensor([0., 0., 0., 0., 1.])
    """

    def __init__(
        self, entries: Sequence[Entry], *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.entries = tuple(entries)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        #: The length of the vector.
        self.out_features = sum(entry.size for entry in self.entries)
        for number, entry in enumerate(self.entries):
            if not entry.classes:
                continue
            counts = torch.tensor(entry.classes)
            element = torch.arange(len(counts)).repeat_interleave(counts)
            label = torch.cat([torch.arange(n) for n in entry.classes])
            # Derived from the entries, so not part of the state.
            self.register_buffer(f"_element_{number}", element, persistent=False)
            self.register_buffer(f"_label_{number}", label, persistent=False)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Join the entries.

        Args:
            values: one tensor ``[*B, *feature]`` for each entry.

        Returns:
            ``[*B, out_features]`` float.

        Raises:
            ValueError: if the number of tensors or a feature shape is another.
        """
        if len(values) != len(self.entries):
            raise ValueError(
                f"JoinEntries joins {[entry.name for entry in self.entries]}, and got "
                f"{len(values)} tensors. Give one for each, in this order."
            )
        parts = []
        for number, (entry, value) in enumerate(zip(self.entries, values)):
            flat = _flat(entry, value)
            if entry.classes:
                element = getattr(self, f"_element_{number}")
                flat = flat[..., element] == getattr(self, f"_label_{number}")
            parts.append(flat.to(self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _apply(self, fn: Callable, recurse: bool = True) -> JoinEntries:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{entry.name}: {entry.size}" for entry in self.entries)


class SplitEntries(nn.Module):
    """A vector taken apart into entries: the inverse of :class:`JoinEntries`.

    Args:
        entries: the entries, none of them categorical.

    Raises:
        ValueError: if an entry holds class numbers, which a vector of floats
            does not give back.

    Examples:
        >>> import torch
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import Entry, SplitEntries
        >>> split = SplitEntries(
        ...     [Entry.from_spec("position", Unbounded((2,))),
        ...      Entry.from_spec("image", Unbounded((4, 3)))]
        ... )
        >>> [value.shape for value in split(torch.zeros(5, 14))]
        [torch.Size([5, 2]), torch.Size([5, 4, 3])]
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.entries = tuple(entries)
        for entry in self.entries:
            if not entry.dtype.is_floating_point:
                raise ValueError(
                    f"{entry.key!r} is {entry.dtype}, and a vector splits into floats. Encode it, "
                    f"and predict the encoding instead."
                )
        self.sizes = [entry.size for entry in self.entries]
        #: The length of the vector.
        self.in_features = sum(self.sizes)

    def forward(self, vector: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Split a vector.

        Args:
            vector: ``[*B, in_features]``.

        Returns:
            One tensor ``[*B, *feature]`` for each entry, in its dtype; a single
            one as itself.
        """
        lead = vector.shape[:-1]
        parts = (
            [vector]
            if len(self.sizes) == 1
            else vector.split_with_sizes(self.sizes, -1)
        )
        out = tuple(
            part.reshape((*lead, *entry.shape)).to(entry.dtype)
            for entry, part in zip(self.entries, parts)
        )
        return out[0] if len(out) == 1 else out

    def extra_repr(self) -> str:
        return ", ".join(f"{entry.name}: {list(entry.shape)}" for entry in self.entries)


def check_numbers(
    module: nn.Module, values: Mapping[NestedKey, torch.Tensor], batch: torch.Size
) -> None:
    """Refuse numbers ``[*B, 1]`` if the entries that a module joins are ``[*B]``.

    An entry cannot tell: ``*B, 1`` could be batch dims, too.

    Args:
        module: the module, and all within it.
        values: some of the entries that it reads, by flat key.
        batch: ``*B``.

    Raises:
        ValueError: if there are such numbers; the message names the key.
    """
    joins = (part for part in module.modules() if isinstance(part, JoinEntries))
    for entry in (entry for join in joins for entry in join.entries):
        value = None if entry.shape else values.get(entry.key, None)
        if value is not None and value.shape == (*batch, 1):
            below = (
                f"class number below {entry.classes[0]}" if entry.classes else "number"
            )
            raise ValueError(
                f"{entry.key!r} is one {below} for each step, [*B] = {tuple(batch)}, and has "
                f"the shape {tuple(value.shape)}. Take the last dim off: td.set({entry.key!r}, "
                f"td.get({entry.key!r}).squeeze(-1)); or make the model of an env whose spec of "
                f"it has the shape (1,)."
            )


def _flat(entry: Entry, value: torch.Tensor) -> torch.Tensor:
    """Return ``[*B, *feature]`` as ``[*B, n]``; a scalar as ``[*B, 1]``."""
    dims = len(entry.shape)
    lead = value.shape[: value.ndim - dims]
    if value.ndim < dims or tuple(value.shape[len(lead) :]) != entry.shape:
        raise ValueError(
            f"{entry.key!r} has the shape {tuple(value.shape)}; its spec asks for [*B, "
            f"{', '.join(map(str, entry.shape))}]. Check the batch size of the tensordict."
        )
    return value if dims == 1 else value.reshape(*lead, prod(entry.shape))
