"""The commands and their options. A command's code is imported when it runs.

Each function returns a function that does the work, so that the command line is read as a
whole before anything happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import tyro

from torchrl_wm._registry import find_recipe, recipe_names

Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Checkpoint = Annotated[
    int | None,
    tyro.conf.arg(metavar="STEP", help_behavior_hint="(default: the newest)"),
]
Render = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="MODULE:FUNCTION", help_behavior_hint="(default: known tasks)"
    ),
]


def train(
    recipe: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[RECIPE]", help_behavior_hint=""),
    ] = None,
    *,
    resume: Annotated[
        str | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")
    ] = None,
    checkpoint: Checkpoint = None,
    device: Annotated[
        str | None, tyro.conf.arg(help_behavior_hint="(default: that of the run)")
    ] = None,
    report: bool = True,
    progress: bool = True,
) -> Callable[[Mapping[str, Any]], None]:
    """Train a policy, or a world model from logged data.

    Args:
        recipe: what to train, see below.
        resume: the folder of a run to go on with, from its last checkpoint.
        checkpoint: the step of the checkpoint to go on from.
        device: where the run goes on.
        report: write the report at the end.
        progress: show the progress.
    """
    if recipe is not None:
        find_recipe(recipe)
    if resume is None:
        names = ", ".join(f"torchrl-wm train {name}" for name in recipe_names())
        raise ValueError(
            f"Say what to train: {names}; or go on with a run: torchrl-wm train --resume RUN."
        )

    def go(ends: Mapping[str, Any]) -> None:
        from torchrl_wm.cli import training

        given = dict(ends) if device is None else {**ends, "device": device}
        training.resume(
            resume,
            recipe=recipe,
            checkpoint=checkpoint,
            report=report,
            progress=progress,
            **given,
        )

    return go


def describe_train() -> str:
    """Return what the help of ``train`` says of the recipes."""
    # Paragraphs, as lines of one would be joined.
    lines = [f"  {name}: {find_recipe(name).summary}" for name in recipe_names()]
    return (
        "Train a policy, or a world model from logged data. The recipes:\n\n"
        + "\n\n".join(lines)
        + "\n\ntorchrl-wm train RECIPE --help lists the settings of one. A run goes on by "
        "torchrl-wm train --resume RUN, and ends later with one of its settings beside it: "
        "--resume RUN --steps 50000."
    )


def evaluate(
    run: Run,
    *,
    episodes: int = 10,
    seed: int = 0,
    checkpoint: Checkpoint = None,
    video: Annotated[
        str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")
    ] = None,
    json: bool = False,
    progress: bool = True,
) -> Callable[[], None]:
    """Act with a run's policy, without exploration, and print the returns.

    Args:
        run: the folder of the run.
        episodes: how many real episodes.
        seed: the seed of how the episodes begin, and of what a planner draws.
        checkpoint: the step of the checkpoint whose policy acts.
        video: the film of the first episode to write, a .gif or an .mp4.
        json: print one line of JSON with all numbers, and nothing else.
        progress: print each return when it is known.
    """

    def go() -> None:
        from torchrl_wm.cli import inspect_run

        inspect_run.evaluate(
            run,
            episodes=episodes,
            seed=seed,
            checkpoint=checkpoint,
            video=video,
            as_json=json,
            progress=progress,
        )

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
    checkpoint: Checkpoint = None,
) -> Callable[[], None]:
    """Measure a run's world model on new episodes of its policy, and write a report, one HTML file.

    Args:
        run: the folder of the run.
        out: the file to write.
        episodes: how many real episodes.
        horizon: how many steps ahead the model is measured.
        seed: the seed of how the episodes begin, and of what is imagined.
        checkpoint: the step of the checkpoint whose model is measured.
    """

    def go() -> None:
        from torchrl_wm.cli import inspect_run

        inspect_run.report(
            run,
            out=out,
            episodes=episodes,
            horizon=horizon,
            seed=seed,
            checkpoint=checkpoint,
        )

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
    render: Render = None,
    checkpoint: Checkpoint = None,
) -> Callable[[], None]:
    """Film a run's policy in the real env, beside what the model imagines where that can be drawn.

    Args:
        run: the folder of the run.
        out: the film to write, a .gif or an .mp4.
        horizon: for how many steps the model imagines before it looks at the real env again.
        max_steps: the greatest length of the film, in steps.
        real_only: film only the real env, with its own renderer.
        seed: the seed of how the episode begins.
        fps: how many frames the film shows in a second.
        height: the height of the frames, in pixels; films of only the real env are as high as its renderer draws them.
        render: your function that draws an observation, for films of your own env.
        checkpoint: the step of the checkpoint whose policy is filmed.
    """

    def go() -> None:
        from torchrl_wm.cli import inspect_run

        inspect_run.play(
            run,
            out=out,
            horizon=horizon,
            max_steps=max_steps,
            real_only=real_only,
            seed=seed,
            fps=fps,
            height=height,
            render=render,
            checkpoint=checkpoint,
        )

    return go


def dream(
    run: Run,
    *,
    port: int = 0,
    open: bool = True,
    seed: int = 0,
    render: Render = None,
    checkpoint: Checkpoint = None,
) -> Callable[[], None]:
    """Step what a run's model imagines on a local page, by hand or by the policy, beside the real env.

    Args:
        run: the folder of the run.
        port: the port of the page, which only this machine can reach; 0 for any that is free.
        open: open the page in a browser.
        seed: the seed of how the first episode begins.
        render: your function that draws an observation, or the id of an env whose drawing fits.
        checkpoint: the step of the checkpoint whose model imagines.
    """

    def go() -> None:
        from torchrl_wm.cli.dream import dream_of

        dream_of(
            run,
            port=port,
            open_page=open,
            seed=seed,
            render=render,
            checkpoint=checkpoint,
        )

    return go


def export(
    run: Run,
    *,
    out: Annotated[
        str | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: RUN/export)"),
    ] = None,
    format: Annotated[
        Literal["auto", "pt2", "onnx", "both"],
        tyro.conf.arg(help_behavior_hint="(default: both, if ONNX is installed)"),
    ] = "auto",
    policy: Annotated[
        str, tyro.conf.arg(help_behavior_hint="(default: that of evaluations)")
    ] = "policy",
    steps: int = 100,
    seed: int = 0,
    checkpoint: Checkpoint = None,
) -> Callable[[], None]:
    """Write a run's policy as a torch.export program and as ONNX, checked against the run's own actions.

    Args:
        run: the folder of the run.
        out: the folder for policy.pt2, policy.onnx and policy.json.
        format: what to write: pt2 for torch alone, onnx for ONNX runtimes.
        policy: which policy of the run; that of TD-MPC2 without a plan is called prior, those of
            MOPO by their penalties.
        steps: on how many real steps they are checked.
        seed: the seed of how the episodes of these steps begin.
        checkpoint: the step of the checkpoint whose policy is written.
    """

    def go() -> None:
        from torchrl_wm.cli import export_run

        export_run.export(
            run,
            out=out,
            format=format,
            policy=policy,
            steps=steps,
            seed=seed,
            checkpoint=checkpoint,
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


#: In the order in which they are listed.
COMMANDS: dict[str, Callable[..., Callable[[], None]]] = {
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "play": play,
    "dream": dream,
    "export": export,
    "demo": demo,
}
