"""Replay buffers and tensordicts as transitions, and transitions in the form of an env."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from torchrl_wm import _upstream
from torchrl_wm.models import EnvSpecs, read_specs
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    join,
    leaf_keys,
    missing_from,
    sibling,
    unique,
)
from torchrl_wm.modules.world_model.filtering import episode_begins
from torchrl_wm.trainers.logged_actions import as_spec
from torchrl_wm.trainers.logged_entries import ENDS
from torchrl_wm.trainers.logged_episodes import Ends, kind_of_ends
from torchrl_wm.trainers.logged_files import oldest_first
from torchrl_wm.trainers.logged_numbers import flags


# TorchRL's forms ---------------------------------------------------------------------


def content(buffer: ReplayBuffer) -> Any:
    """Return all that a replay buffer holds, ``[*B, T]``, from its oldest step on."""
    if not len(buffer):
        raise ValueError("The data holds no transition: the replay buffer is empty.")
    data = buffer[:]
    cursor = _upstream.cursor(buffer.writer)
    if not isinstance(data, TensorDictBase) or cursor is None:
        return data
    time = buffer.dim_extend
    data = oldest_first(data, time, cursor)
    last = getattr(buffer.storage, "ndim", 1) - 1
    return data if time >= last else data.transpose(time, last)


def flat(data: TensorDictBase, dones: str | None, notes: list[str]) -> TensorDictBase:
    """Return the transitions ``[N]`` of a tensordict ``[*B, T]``, without padding.

    Args:
        data: the tensordict.
        dones: what ends are if there is only "done", see
            :func:`~torchrl_wm.trainers.logged_episodes.kind_of_ends`.
        notes: what to say of the data; it is added to.
    """
    found = {as_tuple(key)[-1] for key in leaf_keys(data) if key[0] == "next"}
    missing = [] if "reward" in found else [("next", "reward")]
    if not found & {*ENDS}:
        missing.append(("next", "done"))
    if missing:
        raise MissingEntryError(
            f"The tensordict lacks {missing}; it has {leaf_keys(data)}. Observations and "
            f"actions are required, and below 'next' observations, rewards and dones, as in rollouts."
        )
    if not data.batch_size.numel():
        raise ValueError("The data holds no transition.")
    data = data.copy() if data.batch_dims else data.reshape(1)
    valid = data.get(("collector", "mask"), None)
    if valid is None:
        valid = torch.ones(data.batch_size, dtype=torch.bool, device=data.device)
    valid = valid.reshape(data.batch_size)
    _end(data, _last_steps(data, valid), valid, dones, notes)
    rows = data.reshape(-1)
    return rows.clone() if valid.all() else rows[valid.reshape(-1)]


def _last_steps(data: TensorDictBase, valid: torch.Tensor) -> torch.Tensor:
    """Return the steps after which nothing of their episode was recorded, ``[*B, T]`` bool."""
    last = torch.ones_like(valid)
    last[..., :-1] = ~valid[..., 1:]
    begins = episode_begins(data)
    if begins is not None:
        last[..., :-1] |= begins[..., 1:]
    episode = data.get(("collector", "traj_ids"), None)
    if episode is not None:
        episode = episode.reshape(data.batch_size)
        last[..., :-1] |= episode[..., 1:] != episode[..., :-1]
    return last


def _end(
    data: TensorDictBase,
    last: torch.Tensor,
    valid: torch.Tensor,
    dones: str | None,
    notes: list[str],
) -> None:
    """Truncate the steps ``last``, ``[*B]``, that do not terminate; see :func:`flat`."""
    following = data.get("next")

    def read(key: NestedKey) -> torch.Tensor | None:
        value = following.get(key, None)
        if value is None:
            return None
        flags(repr(join("next", key)), value[valid])  # padding may be anything
        return value.bool()

    ends = [key for key in leaf_keys(following) if as_tuple(key)[-1] in ENDS]
    entries = {
        key: [read(sibling(key, name)) for name in ENDS]
        for key in unique(sibling(key, "done") for key in ends)
    }
    plain = [done for done, *kinds in entries.values() if kinds == [None, None]]
    kind = _kind(plain, last, valid, dones, notes)
    for key, (done, terminated, truncated) in entries.items():
        if done is None:
            done = terminated if truncated is None else truncated
            if terminated is not None:
                done = done | terminated
        if terminated is None and truncated is None:
            terminated = done if kind != "timeout" else torch.zeros_like(done)
        elif terminated is None:
            terminated = done & ~truncated
        if truncated is None:
            truncated = done & ~terminated
        cut = last.reshape(*last.shape, *(1,) * (done.ndim - last.ndim)) & ~terminated
        values = (done | cut, terminated, truncated | cut)
        for name, value in zip(ENDS, values):
            following.set(sibling(key, name), value)


def _kind(
    plain: list[torch.Tensor],
    last: torch.Tensor,
    valid: torch.Tensor,
    dones: str | None,
    notes: list[str],
) -> str | None:
    """Return what ends are of which only "done" is known."""
    none = torch.zeros_like(last[valid])
    done = none
    for value in plain:
        done = done | value.reshape(*last.shape, -1)[valid].any(-1)
    ends = Ends(none, none, done.cpu(), (last[valid] | done).cpu(), none)
    return kind_of_ends([ends], dones, notes)


# The form of an env -------------------------------------------------------------------


def as_specified(data: TensorDictBase, env: EnvBase, start: Any) -> TensorDictBase:
    """Return the transitions with the entries of the env, in its shapes and dtypes."""
    specs: EnvSpecs = read_specs(env)
    entries = [(e.key, e) for e in (*specs.vectors, *specs.pixels)]
    entries += [(join("next", e.key), e) for e in (*specs.vectors, *specs.pixels)]
    entries.append((join("next", specs.reward.key), specs.reward))
    missing = missing_from(data, [*specs.action_keys, *(key for key, _ in entries)])
    if missing:
        raise MissingEntryError(
            f"The data lacks the env's entries {missing}; it has {leaf_keys(data)}."
        )
    for key in specs.action_keys:
        spec = env.full_action_spec_unbatched[key]
        data.set(key, as_spec(key, data.get(key), spec, "the env", start=start))
    for key, entry in entries:
        value = data.get(key)
        if tuple(value.shape[1:]) != entry.shape:
            raise ValueError(
                f"{key!r} has the shape {tuple(value.shape[1:])} per step in the data, and "
                f"{entry.shape} in the env."
            )
        # Whole numbers of a log, but no images, which have another scale in floats.
        counts = value.dtype is not torch.uint8 and entry.dtype.is_floating_point
        if value.dtype != entry.dtype and (value.is_floating_point() or counts):
            data.set(key, value.to(entry.dtype))
    return data
