"""Films of a run's policy, beside what its model imagines if that can be drawn."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs.utils import set_exploration_type

from torchrl_wm._registry import load_object
from torchrl_wm.diagnostics import observation_renderer, render_comparison, save_video
from torchrl_wm.diagnostics.drawn_observations import drawn_frames, Render
from torchrl_wm.diagnostics.recording import observed_keys
from torchrl_wm.diagnostics.video_files import resized
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.models.specs import BOOKKEEPING
from torchrl_wm.modules.keys import as_tuple, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.pixels import rendered_frame
from torchrl_wm.trainers.trainer import RecipeTrainer


class Film(NamedTuple):
    """A film of an episode.

    Args:
        frames: ``[T, height, width, 3]`` uint8; None if nothing draws them.
        episode: the real episode, ``[T]``.
        has_imagined: whether it also shows what the model imagines.
    """

    frames: np.ndarray | None
    episode: TensorDictBase
    has_imagined: bool


def film_policy(
    trainer: RecipeTrainer,
    path: str | os.PathLike,
    *,
    horizon: int = 50,
    max_steps: int = 1000,
    real_only: bool = False,
    seed: int = 0,
    fps: float = 20.0,
    height: int | None = 240,
    episode: TensorDictBase | None = None,
    render: Render | None = None,
) -> bool:
    """Film an episode of a run's policy, beside what the model imagines if that can be drawn.

    The model imagines the same actions, and looks at the real state again every ``horizon``
    steps; a recurrent model looks at what it has filtered from the beginning of the episode on. A
    run without a model, or with one that has learnt nothing yet or predicts no observations, is
    filmed only in the real env; a run of a log without one, only as the model imagines it.

    Args:
        trainer: the run.
        path: ends in ``.gif`` or ``.mp4``.

    Keyword Args:
        horizon: for how many steps the model imagines without another look.
        max_steps: the greatest length of the film, in steps.
        real_only: film only the real env.
        seed: the seed of how the episode begins.
        fps, height: frames in a second, and their height; None for the height as drawn.
        episode: a real episode ``[T]`` to show, in place of a fresh one. It is not used if the
            real env's own renderer draws, which films while the policy acts.
        render: draws observations of your own env: a function
            ``render(observation) -> frame``, or its name, ``"module:function"``. It gets the
            observations of one step that the model predicts, real or imagined, as the run's real
            env gives them after its transforms: an array ``[*O]``, or for several observations
            a dictionary of arrays with nested keys joined by dots. It returns
            ``[height, width, 3]`` or ``[height, width]``, uint8, or floats in [0, 1]. By default
            images are shown as they are; pendulum, cart-pole and MuJoCo's envs of Gymnasium are
            drawn from their observations, and films of only the real env by its own renderer.

    Returns:
        Whether the film also shows what the model imagines.

    Raises:
        ValueError: if nothing can be drawn.

    Examples:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from torchrl_wm.trainers import film_policy, MBPOTrainer
        >>> def draw(observation):
        ...     cos, sin, velocity = observation
        ...     frame = np.zeros([21, 21], np.uint8)
        ...     frame[int(10 - 9 * cos), int(10 - 9 * sin)] = 255
        ...     return frame
        >>> trainer = MBPOTrainer(env="Pendulum-v1", max_episode_steps=20)
        >>> path = os.path.join(tempfile.mkdtemp(), "film.gif")
        >>> film_policy(trainer, path, render=draw)  # the model has learnt nothing yet
        False
    """
    film = take_film(
        trainer,
        horizon=horizon,
        max_steps=max_steps,
        real_only=real_only,
        seed=seed,
        height=height,
        episode=episode,
        render=render,
    )
    if film.frames is None:
        raise ValueError(
            f"{trainer.config.env!r} has no renderer that gives frames. In Gymnasium that is a "
            f"render() which returns [height, width, 3] uint8 for render_mode='rgb_array'; a "
            f"factory gets render_mode if it has a parameter of that name. Or draw observations "
            f"yourself: film_policy(..., render=f) with f(observation) -> [height, width, 3], on the "
            f"command line torchrl-wm play RUN --render module:function."
        )
    save_video(path, film.frames, fps=fps)
    return film.has_imagined


def take_film(
    trainer: RecipeTrainer,
    *,
    horizon: int = 50,
    max_steps: int = 1000,
    real_only: bool = False,
    seed: int = 0,
    height: int | None = 240,
    episode: TensorDictBase | None = None,
    render: Render | None = None,
) -> Film:
    """Return the film of :func:`film_policy`, with the episode that it shows."""
    if horizon < 1 or max_steps < 1:
        raise ValueError(
            f"horizon and max_steps must be at least 1, got {horizon} and {max_steps}."
        )
    draw = _drawing(trainer, render)
    recipe, env = trainer.recipe, None
    if draw is not None and not real_only and recipe.has_learnt:
        env = recipe.diagnosed_env()
    # A model of latents that does not decode them shows nothing.
    is_imagined = env is not None and bool(observed_keys(env))
    if not recipe.has_real_env and recipe.policy is not None:
        return _imagined_film(trainer, env, draw, seed, max_steps, height)
    is_acted = not is_imagined and render is None
    if recipe.policy is None and (is_acted or episode is None):
        raise ValueError(
            f"A run of {recipe.name!r} learns no policy: there is nothing to film. Show an episode "
            f"beside what the model imagines, episode=... with render=...; or call "
            f"torchrl_wm.diagnostics.render_comparison."
        )
    if is_acted:
        film = _real_film(trainer, seed, max_steps, height)
        if film.frames is not None or draw is None:
            return film
        episode = film.episode
    if episode is None:
        (episode,) = trainer.evaluate(1, seed=seed)
    if is_imagined:
        with forked_random(seed):
            frames = render_comparison(
                env, episode[:max_steps], render=draw, horizon=horizon, height=height
            )
        return Film(frames, episode, True)
    frames = drawn_frames(draw, episode[:max_steps].cpu(), _observed_keys(trainer))
    frames = frames if height is None else resized(frames, height)
    return Film(frames, episode, False)


def _drawing(trainer: RecipeTrainer, render: Render | None) -> Callable | None:
    """Return what draws observations: the user's function, or one that is known for the env."""
    if render is None:
        return observation_renderer(trainer.env)
    draw = observation_renderer(found_render(render))
    if draw is None:
        raise ValueError(
            f"Nothing is known that draws {render!r} from its observations. Give a function, "
            f"render=f with f(observation) -> [height, width, 3]."
        )
    return draw


def why_only_real(trainer: RecipeTrainer) -> str:
    """Return why a film shows only the real env, as the end of a sentence."""
    recipe = trainer.recipe
    if not recipe.has_learnt:
        return "the model has learnt nothing yet."
    if not observed_keys(recipe.diagnosed_env()):
        return f"the model of {recipe.name} predicts latents, and no observations."
    return (
        f"nothing is known that draws {trainer.config.about} from its observations. "
        f"--render module:function names your function that does."
    )


def found_render(render: Render | None) -> Render | None:
    """Return the function if its name was given, ``"module:function"``; else what was given."""
    if isinstance(render, str) and ":" in render:
        return load_object(render)
    return render


def _observed_keys(trainer: RecipeTrainer) -> list[NestedKey]:
    """Return the observations that the model predicts; all of the real env if it predicts none."""
    keys = unique(trainer.env.observation_spec.keys(True, True))
    keys = [key for key in keys if as_tuple(key)[-1] not in BOOKKEEPING]
    model = trainer.recipe.world_model
    if model is None:
        return keys
    shown = observed_keys(trainer.recipe.diagnosed_env())
    return [key for key in keys if key in shown] or [
        key for key in keys if key not in model.latent_keys
    ]


def _imagined_film(
    trainer: RecipeTrainer,
    env: WorldModelEnv | None,
    draw: Callable | None,
    seed: int,
    max_steps: int,
    height: int | None,
) -> Film:
    """Return a film of the policy in the model, from where a held-out episode begins."""
    if draw is None or env is None:
        raise ValueError(
            "The run knows no real env, so that its film is imagined, and nothing is known that "
            "draws its observations. Give a function, film_policy(..., render=f) with "
            "f(observation) -> [height, width, 3], on the command line torchrl-wm play RUN "
            "--render module:function."
        )
    first = trainer.recipe.held_out_episodes()[0][0]
    exploration = trainer.recipe.evaluation_exploration
    with forked_random(seed), set_exploration_type(exploration), torch.no_grad():
        with evaluation_mode(trainer.policy, env.world_model):
            start = first.select(*env.start_keys, strict=False)
            episode = env.rollout(max_steps, trainer.policy, tensordict=start)
    frames = drawn_frames(draw, episode.cpu(), _observed_keys(trainer))
    frames = frames if height is None else resized(frames, height)
    return Film(frames, episode, True)


def _real_film(
    trainer: RecipeTrainer, seed: int, max_steps: int, height: int | None
) -> Film:
    """Return the film of an episode, as the real env's own renderer draws it."""
    env, frames = trainer.make_env(render_mode="rgb_array"), []

    def take(*_: Any) -> None:
        if len(frames) <= max_steps:
            frames.append(rendered_frame(env))

    # Before each action: the rollout's callback misses the first and the last state.
    hook = trainer.policy.register_forward_pre_hook(take)
    try:
        (episode,) = trainer.evaluate(1, env, seed=seed)
        take()
    finally:
        hook.remove()
        env.close()  # a run makes many films, and renderers keep their resources
    if any(frame is None for frame in frames):
        return Film(None, episode, False)
    shown = np.stack(frames)
    return Film(shown if height is None else resized(shown, height), episode, False)
