"""A report on a world model: one HTML file that says whether it is any good."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, unravel_key
from torchrl.envs import EnvBase

from torchrl_wm._files import write_text
from torchrl_wm.diagnostics import (
    outcome_sections as outcomes,
    prediction_sections as predictions,
)
from torchrl_wm.diagnostics.drawing import name_of, new_figure
from torchrl_wm.diagnostics.drawn_observations import Render
from torchrl_wm.diagnostics.dream_section import dreams
from torchrl_wm.diagnostics.page import page, ReportSection
from torchrl_wm.diagnostics.recording import (
    as_rows,
    check_env,
    Episodes,
    positive,
    Recording,
)
from torchrl_wm.diagnostics.seeded import seeded
from torchrl_wm.diagnostics.study import DoesNotApply, Measured, Study
from torchrl_wm.diagnostics.unchanging import names_of, unchanging_dims
from torchrl_wm.envs import WorldModelEnv


#: Names, titles and makers, in the order of the report.
SECTIONS: dict[str, tuple[str, Callable[[Study], Measured]]] = {
    "open_loop": ("Open-loop prediction error", predictions.open_loop),
    "dreams": ("What the model dreams", dreams),
    "fan": ("Prediction fan", predictions.fan),
    "one_step": ("One-step prediction", predictions.one_step),
    "calibration": ("Calibration", predictions.calibration),
    "rewards": ("Rewards", outcomes.rewards),
    "terminations": ("Terminations", outcomes.terminations),
    "disagreement": ("Disagreement of the ensemble", predictions.disagreements),
    "exploitation_gap": ("Exploitation gap", outcomes.gap),
    "video": ("Real beside imagined", predictions.video),
}


@dataclass(frozen=True)
class Report:
    """The result of :func:`write_report`.

    Args:
        path: the file.
        numbers: the numbers of all sections' tables, by ``section/name``.
        measured: what the diagnostics returned, by section.
        verdicts: a sentence for each section, by its name.
        left_out: the sections that do not apply, and why.
        constant: the dims that never change in the episodes, which verdicts leave out.
    """

    path: Path
    numbers: dict[str, float]
    measured: TensorDict
    verdicts: dict[str, str]
    left_out: dict[str, str]
    constant: tuple[str, ...] = ()


@torch.no_grad()
def write_report(
    path: str | os.PathLike,
    env: WorldModelEnv,
    episodes: Episodes,
    *,
    policy: Callable | None = None,
    real_env: EnvBase | None = None,
    real_policy: Callable | None = None,
    policy_steps: int = 200,
    policy_episodes: int = 5,
    horizon: int = 20,
    particles: int = 10,
    max_windows: int = 200,
    title: str = "World model report",
    labels: Mapping[NestedKey, Sequence[str]] | None = None,
    render: Render | None = None,
    sections: Sequence[ReportSection] = (),
    seed: int | None = 0,
) -> Report:
    """Measure a world model on recorded episodes, and write all of it into one HTML file.

    The file contains its pictures and needs nothing else. Each section has a line on
    how to read it and a sentence on what its numbers say. A section that does not
    apply (no ensemble, no termination head, no policy) is left out, with a line that
    says why. Verdicts leave out dims that never change in the episodes, and name them.

    Args:
        path: the file to write. An existing file is replaced, and missing folders are made.
        env: an imagined env of batch size ``[]``. With ``decode=True`` decoded
            observations are compared.
        episodes: recorded transitions, ``[*B, T]``, or a list of them, that the model was not
            trained on.

    Keyword Args:
        policy: acts in the imagined env, for the exploitation gap, which also needs
            ``real_env``.
        real_env: the real env. If its observations can be drawn, it also draws the film of vectors.
        real_policy: acts in the real env; ``policy`` by default.
        policy_steps, policy_episodes: how long and how many the policy's episodes are.
        horizon: ``H``; less if the episodes are shorter.
        particles: how many times each window is imagined for the errors of predictions.
        max_windows: how many windows are imagined at most, spread over the episodes.
        title: the heading.
        labels: a name for each dim of an observation, by its key.
        render: draws observations, see
            :func:`~torchrl_wm.diagnostics.render_comparison`. Images need no drawing: their film
            is that of :func:`~torchrl_wm.diagnostics.open_loop_video`.
        sections: your own sections, which come first, such as a learning curve.
        seed: the seed of what is imagined, so that the same report can be made again. The
            random state is put back afterwards. With None, the current state is used.

    Returns:
        The measurements.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if ``env`` is no WorldModelEnv.
        ValueError: if it is batch-locked, or a number is not positive.
        KeyError: if the episodes lack actions.
        IsADirectoryError: if ``path`` is a folder.

    Examples:
        >>> import os, tempfile
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import write_report
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(
        ...     real_env, members=3, hidden=(32,), normalize=False, termination="none"
        ... )
        >>> report = write_report(
        ...     os.path.join(tempfile.mkdtemp(), "report.html"),
        ...     WorldModelEnv(world_model, real_env),
        ...     real_env.rollout(60),
        ...     horizon=5,
        ... )
        >>> report.left_out["terminations"]
        'the model has no termination head.'
        >>> "open_loop/observation: beats persistence up to k" in report.numbers
        True
    """
    path = file_of(path)
    for name, value in (
        ("policy_steps", policy_steps),
        ("policy_episodes", policy_episodes),
        ("horizon", horizon),
        ("particles", particles),
        ("max_windows", max_windows),
    ):
        positive(value, name)
    new_figure(1, 1)  # refuses a missing matplotlib before anything is measured
    check_env(env, "write_report")
    episodes = as_rows(episodes, "write_report")
    recording = Recording.of(env, episodes, "write_report")
    horizon = min(horizon, recording.longest_window())
    windows = len(recording.window_index(horizon)[0])
    study = Study(
        env=env,
        episodes=episodes,
        recording=recording,
        horizon=horizon,
        particles=particles,
        stride=-(-windows // max_windows),
        labels={unravel_key(k): v for k, v in (labels or {}).items()},
        policy=policy,
        real_env=real_env,
        real_policy=real_policy,
        policy_steps=policy_steps,
        policy_episodes=policy_episodes,
        render=render,
        constant=unchanging_dims(recording),
    )
    with seeded(seed):
        made, measured, left_out = measure_sections(SECTIONS, study)
    text = page(
        title,
        _facts(study, windows),
        [*sections, *made.values()],
        {SECTIONS[name][0]: reason for name, reason in left_out.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, path)
    return Report(
        path=path,
        numbers=all_numbers(made),
        measured=measured,
        verdicts={name: section.verdict for name, section in made.items()},
        left_out=left_out,
        constant=tuple(names_of(study.constant, study.labels)),
    )


def file_of(path: str | os.PathLike) -> Path:
    """Return the path of a report.

    Raises:
        IsADirectoryError: if it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: name a file in it.")
    return path


def all_numbers(sections: Mapping[str, ReportSection]) -> dict[str, float]:
    """Return the numbers of all sections, each below the name of its section."""
    return {
        f"{name}/{key}": value
        for name, section in sections.items()
        for key, value in section.numbers.items()
    }


def measure_sections(
    sections: Mapping[str, tuple[str, Callable[[Any], Measured]]], study: Any
) -> tuple[dict[str, ReportSection], TensorDict, dict[str, str]]:
    """Return the sections and their measurements by name, and why others are left out.

    Args:
        sections: names, titles and makers.
        study: what the makers are given.
    """
    made, left_out = {}, {}
    measured = TensorDict({}, batch_size=[])
    for name, (_, measure) in sections.items():
        try:
            made[name], result = measure(study)
        except (DoesNotApply, ImportError, KeyError, RuntimeError, ValueError) as err:
            left_out[name] = str(err)
        else:
            measured.set(name, result)
    return made, measured, left_out


def _facts(study: Study, windows: int) -> dict[str, str]:
    model = study.env.world_model
    parameters = sum(p.numel() for p in model.parameters())
    steps = int(study.recording.valid.sum())
    used = -(-windows // study.stride)
    constant = names_of(study.constant, study.labels)
    never = {"constant, left out of verdicts": ", ".join(constant)}
    return {
        "model": f"{type(model.dynamics).__name__}, {parameters:,} parameters",
        "latents": ", ".join(name_of(key) for key in study.env.latent_keys),
        "recorded steps": f"{steps:,}",
        "horizon": f"{study.horizon} steps, about {used} windows, {study.particles} particles",
        **(never if constant else {}),
    }
