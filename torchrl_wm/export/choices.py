"""Conversion of choices between Gymnasium's numbers of options and the one-hot blocks of specs."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from torch.nn.functional import one_hot
from torchrl.data import (
    Binary,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
)

from torchrl_wm.export.spaces import space_of_spec


def is_choice(spec: TensorSpec) -> bool:
    """Return whether an entry is one of several options, or several such choices."""
    kinds = (Categorical, MultiCategorical, OneHot, MultiOneHot)
    return isinstance(spec, kinds) and not isinstance(spec, Binary)


def number_shape(spec: TensorSpec) -> torch.Size | None:
    """Return the shape of an entry in its space; None if it is that of the spec."""
    if not is_choice(spec):
        return None
    shape = torch.Size(space_of_spec(spec).shape)
    one_hots = isinstance(spec, (OneHot, MultiOneHot))
    return shape if one_hots or shape != spec.shape else None


def to_numbers(
    value: torch.Tensor, spec: TensorSpec, shape: torch.Size
) -> torch.Tensor:
    """Turn entries ``[*B, *spec.shape]`` into those of their space, ``[*B, *shape]``."""
    batch = value.shape[: value.ndim - len(spec.shape)]
    if value.dtype is torch.bool:
        value = value.to(torch.uint8)  # argmax takes no bools
    if isinstance(spec, MultiOneHot):
        blocks = value.split([int(n) for n in spec.nvec], -1)
        value = torch.stack([block.argmax(-1) for block in blocks], -1)
    elif isinstance(spec, OneHot):
        value = value.argmax(-1)
    return value.reshape((*batch, *shape))


def from_numbers(
    numbers: torch.Tensor, spec: TensorSpec, rows: int, key: NestedKey
) -> torch.Tensor:
    """Turn numbers of options, for ``rows`` envs, into entries ``[rows, *spec.shape]``.

    Raises:
        ValueError: if a number is that of no option.
    """
    nvec = None
    if isinstance(spec, MultiOneHot):
        nvec = [int(n) for n in spec.nvec]
        numbers = numbers.reshape((rows, *spec.shape[:-1], len(nvec)))
        counts = torch.tensor(nvec, device=numbers.device)
    elif isinstance(spec, OneHot):
        counts = int(spec.space.n)
    if isinstance(spec, (OneHot, MultiOneHot)):
        numbers = numbers.long()
        if not ((numbers >= 0) & (numbers < counts)).all():
            raise ValueError(
                f"{key!r} is the number of an option, and there are {nvec or counts} of them; got "
                f"{numbers.flatten()[:5].tolist()}."
            )
        if nvec is None:
            numbers = one_hot(numbers, counts)
        else:
            parts = zip(numbers.unbind(-1), nvec, strict=True)
            numbers = torch.cat([one_hot(part, n) for part, n in parts], -1)
    return numbers.to(spec.dtype).reshape((rows, *spec.shape))
