"""The commands and their options. What they do is imported when it is known that they run.

Each function returns what is to be done, so that reading the command line is over before
anything happens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import tyro

#: What ``train`` can train.
RECIPES = ("pets", "mbpo", "model")
Run = Annotated[str, tyro.conf.Positional]


def train(
    recipe: Annotated[
        Literal["pets", "mbpo", "model"] | None, tyro.conf.Positional
    ] = None,
    *,
    resume: str | None = None,
    report: bool = True,
    progress: bool = True,
) -> Callable[[], None]:
    """Train a policy, or a world model from logged data.

    torchrl-wm train pets --help, torchrl-wm train mbpo --help and torchrl-wm train model --help
    list all settings.

    Args:
        recipe: pets: plan through an ensemble; mbpo: SAC on imagined rollouts; model: a world
            model alone, from data.
        resume: the folder of a run that was interrupted: go on from its last checkpoint.
        report: write the report at the end.
        progress: show the progress.
    """
    if resume is None:
        raise ValueError(
            "Say what to train: torchrl-wm train pets, torchrl-wm train mbpo or torchrl-wm train "
            "model; or go on with a run: torchrl-wm train --resume RUN."
        )
    return partial(_training_resume, recipe, resume, report, progress)


def evaluate(
    run: Run, *, episodes: int = 10, seed: int = 0, progress: bool = True
) -> Callable[[], None]:
    """Act with a run's policy, without exploration, and print the returns.

    Args:
        run: the folder of the run.
        episodes: how many real episodes.
        seed: of how they begin, and of what a planner draws.
        progress: print each return when it is known.
    """

    def go() -> None:
        from torchrl_wm.cli import looking

        looking.evaluate(run, episodes=episodes, seed=seed, progress=progress)

    return go


def report(
    run: Run,
    *,
    out: str | None = None,
    episodes: int = 3,
    horizon: int = 20,
    seed: int = 0,
) -> Callable[[], None]:
    """Measure a run's world model on fresh episodes of its policy, and write it all into one HTML file.

    Args:
        run: the folder of the run.
        out: the file; report.html in the folder of the run by default.
        episodes: how many real episodes.
        horizon: how many steps ahead the model is measured.
        seed: of how the episodes begin, and of what is imagined.
    """

    def go() -> None:
        from torchrl_wm.cli import looking

        looking.report(run, out=out, episodes=episodes, horizon=horizon, seed=seed)

    return go


def play(
    run: Run,
    *,
    out: str | None = None,
    horizon: int = 50,
    max_steps: int = 1000,
    real_only: bool = False,
    seed: int = 0,
    fps: float = 20.0,
    height: int = 240,
) -> Callable[[], None]:
    """Film a run's policy in the real env, what the model imagines beside it where that can be drawn.

    Args:
        run: the folder of the run.
        out: the film, .gif or .mp4; film.gif in the folder of the run by default.
        horizon: for how many steps the model imagines before it looks at the real env again.
        max_steps: the length of the film at most.
        real_only: film the real env alone, with its own renderer.
        seed: of how the episode begins.
        fps: frames a second.
        height: of the frames, in pixels; films of the real env alone have that of its renderer.
    """

    def go() -> None:
        from torchrl_wm.cli import looking

        looking.play(
            run,
            out=out,
            horizon=horizon,
            max_steps=max_steps,
            real_only=real_only,
            seed=seed,
            fps=fps,
            height=height,
        )

    return go


def demo(
    *,
    run: str = "runs/demo",
    seed: int = 0,
    trials: int = 1,
    episode_steps: int = 200,
    model_steps: int | None = None,
    num_candidates: int | None = None,
    progress: bool = True,
) -> Callable[[], None]:
    """Learn the pendulum from nothing and balance it by planning; then show how good the model is.

    Args:
        run: the folder of the run; a number is added to it if it exists.
        seed: of everything.
        trials: real episodes that are planned, after two at random.
        episode_steps: the length of an episode.
        model_steps: gradient steps of each training; by default 1,000 first and 175 every 50
            real steps.
        num_candidates: plans tried at each real step; 200 by default.
        progress: show the progress.
    """

    def go() -> None:
        from torchrl_wm.cli.demo import run_demo

        run_demo(
            run,
            seed=seed,
            trials=trials,
            episode_steps=episode_steps,
            model_steps=model_steps,
            num_candidates=num_candidates,
            progress=progress,
        )

    return go


def _training_resume(
    recipe: str | None, path: str, report: bool, progress: bool
) -> None:
    from torchrl_wm.cli import training

    training.resume(path, recipe=recipe, report=report, progress=progress)


#: In the order in which they are listed.
COMMANDS: dict[str, Callable[..., Callable[[], None]]] = {
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "play": play,
    "demo": demo,
}
