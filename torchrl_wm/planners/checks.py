"""Checks of the env, the modules and the state that a planner is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.layout import Layout
from torchrl_wm.envs.masks import masked_actions
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, unique
from torchrl_wm.modules.world_model.wiring import written_keys


def check_modules(
    policy: Callable | None, terminal_value: Any, action_key: NestedKey
) -> None:
    """Refuse a policy that writes no action, and a terminal value that reads one."""
    if policy is not None and not callable(policy):
        raise TypeError(
            f"policy must be a module or a function of tensordicts that writes the action, got "
            f"{type(policy).__name__}."
        )
    written = unique(getattr(policy, "out_keys", None) or [action_key])
    if action_key not in written:
        raise ValueError(
            f"The policy writes {written}, and should write the action {action_key!r}."
        )
    if terminal_value is None:
        return
    if not isinstance(terminal_value, TensorDictModuleBase):
        raise TypeError(
            f"terminal_value must be a TensorDict module, got {type(terminal_value).__name__}. "
            f"Wrap a network with the entries that it reads: ValueOperator(network, "
            f"in_keys=['latent'])."
        )
    if action_key in unique(terminal_value.in_keys):
        raise ValueError(
            f"terminal_value reads {action_key!r}, and there is no action at the horizon. Let a "
            f"policy act before it: TensorDictSequential(policy, terminal_value)."
        )


def check_plan_keys(
    env: EnvBase,
    plan_key: NestedKey,
    carried: Iterable[NestedKey],
    action_key: NestedKey,
) -> None:
    """Refuse a plan, or what travels beside it, that would overwrite an entry of the env."""
    taken = [
        *env.full_observation_spec.keys(True, True),
        *env.full_done_spec.keys(True, True),
        *env.full_reward_spec.keys(True, True),
        action_key,
    ]
    overwritten = [key for key in unique([plan_key, *carried]) if key in unique(taken)]
    if overwritten:
        raise ValueError(
            f"With plan_key={plan_key!r} the planner would overwrite the entries {overwritten} of "
            f"the env. Choose another plan_key."
        )


def check_env(
    env: EnvBase, action_key: NestedKey, reward_key: NestedKey | None
) -> None:
    """Refuse an env that cannot be planned in, or lacks the action, or the reward if one is read."""
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
            f"The env has no action {action_key!r}; it has {actions}. Pass "
            f"action_key={_first(actions)}."
        )
    rewards = [join("next", key) for key in env.full_reward_spec.keys(True, True)]
    if reward_key is not None and not rewards:
        raise ValueError(
            "The env has no rewards, as its world model has no reward_head. Say what a plan is "
            "worth: score=GoalDistance(...), or a function of the imagined trajectory."
        )
    if reward_key is not None and join(reward_key) not in rewards:
        raise ValueError(
            f"The env has no reward {reward_key!r}; its steps write {rewards}. Pass "
            f"reward_key={_first(rewards)}, with 'next'."
        )
    model_env = isinstance(env, WorldModelEnv)
    masked = env.step_kernel.layout.masked if model_env else masked_actions(env)
    if join(action_key) in masked:
        reference = "the reference env" if model_env else "the env"
        raise TypeError(
            f"Planners do not heed masks, and {reference}'s spec of {action_key!r} has one: plans "
            f"would take options that it forbids. If it forbids none, remove the mask before the "
            f"planner{' and its env are' if model_env else ' is'} made: "
            f"env.full_action_spec[{action_key!r}].update_mask(None)."
        )


def check_start(
    model: WorldModel,
    layout: Layout,
    tensordict: TensorDictBase,
    missing: list[NestedKey],
) -> None:
    """Refuse a state that lacks entries; the message says how to get each kind of them.

    Raises:
        MissingEntryError: if ``missing`` is not empty.
    """
    if not missing:
        return
    # Encoders may write context entries, too.
    encoded = {*layout.latent, *written_keys(model.encoder)}
    latents = [key for key in missing if key in encoded]
    others = [key for key in missing if key not in encoded]
    context = [key for key in others if key in layout.context]
    read = [key for key in others if key not in layout.context]
    needs = []
    if latents:
        fix = (
            "The model is recurrent: put its observer before the planner, which keeps them up to "
            "date, TensorDictSequential(world_model.observer(), planner)"
            if model.is_recurrent
            else f"Give them, by world_model.encode(observations), or give the observations "
            f"{unique(model.encoder.in_keys)}"
        )
        needs.append(f"starts from the latents {latents}. {fix}.")
    if context:
        shape = (*tensordict.batch_size, *layout.context[context[0]].shape)
        needs.append(
            f"needs {context}, which the model's step reads as constant context and no encoder "
            f"writes. Set it beside the observations: tensordict[{context[0]!r}] = ..., of the "
            f"shape {shape}."
        )
    if read:
        needs.append(
            f"needs the observations {read}, which its policy or its terminal value reads. Give "
            f"them, or decode them from latents: world_model.decode(tensordict)."
        )
    raise MissingEntryError(
        f"The tensordict has {leaf_keys(tensordict)}, and the planner "
        + " It ".join(needs)
    )


def _first(keys: list[NestedKey]) -> str:
    return repr(keys[0]) if keys else "..."
