"""What all builders share: configs, the registry of builders, and the recipe of a model."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm.models.specs import EnvSpecs, read_specs
from torchrl_wm.modules import WorldModel
from torchrl_wm.objectives import WorldModelLoss

#: Wires a model and its loss from specs and a config.
Wire = Callable[[EnvSpecs, Any], tuple[WorldModel, WorldModelLoss]]


@dataclass(frozen=True)
class Builder:
    """A kind of ready-made model.

    Args:
        name: what it is called in files.
        config: the dataclass of its settings.
        wire: wires model and loss.
    """

    name: str
    config: type
    wire: Wire


@dataclass(frozen=True)
class Recipe:
    """What a ready-made model was made from, with which it can be made again.

    Args:
        builder: the name of the builder.
        config: its settings.
        specs: the entries of the env.
    """

    builder: str
    config: Any
    specs: EnvSpecs


#: The activations that a config can name.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
#: The builders by name.
BUILDERS: dict[str, Builder] = {}


def register(name: str, config: type) -> Callable[[Wire], Wire]:
    """Make a wiring function known under ``name``, for :func:`build` and for files."""

    def add(wire: Wire) -> Wire:
        BUILDERS[name] = Builder(name, config, wire)
        return wire

    return add


def build(
    name: str, env: EnvBase, config: Any, overrides: dict[str, Any]
) -> tuple[WorldModel, WorldModelLoss]:
    """Build a ready-made model for ``env``, on the device of ``env``.

    Args:
        name: the builder.
        env: the env whose specs are read. A config with ``observation_keys``
            chooses among its observations.
        config: the settings; the builder's defaults if None.
        overrides: settings by name, which go before the config's.
    """
    config = resolve_config(BUILDERS[name].config, config, overrides)
    specs = read_specs(env, observation_keys=getattr(config, "observation_keys", None))
    with nullcontext() if env.device is None else torch.device(env.device):
        return rebuild(Recipe(name, config, specs))


def rebuild(recipe: Recipe) -> tuple[WorldModel, WorldModelLoss]:
    """The model and the loss of a recipe, newly initialised; the model keeps the recipe."""
    world_model, loss = BUILDERS[recipe.builder].wire(recipe.specs, recipe.config)
    world_model.__dict__["recipe"] = recipe
    return world_model, loss


def resolve_config(kind: type, config: Any, overrides: dict[str, Any]) -> Any:
    """A config with some settings replaced.

    Raises:
        TypeError: if ``config`` is of another class, or a setting is unknown.
    """
    config = kind() if config is None else config
    if not isinstance(config, kind):
        raise TypeError(
            f"config must be a {kind.__name__}, got {type(config).__name__}. Settings can also "
            f"be given by name."
        )
    known = [field.name for field in fields(kind)]
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(
                f"{kind.__name__} has no setting {name!r}.{hint} There are {known}."
            )
    return replace(config, **overrides)


def activation(name: str) -> type[nn.Module]:
    """The class of an activation by its name in a config.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"Unknown activation {name!r}. Valid choices are {sorted(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


class Same(nn.Module):
    """Gives what it gets: the encoder of a model whose latents are observations."""

    def forward(self, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The values themselves; a single one as itself."""
        return values[0] if len(values) == 1 else values
