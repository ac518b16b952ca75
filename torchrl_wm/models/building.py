"""The registry of builders, and how they build a model from a config and an env."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm._checks import check_choice, check_settings
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.specs import read_specs
from torchrl_wm.modules import Mish, with_penalty, WorldModel
from torchrl_wm.modules.blocks.normalizer import share_notice
from torchrl_wm.modules.integrity import mark_pristine
from torchrl_wm.modules.keys import as_tuple, sibling, suffixed, unique
from torchrl_wm.objectives import WorldModelLoss

#: Wires a model and its loss from specs and a config.
Wire = Callable[[EnvSpecs, Any], tuple[WorldModel, WorldModelLoss]]


@dataclass(frozen=True)
class Builder:
    """A kind of ready-made model.

    Args:
        name: its name in files.
        config: the dataclass of its settings.
        wire: the function that wires model and loss.
        reserved: the names of the model's own entries, beside those of its heads.
    """

    name: str
    config: type
    wire: Wire
    reserved: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blueprint:
    """The settings and specs of a ready-made model, from which it can be made again.

    Args:
        builder: the name of the builder.
        config: the settings.
        specs: the entries of the env.
        penalty: the settings of :func:`~torchrl_wm.modules.with_penalty`, by name; None for a
            model without.
    """

    builder: str
    config: Any
    specs: EnvSpecs
    penalty: dict[str, Any] | None = None


#: Entries that a loss does not take for observations: weights, and labels under other names.
_READ_BY_LOSSES = frozenset(
    {
        "weight",
        "priority_weight",
        "member_weight",
        "target_latent",
        "predicted_latent",
        "reconstructed_observation",
        "true_reward",
        "true_done",
        "true_terminated",
    }
)
#: The activations that a config can name.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "mish": Mish,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
#: The builders by name.
BUILDERS: dict[str, Builder] = {}


def register(
    name: str, config: type, *, reserved: Sequence[str] = ()
) -> Callable[[Wire], Wire]:
    """Register a wiring function under a name, for :func:`build` and for files.

    Args:
        name: the name.
        config: the dataclass of its settings.
        reserved: the names of the model's own entries, which no entry of an env may have.
    """

    def add(wire: Wire) -> Wire:
        BUILDERS[name] = Builder(name, config, wire, tuple(reserved))
        return wire

    return add


def build(
    name: str, env: EnvBase, config: Any, overrides: dict[str, Any]
) -> tuple[WorldModel, WorldModelLoss]:
    """Build a ready-made model for ``env``, on the device of ``env``.

    Args:
        name: the name of the builder.
        env: the env whose specs are read. A config with ``observation_keys``
            chooses among its observations.
        config: the settings; the builder's defaults if None.
        overrides: settings by name, which replace those of the config.

    Returns:
        The model and its loss.

    Raises:
        TypeError: if ``config`` is of another class, or a setting is unknown.
        ValueError: if the builder cannot serve the env.
    """
    config = resolve_config(BUILDERS[name].config, config, overrides)
    specs = read_specs(env, observation_keys=getattr(config, "observation_keys", None))
    _check_names(BUILDERS[name], env, specs)
    with nullcontext() if env.device is None else torch.device(env.device):
        return rebuild(Blueprint(name, config, specs))


def rebuild(blueprint: Blueprint) -> tuple[WorldModel, WorldModelLoss]:
    """Build the model and the loss of a blueprint, which the model keeps as its ``recipe``.

    The loss is that of the model without its penalty.
    """
    wire = BUILDERS[blueprint.builder].wire
    world_model, loss = wire(blueprint.specs, blueprint.config)
    world_model.recipe = replace(blueprint, penalty=None)
    mark_pristine(world_model)
    share_notice(world_model)
    if blueprint.penalty is not None:
        world_model = with_penalty(world_model, **blueprint.penalty)
    return world_model, loss


def _check_names(builder: Builder, env: EnvBase, specs: EnvSpecs) -> None:
    """Refuse an env with entries that the model or its loss would take for their own.

    Raises:
        ValueError: naming the entries.
    """
    heads = ("terminated_logits", "continue_pred", "continue_prob")
    own = {
        *builder.reserved,
        *(sibling(specs.done.key, name) for name in heads),
        suffixed(specs.reward.key, "_logits"),
    }
    used = [*specs.observation_keys, *specs.action_keys, specs.reward.key]
    taken = {key: "the model's own entries" for key in used if key in own}
    # A loss reads these entries of a batch even if the model does not.
    present = [*unique(env.full_observation_spec_unbatched.keys(True, True)), *used]
    for key in present:
        if key in _READ_BY_LOSSES:
            taken[key] = "the entries that the loss reads, such as weights"
    if taken:
        key, what = next(iter(taken.items()))
        other = sibling(key, f"env_{as_tuple(key)[-1]}")
        kind = "inv" if key in specs.action_keys else ""
        change = (
            f"in_keys=[], out_keys=[], in_keys_inv=[{key!r}], out_keys_inv=[{other!r}]"
            if kind
            else f"in_keys=[{key!r}], out_keys=[{other!r}]"
        )
        raise ValueError(
            f"make_{builder.name}_world_model cannot serve an env with the entry {key!r}: this is "
            f"one of {what}, and the two would be mixed up (in all: {list(taken)}). Rename it: "
            f"torchrl.envs.TransformedEnv(env, torchrl.envs.RenameTransform({change}))."
        )


def resolve_config(kind: type, config: Any, overrides: dict[str, Any]) -> Any:
    """Return a config with some settings replaced.

    Raises:
        TypeError: if ``config`` is of another class, or a setting is unknown.
    """
    config = kind() if config is None else config
    if not isinstance(config, kind):
        raise TypeError(
            f"config must be a {kind.__name__}, got {type(config).__name__}. Settings can also "
            f"be given by name."
        )
    check_settings(kind, overrides)
    return replace(config, **overrides)


def activation(name: str) -> type[nn.Module]:
    """Return the class of an activation by its name in a config.

    Raises:
        ValueError: if the name is unknown.
    """
    check_choice("activation", name, sorted(ACTIVATIONS))
    return ACTIVATIONS[name]


class Same(nn.Module):
    """The identity of one or several entries: the encoder of latents that are observations."""

    def forward(self, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the values; a single one without a tuple."""
        return values[0] if len(values) == 1 else values
