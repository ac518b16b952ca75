"""The sections of a report on predicted observations: what is measured, drawn, and said about it."""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.diagnostics.calibration import calibration_curve
from torchrl_wm.diagnostics.compare_frames import render_comparison
from torchrl_wm.diagnostics.disagreements import disagreement
from torchrl_wm.diagnostics.drawing import MAX_DIMS, name_of
from torchrl_wm.diagnostics.fan import prediction_fan
from torchrl_wm.diagnostics.images import images_of
from torchrl_wm.diagnostics.one_step import one_step_prediction
from torchrl_wm.diagnostics.open_loop import open_loop_error
from torchrl_wm.diagnostics.page import ReportSection
from torchrl_wm.diagnostics.plots import plot_open_loop_error, plot_prediction_fan
from torchrl_wm.diagnostics.recording import CONTEXT, spread
from torchrl_wm.diagnostics.statistics_plots import (
    plot_calibration,
    plot_disagreement,
    plot_one_step,
    r_squared,
)
from torchrl_wm.diagnostics.study import DoesNotApply, Measured, Study
from torchrl_wm.diagnostics.unchanging import names_of
from torchrl_wm.diagnostics.verdicts import (
    beats_baselines,
    confidence,
    judged_fan,
    leading,
)
from torchrl_wm.diagnostics.video_files import gif
from torchrl_wm.modules.keys import join

#: Entries of more dims than this, such as images, are drawn only by their means.
MANY_DIMS = 128

_FAN_STARTS, _FAN_PARTICLES, _VIDEO_STEPS, _VIDEO_HEIGHT = 30, 50, 100, 200


def open_loop(study: Study) -> Measured:
    """Measure errors over the horizon beside the baselines."""
    error = open_loop_error(
        study.env,
        study.episodes,
        study.horizon,
        stride=study.stride,
        particles=study.particles,
    )
    numbers, said, best = {}, [], []
    keys = _keys(error, "persistence")
    varying = [key for key in keys if _varies(error, key, study).any()]
    if not varying:
        names = " and ".join(name_of(key) for key in keys)
        do = "does" if len(keys) == 1 else "do"
        raise DoesNotApply(f"{names} {do} not change in the episodes.")
    for key in varying:
        share, persistence = _shares(error, key, study)
        beats = leading((share < persistence).tolist())
        numbers[f"{name_of(key)}: 1 step, share of the data's spread"] = float(share[0])
        numbers[f"{name_of(key)}: {len(share)} steps"] = float(share[-1])
        numbers[f"{name_of(key)}: beats persistence up to k"] = beats
        beats_mean = leading((share < 1).tolist())
        numbers[f"{name_of(key)}: beats the mean up to k"] = beats_mean
        best.append(min(beats, beats_mean) / len(share))
        said.append(f"{name_of(key)} {beats_baselines(beats, beats_mean, len(share))}")
        behind = _behind(error, key, study)
        if beats and behind.any():
            best.append(best.pop() / 2)  # neither good nor bad
            names = names_of({key: behind}, study.labels)
            verb = "is" if int(behind.sum()) == 1 else "are"
            said[-1] += (
                f" as a mean over its dims, of which {', '.join(names)} {verb} behind persistence "
                f"at most steps"
            )
    _choose_worst(error, study)
    pictures = []
    for key in varying:
        many = error.get(join("model", key))[0].numel() > MANY_DIMS
        kwargs = {} if many else {"per_dim": True, **study.drawing(key)}
        pictures.append(plot_open_loop_error(error, key, **kwargs))
    section = ReportSection(
        "Open-loop prediction error",
        how=(
            f"The model imagines {study.horizon} steps with the recorded actions and never looks "
            f"at the observations again. Persistence predicts that nothing changes, mean predicts "
            f"the data's mean. Trust plans and imagined rollouts only as far as the model is below "
            f"both. If there are many dims, those with the largest error are shown."
        ),
        verdict="; ".join(said) + ".",
        good=True if min(best) == 1 else False if min(best) == 0 else None,
        pictures=pictures,
        numbers=numbers,
        note=study.note(keys),
    )
    return section, error


def fan(study: Study) -> Measured:
    """Compare the particles' spread with the truth."""
    starts, keys = _fan_starts(study)
    measured = prediction_fan(
        study.env, starts, study.horizon, particles=_FAN_PARTICLES, keys=keys
    )
    inside, widths, pictures, numbers = [], [], [], {}
    for key in keys:
        quantiles = measured.get(join("quantiles", key)).flatten(3)  # [W, H, Q, D]
        real = measured.get(join("real", key)).flatten(2)
        varies = study.varies(key, real.shape[-1]).to(real.device)
        if not varies.any():
            continue
        pictures.append(plot_prediction_fan(measured, key, **study.drawing(key)))
        quantiles, real = quantiles[..., varies], real[..., varies]
        low, high = quantiles[:, :, 0], quantiles[:, :, -1]
        hit = ((real >= low) & (real <= high)).float().mean()
        widths.append(float((high - low).mean() / real.std().clamp_min(1e-12)))
        inside.append(float(hit))
        numbers[f"{name_of(key)}: truth within the 90% fan"] = float(hit)
    verdict, good, study.fan = judged_fan(inside, widths)
    section = ReportSection(
        "Prediction fan",
        how=(
            f"{_FAN_PARTICLES} particles imagine the recorded actions from one start. A good fan "
            f"is narrow, holds the truth, and widens where the model begins to guess."
        ),
        verdict=verdict,
        good=good,
        pictures=pictures,
        numbers=numbers,
        note=study.note(keys),
    )
    return section, measured


def _fan_starts(study: Study) -> tuple[TensorDictBase, list[NestedKey]]:
    """Return windows ``[W, H]`` to imagine again, and the entries that can be drawn."""
    steps = study.recording.steps
    row, time = study.recording.window_index(study.horizon)
    rows = study.episodes.reshape(-1, study.episodes.batch_size[-1])
    if study.env.world_model.is_recurrent:
        rows = steps  # with the latents filtered up to each start
        has_context = study.recording.ages[row, time[:, :1]].flatten() >= CONTEXT - 1
        if has_context.any():
            row, time = row[has_context], time[has_context]
    chosen = spread(len(row), _FAN_STARTS)
    row, time = (i[chosen.to(i.device)].to(rows.device) for i in (row, time))
    observed = study.recording.real(steps[:1, :1])
    keys = [key for key, value in observed.items() if value[0, 0].numel() <= MANY_DIMS]
    keys += list(study.recording.rewards(steps[:1, :1]))
    if not keys:
        raise DoesNotApply("all that is predicted has too many dims to draw.")
    return rows[row, time], keys


def one_step(study: Study) -> Measured:
    """Compare predicted with real changes."""
    prediction = one_step_prediction(study.env, study.episodes)
    keys = [
        key
        for key in prediction.get("real").keys(True, True)
        if prediction.get(join("real", key))[0].numel() <= MANY_DIMS
    ]
    if not keys:
        raise DoesNotApply("all that is predicted has too many dims to draw.")
    numbers, scores, pictures = {}, [], []
    for key in keys:
        real = prediction.get(join("real", key)).flatten(1).float()
        mean = prediction.get(join("loc", key)).flatten(2).float().mean(1)
        before = prediction.get(join("start", key), None)
        if before is not None:
            real, mean = real - before.flatten(1), mean - before.flatten(1)
        varies = study.varies(key, real.shape[1]).nonzero().flatten().tolist()
        values = [r_squared(mean[:, d], real[:, d]) for d in varies]
        values = [value for value in values if not math.isnan(value)]
        if values:
            numbers[f"{name_of(key)}: lowest R²"] = min(values)
            numbers[f"{name_of(key)}: mean R²"] = sum(values) / len(values)
            scores.append((min(values), name_of(key)))
            pictures.append(plot_one_step(prediction, key, **study.drawing(key)))
    verdict, good = "Nothing changes in the episodes.", None
    if scores:
        low, where = min(scores)
        verdict = f"The model explains at least {low:.1%} of the change of every dim ({where})."
        if low < 0:
            verdict = f"A dim of {where} is predicted worse than by its mean change."
        good = True if low > 0.95 else False if low < 0.5 else None
    section = ReportSection(
        "One-step prediction",
        how=(
            "Predicted against real change over one step (reward: the value); on the diagonal it "
            "is right. R² is the share of the variance that the members' mean explains."
        ),
        verdict=verdict,
        good=good,
        pictures=pictures,
        numbers=numbers,
        note=study.note(keys),
    )
    return section, prediction


def calibration(study: Study) -> Measured:
    """Compare nominal with empirical coverage."""
    coverage = calibration_curve(study.env, study.episodes)
    level = coverage.get("level")
    numbers, pictures, off, signed = {}, [], [], {}
    keys = list(coverage.get("mixture").keys(True, True))
    for key in keys:
        difference = coverage.get(join("mixture", key)).flatten(1) - level
        varies = study.varies(key, difference.shape[1]).to(difference.device)
        if not varies.any():
            continue
        off.append(float(difference[:, varies].abs().mean()))
        signed[name_of(key)] = float(difference[:, varies].mean())
        numbers[f"{name_of(key)}: mean distance from nominal"] = off[-1]
        if difference.shape[1] <= MANY_DIMS:
            pictures.append(plot_calibration(coverage, key, **study.drawing(key)))
    if not off:
        raise DoesNotApply("nothing that the model predicts changes in the episodes.")
    mean = sum(off) / len(off)
    verdict = f"One step ahead, coverage is off by {mean:.1%} on average: " + (
        "well calibrated."
        if mean < 0.05
        else f"{confidence(mean, signed, study.fan, study.horizon)}."
    )
    section = ReportSection(
        "Calibration",
        how=(
            "How often the truth lies within the predicted interval of a given probability. On "
            "the diagonal the predicted variance is right; below it the model is surer than it "
            "may be. Only episodes that the model was not trained on say anything here."
        ),
        verdict=verdict,
        good=True if mean < 0.05 else False if mean > 0.15 else None,
        pictures=pictures,
        numbers=numbers,
        note=study.note(keys),
    )
    return section, coverage


def disagreements(study: Study) -> Measured:
    """Compare the disagreement of the members with their error."""
    measured = disagreement(study.env, study.episodes)
    rank = float(measured["rank_correlation"])
    valid = measured["collector", "mask"]
    if rank > 0.5:
        verdict = "Where the members disagree, they are wrong: disagreement is a good warning."
    elif rank > 0.2:
        verdict = "Disagreement says something about the error, but not much."
    elif not math.isnan(rank):
        verdict = "Disagreement says nothing about the error in these episodes."
    else:
        verdict = (
            "All disagreements or all errors are equal: there is nothing to compare."
        )
    if not math.isnan(rank):
        verdict += f" The rank correlation is {rank:.2f}."
    section = ReportSection(
        "Disagreement of the ensemble",
        how=(
            "The spread of the members' one-step predictions beside the error of their mean, in "
            "units of the data's spread, and the rank correlation of the two. Low correlation is "
            "no fault where all errors are small."
        ),
        verdict=verdict,
        good=True if rank > 0.5 else None,
        pictures=[plot_disagreement(measured)],
        numbers={
            "rank correlation": rank,
            "median disagreement": float(measured["disagreement"][valid].median()),
            "median error": float(measured["error"][valid].median()),
        },
        note=study.note(list(study.constant)),
    )
    return section, measured


def video(study: Study) -> Measured:
    """Film one episode as a GIF, real beside imagined."""
    render = study.render if study.render is not None else study.real_env
    rows = study.episodes.reshape(-1, study.episodes.batch_size[-1])
    lengths = study.recording.valid.sum(1)
    episode = rows[int(lengths.argmax())]
    if study.render is None and images_of(study.env, study.recording.steps):
        raise DoesNotApply("the film of what the model dreams shows it.")
    if render is None:
        raise DoesNotApply(
            "nothing says how to draw: render=... (the real env's id, or a function)."
        )
    settings = {"max_steps": _VIDEO_STEPS, "height": _VIDEO_HEIGHT}
    frames = render_comparison(study.env, episode, render=render, **settings)
    section = ReportSection(
        "Real beside imagined",
        how=(
            f"The first {len(frames) - 1} steps of a recorded episode, and what the model imagines "
            f"with the same actions from its start, without another look. The difference is black "
            f"where the pictures agree. The returns are those so far."
        ),
        pictures=[gif(frames)],
    )
    return section, TensorDict({}, batch_size=[])


def _keys(error: TensorDictBase, name: str) -> list[NestedKey]:
    return list(error.get(name).keys(True, True))


def _choose_worst(error: TensorDictBase, study: Study) -> None:
    """Let figures of entries with too many dims show those with the largest error."""
    for key in _keys(error, "persistence"):
        model, spread = (error.get(join(name, key)) for name in ("model", "mean"))
        varies = _varies(error, key, study)
        if not MAX_DIMS < model[0].numel() <= MANY_DIMS or not varies.any():
            continue
        ratio = (model.flatten(1)[-1] / spread.flatten(1)[-1]).nan_to_num(-1, posinf=-1)
        order = ratio.cpu().where(varies, -1).argsort(descending=True)
        count = min(MAX_DIMS, int(varies.sum()))
        study.worst[key] = sorted(order[:count].tolist())


def _varies(error: TensorDictBase, key: NestedKey, study: Study) -> torch.Tensor:
    """Return the dims that change in the episodes and in all windows, ``[D]`` bool."""
    spread = error.get(join("mean", key)).flatten(1).cpu()
    return (spread > 0).all(0) & study.varies(key, spread.shape[1])


def _behind(error: TensorDictBase, key: NestedKey, study: Study) -> torch.Tensor:
    """Return the dims that are no better than persistence at most of the steps, ``[D]`` bool.

    None of many: single pixels say nothing.
    """
    model, persistence = (
        error.get(join(name, key)).flatten(1).cpu() for name in ("model", "persistence")
    )
    is_behind = (model >= persistence).float().mean(0) > 0.5
    few = model.shape[1] <= MANY_DIMS
    return is_behind & _varies(error, key, study) & few


def _shares(
    error: TensorDictBase, key: NestedKey, study: Study
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return errors as shares of the data's spread, means over the dims that vary, ``[H]`` each."""
    spread = error.get(join("mean", key)).flatten(1)
    varies = _varies(error, key, study).to(spread.device)
    out = []
    for name in ("model", "persistence"):
        values = error.get(join(name, key)).flatten(1)
        out.append((values[:, varies] / spread[:, varies]).mean(-1))
    return out[0], out[1]
