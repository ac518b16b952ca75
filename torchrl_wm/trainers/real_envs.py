"""Real envs for the recipes: by name, by a factory's name, or as an object."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import gymnasium
from tensordict import TensorDictBase
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    GymWrapper,
    InitTracker,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from torchrl_wm import _upstream
from torchrl_wm._interrupts import keep_sigterm
from torchrl_wm._registry import load_object
from torchrl_wm.trainers.env_checks import check_entries, NAMED_OBSERVATIONS
from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.gym_actions import (
    as_torchrl_acts,
    check_start,
    gymnasium_env,
    layers,
)
from torchrl_wm.trainers.pixels import check_frames, Pixels
from torchrl_wm.trainers.settings import AtLeast

#: The forms in which a recipe takes an env.
EnvSource = str | EnvBase | gymnasium.Env | Callable[[], Any]
_DM_CONTROL = "dm_control/"


def make_real_env(
    env: EnvSource,
    *,
    seed: int = 0,
    max_episode_steps: int | None = None,
    action_repeat: int = 1,
    pixels: int | None = None,
    pixels_only: bool = True,
    first_episode: int = 0,
    stride: int = 1,
    **kwargs: Any,
) -> TransformedEnv:
    """Make a real env for the recipes: float32, with counted steps and episodes seeded one by one.

    Args:
        env: one of

            - a Gymnasium id, ``"Pendulum-v1"``;
            - a dm_control task, ``"dm_control/cartpole/swingup"``;
            - ``"module:factory"``, your function that returns an env;
            - such a function itself, a Gymnasium env or a TorchRL env of batch size ``[]``.

            The first option of a Gymnasium env's ``Discrete(3, start=-1)`` is -1, as it says.

    Keyword Args:
        seed: each episode is seeded from it and its number
            (:class:`~torchrl_wm.trainers.EpisodeSeeds`).
        max_episode_steps: a time limit, after which an episode is truncated.
        action_repeat: for how many steps of the env an action is repeated. They count as one,
            and their rewards are summed. The end of an episode also ends them.
        pixels: the height and width of images of the env, ``[pixels, pixels, 3]`` uint8, which
            are observed under "pixels": what a Gymnasium env renders, or the first camera of a
            dm_control task. None for none.
        pixels_only: leave out the env's own observations if there are images.
        first_episode, stride: the number of the first episode, and what is added to it for
            each later one.
        kwargs: arguments for Gymnasium, such as ``render_mode``, or for dm_control; a function
            gets those that it takes.

    Returns:
        The env, with the entries ``is_init``, ``step_count`` and ``episode_reward``.

    Raises:
        ValueError: if there is no such env, it has a batch size, or it has several actions or
            rewards; if it is a TorchRL env whose Gymnasium env does not number its actions
            from 0; if there should be pixels, and it shows no frames.
        TypeError: if the function returns something else.

    Examples:
        >>> from torchrl_wm.trainers import make_real_env
        >>> env = make_real_env("Pendulum-v1", seed=0)
        >>> env.rollout(300)["next", "episode_reward"].shape
        torch.Size([200, 1])
    """
    if max_episode_steps is not None:
        AtLeast(1).check("max_episode_steps", max_episode_steps)
    AtLeast(1).check("action_repeat", action_repeat)
    if pixels is not None:
        AtLeast(8).check("pixels", pixels)
        kwargs = {"render_mode": "rgb_array", **kwargs}
    if "render_mode" in kwargs:
        keep_sigterm()
    base = _base_env(env, kwargs)
    if base.batch_size:
        raise ValueError(
            f"The recipes act in one env at a time, and this one has the batch size "
            f"{tuple(base.batch_size)}. Give a single env."
        )
    check_entries(base)
    changes = [ActionRepeat(action_repeat)] if action_repeat > 1 else []
    if pixels is not None:
        check_frames(base, pixels)
        changes.append(Pixels(base, pixels, pixels_only))
    return TransformedEnv(
        base,
        Compose(
            EpisodeSeeds(seed, first_episode, stride),
            *changes,
            InitTracker(),
            DoubleToFloat(),
            StepCounter(max_episode_steps),
            RewardSum(in_keys=[base.reward_key], out_keys=["episode_reward"]),
        ),
        auto_unwrap=False,
    )


def episode_seeds(env: TransformedEnv) -> EpisodeSeeds:
    """Return the transform that seeds the episodes of an env of :func:`make_real_env`."""
    for transform in chain.from_iterable(layers(env)):
        if isinstance(transform, EpisodeSeeds):
            return transform
    raise TypeError(
        "The env does not seed its episodes one by one. Make it with make_real_env(env)."
    )


class ActionRepeat(Transform):
    """A transform that repeats each action until the episode ends, and sums the rewards.

    TorchRL's FrameSkipTransform steps on after the end of an episode, and loses the end.

    Args:
        times: how many times.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        env = self.parent
        total = next_tensordict.get(env.reward_key)
        for _ in range(self.times - 1):
            ends = [next_tensordict.get(key, None) for key in env.done_keys]
            if any(end.any() for end in ends if end is not None):
                break
            next_tensordict = env._step(tensordict)
            total = total + next_tensordict.get(env.reward_key)
        return next_tensordict.set(env.reward_key, total)


def copied_source(source: EnvSource) -> EnvSource:
    """Return a source of one more env: a copy of an env, or the function or name itself.

    Raises:
        ValueError: if the env cannot be copied.
    """
    if not isinstance(source, (EnvBase, gymnasium.Env)):
        return source
    try:
        return copy.deepcopy(source)
    except Exception as err:  # whatever the env holds
        raise ValueError(
            f"Evaluations, films and num_envs above 1 need more envs like the one given, and this "
            f"{type(source).__name__} cannot be copied ({type(err).__name__}: {err}). Give its name "
            f"or a function that makes it as env=...; or leave them out: num_envs=1, "
            f"evaluation_interval=0, film_interval=0."
        ) from err


def _base_env(source: EnvSource, kwargs: dict[str, Any]) -> EnvBase:
    if isinstance(source, str):
        return _named(source, kwargs)
    made = source
    if not isinstance(source, (EnvBase, gymnasium.Env)) and callable(source):
        made = source(**_taken(source, kwargs))
    if isinstance(made, EnvBase):
        check_start(made)
        return made
    if isinstance(made, gymnasium.Env):
        return _wrapped(made)
    raise TypeError(
        f"A Gymnasium env, a TorchRL env, the name of one or a function that makes one is "
        f"expected, got {type(made).__name__}."
    )


def _named(name: str, kwargs: dict[str, Any]) -> EnvBase:
    if name.startswith(_DM_CONTROL):
        return _dm_control(name, kwargs)
    if ":" in name and name not in gymnasium.registry:
        module, _, rest = name.partition(":")
        if rest not in gymnasium.registry and not _is_id_of(module, rest):
            return _base_env(load_object(name), kwargs)
    try:
        env = GymEnv(name, **kwargs)
    except gymnasium.error.DependencyNotInstalled as err:
        raise ValueError(f"{name!r} needs more to be installed: {err}") from err
    except gymnasium.error.Error as err:
        raise ValueError(
            f"There is no env {name!r} ({err}). Give a Gymnasium id such as 'Pendulum-v1', "
            f"'dm_control/cartpole/swingup', or 'module:factory' for an env of your own."
        ) from err
    except RuntimeError as err:
        raise _not_taken(name, gymnasium.make(name), err) from err
    inner = gymnasium_env(env)
    # In place, as only GymEnv knows which arguments are Gymnasium's.
    if inner is not None:
        _upstream.set_wrapped_env(env, as_torchrl_acts(inner))
    return env


def _wrapped(env: gymnasium.Env) -> EnvBase:
    try:
        return GymWrapper(as_torchrl_acts(env))
    except (LookupError, RuntimeError, TypeError) as err:
        raise _not_taken(type(env).__name__, env, err) from err


def _not_taken(name: str, env: gymnasium.Env, err: Exception) -> ValueError:
    how = (
        "Gymnasium's wrappers make simpler ones of them: FlattenObservation, and TransformAction "
        "with your function."
    )
    space = env.observation_space
    if isinstance(space, gymnasium.spaces.Tuple) and any(
        len(part.shape or ()) > 1 for part in space
    ):
        how = f"Make a dictionary of the observations: {NAMED_OBSERVATIONS}"
    return ValueError(
        f"TorchRL's GymWrapper does not take the env {name!r} ({type(err).__name__}: {err}). Its "
        f"spaces are observation_space={space} and "
        f"action_space={env.action_space}. {how} On the command line, "
        f"name a function that makes the env so: --env module:function."
    )


def _taken(factory: Callable, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function takes."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # such as a class of C
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def _is_id_of(module: str, name: str) -> bool:
    """Return whether ``module:name`` is Gymnasium's form for an id that a module registers."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return name in gymnasium.registry


def _dm_control(name: str, kwargs: dict[str, Any]) -> EnvBase:
    from torchrl.envs import DMControlEnv

    domain, _, task = name[len(_DM_CONTROL) :].partition("/")
    # Its physics can always be drawn, and its tasks do not take the argument.
    kwargs = {key: value for key, value in kwargs.items() if key != "render_mode"}
    try:
        return DMControlEnv(domain, task, **kwargs)
    except ImportError as err:
        raise ImportError(
            "dm_control's tasks need dm_control: pip install 'torchrl-wm[dm-control]'."
        ) from err
    except (ValueError, RuntimeError) as err:
        raise ValueError(
            f"There is no dm_control task {name!r} ({err}). Give 'dm_control/<domain>/<task>', "
            f"such as 'dm_control/cartpole/swingup'."
        ) from err
