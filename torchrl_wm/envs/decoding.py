"""Decoded observations, and the forms that real envs show them in: bytes, bits and choices."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.data import (
    Binary,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
)

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, strip_next, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict
from torchrl_wm.modules.world_model.wiring import written_keys

#: The greatest float64 that an int64 can hold.
_MOST = 2.0**63 - 1024


def decoder_inputs(world_model: WorldModel, state: FlatTensors) -> FlatTensors:
    """Return what the decoder reads of latents and context, at the root or below "next".

    Raises:
        MissingEntryError: if it reads something else.
    """
    work = dict(state)
    if any(is_next(key) for key in unique(world_model.decoder.in_keys)):
        work.update({join("next", key): value for key, value in state.items()})
    missing = [key for key in unique(world_model.decoder.in_keys) if key not in work]
    if missing:
        raise MissingEntryError(
            f"decoder reads {missing}; in an imagined env it can read latents and context: "
            f"{sorted(state, key=str)}."
        )
    return work


def read_decoded(
    world_model: WorldModel,
    state: FlatTensors,
    keys: list[NestedKey],
    at: Placement,
) -> FlatTensors:
    """Return the observations that latents stand for, by key.

    Args:
        state: latents and context by flat key, ``[*B, ...]``.
        keys: the observations wanted.
        at: their batch size and device.
    """
    work = to_tensordict(decoder_inputs(world_model, state), at)
    out = world_model.decode(work)
    place = {strip_next(k): k for k in written_keys(world_model.decoder)}
    return {key: out.get(place[key]) for key in keys}


# Rounding ------------------------------------------------------------------


def specs_to_round(
    decoder: TensorDictModuleBase, specs: dict[NestedKey, TensorSpec]
) -> dict[NestedKey, TensorSpec]:
    """Return the specs of entries that are decoded as floats and shown as the real env shows them.

    These are entries of integers and bits, written by a module that says
    ``in_env_units = True``. The floats of another module may be bytes or a 255th of them,
    and a wrong guess would show black images.

    Args:
        decoder: what writes them, at the root or below "next".
        specs: the entries' specs, without batch dims.
    """
    return {
        key: spec
        for key, spec in specs.items()
        if not spec.dtype.is_floating_point and _in_env_units(decoder, key)
    }


def _in_env_units(module: TensorDictModuleBase, key: NestedKey) -> bool:
    if isinstance(module, TensorDictSequential):
        if "in_env_units" in module.__dict__:
            return bool(module.__dict__["in_env_units"])
        writers = [m for m in module.module if key in map(strip_next, written_keys(m))]
        return bool(writers) and _in_env_units(writers[-1], key)
    return bool(getattr(module, "in_env_units", False))


def as_observed(value: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return floats in the units of an entry as what its spec holds.

    Numbers are rounded and clamped to the bounds. Bits above a half are set, and so is the
    greatest entry of each one-hot block. Other dtypes than floats are left as they are.

    Args:
        value: ``[*B, *spec.shape]``. NaN has no such form: look for it before.
        spec: without batch dims, of integers or bools.
    """
    if not value.is_floating_point():
        return value
    if isinstance(spec, MultiOneHot):
        blocks = value.split([int(n) for n in spec.nvec], -1)
        return torch.cat([_greatest(block) for block in blocks], -1).to(spec.dtype)
    if isinstance(spec, OneHot):
        return _greatest(value).to(spec.dtype)
    if isinstance(spec, Binary) or spec.dtype is torch.bool:
        return (value > 0.5).to(spec.dtype)
    # Where float32 does not hold all of the dtype's integers, float64.
    wide = torch.iinfo(spec.dtype).bits > 16
    value = value.to(torch.float64 if wide else torch.float32).round()
    if isinstance(spec, MultiCategorical):
        zero = torch.zeros_like(spec.nvec)
        return value.clamp(zero, spec.nvec - 1).to(spec.dtype)
    if isinstance(spec, Categorical):
        return value.clamp(0, spec.n - 1).to(spec.dtype)
    low, high = spec.space.low, spec.space.high
    if wide:
        low, high = low.double(), high.double().clamp(max=_MOST)
    return value.clamp(low, high).to(spec.dtype)


def _greatest(block: torch.Tensor) -> torch.Tensor:
    """Return True at the greatest entry of each block, the first of several, else False."""
    # Not torch's one_hot, which may wait for the device.
    options = torch.arange(block.shape[-1], device=block.device)
    return block.argmax(-1, keepdim=True) == options
