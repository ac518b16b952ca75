"""The sections of a report on rewards, ends and returns: what is measured, drawn, and said about it."""

from __future__ import annotations

import math

from torchrl_wm.diagnostics.drawing import name_of
from torchrl_wm.diagnostics.page import ReportSection
from torchrl_wm.diagnostics.plots import plot_reward_error
from torchrl_wm.diagnostics.returns import exploitation_gap
from torchrl_wm.diagnostics.rewards import reward_error
from torchrl_wm.diagnostics.statistics_plots import (
    plot_exploitation_gap,
    plot_terminations,
)
from torchrl_wm.diagnostics.study import DoesNotApply, Measured, Study
from torchrl_wm.diagnostics.terminations import (
    predicts_terminations,
    termination_metrics,
)
from torchrl_wm.diagnostics.verdicts import graded, sentence
from torchrl_wm.modules.keys import join


def rewards(study: Study) -> Measured:
    """Measure errors and correlations of rewards and returns."""
    if not study.recording.rewards(study.recording.steps[:1, :1]):
        raise DoesNotApply("no rewards were recorded.")
    error = reward_error(
        study.env,
        study.episodes,
        study.horizon,
        stride=study.stride,
        particles=study.particles,
    )
    numbers, pictures, worst, said = {}, [], [], []
    for key in error.get("rmse").keys(True, True):
        name = name_of(key)
        rmse = error.get(join("rmse", key)).flatten(1).mean(-1)
        mean = error.get(join("mean", key)).flatten(1).mean(-1)
        related = error.get(join("return_correlation", key)).flatten(1).mean(-1)
        numbers[f"{name}: RMSE, 1 step"] = float(rmse[0])
        numbers[f"{name}: RMSE, {study.horizon} steps"] = float(rmse[-1])
        numbers[f"{name}: RMSE of the mean"] = float(mean[-1])
        numbers[f"{name}: correlation of {study.horizon}-step returns"] = float(
            related[-1]
        )
        pictures.append(plot_reward_error(error, key))
        if not math.isnan(float(related[-1])):
            worst.append(float(related[-1]))
            said.append(
                f"predicted and real {study.horizon}-step sums of {name} correlate by "
                f"{float(related[-1]):.2f}"
            )
        else:
            said.append(f"the sums of {name} do not vary, so nothing tells plans apart")
    low = min(worst, default=math.nan)
    section = ReportSection(
        "Rewards",
        how=(
            "A planner compares sums of predicted rewards: their correlation with the real sums "
            "says whether it can tell good plans from bad ones."
        ),
        verdict=sentence(said),
        good=graded(low),
        pictures=pictures,
        numbers=numbers,
    )
    return section, error


def terminations(study: Study) -> Measured:
    """Measure precision and recall of predicted ends."""
    if not predicts_terminations(study.env):
        raise DoesNotApply("the model has no termination head.")
    metrics = termination_metrics(study.env, study.episodes)
    groups = [key for key in metrics.keys(True, True) if name_of(key).endswith("f1")]
    numbers, pictures, said, scores = {}, [], [], []
    for key in groups:
        prefix = () if isinstance(key, str) else key[:-1]
        values = {
            name: float(metrics.get(join(*prefix, name)))
            for name in ("precision", "recall", "f1", "base_rate", "predicted_rate")
        }
        label = f"{name_of(prefix)}: " if prefix else ""
        numbers.update(
            {
                f"{label}{name.replace('_', ' ')}": value
                for name, value in values.items()
            }
        )
        pictures.append(plot_terminations(metrics, prefix))
        if values["base_rate"] == 0:
            said.append(
                f"{label}no recorded step terminates, and {values['predicted_rate']:.1%} of them "
                f"are predicted to; record some that do, or, if no episode ever does, make a model "
                f"without terminations (termination='none')"
            )
            continue
        scores.append(values["f1"])
        right = (
            f"{values['precision']:.0%} of the predicted ends are right"
            if values["predicted_rate"]
            else "no end is predicted"
        )
        said.append(f"{label}{values['recall']:.0%} of the ends are found, {right}")
    low = min(scores, default=math.nan)
    section = ReportSection(
        "Terminations",
        how=(
            "One step ahead, at the head's own threshold. Ends that are missed let imagined "
            "episodes earn rewards that no real one gets; ends that are made up cut them short."
        ),
        verdict=sentence(said),
        good=graded(low),
        pictures=pictures,
        numbers=numbers,
    )
    return section, metrics


def gap(study: Study) -> Measured:
    """Compare the returns that the model promises a policy with those that it gets."""
    if study.policy is None or study.real_env is None:
        raise DoesNotApply(
            "it needs the real env, and a policy that can act in the imagined one as well, which a "
            "planner of the real env cannot: write_report(..., policy=..., real_env=...)"
        )
    measured = exploitation_gap(
        study.env,
        study.policy,
        study.real_env,
        study.policy_steps,
        episodes=study.policy_episodes,
        real_policy=study.real_policy,
    )
    real, difference = measured["real_return"], measured["gap"]
    mean, count = float(difference.mean()), len(measured)
    error = float(difference.std() / count**0.5) if count > 1 else math.nan
    scale = max(float(real.mean().abs()), 1e-12)
    share = abs(mean) / scale
    kind = "more than the real env pays" if mean > 0 else "less than the real env pays"
    verdict = (
        f"The model promises {abs(mean):.4g} {kind} ({share:.0%} of the real return, "
        f"{float(real.mean()):.4g})."
    )
    within = share < 0.1 or abs(mean) < 2 * error
    section = ReportSection(
        "Exploitation gap",
        how=(
            f"Returns of the policy over {study.policy_steps} steps at most, imagined and real, "
            f"from the same starts. Far above the diagonal the policy lives on the model's errors."
        ),
        verdict=verdict,
        good=True if within else False if mean > 0 and share > 0.25 else None,
        pictures=[plot_exploitation_gap(measured)],
        numbers={
            "real return": float(real.mean()),
            "imagined return": float(measured["imagined_return"].mean()),
            "gap": mean,
            "standard error of the gap": error,
            "episodes": count,
        },
    )
    return section, measured
