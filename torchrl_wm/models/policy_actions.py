"""The actions that ready-made policies give: one choice, or numbers within finite bounds."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from torchrl.data import Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.modules.blocks.one_hot import OneHotChoice


def policy_action(env: EnvBase, builder: str) -> tuple[NestedKey, TensorSpec, bool]:
    """Return the key of the env's action, its spec, and whether it is a choice.

    Args:
        env: the env whose specs are read.
        builder: the name of the function that makes the policy, for messages.

    Raises:
        ValueError: if the env has several actions, or the action is neither continuous within
            finite bounds nor a single choice.
    """
    keys = list(env.action_keys)
    if len(keys) != 1:
        raise ValueError(
            f"{builder} serves one action, and the env has {keys}. Join them, by "
            f"torchrl.envs.CatTensors for instance."
        )
    key, spec = keys[0], env.full_action_spec_unbatched[keys[0]]
    several = isinstance(spec, (MultiOneHot, MultiCategorical))
    if isinstance(spec, (OneHot, Categorical)) and not several and spec.shape.numel():
        if len(spec.shape) != isinstance(spec, OneHot):
            raise ValueError(
                f"{builder} makes one choice, and {key!r} has the shape {tuple(spec.shape)}."
            )
        return key, spec, True
    bounds = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    most = torch.finfo(torch.float32).max / 4
    if (
        not spec.dtype.is_floating_point
        or bounds[0] is None
        or not all(bound.abs().max() < most for bound in bounds)
    ):
        raise ValueError(
            f"{builder} gives continuous actions within finite bounds, or a single choice; "
            f"{key!r} is a {type(spec).__name__} of {spec.dtype} and the shape "
            f"{tuple(spec.shape)}. Bound it with Gymnasium's ClipAction or RescaleAction, or "
            f"make one choice of it."
        )
    return key, spec, False


def choice_distribution(spec: TensorSpec) -> type[torch.distributions.Distribution]:
    """Return the distribution of a choice, in the form of its spec."""
    is_one_hot = isinstance(spec, OneHot)
    return OneHotChoice if is_one_hot else torch.distributions.Categorical
