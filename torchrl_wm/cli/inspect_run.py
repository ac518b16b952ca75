"""``torchrl-wm evaluate``, ``report`` and ``play``: inspect what a run has learnt."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torchrl_wm.cli.console import say
from torchrl_wm.cli.open_run import open_run
from torchrl_wm.trainers import (
    episode_return,
    film_policy,
    RecipeTrainer,
    write_run_report,
)
from torchrl_wm.trainers.films import why_only_real
from torchrl_wm.trainers.settings import AtLeast


def evaluate(
    path: str,
    *,
    episodes: int,
    seed: int,
    checkpoint: int | None,
    video: str | None,
    as_json: bool,
    progress: bool,
) -> None:
    """Print the returns of the policy."""
    AtLeast(1).check("--episodes", episodes)
    trainer = open_run(path, checkpoint)
    if video is not None:
        _check_acts(trainer, path)
        if not trainer.recipe.has_real_env:
            trainer.make_env()  # raises the error that says how to name one
    steps = trainer.collected_frames
    if trainer.policy is None or not trainer.recipe.has_real_env:
        numbers = {"steps": steps, **trainer.recipe.measures()}
        text = [
            f"{name.replace('_', ' ')} {value:.6g}" for name, value in numbers.items()
        ]
        say(
            json.dumps(numbers)
            if as_json
            else f"{trainer.recipe.title}: {', '.join(text)}"
        )
        return
    returns, lengths = [], []
    for number, episode in enumerate(trainer.iterate(episodes, seed=seed)):
        returns.append(episode_return(trainer.env, episode))
        lengths.append(len(episode))
        if progress and not as_json:
            say(f"episode {number + 1}: return {returns[-1]:.6g}, {len(episode)} steps")
    numbers = {
        "steps": steps,
        "episodes": episodes,
        "seed": seed,
        "mean": mean(returns),
        "std": stdev(returns) if len(returns) > 1 else None,
        "least": min(returns),
        "largest": max(returns),
        "returns": returns,
        "lengths": lengths,
    }
    if video is not None:
        film_policy(trainer, Path(video), seed=seed)
        numbers["video"] = video
    if as_json:
        say(json.dumps(numbers))
        return
    spread = f", std {numbers['std']:.6g}" if len(returns) > 1 else ""
    say(
        f"{trainer.recipe.title} after {steps} steps, {episodes} episodes: mean "
        f"{numbers['mean']:.6g}{spread}, least {min(returns):.6g}, largest {max(returns):.6g}"
    )
    if video is not None:
        say(video)


def report(
    path: str,
    *,
    out: str | None,
    episodes: int,
    horizon: int,
    seed: int,
    checkpoint: int | None,
) -> None:
    """Write the report."""
    AtLeast(1).check("--episodes", episodes)
    trainer = open_run(path, checkpoint)
    written = write_run_report(
        trainer, out, episodes=episodes, seed=seed, horizon=horizon
    )
    for verdict in written.verdicts.values():
        if verdict:
            say(verdict)
    say(str(written.path))


def play(
    path: str,
    *,
    out: str | None,
    real_only: bool,
    checkpoint: int | None,
    **settings: Any,
) -> None:
    """Film the policy."""
    trainer = open_run(path, checkpoint)
    _check_acts(trainer, path)
    film = Path(out) if out else trainer.run.path / "film.gif"
    both = film_policy(trainer, film, real_only=real_only, **settings)
    if not trainer.recipe.has_real_env:
        say("The run knows no real env: all of the film is imagined.")
    elif not both and not real_only:
        say(f"Only the real env is filmed: {why_only_real(trainer)}")
    say(str(film))


def _check_acts(trainer: RecipeTrainer, path: str) -> None:
    """Refuse to film where nothing acts."""
    if trainer.policy is None:
        raise ValueError(
            f"{path!r} is a run of {trainer.recipe.name!r}, which has no policy to film. Look at "
            f"its model: torchrl-wm report {path}."
        )
