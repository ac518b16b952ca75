"""Which samples of a batch count in a loss, and how much."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys
from torchrl_wm.modules.world_model.filtering import episode_begins, IS_INIT
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.processes import Processes

REDUCTIONS = ("mean", "sum", "none")


def as_slices(batch: TensorDictBase, length: int) -> TensorDictBase:
    """Return a flat batch of slices, ``[B * T]``, as ``[B, T]``; others as they are.

    Raises:
        ValueError: if the batch does not consist of slices of that length.
    """
    if batch.batch_dims != 1:
        return batch
    if len(batch) % length:
        raise ValueError(
            f"slice_len={length} does not divide the batch of {len(batch)} steps. Let the sampler "
            f"draw whole slices: SliceSampler(slice_len={length}, strict_length=True), with a "
            f"batch size that is a multiple of {length}."
        )
    return batch.reshape(-1, length)


def valid_samples(
    batch: TensorDictBase, mask_key: NestedKey | Literal["auto"] | None
) -> torch.Tensor | None:
    """Return where the batch's masks say that samples are valid, ``[*B]``; None without a mask.

    Args:
        batch: ``[*B]``.
        mask_key: the mask; ``"auto"`` for TorchRL's own masks, None for no mask.

    Raises:
        KeyError: if the batch lacks a mask that was named.
    """
    auto = mask_key == "auto"
    keys = AUTO_LOSS_MASK_KEYS if auto else () if mask_key is None else (mask_key,)
    masks = [
        mask for mask in (batch.get(key, None) for key in keys) if mask is not None
    ]
    if not masks:
        if not auto and mask_key is not None:
            raise MissingEntryError(
                f"The loss expects that {mask_key!r} masks invalid samples, and the batch has "
                f"{leaf_keys(batch)}. Add it, or call loss.set_keys(mask=None)."
            )
        return None
    size = batch.batch_size
    valid = torch.ones(size, dtype=torch.bool, device=masks[0].device)
    for mask in masks:
        valid = valid & _per_sample(mask.bool(), size)
    return valid


def _per_sample(mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return a mask ``[*B]``, ``[*B, 1]`` or of the first dims of ``*B`` as ``[*B]``."""
    while mask.ndim > len(size) and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    if mask.ndim > len(size):
        raise ValueError(
            f"A mask has one bool per sample, {tuple(size)} or {(*size, 1)}; this "
            f"one has the shape {tuple(mask.shape)}. Reduce it, or name another entry: "
            f"loss.set_keys(mask=...)."
        )
    return mask.reshape(mask.shape + (1,) * (len(size) - mask.ndim)).expand(size)


def sample_weights(batch: TensorDictBase, keys: LossKeys) -> torch.Tensor | None:
    """Return the product of the batch's weights, ``[*B]``; None if it has none."""
    total = None
    for key in (keys.weight, keys.priority_weight):
        weight = batch.get(key, None)
        if weight is None:
            continue
        size = batch.batch_size
        if weight.shape not in (size, (*size, 1)):
            raise ValueError(
                f"The weights {key!r} have the shape {tuple(weight.shape)}; one per sample "
                f"is expected, {tuple(size)} or {(*size, 1)}. If this entry is no weight, "
                f"call loss.set_keys(weight=...) with another key."
            )
        weight = weight.reshape(size)
        total = weight if total is None else total * weight
    return total


def begins_within(batch: TensorDictBase, keys: LossKeys) -> torch.Tensor:
    """Return where episodes begin in sequences after their first step, ``[*B, T]`` bool."""
    done = keys.find_label(batch, "done")
    begins = torch.zeros(batch.batch_size, dtype=torch.bool, device=batch.device)
    # Either may say so: a slice can lack the step before an episode's first.
    for flags in (episode_begins(batch), episode_begins(batch.exclude(IS_INIT), done)):
        if flags is not None:
            begins[..., 1:] |= flags[..., 1:]
    return begins


def first_episode(batch: TensorDictBase, keys: LossKeys) -> torch.Tensor:
    """Return where the first step's episode still goes on in sequences, ``[*B, T]`` bool."""
    return begins_within(batch, keys).cumsum(-1) == 0


def pieces(
    batch: TensorDictBase, keys: LossKeys, valid: torch.Tensor | None
) -> torch.Tensor:
    """Return the number of the piece that each step of sequences belongs to, ``[*B, T]`` int64.

    Pieces end with episodes, and where steps are not valid.

    Args:
        batch: ``[*B, T]``.
        keys: the keys of the loss.
        valid: where steps are valid, ``[*B, T]``; None if all are.
    """
    begins = begins_within(batch, keys)
    if valid is not None:
        later = torch.arange(valid.shape[-1], device=valid.device) > 0
        begins = begins | ~valid | (~valid.roll(1, -1) & later)
    return begins.cumsum(-1)


def blank(batch: TensorDictBase, valid: torch.Tensor) -> TensorDictBase:
    """Return the batch with zeros in its invalid samples.

    Padding may hold anything, NaN included. Leaving it out of the reduction is not
    enough: the gradient of a prediction from NaN is NaN.
    """
    if isinstance(batch, LazyStackedTensorDict):
        batch = batch.contiguous()  # apply would go through its parts

    def zeros(value: torch.Tensor) -> torch.Tensor:
        if value.dtype is torch.bool:
            return value
        rows = valid.reshape(valid.shape + (1,) * (value.ndim - valid.ndim))
        return torch.where(rows, value, torch.zeros_like(value))

    return batch.apply(zeros)


def counted(
    size: torch.Size,
    device: torch.device,
    valid: torch.Tensor | None,
    weights: torch.Tensor | None,
    processes: Processes,
) -> torch.Tensor | None:
    """Return what a mean divides by, of the valid samples or their weights; None for all ``[*B]``.

    It counts the samples of all processes: how many there are in each on average, as the
    processes average their gradients.
    """
    if weights is None and valid is None and not processes.groups:
        return None
    if weights is None:
        weights = torch.ones(size, device=device)
    if valid is not None:
        weights = torch.where(valid, weights, torch.zeros_like(weights))
    return processes.average(weights.sum())


def reduce(
    value: torch.Tensor,
    valid: torch.Tensor | None,
    weights: torch.Tensor | None,
    reduction: str,
    count: torch.Tensor | None,
) -> torch.Tensor:
    """Reduce one number per sample, ``[*B]``; invalid samples are zero and do not count.

    Args:
        value: the numbers.
        valid: which samples are valid.
        weights: their weights.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        count: what a mean divides by, from :func:`counted`.
    """
    if valid is not None:
        value = torch.where(valid, value, torch.zeros_like(value))
    if weights is not None:
        value = value * weights
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    if count is None:
        return value.mean()
    # All samples invalid, or of no weight: zero, not NaN.
    count = count.to(value.dtype)
    return value.sum() / count.clamp_min(torch.finfo(value.dtype).tiny)
