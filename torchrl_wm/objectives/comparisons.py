"""What the terms share: finding predictions and labels, and their distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.modules import symlog
from torchrl.objectives.utils import distance_loss

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys, strip_next, unique
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.keys import LossKeys

#: Gives the unit in which an entry is compared, by its key.
Scale = Callable[[NestedKey], "torch.Tensor | float"]
DISTANCES = ("l2", "l1", "smooth_l1", "symlog")


def check_distance(argument: str, value: str, known: tuple[str, ...]) -> str:
    """Return a distance's name; raise an error at once if it is unknown."""
    if value not in known:
        raise ValueError(
            f"Unknown {argument}={value!r}. Valid choices are {list(known)}."
        )
    return value


def check_encoded(
    term: str,
    use: str,
    keys: list[NestedKey],
    world_model: WorldModel,
    advice: str = "",
) -> None:
    """Raise an error if the encoder does not write all the latents ``keys`` that a loss uses."""
    encoded = written_keys(world_model.encoder)
    missing = [key for key in keys if key not in encoded]
    if missing:
        raise ValueError(
            f"The loss {term!r} {use}, and the encoder writes {encoded}, not {missing}.{advice}"
        )


def distance(
    value: torch.Tensor,
    label: torch.Tensor,
    name: str,
    key: NestedKey,
    batch: TensorDictBase,
    scale: Scale | None = None,
) -> torch.Tensor:
    """Return the distance per sample, ``[*B]``; shapes must be equal, nothing is broadcast.

    ``"symlog"`` is the squared distance of the symmetric logarithms (arXiv 2301.04104, eq. 10).
    """
    check_shapes(value, label, key)
    if scale is not None:
        unit = scale(strip_next(key))
        value, label = value / unit, label / unit
    # Not in the lower precision of the two, where both could round to the same.
    dtype = torch.promote_types(value.dtype, label.dtype)
    value, label = value.to(dtype), label.to(dtype)
    if name == "symlog":  # squares of large numbers would drown the small ones
        value, label, name = symlog(value), symlog(label), "l2"
    return per_sample(distance_loss(value, label, name), batch)


def check_shapes(value: torch.Tensor, label: torch.Tensor, key: NestedKey) -> None:
    """Raise an error if a prediction and its label differ in shape."""
    if value.shape != label.shape:
        raise ValueError(
            f"The prediction {key!r} has the shape {tuple(value.shape)}, its label "
            f"{tuple(label.shape)}. They must be equal; nothing is broadcast."
        )


def per_sample(loss: torch.Tensor, batch: TensorDictBase) -> torch.Tensor:
    """Return ``[*B, *feature]`` as ``[*B]``, by the mean over the feature dims."""
    dims = batch.batch_dims
    return loss if loss.ndim == dims else loss.flatten(dims).mean(-1)


# Entries ---------------------------------------------------------------------


def next_observations(world_model: WorldModel) -> list[NestedKey]:
    """Return the next observations that the encoder reads, as keys of a batch."""
    return [join("next", key) for key in unique(world_model.encoder.in_keys)]


def reward_label(
    batch: TensorDictBase, keys: LossKeys, term: str, key: NestedKey | None = None
) -> torch.Tensor:
    """Return the real reward: the loss's, or the one under ``key``, below "next"."""
    value = keys.find_label(batch, "reward") if key is None else None
    if value is None:
        value = read_label(batch, join("next", key or keys.reward), term)
    return value


def read_label(
    batch: TensorDictBase, key: NestedKey, term: str, also: NestedKey | None = None
) -> torch.Tensor:
    """Return an entry of the batch; raise an error that names the loss if it is missing.

    The error also names ``also``, a key that would have done.
    """
    value = batch.get(key, None)
    if value is None:
        alternative = "" if also is None else f" (nor {also!r})"
        raise MissingEntryError(
            f"The loss {term!r} needs the label {key!r}{alternative}, and the batch has "
            f"{leaf_keys(batch)}. Add it to the batch, name it with loss.set_keys(...), or leave "
            f"{term!r} out of losses."
        )
    return value


def prediction(
    predicted: TensorDictBase, key: NestedKey, component: str, world_model: WorldModel
) -> torch.Tensor:
    """Return what ``component`` predicted under ``key``; raise an error if it did not."""
    value = predicted.get(key, None)
    if value is None:
        written = written_keys(getattr(world_model, component))
        raise MissingEntryError(
            f"{component} writes {written}, not {key!r}. Change its out_key to {key!r}, or, for "
            f"another key below 'next', call loss.set_keys({as_tuple(key)[-1]}=<that key>, "
            f"true_{as_tuple(key)[-1]}={strip_next(key)!r})."
        )
    return value
