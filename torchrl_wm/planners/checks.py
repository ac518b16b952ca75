"""What a planner refuses, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

from tensordict import NestedKey, unravel_key
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.keys import join, unique


def positive(name: str, value: Any) -> int:
    """A count as an int.

    Raises:
        ValueError: if it is none, or not positive.
    """
    try:
        number = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}.")
    return number


def check_modules(
    policy: Callable | None, terminal_value: Any, action_key: NestedKey
) -> None:
    """Refuse a policy that writes no action, and a terminal value that cannot judge states."""
    if policy is not None and not callable(policy):
        raise TypeError(
            f"policy must be a module or a function of tensordicts that writes the action, got "
            f"{type(policy).__name__}."
        )
    written = unique(getattr(policy, "out_keys", None) or [action_key])
    if action_key not in written:
        raise ValueError(
            f"The policy writes {written}, and is to propose {action_key!r}."
        )
    if terminal_value is None:
        return
    if not isinstance(terminal_value, TensorDictModuleBase):
        raise TypeError(
            f"terminal_value must be a TensorDict module, got {type(terminal_value).__name__}. "
            f"Say what it reads: ValueOperator(network, in_keys=['latent'])."
        )
    if action_key in unique(terminal_value.in_keys):
        raise ValueError(
            f"terminal_value reads {action_key!r}, and at the horizon nothing has been done yet. "
            f"Let a policy act before it: TensorDictSequential(policy, terminal_value)."
        )


def check_plan_key(env: EnvBase, plan_key: NestedKey, action_key: NestedKey) -> None:
    """Refuse a plan that would overwrite an entry of the env."""
    taken = [
        *env.full_observation_spec.keys(True, True),
        *env.full_done_spec.keys(True, True),
        *env.full_reward_spec.keys(True, True),
        action_key,
    ]
    if unravel_key(plan_key) in unique(taken):
        raise ValueError(
            f"plan_key {plan_key!r} is an entry of the env, and would be overwritten. Choose "
            f"another."
        )


def check_env(env: EnvBase, action_key: NestedKey, reward_key: NestedKey) -> None:
    """Refuse an env that cannot be planned in, or lacks the action or reward."""
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"A planner plans in a torchrl_wm.WorldModelEnv or another TorchRL env, got "
            f"{type(env).__name__}. Make one: WorldModelEnv(world_model, base_env)."
        )
    if env.batch_locked:
        fix = (
            "Make it without a batch size of its own: WorldModelEnv(world_model, base_env, "
            "batch_size=[])"
            if isinstance(env, WorldModelEnv)
            else "Learn a world model of it, and plan in that: WorldModelEnv(world_model, env)"
        )
        raise ValueError(
            f"The env is batch-locked: it takes tensordicts of the batch size "
            f"{tuple(env.batch_size)} only, and a planner steps many candidates at once. {fix}."
        )
    actions = unique(env.full_action_spec.keys(True, True))
    if actions != [join(action_key)]:
        if join(action_key) in actions:
            raise ValueError(
                f"The env has the actions {actions}, and a planner plans one. Make an env with a "
                f"single action, by torchrl.envs.CatTensors for instance."
            )
        raise ValueError(
            f"The env has no action {action_key!r}; it has {actions}. Pass action_key=."
        )
    rewards = [join("next", key) for key in env.full_reward_spec.keys(True, True)]
    if join(reward_key) not in rewards:
        raise ValueError(
            f"The env has no reward {reward_key!r}; it has {rewards}. Pass reward_key=."
        )
