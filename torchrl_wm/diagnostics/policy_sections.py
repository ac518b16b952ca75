"""The sections of a report on a policy: what is measured, drawn, and said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tensordict import TensorDict, TensorDictBase

from torchrl_wm.diagnostics.fitted_q import fitted_q_value
from torchrl_wm.diagnostics.importance import importance_weighted_value
from torchrl_wm.diagnostics.page import ReportSection
from torchrl_wm.diagnostics.policy_measures import (
    disagreement_of,
    distance_of,
    returns_of,
)
from torchrl_wm.diagnostics.policy_plots import (
    plot_policy_departure,
    plot_policy_return,
)
from torchrl_wm.diagnostics.policy_study import PolicyStudy
from torchrl_wm.diagnostics.policy_verdicts import MOST_BEYOND, settled, trusted
from torchrl_wm.diagnostics.returns import exploitation_gap, rolled_out
from torchrl_wm.diagnostics.statistics_plots import plot_exploitation_gap
from torchrl_wm.diagnostics.study import DoesNotApply, Measured
from torchrl_wm.modules.keys import as_tuple

#: Fewer episodes than this, by their weights, say nothing.
_FEWEST_EPISODES = 5

_UNSETTLED = (
    "The values did not settle: more of them than a tenth are beyond what the rewards of the log could "
    "add up to. Take more gradient steps (fitted_steps) or a smaller gamma; if they do not help, "
    "the policy does what is nowhere in the log, and no value of the log holds for it."
)


def disagreement(study: PolicyStudy) -> Measured:
    """Measure the disagreement along imagined rollouts beside that in the data."""
    how = (
        "How much the ensemble's members differ on what the policy does in the model, from where "
        "recorded episodes begin, beside the steps of the log. Where they differ more than on "
        "99 % of these, they guess."
    )
    found = disagreement_of(study)
    return _departure(
        study, found, "Disagreement on what the policy does", how, "disagreement"
    )


def distance(study: PolicyStudy) -> Measured:
    """Measure the distance of imagined rollouts to the data."""
    how = (
        "The distance of the imagined latents and actions to the nearest recorded ones, the root "
        "mean square over dims in units of the data's spread, beside that of recorded steps to "
        "other episodes. It needs no ensemble, and sees what all members have learnt wrong alike."
    )
    section, found = _departure(
        study, distance_of(study), "Distance to the data", how, "distance"
    )
    total = int(study.recording.valid.sum())
    if total > study.max_rows:
        note = f"{study.max_rows:,} of {total:,} recorded steps stand for the log."
        section = replace(section, note=note)
    return section, found


def returns(study: PolicyStudy) -> Measured:
    """Measure what the model promises over horizons, with and without a penalty."""
    found = returns_of(study)
    plain, penalised = found["return"], found.get("penalised", None)
    numbers, note = {}, ""
    for horizon in sorted(study.horizons):
        value = plain[:, horizon - 1]
        numbers[f"return over {horizon} steps"] = float(value.mean())
        if penalised is not None:
            numbers[f"with penalty, {horizon} steps"] = float(
                penalised[:, horizon - 1].mean()
            )
    error = float(plain[:, -1].std(unbiased=False) / len(plain) ** 0.5)
    numbers[f"standard error, {study.horizon} steps"] = error
    if penalised is None:
        verdict = f"The model promises {float(plain[:, -1].mean()):.4g} over {study.horizon} steps."
        note = (
            "No disagreement is known along the rollouts that could be penalised: the model is no "
            "ensemble, or has a memory."
        )
    else:
        cost = float((plain - penalised)[:, -1].mean())
        verdict = (
            f"Over {study.horizon} steps the model promises {float(plain[:, -1].mean()):.4g}, and "
            f"{float(penalised[:, -1].mean()):.4g} with the penalty, which takes {cost:.4g}."
        )
        numbers["coefficient of the penalty"] = float(found["coefficient"])
    section = ReportSection(
        "What the model promises",
        how=(
            f"Discounted returns (gamma = {study.gamma:g}) of {len(plain)} imagined rollouts over their "
            f"first steps, and with the members' disagreement (a penalised model: its measure) as a "
            f"penalty. Where both part, the promise comes from where the model knows little."
        ),
        verdict=verdict,
        pictures=[plot_policy_return(found)],
        numbers=numbers,
        note=note,
    )
    return section, found


def fitted(study: PolicyStudy) -> Measured:
    """Evaluate the policy on the log alone."""
    env = study.env
    found = fitted_q_value(
        study.policy,
        study.latents,
        gamma=study.gamma,
        steps=study.steps,
        observation_keys=env.latent_keys,
        action_keys=env.action_keys,
        reward_key=env.reward_key,
        done_key=_done_key(study),
        seed=None,
    )
    numbers = {
        "value": float(found["value"]),
        "least": float(found["low"]),
        "greatest": float(found["high"]),
        "the log's episodes": float(found["log_value"]),
        "the best tenth of them": float(found["best_log_value"]),
    }
    numbers["share of values beyond any sum of rewards"] = float(found["unsettled"])
    low, high, own = (float(found[name]) for name in ("low", "high", "log_value"))
    better = True if low > own else False if high < own else None
    kind = {True: "more than", False: "less than", None: "about as much as"}[better]
    verdict = (
        f"The policy is worth {numbers['value']:.4g} ({low:.4g} to {high:.4g}), {kind} the log's own "
        f"episodes ({own:.4g}; the best tenth of them {numbers['the best tenth of them']:.4g})."
    )
    section = ReportSection(
        "What the log says it is worth",
        how=(
            f"Fitted Q evaluation: the discounted value (gamma = {study.gamma:g}) at the episodes' "
            f"beginnings, learnt from the recorded transitions and the policy's own actions, without "
            f"the model. The interval is that of chance; it cannot know actions that the log lacks."
        ),
        verdict=verdict if settled(found) else _UNSETTLED,
        good=better if settled(found) else None,
        numbers=numbers,
    )
    return section, found


def importance(study: PolicyStudy) -> Measured:
    """Weigh the recorded episodes by how likely they are under the policy."""
    if len(study.env.action_keys) > 1:
        raise DoesNotApply("it takes policies of one action entry.")
    try:
        found = importance_weighted_value(
            study.policy,
            study.latents,
            gamma=study.gamma,
            action_key=study.env.action_keys[0],
            reward_key=study.env.reward_key,
            done_key=_done_key(study),
            seed=None,
        )
    except (KeyError, TypeError) as err:
        raise DoesNotApply(str(err)) from err
    numbers = {name: float(found[name]) for name in found.keys()}
    effective = numbers["effective_episodes"]
    says = effective >= _FEWEST_EPISODES
    section = ReportSection(
        "What recorded episodes say it is worth",
        how=(
            "Each recorded episode counts by how much likelier it is under the policy than under the "
            "one that recorded it. Few episodes with all the weight say nothing."
        ),
        verdict=(
            f"Of {numbers['episodes']:.0f} episodes {effective:.3g} count: "
            + (
                f"the policy is worth {numbers['value']:.4g} ({numbers['low']:.4g} to "
                f"{numbers['high']:.4g})."
                if says
                else "too few to say anything. The policy is too unlike the one that recorded."
            )
        ),
        numbers=numbers,
    )
    return section, found


def gap(study: PolicyStudy) -> Measured:
    """Compare what the model promises with what the real env pays."""
    if study.real_env is None:
        raise DoesNotApply("it needs a simulator: real_env=...")
    policy = study.real_policy or study.policy
    real = rolled_out(study.real_env, policy, study.horizon, study.real_episodes)
    numbers, found = {}, None
    for name, gamma in (("discounted ", study.gamma), ("", 1.0)):
        found = exploitation_gap(
            study.env, study.policy, real, study.horizon,
            gamma=gamma, reward_key=study.env.reward_key,
        )  # fmt: skip
        for key in ("imagined_return", "real_return", "gap"):
            numbers[f"{name}{key.replace('_', ' ')}"] = float(found[key].mean())
    count = len(found)
    error = float(found["gap"].std() / count**0.5) if count > 1 else float("nan")
    numbers["standard error of the gap"], numbers["episodes"] = error, count
    size, paid = numbers["gap"], numbers["real return"]
    within = abs(size) < 2 * error or abs(size) < 0.1 * abs(paid)
    section = ReportSection(
        "Exploitation gap",
        how=(
            f"Plain sums of the rewards over {study.horizon} steps at most, imagined and real, from the "
            f"same starts; the discounted ones are among the numbers. Far above the diagonal the "
            f"policy lives on the model's errors."
        ),
        verdict=(
            f"The model promises {numbers['imagined return']:.4g}, the real env pays {paid:.4g}: "
            + (
                "they agree."
                if within
                else f"{abs(size):.4g} too {'much' if size > 0 else 'little'}."
            )
        ),
        good=True if within else False if size > 0 else None,
        pictures=[plot_exploitation_gap(found)],
        numbers=numbers,
    )
    return section, found


#: Names, titles and makers, in the order of the report.
POLICY_SECTIONS: dict[str, tuple[str, Callable[[PolicyStudy], Measured]]] = {
    "disagreement": ("Disagreement on what the policy does", disagreement),
    "distance": ("Distance to the data", distance),
    "returns": ("What the model promises", returns),
    "fitted_q": ("What the log says it is worth", fitted),
    "importance": ("What recorded episodes say it is worth", importance),
    "exploitation_gap": ("Exploitation gap", gap),
}


def _departure(
    study: PolicyStudy, found: TensorDictBase, title: str, how: str, name: str
) -> tuple[ReportSection, TensorDict]:
    """Return the section on disagreement or distance."""
    quantiles, alive = found["quantiles"], study.alive.cpu()
    trust = trusted({name: found}, tuple(study.horizons))
    share = float((~(found["values"] <= found["edge"]))[alive].float().mean())
    numbers = {
        "data, median": float(found["data_quantiles"][1]),
        "data, 99 % quantile": float(found["edge"]),
        "share of imagined steps beyond it": share,
        "steps until more than 10 % are": trust.steps,
    }
    for horizon in sorted(study.horizons):
        numbers[f"median at step {horizon}"] = float(quantiles[horizon - 1, 1])
    said = f"{share:.1%} of the imagined steps are beyond the data's 99 % quantile of {name}"
    end = (
        f"never more than {MOST_BEYOND:.0%} at a step"
        if trust.good
        else f"more than {MOST_BEYOND:.0%} from step {trust.steps + 1} on"
    )
    section = ReportSection(
        title,
        how=how,
        verdict=f"{said}, {end}.",
        good=trust.good,
        pictures=[plot_policy_departure(found, name=name)],
        numbers=numbers,
    )
    return section, found


def _done_key(study: PolicyStudy):
    """Return the entry that says when episodes end."""
    return next(key for key in study.env.done_keys if as_tuple(key)[-1] == "done")
