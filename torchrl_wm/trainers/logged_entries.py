"""The names and dtypes that entries of logged data may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.models import read_specs
from torchrl_wm.models.specs import BOOKKEEPING
from torchrl_wm.modules.blocks.precision import coarse_dims, warn_of_coarse
from torchrl_wm.modules.keys import (
    as_tuple,
    is_next,
    join,
    leaf_keys,
    sibling,
    strip_next,
)

#: The entries that say that an episode ends.
ENDS = ("done", "terminated", "truncated")


def check_names(observations: Mapping[Any, Any], what: str, known: bool) -> None:
    """Refuse observations with the name of an action, a reward, an end or a count.

    Args:
        observations: by key.
        what: what they belong to, for errors.
        known: whether an env says which entries are observations; then only the keys that
            arrays are written to are refused.
    """
    own = {"action", "reward", *ENDS} | (set() if known else BOOKKEEPING)
    taken = []
    for key in observations:
        names = as_tuple(key)
        if names[0] in ("next", "collector"):
            taken.append((names, 0))
        elif names[-1] in own and not (known and len(names) > 1):
            taken.append((names, len(names) - 1))
    if taken:
        (names, place), *_ = taken
        other = (*names[:place], f"env_{names[place]}", *names[place + 1 :])
        raise ValueError(
            f"The observations of {what} have the entries {['/'.join(n) for n, _ in taken]}: in "
            f"a transition, actions, rewards, ends, and what is counted or comes next have these "
            f"names, and the two would be mixed up. Rename them, {'/'.join(other)!r} for "
            f"{'/'.join(names)!r} (in an env with torchrl.envs.RenameTransform), or leave them "
            f"out. Episodes of a Minari dataset can also be given as a list of dictionaries."
        )


def check_observed_actions(data: TensorDictBase) -> None:
    """Refuse an entry that may be an observation called "action", or the next action."""
    for key in leaf_keys(data):
        following = join("next", key)
        if as_tuple(key)[-1] != "action" or data.get(following, None) is None:
            continue
        raise ValueError(
            f"The data has {following!r} beside {key!r}, and does not tell whether that is an "
            f"observation or the action of the next step. Name the env, env=..., or leave it "
            f"out, data.exclude({following!r}). An observation needs another name, as "
            f"torchrl.envs.RenameTransform(in_keys=[{key!r}], "
            f"out_keys=[{sibling(key, 'env_action')!r}]) gives it in the env."
        )


def narrowed(data: TensorDictBase, env: EnvBase | None) -> TensorDictBase:
    """Make float32 of float64 entries, unless the env says float64 or too much would be lost.

    Half precision, in which nothing computes, becomes float32 as well. It is done in place, an entry after the other, so that there are few of both at once.
    """
    dtypes = {}
    if env is not None:
        specs = read_specs(env)
        entries = (*specs.vectors, *specs.pixels, *specs.actions, specs.reward)
        dtypes = {entry.key: entry.dtype for entry in entries}
    wide = set()
    for key in sorted(leaf_keys(data), key=is_next):  # a root entry decides for both
        value, plain = data.get(key), strip_next(key)
        if value.dtype in (torch.float16, torch.bfloat16) and plain not in dtypes:
            data.set(key, value.float())
        if value.dtype is not torch.float64:
            continue
        dtype = dtypes.get(plain, torch.float32)
        if not is_next(key) and dtype is torch.float32:
            dims = coarse_dims(value, data.get(join("next", key), None))
            if dims and plain in dtypes:  # the env's model reads float32
                warn_of_coarse(key, dims, stacklevel=4)
            elif dims:
                wide.add(plain)
        if dtype is torch.float32 and plain not in wide:
            data.set(key, value.float())
    return data
