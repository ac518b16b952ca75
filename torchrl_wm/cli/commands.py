"""The commands and their options. What they do is imported when it is known that they run.

Each function returns what is to be done, so that reading the command line is over before
anything happens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import tyro

#: What ``train`` can train.
RECIPES = ("pets", "mbpo", "model")
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def check_recipe(name: str) -> None:
    """Refuse what ``train`` cannot train.

    Raises:
        ValueError: if there is no recipe of that name; the message lists those that there are.
    """
    if name not in RECIPES:
        raise ValueError(
            f"There is no recipe {name!r} to train. Valid choices are {sorted(RECIPES)}: "
            f"torchrl-wm train --help."
        )


def train(
    recipe: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[{pets,mbpo,model}]", help_behavior_hint=""),
    ] = None,
    *,
    resume: Annotated[
        str | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")
    ] = None,
    report: bool = True,
    progress: bool = True,
) -> Callable[[], None]:
    """Train a policy, or a world model from logged data.

    torchrl-wm train pets --help, torchrl-wm train mbpo --help and torchrl-wm train model --help
    list all settings.

    Args:
        recipe: pets plans through an ensemble, mbpo learns a policy by SAC, model is a world model of logged data.
        resume: the folder of a run that was interrupted, to go on from its last checkpoint.
        report: write the report at the end.
        progress: show the progress.
    """
    if recipe is not None:
        check_recipe(recipe)
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
        seed: the seed of how the episodes begin, and of what a planner draws.
        progress: print each return when it is known.
    """

    def go() -> None:
        from torchrl_wm.cli import looking

        looking.evaluate(run, episodes=episodes, seed=seed, progress=progress)

    return go


def report(
    run: Run,
    *,
    out: Annotated[
        str | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: RUN/report.html)"),
    ] = None,
    episodes: int = 3,
    horizon: int = 20,
    seed: int = 0,
) -> Callable[[], None]:
    """Measure a run's world model on new episodes of its policy, and write a report, one HTML file.

    Args:
        run: the folder of the run.
        out: the file to write.
        episodes: how many real episodes.
        horizon: how many steps ahead the model is measured.
        seed: the seed of how the episodes begin, and of what is imagined.
    """

    def go() -> None:
        from torchrl_wm.cli import looking

        looking.report(run, out=out, episodes=episodes, horizon=horizon, seed=seed)

    return go


def play(
    run: Run,
    *,
    out: Annotated[
        str | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: RUN/film.gif)"),
    ] = None,
    horizon: int = 50,
    max_steps: int = 1000,
    real_only: bool = False,
    seed: int = 0,
    fps: float = 20.0,
    height: int = 240,
) -> Callable[[], None]:
    """Film a run's policy in the real env, beside what the model imagines where that can be drawn.

    Args:
        run: the folder of the run.
        out: the film to write, a .gif or an .mp4.
        horizon: for how many steps the model imagines before it looks at the real env again.
        max_steps: the greatest length of the film, in steps.
        real_only: film the real env alone, with its own renderer.
        seed: the seed of how the episode begins.
        fps: how many frames the film shows in a second.
        height: the height of the frames, in pixels; the real env alone is filmed as high as its renderer draws it.
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
    run: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "runs/demo",
    seed: int = 0,
    trials: int = 1,
    episode_steps: int = 200,
    model_steps: Annotated[
        int | None,
        tyro.conf.arg(
            help_behavior_hint="(default: 1000 first, then 175 every 50 real steps)"
        ),
    ] = None,
    num_candidates: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: 200)")
    ] = None,
    progress: bool = True,
) -> Callable[[], None]:
    """Learn to balance a pendulum from nothing, by planning through a learned model, and draw how good it is.

    Args:
        run: the folder of the run, with a number added to it if it exists.
        seed: the seed of networks, plans and episodes.
        trials: how many real episodes are planned, after two at random.
        episode_steps: the length of an episode, in real steps.
        model_steps: how many gradient steps each training of the model takes.
        num_candidates: how many plans are tried at each real step.
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
