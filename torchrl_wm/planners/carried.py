"""The entries in which a plan travels from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules.world_model.filtering import IS_INIT

#: The plan, and the entries that a subclass adds, ``[B, ...]``.
Carried = dict[NestedKey, torch.Tensor]
#: Their shapes, without batch dims, and their dtypes.
CarriedSpecs = Mapping[NestedKey, tuple[torch.Size, torch.dtype]]


def read_carried(
    tensordict: TensorDictBase,
    specs: CarriedSpecs,
    device: torch.device | None,
    *,
    warm: bool,
) -> Carried:
    """Read the entries that travel, ``[*B, ...]``, as rows ``[B, ...]``.

    They are zero in rows in which an episode begins, if the tensordict lacks them, and without
    a warm start.

    Raises:
        ValueError: if an entry has the shape of another planner's.
    """
    size = tensordict.batch_size
    begins = tensordict.get(IS_INIT, None) if warm else None
    if begins is not None:
        begins = begins.reshape(size.numel(), -1).all(-1).to(device)
    out: Carried = {}
    for key, (shape, dtype) in specs.items():
        value = tensordict.get(key, None) if warm else None
        if value is None:
            out[key] = torch.zeros(size.numel(), *shape, dtype=dtype, device=device)
            continue
        if tuple(value.shape) != (*size, *shape):
            raise ValueError(
                f"{key!r} has the shape {tuple(value.shape)}, and this planner carries "
                f"{(*size, *shape)} there. If it is another planner's, give each its own: "
                f"plan_key=..."
            )
        value = value.reshape(-1, *shape).to(device)
        if begins is not None:
            rows = begins.reshape(-1, *(1,) * len(shape))
            value = torch.where(rows, torch.zeros_like(value), value)
        out[key] = value
    return out


def moved(steps: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a plan one step later: without the first step, and with zeros as the last."""
    later = steps.narrow(dim, 1, steps.shape[dim] - 1)
    return torch.cat([later, torch.zeros_like(steps.narrow(dim, 0, 1))], dim)
