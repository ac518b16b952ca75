"""``torchrl-wm demo``: learn a model of the pendulum from nothing, and balance it by planning."""

from __future__ import annotations

import time
from pathlib import Path

from torchrl_wm.cli.console import list_paths, say
from torchrl_wm.cli.open_run import free
from torchrl_wm.cli.training import paths, saying_what_is_saved
from torchrl_wm.trainers import (
    episode_return,
    film_policy,
    PETSConfig,
    PETSTrainer,
    plot_learning_curve,
    save_prediction_fan,
)

#: Each plan goes on from the plan of the step before, so that a single iteration at each step
#: is enough, and takes the least time on a CPU.
PLANS = {"optim_steps": 1, "num_particles": 3}
#: The settings that the pendulum is learnt with; docs/benchmarks/learning.md has curves over seeds.
SETTINGS = {
    **PLANS,
    "env": "Pendulum-v1",
    "termination": "none",  # the pendulum never ends an episode
    # Two episodes, in which torques that are held swing it up now and then.
    "random_steps": 400,
    "random_hold": 10,
    "beta": 0.25,
    "num_candidates": 200,
    "model_batch_size": 128,
    "first_model_steps": 1000,
    "model_interval": 50,
    "model_steps": 175,
}
LABELS = ["cos(angle)", "sin(angle)", "velocity"]
#: How many steps the film imagines before it looks at the real pendulum again.
FILM_HORIZON = 40


def run_demo(
    run: str,
    *,
    seed: int,
    trials: int,
    episode_steps: int,
    model_steps: int | None,
    num_candidates: int | None,
    progress: bool,
) -> None:
    """Run PETS on Pendulum-v1, and write three pictures."""
    began = time.monotonic()
    given = {
        "max_episode_steps": episode_steps,
        "random_steps": 2 * episode_steps,
        "model_steps": model_steps,
        "first_model_steps": model_steps,
        "num_candidates": num_candidates,
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = PETSConfig(**{**SETTINGS, **given}, seed=seed, trials=trials)
    path = free(Path(run))
    trainer = PETSTrainer.start(path, config, progress=progress)
    say(
        f"Learning the pendulum from nothing: {config.random_steps} random steps, then "
        f"{counted(trials)} in which the actions are planned through an ensemble, which learns from all "
        f"steps so far."
    )
    with saying_what_is_saved(trainer):
        trainer.train()
        say(
            "Acting once more, to compare what happens with what the model imagines ..."
        )
        (episode,) = trainer.evaluate(1, seed=seed)
        pictures = {
            "learning curve": path / "learning_curve.png",
            "prediction fan": path / "prediction_fan.png",
            "real beside imagined": path / "real_beside_imagined.gif",
        }
        figure = plot_learning_curve(
            trainer.metrics, title=f"PETS on Pendulum-v1, seed {seed}"
        )
        figure.savefig(pictures["learning curve"], dpi=120)
        save_prediction_fan(
            trainer, pictures["prediction fan"], episode, seed=seed, labels=LABELS
        )
        film_policy(
            trainer,
            pictures["real beside imagined"],
            horizon=FILM_HORIZON,
            seed=seed,
            episode=episode,
        )
    first, last = trainer.metrics[0]["return"], episode_return(trainer.env, episode)
    say(
        f"Return at random {first:.0f}, after {counted(trials)} {last:.0f}. Done in "
        f"{time.monotonic() - began:.0f} s."
    )
    list_paths({**pictures, **paths(trainer)})
    say(f"More about this model: torchrl-wm report {path}")


def counted(trials: int) -> str:
    """Say how many trials there are."""
    return f"{trials} trial" + "s" * (trials > 1)
