"""What a model of images dreams: real frames above imagined ones above their error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.diagnostics.drawn_observations import over_time
from torchrl_wm.diagnostics.images import beside, Image, images_of
from torchrl_wm.diagnostics.recording import (
    CONTEXT,
    Entries,
    Episodes,
    imagine_windows,
    matching,
    positive,
    Recording,
    spread,
)
from torchrl_wm.diagnostics.video_files import captioned, labelled, resized, separated
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, unique
from torchrl_wm.modules.modes import evaluation_mode

_SEEING, _IMAGINING = (40, 160, 70), (200, 50, 40)
_BORDER = 2  # pixels


class Dream(NamedTuple):
    """Windows of real frames, and what a model makes of them.

    Args:
        images: the images that are shown.
        context: how many frames the model has seen where it begins to imagine.
        real: the recorded frames, ``[W, T, *shape]`` by key.
        shown: the decoded ones, of the same shape: the first ``context`` from the latents of the
            real frames, the others imagined with the recorded actions.
    """

    images: list[Image]
    context: int
    real: Entries
    shown: Entries

    def some(self, windows: int) -> Dream:
        """Return fewer of the windows."""
        chosen = spread(len(next(iter(self.real.values()))), windows)
        real, shown = (
            {key: value[chosen.to(value.device)] for key, value in entries.items()}
            for entries in (self.real, self.shown)
        )
        return self._replace(real=real, shown=shown)


def open_loop_video(
    env: WorldModelEnv,
    data: Episodes,
    horizon: int,
    *,
    context: int = CONTEXT,
    keys: Sequence[NestedKey] | None = None,
    windows: int = 4,
    captions: bool = True,
    height: int | None = None,
) -> np.ndarray:
    """Draw what a model of images dreams: real frames above imagined ones above their error.

    While the border is green, the model sees the real frames: its own are decoded from their
    latents. While it is red, the model imagines with the recorded actions, open loop. The error
    is the difference of the colours: black is right. Ends that the model predicts are not heeded.

    A recurrent model filters the recorded observations, from the first one of the episode or of
    its row of the data on. Another model encodes each frame of the context by itself.

    Args:
        env: an imagined env of batch size ``[]`` that decodes, ``WorldModelEnv(..., decode=True)``.
        data: recorded transitions, ``[*B, T]``, time last, or a list of them, with images of any
            keys: ``[C, H, W]``, ``[H, W, C]`` or ``[H, W]``, of bytes or floats.
        horizon: ``H``, how many steps are imagined.

    Keyword Args:
        context: ``C``, how many real frames are shown before.
        keys: the images to show, side by side; all by default.
        windows: how many stretches of the data are shown side by side, each within one episode;
            they are spread evenly over the data.
        captions: write names beside the rows, and the step above.
        height: of each image in pixels. By default small images are enlarged to at most 80, and
            large ones are reduced to 128.

    Returns:
        ``[C + H, height, width, 3]`` uint8.

    Raises:
        ValueError: if no stretch of ``C + H`` frames lies within one episode, a number is not
            positive, or the env is batch-locked.
        KeyError: if the data lacks actions, or there is no image that the env imagines and the
            data has.
        ImportError: for captions or another height than that of the images without Pillow.

    Examples:
        >>> import gymnasium
        >>> import numpy as np
        >>> from torchrl.envs import GymWrapper
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import open_loop_video, save_video
        >>> from torchrl_wm.models import make_rssm_world_model
        >>> class Bar(gymnasium.Env):
        ...     observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 1), np.uint8)
        ...     action_space = gymnasium.spaces.Discrete(2)
        ...     def reset(self, *, seed=None, options=None):
        ...         self.place = 3
        ...         return self.seen(), {}
        ...     def step(self, action):
        ...         self.place = (self.place + 2 * action - 1) % 8
        ...         return self.seen(), 0.0, False, False, {}
        ...     def seen(self):
        ...         row = 255 * (np.arange(8) == self.place)
        ...         return np.tile(row, (8, 1))[..., None].astype(np.uint8)
        >>> real_env = GymWrapper(Bar())
        >>> world_model, _ = make_rssm_world_model(real_env, belief_size=16)
        >>> env = WorldModelEnv(world_model, real_env, decode=True)
        >>> frames = open_loop_video(env, real_env.rollout(40), horizon=10, height=32)
        >>> frames.shape
        (15, 126, 198, 3)
        >>> save_video("dream.gif", frames, fps=8)  # doctest: +SKIP
    """
    recording = Recording.of(env, data, "open_loop_video")
    images = chosen_images(recording, keys)
    return dream_frames(
        dream(recording, images, horizon, context, windows), captions, height
    )


def chosen_images(
    recording: Recording, keys: Sequence[NestedKey] | None = None
) -> list[Image]:
    """Return the images to show."""
    env, steps = recording.env, recording.steps
    images = {image.key: image for image in images_of(env, steps)}
    wanted = list(images) if keys is None else unique(keys)
    if wanted and all(key in images for key in wanted):
        return [images[key] for key in wanted]
    missing = [key for key in wanted if key not in images]
    raise MissingEntryError(
        f"There is no image {missing or ''} to show that the imagined env and the data both have: "
        f"the env imagines {list(env.observation_spec.keys(True, True))}, the data has "
        f"{leaf_keys(steps)}. Decode images: WorldModelEnv(..., decode=True); for observations "
        f"of another kind see prediction_fan, and render_comparison(..., render=f)."
    )


@torch.no_grad()
def dream(
    recording: Recording, images: list[Image], horizon: int, context: int, windows: int
) -> Dream:
    """Let a model see and imagine stretches of its recording.

    Args:
        recording: the model and its data.
        images: the images to decode.
        horizon: how many steps are imagined.
        context: how many frames are seen.
        windows: how many stretches there are at most.
    """
    for name, value in (
        ("horizon", horizon),
        ("context", context),
        ("windows", windows),
    ):
        positive(value, name)
    length = context - 1 + horizon
    longest = recording.longest_window()
    if length > longest:
        raise ValueError(
            f"context={context} frames and horizon={horizon} steps need {length} steps of one "
            f"episode, and the longest one has {longest}. Take fewer, or longer episodes."
        )
    row, time = recording.window_index(length)
    chosen = spread(len(row), windows).to(row.device)
    steps = recording.steps[row[chosen], time[chosen]]  # [W, C - 1 + H]
    keys = [image.key for image in images]
    seen = _reconstructed(recording.env, steps[:, :context], keys)
    ahead = imagine_windows(recording, steps[:, context - 1 :], keys).steps
    real, shown = {}, {}
    for key in keys:
        made = torch.cat([seen[key], ahead[key]], 1)
        shown[key], real[key] = matching(key, made, over_time(steps, key))
    return Dream(images, context, real, shown)


def _reconstructed(
    env: WorldModelEnv, steps: TensorDictBase, keys: list[NestedKey]
) -> Entries:
    """Return what the latents of recorded steps ``[W, C]`` are decoded to, by key."""
    model, rows = env.world_model, steps.reshape(-1)
    with evaluation_mode(model):
        if not model.is_recurrent:
            rows = model.encode(rows.select(*env.start_keys, strict=False))
        # Without the real observations, which a reset would keep.
        state = rows.select(*env.state_spec.keys(True, True), strict=False)
        decoded = env.reset(state)
    return {k: decoded.get(k).unflatten(0, steps.batch_size) for k in keys}


@torch.no_grad()
def dream_error(found: Dream) -> TensorDict:
    """Return the mean absolute errors of imagined frames, as shares of the range of the image.

    Returns:
        Batch size ``[H]``; entry ``k - 1`` is the error ``k`` steps ahead, ``[H, 1]``:
        ``("model", key)``, ``("persistence", key)`` if the last frame seen stays, and
        ``("mean", key)`` for the mean frame of those that are imagined.
    """
    first = next(iter(found.real.values()))
    out = TensorDict({}, batch_size=[first.shape[1] - found.context])
    for image in found.images:
        real = image.shares(found.real[image.key])
        ahead = real[:, found.context :]
        guesses = {
            "model": image.shares(found.shown[image.key][:, found.context :]),
            "persistence": real[:, found.context - 1 :][:, :1],
            "mean": ahead.mean((0, 1), keepdim=True),
        }
        for name, guess in guesses.items():
            error = (guess - ahead).abs().transpose(0, 1).flatten(1).mean(1)
            out.set(join(name, image.key), error.unsqueeze(-1))
    return out


def dream_frames(
    found: Dream, captions: bool = True, height: int | None = None
) -> np.ndarray:
    """Draw windows side by side, ``[C + H, height, width, 3]`` uint8."""
    if height is None:
        height = _small_height(found)
    kinds = {"real": [], "model": [], "error": []}
    for image in found.images:
        real, shown = (
            _sized(image.frames(entries[image.key]), height)
            for entries in (found.real, found.shown)
        )
        kinds["real"].append(real)
        kinds["model"].append(shown)
        difference = np.abs(real.astype(np.int16) - shown).astype(np.uint8)
        kinds["error"].append(difference)
    rows = [_framed(beside(frames), found.context) for frames in kinds.values()]
    film = list(np.concatenate(rows, -3))  # of each window [T, height, width, 3]
    out = np.concatenate(separated(film), 2)
    if not captions:
        return out
    names = labelled(list(kinds), rows[0].shape[-3])
    film = []
    for time, frame in enumerate(out, start=1):
        ahead = time - found.context
        text = f"seen, {time} of {found.context}"
        text = text if ahead <= 0 else f"imagined, step {ahead}"
        frame = np.concatenate([names, frame], 1)
        film.append(captioned(frame, [text], frame.shape[1]))
    return np.stack(film)


def _framed(film: np.ndarray, context: int) -> np.ndarray:
    """Return ``[W, T, height, width, 3]`` with a border that says what the model sees."""
    windows, steps, height, width, _ = film.shape
    edge = 2 * _BORDER
    out = np.empty((windows, steps, height + edge, width + edge, 3), np.uint8)
    out[:, :context], out[:, context:] = _SEEING, _IMAGINING
    out[:, :, _BORDER:-_BORDER, _BORDER:-_BORDER] = film
    return out


def _sized(frames: np.ndarray, height: int) -> np.ndarray:
    """Return ``[W, T, height, width, 3]`` of another height."""
    flat = resized(frames.reshape(-1, *frames.shape[2:]), height)
    return flat.reshape(*frames.shape[:2], *flat.shape[1:])


def _small_height(found: Dream) -> int:
    """Return a height of images that shows them well in a small file."""
    images = found.images
    frames = [image.frames(found.real[image.key][:1, 0]) for image in images]
    height = max(frame.shape[1] for frame in frames)
    return min(128, height * max(1, 80 // height))
