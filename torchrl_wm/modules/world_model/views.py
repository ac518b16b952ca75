"""A world model that shares its components with another one, but for some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from torchrl_wm.modules.integrity import is_pristine, mark_pristine
from torchrl_wm.modules.world_model.world_model import WorldModel


def view_of(
    world_model: WorldModel,
    components: dict[str, nn.Module | None],
    changes: dict[str, Any],
) -> WorldModel:
    """Return the same world model with some components replaced.

    Whatever is not replaced is shared, initial state and sequence included, so that training
    either trains both.

    Args:
        world_model: the model.
        components: the components that replace its own, by name; None leaves one out.
        changes: what a ready-made model's recipe has otherwise, so that the view can be saved as
            the model can.

    Returns:
        The new world model, in the same mode (training or not).
    """
    view = WorldModel(
        **{**world_model.components, **components},
        initial_state=world_model.initial_state,
        memory=world_model.memory_keys,
        sequence=world_model.sequence,
    )
    view.training = world_model.training
    recipe = getattr(world_model, "recipe", None)
    if recipe is not None:
        view.recipe = replace(recipe, **changes)
    if is_pristine(world_model):
        mark_pristine(view)
    return view
