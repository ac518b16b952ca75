"""Films of the real env beside the imagined one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, unravel_key

from torchrl_wm._rendering import IMAGE_KEYS
from torchrl_wm.diagnostics.drawn_observations import (
    class_name,
    drawn_frames,
    observation_renderer,
    over_time,
    Render,
)
from torchrl_wm.diagnostics.images import beside, Image, image_of, images_of
from torchrl_wm.diagnostics.recording import (
    check_env,
    observed_keys,
    positive,
    Recording,
)
from torchrl_wm.diagnostics.video_files import captioned, GAP, resized, separated
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys, unique
from torchrl_wm.modules.modes import evaluation_mode


@torch.no_grad()
def render_comparison(
    env: WorldModelEnv,
    episode: TensorDictBase,
    *,
    policy: Callable | None = None,
    horizon: int | None = None,
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

    The pictures are recorded and decoded images (the entry ``pixels_key``, or all images that
    both have, side by side), else ``render``, which draws recorded and imagined observations
    alike. Positions that MuJoCo envs do not observe (how far a runner has run) are drawn as
    zero.

    Args:
        env: an imagined env of batch size ``[]``.
        episode: one recorded episode, ``[T]``; it is shown up to its first end.

    Keyword Args:
        policy: acts in the imagined env; the recorded actions are taken by default.
        horizon: after how many steps the model looks at the real state again; never by default.
            A recurrent model looks at what it has filtered from all recorded observations so far.
        render: the real env or its id, if :func:`observation_renderer` knows it, or
            ``f(observation) -> [height, width, 3]``.
        pixels_key: the entry of the image, without the "next".
        observation_key: which observation ``render`` draws, if it is one of several.
        max_steps: how many steps are shown at most.
        captions: write the step and the sum of the rewards so far over the panels.
        height: of the panels in pixels; as drawn by default.

    Returns:
        ``[T + 1, height, width, 3]`` uint8: the start, and each step. Panels from
        left to right: real, imagined, difference. After an imagined end the imagined
        panel keeps its last frame, in grey, until the model looks at the real state again.

    Raises:
        ValueError: if nothing says how to draw, there is more than one episode,
            ``horizon`` is below 1, or the two kinds of frames differ in size.
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
    if horizon is not None:
        positive(horizon, "horizon")
    imagined = _imagined(env, real, horizon, policy)
    real, imagined = real[0].cpu(), imagined[0].cpu()
    alive = imagined.get(("collector", "mask")).numpy()
    draw = _drawer(env, real, imagined, render, pixels_key, observation_key)
    panels = _panels(draw(real, "recorded"), draw(imagined, "imagined"), alive)
    if height is not None:
        panels = [resized(frames, height) for frames in panels]
    film = np.concatenate(separated(panels), 2)
    if not captions:
        return film
    sums = [_rewards_so_far(env, real, None), _rewards_so_far(env, imagined, alive)]
    return _captioned(film, sums, panels[0].shape[2] + GAP)


# What is shown ---------------------------------------------------------------


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


def _imagined(
    env: WorldModelEnv,
    real: TensorDictBase,
    horizon: int | None,
    policy: Callable | None,
) -> TensorDictBase:
    """Imagine recorded steps ``[1, T]``, each ``horizon`` of them from the real state."""
    parts = []
    with evaluation_mode(env.world_model):
        for window in real.split(horizon or real.batch_size[1], 1):
            start = window[:, 0].select(*env.start_keys, strict=False)
            actions = None if policy is not None else window.select(*env.action_keys)
            steps = window.batch_size[1]
            parts.append(env.imagine(steps, policy, start, actions))
    return torch.cat(parts, 1)


# Where the pictures come from ------------------------------------------------


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
        images = _images(env, real, pixels_key)
        return lambda steps, name: beside(
            [image.frames(over_time(steps, image.key)) for image in images]
        )
    draw = observation_renderer(render)
    if draw is None:
        raise ValueError(
            f"Nothing draws the observations of {class_name(render)}: no drawing of its state from them "
            f"is known. Pass render=f, f(observation) -> [height, width, 3]; or record pixels "
            f"(GymEnv(..., from_pixels=True, pixels_only=False)) and decode them. save_video(path, "
            f"frames) writes only the recorded pixels."
        )
    if pixels_key is not None:
        raise ValueError("Pass render or pixels_key, not both.")
    keys = _drawn_keys(env, real, imagined, observation_key)
    return lambda steps, name: drawn_frames(draw, steps, keys)


def _images(
    env: WorldModelEnv, real: TensorDictBase, key: NestedKey | None
) -> list[Image]:
    """Return the images that both episodes have, or the one with that key."""
    shown, specs = images_of(env, real), env.full_observation_spec_unbatched
    if key is not None:
        key, recorded = unravel_key(key), real.get(join("next", key), None)
        shown = [image for image in shown if image.key == key]
        if not shown and recorded is not None and key in unique(specs.keys(True, True)):
            shown = [image_of(key, specs[key], recorded, named=True)]
            if shown == [None]:
                raise ValueError(
                    f"{key!r} has the shape {tuple(specs[key].shape)} of {specs[key].dtype}, and is "
                    f"no image [C, H, W], [H, W, C] or [H, W]. Pass render=f, f(observation) -> "
                    f"[height, width, 3]."
                )
    if shown:
        return shown
    named = [key] if key is not None else _image_keys(real)
    if len(named) == 1:
        (key,) = named
        lacking, there = "imagined", sorted(specs.keys(True, True), key=str)
        if real.get(join("next", key), None) is None:
            lacking, there = "recorded", leaf_keys(real)
        raise ValueError(
            f"The {lacking} episode has no {join('next', key)!r}: {there}. Decode it, "
            f"WorldModelEnv(..., decode=True), or pass render=."
        )
    raise ValueError(
        f"Nothing says how to draw: the recorded and the imagined episode have no image in common "
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
    observed = observed_keys(env)
    both = [k for k in observed if real.get(join("next", k), None) is not None]
    if key is None and both:
        return both
    if key is not None and unravel_key(key) in both:
        return [unravel_key(key)]
    raise MissingEntryError(
        f"There is no observation {'' if key is None else repr(key)} to draw that both have: the "
        f"imagined env has {observed}, the recorded episode "
        f"{leaf_keys(real)}. Decode observations: WorldModelEnv(..., decode=True)."
    )


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
    last = np.maximum.accumulate(np.where(ended, 0, np.arange(len(ended))))[ended]
    grey = 0.6 * imagined[last].astype(np.float32).mean(-1, keepdims=True) + 60
    imagined = imagined.copy()
    imagined[ended] = grey.clip(0, 255).astype(np.uint8)
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


def _captioned(
    film: np.ndarray, sums: list[np.ndarray | None], width: int
) -> np.ndarray:
    """Write the step and the returns so far over the panels, ``width`` apart."""
    out = []
    for time, frame in enumerate(film):
        texts = [
            name if total is None else f"{name}: return {total[time]:.1f}"
            for name, total in zip(("real", "imagined"), sums)
        ]
        out.append(captioned(frame, [*texts, f"difference, step {time}"], width))
    return np.stack(out)
