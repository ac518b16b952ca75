"""A report on a policy in a model: one HTML file that says whether it is to be trusted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm._files import write_text
from torchrl_wm.diagnostics.drawing import name_of, new_figure
from torchrl_wm.diagnostics.page import page, ReportSection
from torchrl_wm.diagnostics.policy_sections import POLICY_SECTIONS
from torchrl_wm.diagnostics.policy_study import PolicyStudy
from torchrl_wm.diagnostics.policy_verdicts import (
    judged,
    RULES,
    settled,
    Trust,
    trusted,
)
from torchrl_wm.diagnostics.recording import Episodes, positive, Recording
from torchrl_wm.diagnostics.report import all_numbers, file_of, measure_sections, Report
from torchrl_wm.diagnostics.seeded import seeded
from torchrl_wm.envs import WorldModelEnv


@dataclass(frozen=True, kw_only=True)
class PolicyReport(Report):
    """The result of :func:`write_policy_report`.

    Beside what a :class:`Report` has (``path`` is None if no file was written):

    Args:
        verdict: the sentence at the top.
        trusted_steps: for how many imagined steps the model can be believed about the policy.
        score: what ranks policies on one log: the value by fitted Q evaluation; NaN if that
            does not apply, or did not settle. See the guide for how well it ranks.
        sections: the sections, for another report: ``write_report(..., sections=sections)``.
    """

    verdict: str
    trusted_steps: int
    score: float
    sections: tuple[ReportSection, ...]


def write_policy_report(
    env: WorldModelEnv,
    policy: Callable,
    data: Episodes,
    path: str | os.PathLike | None = None,
    *,
    real_env: EnvBase | None = None,
    real_policy: Callable | None = None,
    real_episodes: int = 5,
    gamma: float = 0.99,
    horizons: Sequence[int] = (5, 20, 50),
    coefficient: float | None = None,
    rollouts: int = 200,
    max_rows: int = 5000,
    fitted_steps: int = 1000,
    title: str = "Is this policy to be trusted?",
    seed: int | None = 0,
) -> PolicyReport:
    """Say of a policy in a model, without a simulator, what to believe; write it into one HTML file.

    The policy acts in the model from where recorded episodes begin: does the ensemble agree on
    what it does (:func:`policy_disagreement`), is that near to recorded steps
    (:func:`policy_distance`), and what does the model promise, with and without a
    penalty (:func:`policy_return`)? The log alone is asked, too: :func:`fitted_q_value`, and
    :func:`importance_weighted_value` where it has log-probabilities. A section that does not
    apply is left out, with the reason. A policy that draws does so as the exploration type
    around the call says.

    Args:
        env: an imagined env of batch size ``[]``.
        policy: acts in the imagined env.
        data: the recorded transitions that the model has learnt from, ``[*B, T]``, or a list of
            them. :func:`~torchrl_wm.trainers.load_transitions` reads logs.
        path: the file to write; an existing one is replaced. None writes none: the sections of
            the result go into another report.

    Keyword Args:
        real_env: a simulator, for the exploitation gap.
        real_policy: acts in it, where that takes something else; ``policy`` by default.
        real_episodes: how many.
        gamma: the discount of all values.
        horizons: for how many steps the model is to be believed. The longest is imagined.
        coefficient: of the penalty, see :func:`policy_return`.
        rollouts: how many are imagined.
        max_rows: how many recorded steps stand for the log, but in fitted Q evaluation, which
            sees all of them.
        fitted_steps: the gradient steps of fitted Q evaluation.
        title: the heading.
        seed: the seed of what is imagined and fitted. The random state is put back
            afterwards. With None, the current state is used.

    Returns:
        The measurements and the verdict.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if ``env`` is no WorldModelEnv.
        ValueError: if it is batch-locked, or a number is not positive.
        KeyError: if the data lack actions.
        IsADirectoryError: if ``path`` is a folder.

    Examples:
        >>> import os, tempfile
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import write_policy_report
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> model, _ = make_ensemble_world_model(real_env, hidden=(32,), termination="none")
        >>> policy = TensorDictModule(MLP(3, 1, num_cells=[32]), ["observation"], ["action"])
        >>> log = [real_env.rollout(50) for _ in range(4)]
        >>> report = write_policy_report(
        ...     WorldModelEnv(model, real_env), policy, log,
        ...     os.path.join(tempfile.mkdtemp(), "policy.html"), horizons=(5, 10), fitted_steps=10,
        ... )
        >>> sorted(report.left_out)
        ['exploitation_gap', 'importance']
    """
    path = None if path is None else file_of(path)
    horizons = tuple(horizons)
    counts = {"rollouts": rollouts, "max_rows": max_rows, "fitted_steps": fitted_steps}
    _check_numbers(gamma, horizons, {**counts, "real_episodes": real_episodes})
    new_figure(1, 1)  # refuses a missing matplotlib before anything is measured
    study = PolicyStudy(
        Recording.of(env, data, "write_policy_report"),
        policy,
        horizons,
        gamma=gamma,
        coefficient=coefficient,
        rollouts=rollouts,
        max_rows=max_rows,
        steps=fitted_steps,
        real_env=real_env,
        real_policy=real_policy,
        real_episodes=real_episodes,
    )
    with seeded(seed):
        made, measured, left_out = measure_sections(POLICY_SECTIONS, study)
    departures = {k: measured[k] for k in ("disagreement", "distance") if k in made}
    trust = trusted(departures, horizons)
    fitted = measured.get("fitted_q", None)
    trusts_log = fitted is not None and settled(fitted)
    top = _top(title, trust, fitted, made.get("exploitation_gap"))
    sections = (top, *made.values())
    if path is not None:
        reasons = {POLICY_SECTIONS[name][0]: why for name, why in left_out.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(page(title, _facts(study), sections, reasons), path)
    return PolicyReport(
        path=path,
        numbers=all_numbers(made),
        measured=measured,
        verdicts={name: section.verdict for name, section in made.items()},
        left_out=left_out,
        verdict=top.verdict,
        trusted_steps=0 if trust is None else trust.steps,
        score=float(fitted["value"]) if trusts_log else float("nan"),
        sections=sections,
    )


def _check_numbers(
    gamma: float, horizons: tuple[int, ...], counts: dict[str, int]
) -> None:
    if not horizons:
        raise ValueError("horizons must name at least one number of steps, got none.")
    for name, value in (*counts.items(), *(("horizons", h) for h in horizons)):
        positive(value, name)
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be above 0 and below 1, got {gamma}.")


def _top(
    title: str,
    trust: Trust | None,
    fitted: TensorDictBase | None,
    gap: ReportSection | None,
) -> ReportSection:
    """Return the first section, whose verdict is the sentence at the top."""
    names = ("imagined return", "real return")
    return ReportSection(
        title,
        how=RULES,
        verdict=judged(
            trust, fitted, None if gap is None else tuple(gap.numbers[k] for k in names)
        ),
        good=None if trust is None else trust.good,
        numbers={"steps to be trusted": 0 if trust is None else trust.steps},
    )


def _facts(study: PolicyStudy) -> dict[str, str]:
    recording = study.recording
    episodes = int((recording.valid & (recording.ages == 0)).sum())
    return {
        "model": type(study.env.world_model.dynamics).__name__,
        "latents": ", ".join(name_of(key) for key in study.env.latent_keys),
        "recorded steps": f"{int(recording.valid.sum()):,} in {episodes:,} episodes",
        "imagined": f"{study.rollouts} rollouts of {study.horizon} steps, from where episodes begin",
    }
