"""What recipes need of a real env. Errors say which wrapper makes an env fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import gymnasium
from tensordict import NestedKey
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    NonTensor,
    OneHot,
    TensorSpec,
)
from torchrl.envs import EnvBase

from torchrl_wm.models.specs import BOOKKEEPING, pixel_entry
from torchrl_wm.modules.keys import as_tuple, unique
from torchrl_wm.planners.actions import finite_bounds
from torchrl_wm.trainers.gym_actions import own_action_space

#: One vector in place of any number of continuous actions of any shapes.
_JOINED_ACTIONS = (
    "space = env.action_space; env = gymnasium.wrappers.TransformAction(env, lambda action: "
    "gymnasium.spaces.unflatten(space, action), gymnasium.spaces.flatten_space(space))."
)
#: One vector of floats in place of any observation.
_FLOAT_OBSERVATIONS = (
    "env = gymnasium.wrappers.DtypeObservation("
    "gymnasium.wrappers.FlattenObservation(env), numpy.float32)."
)
#: A dictionary in place of a tuple of observations, in which each keeps its shape.
NAMED_OBSERVATIONS = (
    "env = gymnasium.wrappers.TransformObservation(env, lambda parts: {f'part{n}': part for n, "
    "part in enumerate(parts)}, gymnasium.spaces.Dict({f'part{n}': part for n, part in "
    "enumerate(env.observation_space)}))."
)
_WHERE = (
    "On the command line, name a function that makes the env so: --env module:function."
)
#: The most options that a planner can compare by trying them.
_MOST_OPTIONS = 10_000


def check_entries(env: EnvBase) -> None:
    """Refuse an env with several actions or several rewards.

    Raises:
        ValueError: if there are; the message names them.
    """
    rewards, actions = env.reward_keys, env.action_keys
    if len(rewards) != 1:
        raise ValueError(
            f"The recipes learn from one reward, and this env has {len(rewards)}: {rewards}. Give "
            f"it a single one, such as their sum."
        )
    if len(actions) == 1:
        return
    specs = env.full_action_spec_unbatched
    if all(specs[key].dtype.is_floating_point for key in actions):
        how = f"Make them one vector; of a Gymnasium env: {_JOINED_ACTIONS} {_WHERE}"
    else:
        how = (
            "Make them one; of a Gymnasium env by gymnasium.wrappers.TransformAction(env, "
            "function, space), with a function from the actions of that space to the env's."
        )
    raise ValueError(
        f"The recipes act with one action, and this env has {len(actions)}: {actions}. {how}"
    )


def check_bounds(spec: TensorSpec, key: NestedKey) -> None:
    """Refuse continuous actions without finite bounds.

    Raises:
        ValueError: if an action has none.
    """
    if spec.dtype.is_floating_point and finite_bounds(spec) is None:
        raise ValueError(
            f"The actions {key!r} have no finite bounds: {spec.__class__.__name__} of the shape "
            f"{tuple(spec.shape)}. Give the env an action space with bounds, or bound it with "
            f"Gymnasium's ClipAction or RescaleAction, or torchrl.envs.ActionScaling; give those of "
            f"logged data with action_bounds=(low, high)."
        )


def check_stacked(env: EnvBase) -> None:
    """Refuse observations that are stacked parts of different sizes.

    Raises:
        ValueError: if there are; the message names them.
    """
    for key, spec in env.full_observation_spec_unbatched.items(True, True):
        if _is_stacked(spec):
            raise ValueError(
                f"The observation {key!r} has the shape {tuple(spec.shape)}: TorchRL stacks the parts "
                f"of a Tuple space, and their sizes differ. Make a dictionary of them: "
                f"{NAMED_OBSERVATIONS} {_WHERE}"
            )


def check_float_observations(env: EnvBase) -> None:
    """Refuse observations that are not floats, as ensembles predict floats.

    Raises:
        ValueError: if there are; the message names them.
    """
    images, others = [], {}
    for key in unique(env.full_observation_spec_unbatched.keys(True, True)):
        spec = env.full_observation_spec_unbatched[key]
        if as_tuple(key)[-1] in BOOKKEEPING:
            continue
        if spec.dtype is None or isinstance(spec, NonTensor):
            others[key] = type(spec).__name__
        elif pixel_entry(key, spec) is not None:
            images.append(key)
        elif not spec.dtype.is_floating_point or _is_stacked(spec):
            others[key] = f"{list(spec.shape)} {spec.dtype}"
    without = (
        "with gymnasium.wrappers.FilterObservation or torchrl.envs.ExcludeTransform"
    )
    if images:
        raise ValueError(
            f"PETS, MBPO and ensembles predict vectors, and these observations of the env are images: "
            f"{images}. Leave them out, {without}, or make vectors of them. Dreamer, PlaNet and "
            f"TD-MPC2 learn from images: torchrl-wm train dreamer, planet or tdmpc2."
        )
    if others:
        raise ValueError(
            f"The recipes predict observations as floats, and these of the env are no floats: "
            f"{others}. Make one vector of floats of all observations; of a Gymnasium env: "
            f"{_FLOAT_OBSERVATIONS} {_WHERE} Of a TorchRL env: torchrl.envs.DTypeCastTransform. "
            f"Or leave them out, {without}."
        )


def check_action(env: EnvBase) -> None:
    """Refuse actions that planners do not search, and actors do not choose.

    Raises:
        ValueError: if they are neither continuous nor a single choice.
    """
    key = env.action_key
    spec = env.full_action_spec_unbatched[key]
    if not spec.dtype.is_floating_point and not _is_choice(spec):
        raise ValueError(
            f"Planners and actors take continuous actions and single choices, and {key!r} is "
            f"{type(spec).__name__} of the shape {tuple(spec.shape)}. {_one_choice(env)}"
        )


def check_policy_action(env: EnvBase) -> None:
    """Refuse actions other than bounded vectors, which SAC's policy gives.

    Raises:
        ValueError: if they are something else.
    """
    key = env.action_key
    spec = env.full_action_spec_unbatched[key]
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        what = (
            f"MBPO's policy (SAC) needs continuous, bounded actions, and {key!r} is "
            f"{type(spec).__name__} of the shape {tuple(spec.shape)}."
        )
        how = "For discrete actions plan instead: PETSTrainer, torchrl-wm train pets."
        if not _is_choice(spec):
            how = f"{_one_choice(env)} Then plan: PETSTrainer, torchrl-wm train pets."
        raise ValueError(f"{what} {how}")
    if len(spec.shape) != 1:
        raise ValueError(
            f"MBPO's policy (SAC) gives vectors, and the action {key!r} has the shape "
            f"{tuple(spec.shape)}. Flatten the actions; of a Gymnasium env: "
            f"{_JOINED_ACTIONS} {_WHERE}"
        )
    check_bounds(spec, key)
    constant = (spec.space.low == spec.space.high).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"SAC has nothing to choose in the dims {constant} of the {spec.shape[0]} of the action "
            f"{key!r}, whose bounds are equal: {spec.space.low[constant].tolist()}. In logged data "
            f"they never change; leave them out of the actions, or say between what they may lie: "
            f"action_bounds=(low, high)."
        )


def check_policy_observations(env: EnvBase, keys: Sequence[NestedKey]) -> None:
    """Refuse observations other than vectors, which SAC's networks read.

    Raises:
        ValueError: if some are of other shapes; the message names them.
    """
    shapes = {
        key: tuple(env.full_observation_spec_unbatched[key].shape) for key in keys
    }
    wrong = {key: shape for key, shape in shapes.items() if len(shape) != 1}
    if wrong:
        raise ValueError(
            f"MBPO's policy (SAC) reads vectors, and these observations have other shapes: "
            f"{wrong}. Flatten them: Gymnasium's FlattenObservation, or "
            f"torchrl.envs.FlattenObservation."
        )


def _is_stacked(spec: TensorSpec) -> bool:
    """Return whether TorchRL stacked parts of a Tuple of different sizes: a dim has no fixed size."""
    return min(spec.shape, default=1) < 1


def _is_choice(spec: TensorSpec) -> bool:
    several = isinstance(spec, (MultiOneHot, MultiCategorical, Binary))
    return isinstance(spec, (OneHot, Categorical)) and not several


def _one_choice(env: EnvBase) -> str:
    """Say how to make one choice of several numbers: a number for each combination."""
    space = own_action_space(env)
    if space is None:
        return "Give the env one one-hot action, with an option for each combination."
    sizes, least = _options(space)
    number = math.prod(sizes)
    if not sizes or number > _MOST_OPTIONS:
        return (
            "Make one choice of it, among the combinations that matter: env = "
            "gymnasium.wrappers.TransformAction(env, lambda number: TABLE[number], "
            f"gymnasium.spaces.Discrete(len(TABLE))), with a TABLE of actions. {_WHERE}"
        )
    action = f"numpy.array(numpy.unravel_index(number, {sizes}))"
    if any(least):
        action += f" + {least}"
    return (
        f"Make one choice of it, among all {number} combinations: env = "
        f"gymnasium.wrappers.TransformAction(env, lambda number: {action}, "
        f"gymnasium.spaces.Discrete({number})). {_WHERE}"
    )


def _options(space: gymnasium.Space) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many options each number of a vector has, and its least value; nothing for other spaces."""
    if len(space.shape or ()) != 1:
        return (), ()
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(space.nvec.tolist()), tuple(space.start.tolist())
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return (2,) * space.n, (0,) * space.n
    if isinstance(space, gymnasium.spaces.Box):
        least, most = space.low.tolist(), space.high.tolist()
        return tuple(b - a + 1 for a, b in zip(least, most)), tuple(least)
    return (), ()
