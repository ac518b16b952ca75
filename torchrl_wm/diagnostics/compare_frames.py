"""Films of the real env beside the imagined one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.envs import EnvBase

from torchrl_wm import _upstream
from torchrl_wm._rendering import as_frame, can_draw, IMAGE_KEYS, RealEnvRenderer
from torchrl_wm.diagnostics.drawing import name_of
from torchrl_wm.diagnostics.recording import check_env, Recording
from torchrl_wm.diagnostics.video_files import captioned, GAP, resized, separated
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys
from torchrl_wm.modules.modes import evaluation_mode

Draw = Callable[[Any], np.ndarray]
Render = Union[str, Draw, gymnasium.Env, EnvBase]


def observation_renderer(render: Render) -> Draw | None:
    """Return a function that draws observations, if one is known.

    Args:
        render: the id of a Gymnasium env; a Gymnasium or TorchRL env; or a
            function from an observation to a frame, which is returned as it is.

    Returns:
        A function from an observation (an array, or a dictionary of arrays for
        several observations) to a frame ``[height, width, 3]`` uint8; None for envs
        whose state does not follow from their observation. Known are the pendulum,
        the cart-pole, and MuJoCo envs that observe positions and velocities.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.diagnostics import observation_renderer
        >>> observation_renderer(GymEnv("MountainCar-v0")) is None
        True
    """
    if isinstance(render, EnvBase):
        render = _innermost(render)
        if not isinstance(render, gymnasium.Env):
            return None
    if isinstance(render, (str, gymnasium.Env)):
        env = gymnasium.make(render) if isinstance(render, str) else render
        if not can_draw(env):
            return None
        # An env of its own, as drawing sets its state.
        if env.unwrapped.render_mode != "rgb_array" or not isinstance(render, str):
            env = gymnasium.make(env.spec.id, render_mode="rgb_array")
        return RealEnvRenderer(env)
    if not callable(render):
        raise TypeError(
            f"render must be the id of an env, an env, or a function of the observation, got "
            f"{type(render).__name__}."
        )
    return render


@torch.no_grad()
def render_comparison(
    env: WorldModelEnv,
    episode: TensorDictBase,
    *,
    policy: Callable | None = None,
    render: Render | None = None,
    pixels_key: NestedKey | None = None,
    observation_key: NestedKey | None = None,
    max_steps: int | None = None,
    captions: bool = True,
    height: int | None = None,
) -> np.ndarray:
    """Draw a recorded episode, the same episode imagined, and their difference.

    The model imagines the recorded actions from the first step on, without another
    look at the real state; with a policy, it imagines the policy's own actions. The
    difference is that of the colours: black is right.

    The pictures are recorded and decoded pixels (the entry
    ``pixels_key``, or one called pixels, image or rgb, that both have), else
    ``render``, which draws recorded and imagined observations alike. Positions that
    MuJoCo envs do not observe (how far a runner has run) are drawn as zero.

    Args:
        env: an imagined env of batch size ``[]``.
        episode: one recorded episode, ``[T]``; it is shown up to its first end.

    Keyword Args:
        policy: acts in the imagined env; the recorded actions are taken by default.
        render: the real env or its id, if :func:`observation_renderer` knows it, or
            ``f(observation) -> [height, width, 3]``.
        pixels_key: the entry of the pixels, without the "next".
        observation_key: which observation ``render`` draws, if it is one of several.
        max_steps: how many steps are shown at most.
        captions: write the step and the sum of the rewards so far over the panels.
        height: of the panels in pixels; as drawn by default.

    Returns:
        ``[T + 1, height, width, 3]`` uint8: the start, and each step. Panels from
        left to right: real, imagined, difference. After an imagined end the imagined
        panel keeps its last frame, in grey.

    Raises:
        ValueError: if nothing says how to draw, there is more than one episode, or
            the two kinds of frames differ in size.
        ImportError: for captions or another height without Pillow.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import render_comparison, save_video
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> frames = render_comparison(
        ...     WorldModelEnv(world_model, real_env), real_env.rollout(5), render=real_env, height=96
        ... )
        >>> frames.shape
        (6, 114, 296, 3)
        >>> save_video("pendulum.gif", frames)  # doctest: +SKIP
    """
    check_env(env, "render_comparison")
    if not isinstance(episode, TensorDictBase):
        raise TypeError(
            f"render_comparison shows one episode, a tensordict [T], got "
            f"{type(episode).__name__}. Take one of a list: episodes[0]."
        )
    if episode.batch_dims != 1 or not len(episode):
        raise ValueError(
            f"render_comparison shows one episode, [T], got {tuple(episode.batch_size)}. Take one: "
            f"episodes[0]."
        )
    recording = Recording.of(env, episode, "render_comparison")
    real = recording.steps[:, : _length(recording, max_steps)]
    horizon = real.batch_size[1]
    start = real[:, 0].select(*env.start_keys, strict=False)
    with evaluation_mode(env.world_model):
        actions = None if policy is not None else real.select(*env.action_keys)
        imagined = env.imagine(horizon, policy, start, actions)
    real, imagined = real[0].cpu(), imagined[0].cpu()
    alive = imagined.get(("collector", "mask")).numpy()
    draw = _drawer(env, real, imagined, render, pixels_key, observation_key)
    panels = _panels(draw(real, "recorded"), draw(imagined, "imagined"), alive)
    if height is not None:
        panels = [resized(frames, height) for frames in panels]
    names = ("real", "imagined", "difference")
    film = [
        np.concatenate(separated([frames[time] for frames in panels]), 1)
        for time in range(horizon + 1)
    ]
    if not captions:
        return np.stack(film)
    sums = [_rewards_so_far(env, real, None), _rewards_so_far(env, imagined, alive)]
    width = panels[0].shape[2] + GAP
    out = []
    for time, frame in enumerate(film):
        texts = [
            name if total is None else f"{name}: return {total[time]:.1f}"
            for name, total in zip(names, sums)
        ]
        texts.append(f"{names[2]}, step {time}")
        out.append(captioned(frame, texts, width))
    return np.stack(out)


# Where the pictures come from ------------------------------------------------


def _length(recording: Recording, max_steps: int | None) -> int:
    """Return how many steps the first episode has."""
    over = (recording.done | ~recording.valid)[0]
    length = len(over)
    if over.any():
        first = int(over.float().argmax())
        length = first + int(recording.valid[0, first])
    if not length:
        raise ValueError("The episode begins with padding: there is nothing to show.")
    return length if max_steps is None else min(length, max_steps)


def _drawer(
    env: WorldModelEnv,
    real: TensorDictBase,
    imagined: TensorDictBase,
    render: Render | None,
    pixels_key: NestedKey | None,
    observation_key: NestedKey | None,
) -> Callable[[TensorDictBase, str], np.ndarray]:
    """Return a function that makes frames ``[T + 1, ...]`` of steps ``[T]``."""
    if render is None:
        key = _pixels_key(real, imagined, pixels_key)
        recorded = real.get(join("next", key)).dtype
        # Bytes are decoded to floats of the same range.
        space = spaces.Box(0, 255, (1,)) if recorded is torch.uint8 else None
        return lambda steps, name: np.stack(
            [
                as_frame(o.numpy(), space, f"{name} {key!r}")
                for o in _over_time(steps, key)
            ]
        )
    draw = observation_renderer(render)
    if draw is None:
        raise ValueError(
            f"Nothing draws the observations of {_name_of(render)}: no drawing of its state from them "
            f"is known. Pass render=f, f(observation) -> [height, width, 3]; or record pixels "
            f"(GymEnv(..., from_pixels=True, pixels_only=False)) and decode them. save_video(path, "
            f"frames) writes only the recorded pixels."
        )
    if pixels_key is not None:
        raise ValueError("Pass render or pixels_key, not both.")
    keys = _drawn_keys(env, real, imagined, observation_key)
    return lambda steps, name: drawn_frames(draw, steps, keys)


def drawn_frames(
    draw: Draw, steps: TensorDictBase, keys: list[NestedKey]
) -> np.ndarray:
    """Draw what steps ``[T]`` observe.

    Args:
        draw: a function from an observation to a frame, as :func:`observation_renderer` returns.
        steps: recorded ones, on the CPU.
        keys: the observations that it gets: an array of a single one, of several a dictionary
            of arrays, nested keys joined by dots.

    Returns:
        ``[T + 1, height, width, 3]`` uint8: the start, and what follows each step.
    """
    series = {key: _over_time(steps, key) for key in keys}
    out = []
    for time in range(len(steps) + 1):
        shown = {name_of(key): value[time].numpy() for key, value in series.items()}
        shown = next(iter(shown.values())) if len(shown) == 1 else shown
        out.append(as_frame(draw(shown), None, "what render draws"))
    return np.stack(out)


def _name_of(render: Render) -> str:
    """Return the class name of an env, whose own repr lists all its specs."""
    if not isinstance(render, EnvBase):
        return repr(render)
    inner = _innermost(render)
    named = inner.unwrapped if isinstance(inner, gymnasium.Env) else inner
    return type(named).__name__


def _innermost(env: EnvBase) -> Any:
    """Return what a TorchRL env wraps in the end, or that env itself."""
    while hasattr(env, "base_env"):
        env = env.base_env
    inner = _upstream.wrapped_env(env)
    return env if inner is None else inner


def _pixels_key(
    real: TensorDictBase, imagined: TensorDictBase, key: NestedKey | None
) -> NestedKey:
    """Return the entry with the pixels, which both episodes have."""
    found = [key] if key is not None else _image_keys(real)
    found = [unravel_key(key) for key in found]
    for key in found:
        lacking = [
            name
            for name, steps in (("recorded", real), ("imagined", imagined))
            if steps.get(join("next", key), None) is None
        ]
        if not lacking:
            return key
        if len(found) == 1:
            there = {"recorded": leaf_keys(real), "imagined": leaf_keys(imagined)}
            raise ValueError(
                f"The {' and the '.join(lacking)} episode has no {join('next', key)!r}: "
                f"{there[lacking[0]]}. Decode it, WorldModelEnv(..., decode=True), or pass render=."
            )
    raise ValueError(
        f"Nothing says how to draw: neither the recorded nor the imagined episode has pixels "
        f"(recorded: {leaf_keys(real)}). Pass render=real_env (pendulum, cart-pole, MuJoCo), "
        f"render=f with f(observation) -> [height, width, 3], or pixels_key=."
    )


def _image_keys(steps: TensorDictBase) -> list[NestedKey]:
    next_td = steps.get("next", None)
    keys = [] if next_td is None else leaf_keys(next_td)
    return [key for key in keys if as_tuple(key)[-1] in IMAGE_KEYS]


def _drawn_keys(
    env: WorldModelEnv,
    real: TensorDictBase,
    imagined: TensorDictBase,
    key: NestedKey | None,
) -> list[NestedKey]:
    """Return the observations to draw, which both episodes have."""
    both = [
        other
        for other in env.observation_spec.keys(True, True)
        if real.get(join("next", other), None) is not None
    ]
    if key is None and both:
        return [unravel_key(other) for other in both]
    if key is not None and unravel_key(key) in map(unravel_key, both):
        return [unravel_key(key)]
    raise MissingEntryError(
        f"There is no observation {'' if key is None else repr(key)} to draw that both have: the "
        f"imagined env has {list(env.observation_spec.keys(True, True))}, the recorded episode "
        f"{leaf_keys(real)}. Decode observations: WorldModelEnv(..., decode=True)."
    )


def _over_time(steps: TensorDictBase, key: NestedKey) -> torch.Tensor:
    """Return the start and what follows each step, ``[T + 1, ...]``."""
    following = steps.get(join("next", key))
    first = steps.get(key, None)
    if first is None or first.shape != following.shape:
        return torch.cat([following[:1], following])
    return torch.cat([first[:1].to(following.dtype), following])


# How they are put together ---------------------------------------------------


def _panels(
    real: np.ndarray, imagined: np.ndarray, alive: np.ndarray
) -> list[np.ndarray]:
    if real.shape[1:] != imagined.shape[1:]:
        raise ValueError(
            f"Recorded frames are {real.shape[1:]}, imagined ones {imagined.shape[1:]}. Record "
            f"pixels of the size that the model decodes, or draw both by render=."
        )
    # After the end the last frame that counts is kept, in grey.
    ended = np.concatenate([[False], ~alive])
    if ended.any():
        first = int(ended.argmax())
        last = imagined[first - 1].astype(np.float32).mean(-1, keepdims=True)
        imagined = imagined.copy()
        imagined[first:] = (0.6 * last + 60).clip(0, 255).astype(np.uint8)
    difference = np.abs(real.astype(np.int16) - imagined).astype(np.uint8)
    return [real, imagined, difference]


def _rewards_so_far(
    env: WorldModelEnv, steps: TensorDictBase, alive: np.ndarray | None
) -> np.ndarray | None:
    """Return the sum of all rewards up to each step, ``[T + 1]``."""
    if not env.reward_keys:
        return None
    total = np.zeros(len(steps))
    for key in env.reward_keys:
        reward = steps.get(join("next", key), None)
        if reward is None:
            return None
        total += reward.flatten(1).sum(1).numpy()
    if alive is not None:
        total = total * alive
    return np.concatenate([[0.0], total.cumsum()])
