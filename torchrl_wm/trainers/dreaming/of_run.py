"""The dream of a run: its model, its real env, and its policy."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_wm.diagnostics.drawn_observations import observation_renderer, Render
from torchrl_wm.diagnostics.images import images_of
from torchrl_wm.diagnostics.recording import Episodes
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.trainers.dreaming.session import DreamSession
from torchrl_wm.trainers.dreaming.with_disagreement import with_disagreement
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.recipe import Recipe
from torchrl_wm.trainers.trainer import RecipeTrainer

#: The most real steps that the disagreement is compared with.
_STEPS = 2000


def dream_of_run(
    trainer: RecipeTrainer, *, seed: int = 0, render: Render | None = None
) -> DreamSession:
    """Return a session in which one steps what a run's model imagines, beside its real env.

    The policy of the run may act, if it has one. The session of a run that learns from a log begins
    at held-out steps, or in the real env if the run's settings name it.

    Args:
        trainer: the run.

    Keyword Args:
        seed: the seed of the first episode, which begins as that of ``torchrl-wm play``.
        render: draws observations, see :func:`~torchrl_wm.trainers.film_policy`.

    Raises:
        ValueError: if the run has no model, or its model has not learnt anything yet.

    Examples:
        >>> from torchrl_wm.trainers import dream_of_run, MBPOTrainer
        >>> trainer = MBPOTrainer(env="Pendulum-v1")
        >>> dream_of_run(trainer)
        Traceback (most recent call last):
            ...
        ValueError: The run's model has not learnt anything yet: ...
    """
    recipe = trainer.recipe
    if recipe.world_model is None:
        raise ValueError(
            f"The recipe {recipe.name!r} has no world model to dream with. torchrl-wm play films "
            f"its policy."
        )
    if not recipe.has_learnt:
        raise ValueError(
            "The run's model has not learnt anything yet: it begins to after the random steps "
            "(random_steps) and the first episode. Go on with the run, torchrl-wm train --resume "
            "RUN, and dream then."
        )
    env = recipe.diagnosed_env()
    if recipe.learns_from_log:
        data = recipe.held_out_episodes()
    else:
        with forked_random(seed):
            data = _recorded(recipe, env)
    if recipe.policy is None or not recipe.has_real_env:
        real_env = recipe.real_env  # as the report on such a run; none of a log alone
    else:
        real_env = _real_env(trainer, env, render)
    return DreamSession(
        env,
        real_env=real_env,
        policy=recipe.latent_policy,
        data=data,
        render=render,
        seed=seed,
        exploration=recipe.evaluation_exploration,
        title=recipe.title,
    )


def _real_env(trainer: RecipeTrainer, env: WorldModelEnv, render: Render | None) -> Any:
    """Return another real env of the run, which draws itself if nothing draws its observations."""
    is_drawn = render is not None or bool(images_of(env))
    if is_drawn or observation_renderer(trainer.env) is not None:
        return trainer.make_env()
    return trainer.make_env(render_mode="rgb_array")


def _recorded(recipe: Recipe, env: WorldModelEnv) -> Episodes | None:
    """Return some real steps of the run, if there is a disagreement to compare with theirs."""
    steps = recipe.replay
    if steps is None or not len(steps) or with_disagreement(env) is env:
        return None
    rows = torch.randperm(len(steps))[:_STEPS]
    found: TensorDictBase = steps[rows]
    # Rows in any order: no step follows the one before.
    return found.exclude("is_init").unsqueeze(1)
