"""Films of the policy and of what the model dreams, and its errors, during a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.trainers import TrainerHookBase

from torchrl_wm import _upstream
from torchrl_wm.diagnostics import open_loop_error, open_loop_video
from torchrl_wm.diagnostics.drawing import pixels_of
from torchrl_wm.diagnostics.images import images_of
from torchrl_wm.diagnostics.recording import CONTEXT
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.films import take_film
from torchrl_wm.trainers.run_report import fan_figure
from torchrl_wm.trainers.trainer import RecipeTrainer

#: How many steps ahead the model is measured.
HORIZONS = (1, 5, 20)
#: The most steps of an episode that imagination starts from.
_STARTS = 100
#: The most steps of a film, and its height: a run waits while it is written.
_FILM_STEPS, _FILM_HEIGHT = 250, 120
#: The steps and the speed of what the model dreams, and the particles of a fan.
_DREAM_STEPS, _DREAM_FPS, _PARTICLES = 20, 5, 50


def watch(trainer: RecipeTrainer, *, render: str | Callable | None = None) -> None:
    """Let a run film its policy and measure its model each ``film_interval`` steps.

    Args:
        trainer: the run.

    Keyword Args:
        render: draws observations of your own env; see
            :func:`~torchrl_wm.trainers.film_policy`.

    Examples:
        >>> from torchrl_wm.trainers import PETSTrainer, watch
        >>> trainer = PETSTrainer(env="Pendulum-v1", film_interval=200)
        >>> watch(trainer, render=lambda observation: observation.reshape(1, 3) / 20 + 0.5)
    """
    interval = getattr(trainer.config, "film_interval", 0)
    if interval and trainer.recipe.policy is not None:
        Watching(interval, render=render).register(trainer)


class Watching(TrainerHookBase):
    """A hook of TorchRL's Trainer that films an evaluation, and measures the model on it.

    Every ``interval`` steps the loggers get the film as ``policy``; what the model imagines of
    the same episode as ``dream``, a video for images (see
    :func:`~torchrl_wm.diagnostics.open_loop_video`) and a picture of a fan for vectors (see
    :func:`~torchrl_wm.diagnostics.prediction_fan`); and the metrics a row with
    ``open_loop_error_1``, ``_5`` and ``_20``: the errors of the model 1, 5 and 20 steps ahead, as
    shares of the spread of the observations. All random states are left as they were.

    Args:
        interval: how many real steps pass between two films.

    Keyword Args:
        render: draws observations.
    """

    def __init__(self, interval: int, *, render: str | Callable | None = None) -> None:
        self.interval, self.render = interval, render
        self._is_filmed = self._is_dreamt = True
        self._trainer: RecipeTrainer | None = None

    def register(self, trainer: RecipeTrainer, name: str = "watching") -> None:
        """Have the trainer call the hook, in place of an earlier one of that name."""
        self._trainer = trainer
        before = _upstream.unregister(trainer, name)
        if before is not None:
            before.interval = 0
        trainer.register_module(name, self)
        trainer.register_op("post_optim", self)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the number of steps says when a film is due."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""

    def __call__(self) -> None:
        """Film and measure, if it is due."""
        trainer = self._trainer
        if not self.interval or not trainer.new_steps.due(self.interval):
            return
        with forked_random():
            episode = self._film()
            if not trainer.recipe.has_learnt:
                return
            if episode is None:
                (episode,) = trainer.evaluate(1, seed=trainer.config.seed)
            env = trainer.recipe.diagnosed_env()
            errors = open_loop_shares(env, episode)
            self._dream(env, episode)
        if errors:
            trainer.record(**{f"open_loop_error_{k}": e for k, e in errors.items()})

    def _film(self) -> TensorDictBase | None:
        """Give the loggers a film; return the episode that it shows."""
        trainer = self._trainer
        if trainer.run is None or not self._is_filmed:
            return None
        film, reason = None, "nothing draws what the env shows, nor what it observes"
        try:
            # A policy that has not learnt anything yet is filmed as well.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "A normaliser is used before")
                film = take_film(
                    trainer,
                    max_steps=_FILM_STEPS,
                    seed=trainer.config.seed,
                    height=_FILM_HEIGHT,
                    render=self.render,
                )
        # No error of a renderer should end a run.
        except Exception as err:
            reason = f"{type(err).__name__}: {err}"
        if film is None or film.frames is None:
            self._is_filmed = False
            warnings.warn(
                f"The run is not filmed ({reason}). For films of your own env call "
                f"watch(trainer, render=f) with f(observation) -> [height, width, 3].",
                stacklevel=2,
            )
            return None if film is None else film.episode
        frames = torch.from_numpy(film.frames)
        trainer.run.log_film("policy", frames, trainer.collected_frames)
        return film.episode

    def _dream(self, env: WorldModelEnv, episode: TensorDictBase) -> None:
        """Give the loggers what the model imagines of an episode."""
        trainer = self._trainer
        too_short = len(episode) <= CONTEXT
        if trainer.run is None or not self._is_dreamt or too_short:
            return
        # No error of a picture should end a run.
        try:
            frames = dream_of(env, episode)
        except Exception as err:
            self._is_dreamt = False
            warnings.warn(
                f"What the model dreams is not shown ({type(err).__name__}: {err}).",
                stacklevel=2,
            )
            return
        step = trainer.collected_frames
        trainer.run.log_film("dream", frames, step, fps=_DREAM_FPS)


def dream_of(env: WorldModelEnv, episode: TensorDictBase) -> torch.Tensor:
    """Draw what a model imagines of an episode: a video of images, or a fan in a single frame.

    Args:
        env: the imagined env.
        episode: a real episode, ``[T]``, of more than five steps.

    Returns:
        ``[T, height, width, 3]`` uint8.
    """
    horizon = min(_DREAM_STEPS, len(episode) - CONTEXT + 1)
    if images_of(env, episode):
        return torch.from_numpy(open_loop_video(env, episode, horizon))
    figure = fan_figure(env, episode, horizon, 3, _PARTICLES)
    return torch.from_numpy(pixels_of(figure)).unsqueeze(0)


def open_loop_shares(env: WorldModelEnv, episode: TensorDictBase) -> dict[int, float]:
    """Return the errors of a model in an episode, by the number of steps ahead.

    Args:
        env: the imagined env.
        episode: a real episode, ``[T]``.

    Returns:
        The root mean squared errors as shares of the data's spread, means over the dims that
        vary; nothing for horizons that the episode is too short for.
    """
    horizons = [horizon for horizon in HORIZONS if horizon <= len(episode)]
    longest = horizons[-1]
    starts = len(episode) - longest + 1
    error = open_loop_error(env, episode, longest, stride=-(-starts // _STARTS))
    model, mean, rewards = error.get("model"), error.get("mean"), set(env.reward_keys)
    shares = []
    for key in model.keys(True, True):
        spread = mean.get(key).flatten(1)
        varies = (spread > 1e-9).all(0)
        if key not in rewards and varies.any():
            shares.append((model.get(key).flatten(1) / spread)[:, varies])
    if not shares:
        return {}
    share = torch.cat(shares, 1).mean(1)
    return {horizon: float(share[horizon - 1]) for horizon in horizons}
