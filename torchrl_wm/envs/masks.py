"""Masks of action specs: what a real env allowed at one moment, which binds no imagined step."""

from __future__ import annotations

import warnings

from tensordict import NestedKey
from torchrl.data import Composite, TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.modules.keys import unique


def masked_actions(env: EnvBase) -> list[NestedKey]:
    """Return the actions whose spec has a mask of the options that are allowed at the moment."""
    # Not the unbatched spec: to index one drops masks.
    spec = env.full_action_spec
    return [key for key in _leaves(spec) if _is_masked(spec[key])]


def without_masks(spec: Composite) -> Composite:
    """Return a copy of a spec that allows all that its leaves could ever allow."""
    free = spec.clone()
    for key in _leaves(free):
        if _is_masked(free[key]):
            free[key].update_mask(None)
    return free


def warn_of_masks(keys: list[NestedKey]) -> None:
    """Warn that an imagined env leaves out the masks of its reference env."""
    if keys:
        warnings.warn(
            f"The reference env's spec of the actions {keys} has a mask, which says what that env "
            f"allowed at one moment. The imagined env leaves it out: its random actions are drawn "
            f"from all options. Where the model predicts the mask, make the imagined env with "
            f"decode=True and a batch size, and heed it there: TransformedEnv(imagined_env, "
            f"torchrl.envs.ActionMask({keys[0]!r}, mask_key=...)).",
            stacklevel=4,
        )


def _leaves(spec: Composite) -> list[NestedKey]:
    return unique(spec.keys(True, True))


def _is_masked(leaf: TensorSpec) -> bool:
    return getattr(leaf, "mask", None) is not None
