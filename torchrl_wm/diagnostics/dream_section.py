"""The section of a report on imagined images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from torchrl_wm.diagnostics.drawing import grid, measured, name_of
from torchrl_wm.diagnostics.dreams import (
    chosen_images,
    dream,
    dream_error,
    dream_frames,
)
from torchrl_wm.diagnostics.images import Image
from torchrl_wm.diagnostics.page import ReportSection
from torchrl_wm.diagnostics.recording import CONTEXT
from torchrl_wm.diagnostics.study import DoesNotApply, Measured, Study
from torchrl_wm.diagnostics.verdicts import graded
from torchrl_wm.diagnostics.video_files import gif
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many stretches are measured, and how many of them are shown.
_DREAMS, _SHOWN = 30, 4
_FPS = 5.0


def dreams(study: Study) -> Measured:
    """Show imagined images below the real ones, and measure how far they are off."""
    try:
        images = chosen_images(study.recording)
    except MissingEntryError:
        raise DoesNotApply("no image is predicted.") from None
    horizon = min(study.horizon, study.recording.longest_window() - CONTEXT + 1)
    if horizon < 1:
        raise DoesNotApply(f"no episode has more than {CONTEXT} frames.")
    found = dream(study.recording, images, horizon, CONTEXT, _DREAMS)
    error = dream_error(found)
    numbers, said, best = {}, [], []
    for image in images:
        model, persistence, mean = (
            error.get(join(name, image.key)).flatten().cpu()
            for name in ("model", "persistence", "mean")
        )
        name = name_of(image.key)
        for label, values in (
            ("model", model),
            ("the last frame stays", persistence),
            ("the mean frame", mean),
        ):
            numbers[f"{name}: {label}, 1 step"] = float(values[0])
            numbers[f"{name}: {label}, {horizon} steps"] = float(values[-1])
        better = int((model < torch.minimum(persistence, mean)).sum())
        best.append(better / horizon)
        said.append(
            f"{name} is off by {model.mean():.1%} of its range on average over {horizon} steps (the "
            f"last frame by {persistence.mean():.1%}, the mean frame by {mean.mean():.1%}), and less "
            f"than both at {better} of them"
        )
    film = dream_frames(found.some(_SHOWN))
    section = ReportSection(
        "What the model dreams",
        how=(
            f"Real frames above those of the model, and the difference, in which black is right. "
            f"With a green border the model sees the {CONTEXT} real frames; with a red one it "
            f"imagines {horizon} steps with the recorded actions. Numbers are mean absolute errors as "
            f"shares of the range from black to white, beside those of the guesses that the last "
            f"frame stays and of the mean frame."
        ),
        verdict="; ".join(said) + ".",
        good=graded(min(best)),
        pictures=[gif(film, _FPS), _error_figure(error, images)],
        numbers=numbers,
    )
    return section, error


def _error_figure(error: TensorDictBase, images: Sequence[Image]) -> Figure:
    """Draw the error of images over the horizon, a plot for each."""
    figure, axes = grid(len(images), 4.4, 2.8, columns=2)
    for place, image in zip(axes, images):
        for name, style, label in (
            ("model", "-", "model"),
            ("persistence", "--", "the last frame stays"),
            ("mean", ":", "mean frame"),
        ):
            values = measured(error, join(name, image.key), image.key).flatten()
            place.plot(range(1, len(values) + 1), values, style, label=label)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set(xlabel="steps ahead", ylabel=f"mean error of {name_of(image.key)}")
        place.set_ylim(bottom=0)
    axes[0].legend(fontsize="small")
    return figure
