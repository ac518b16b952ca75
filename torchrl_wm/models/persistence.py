"""World models in files: weights and plain data, never code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchrl_wm._files import check_plain, read_plain, write_plain
from torchrl_wm.models.building import Blueprint, BUILDERS, rebuild, resolve_config
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.modules import penalty_of, WorldModel
from torchrl_wm.modules.integrity import is_pristine

#: The mark of the package's files.
FORMAT = "torchrl_wm.world_model"
#: The version of the format, raised with each change that older versions cannot read. A file is of
#: the least one that can hold its model: a penalty takes 2, any other model 1.
VERSION = 2


def save_world_model(world_model: WorldModel, path: str | os.PathLike) -> None:
    """Write a world model into a file.

    The file holds tensors, numbers and strings, and is read with
    ``torch.load(weights_only=True)``. For a model that a builder made it also holds the
    settings and the env's specs, so that :func:`load_world_model` needs nothing else,
    unless a component, or a module within one, was replaced. It holds neither other
    changes of the modules after building nor the state of an optimiser. A model of
    :func:`~torchrl_wm.modules.with_penalty` is saved with its penalty.

    Args:
        world_model: the model, ready-made or wired by hand.
        path: the file. It is replaced as a whole, or not at all.

    Raises:
        TypeError: if the model is not a ``WorldModel``, or if its state or settings hold
            something that is neither a tensor nor plain data.
        ValueError: if the model has lazy parameters that are not initialised yet.

    Examples:
        >>> import tempfile, pathlib
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import (
        ...     load_world_model, make_ensemble_world_model, save_world_model
        ... )
        >>> world_model, loss = make_ensemble_world_model(GymEnv("CartPole-v1"), hidden=(32,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.pt"
        ...     save_world_model(world_model, path)
        ...     again = load_world_model(path)
        >>> again.recipe.config.hidden
        (32,)
    """
    if not isinstance(world_model, WorldModel):
        raise TypeError(
            f"world_model must be a torchrl_wm.WorldModel, got {type(world_model).__name__}."
        )
    own = world_model.state_dict()
    lazy = [key for key, value in own.items() if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"{lazy[0]!r} has no shape and no values yet (in all {len(lazy)} entries of the model's "
            f"state). Run the model once on data first: world_model(batch)."
        )
    state = {
        # Copies: for a view, the whole storage would be written.
        key: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for key, value in own.items()
    }
    check_plain(state, "state_dict")
    version = 1 if penalty_of(world_model) is None else 2
    content = {"format": FORMAT, "version": version, "state_dict": state}
    blueprint = getattr(world_model, "recipe", None)
    if not is_pristine(world_model):
        blueprint = None  # it would make another model
    content["recipe"] = None if blueprint is None else _plain_blueprint(blueprint)
    write_plain(content, path)


def load_world_model(
    path: str | os.PathLike,
    world_model: WorldModel | None = None,
    *,
    device: torch.device | str | None = None,
) -> WorldModel:
    """Read a world model from a file that :func:`save_world_model` wrote.

    Nothing in the file is executed, so that files of any origin are safe.

    Args:
        path: the file.
        world_model: a model to load the weights into, in place: its loss and optimiser
            stay valid. Needed for models that were wired by hand, that have replaced
            components, or that use functions of yours (``reward_function``). Without it
            the model is made anew from the settings in the file.

    Keyword Args:
        device: the device of a model that is made anew; the CPU by default.

    Returns:
        The world model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no world model file, or has a newer version,
            or if it holds another model than the given one.

    Examples:
        See :func:`save_world_model`. To continue training:

        >>> import tempfile, pathlib
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import load_world_model, make_mlp_world_model, save_world_model
        >>> env = GymEnv("CartPole-v1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.pt"
        ...     save_world_model(make_mlp_world_model(env, hidden=(32,))[0], path)
        ...     world_model, loss = make_mlp_world_model(env, hidden=(32,))
        ...     world_model = load_world_model(path, world_model)
    """
    content = _read(path)
    if world_model is None:
        return _made_anew(content, path, device)
    if device is not None:
        raise ValueError(
            "device is for models that are made anew. The given world_model stays on its device; "
            "move it with world_model.to(device)."
        )
    _check_same_model(content["recipe"], getattr(world_model, "recipe", None), path)
    _load_state(world_model, content["state_dict"], path)
    return world_model


# Reading -------------------------------------------------------------------


def _read(path: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a file, checked."""
    content = read_plain(
        path, "world model file", "save_world_model(world_model, path)"
    )
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} is a file of torch, but no world model file. A state_dict by "
            f"itself is loaded by world_model.load_state_dict(torch.load(path))."
        )
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} is of version {version!r} of the format, and this torchrl_wm "
            f"reads versions from 1 to {VERSION}. Update torchrl_wm, if a newer one wrote it."
        )
    kinds = {"state_dict": dict, "recipe": (dict, type(None))}
    lacking = [
        key
        for key, kind in kinds.items()
        if key not in content or not isinstance(content[key], kind)
    ]
    if lacking or not all(isinstance(key, str) for key in content["state_dict"]):
        raise ValueError(
            f"{os.fspath(path)!r} is damaged: it lacks {lacking or ['state_dict']}."
        )
    if _holds_tensors(content["recipe"]):  # comparisons of tensors have no truth value
        raise _foreign_settings(path, TypeError("a setting is a tensor"))
    return content


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, (*value, *value.values())))
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def _made_anew(
    content: dict[str, Any], path: Any, device: torch.device | str | None
) -> WorldModel:
    if content["recipe"] is None:
        raise ValueError(
            f"{os.fspath(path)!r} holds the weights of a world model that was wired by hand, or a "
            f"component of it was replaced. Wire it again and load into it: "
            f"load_world_model(path, world_model)."
        )
    functions = content["recipe"].get("functions")
    if functions:
        raise ValueError(
            f"{os.fspath(path)!r} holds a model made with the functions {functions}, which no file "
            f"holds. Make it again with them and load into it: world_model, loss = "
            f"make_{content['recipe'].get('builder')}_world_model(env, ...); load_world_model(path, "
            f"world_model)."
        )
    blueprint = _blueprint(content["recipe"], path)
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are thrown away
            world_model, _ = rebuild(blueprint)
    except Exception as err:  # networks may raise anything for wrong settings
        raise _foreign_settings(path, err) from err
    # The dtype of the saved weights is also that of tensors outside of the state. If it is the
    # dtype already, `to` would only narrow tensors that keep the float64 numbers of an env.
    dtypes = _float_dtypes(content["state_dict"])
    if len(dtypes) == 1 and dtypes != _float_dtypes(world_model.state_dict()):
        world_model.to(*dtypes)
    _load_state(world_model, content["state_dict"], path, assign=True)
    return world_model if device is None else world_model.to(device)


def _float_dtypes(state: Mapping[str, Any]) -> set[torch.dtype]:
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return {value.dtype for value in tensors if value.is_floating_point()}


def _load_state(
    world_model: nn.Module, state: Mapping[str, Any], path: Any, *, assign: bool = False
) -> None:
    """Load weights, or refuse weights that do not fit before anything is changed."""
    own = world_model.state_dict()
    problems = [f"the file lacks {key!r}" for key in own if key not in state]
    problems += [f"the model lacks {key!r}" for key in state if key not in own]
    for key in own.keys() & state.keys():
        here, there = own[key], state[key]
        if not isinstance(here, torch.Tensor) or is_lazy(here):
            continue
        if not isinstance(there, torch.Tensor) or here.shape != there.shape:
            got = tuple(getattr(there, "shape", ())) or type(there).__name__
            problems.append(
                f"{key!r} is {tuple(here.shape)} in the model, {got} in the file"
            )
        elif here.dtype != there.dtype and not assign:
            problems.append(
                f"{key!r} is {here.dtype} in the model, {there.dtype} in the file: call "
                f"world_model.to({there.dtype}) first"
            )
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"The weights in {os.fspath(path)!r} belong to another model, or to one whose "
            f"components were replaced: {shown}{more}. Wire the same model and load into it: "
            f"load_world_model(path, world_model)."
        )
    world_model.load_state_dict(dict(state), assign=assign)


# Blueprints ----------------------------------------------------------------


def _plain_blueprint(blueprint: Blueprint) -> dict[str, Any]:
    """Return a blueprint as plain data, with functions by their names."""
    if not is_dataclass(blueprint.config):
        raise TypeError(
            f"The config of the world model must be a dataclass, got "
            f"{type(blueprint.config).__name__}."
        )
    config, functions = {}, {}
    for field in fields(blueprint.config):
        value = getattr(blueprint.config, field.name)
        if callable(value) and not isinstance(value, type):
            functions[field.name] = getattr(value, "__name__", type(value).__name__)
        else:
            check_plain(value, field.name)
            config[field.name] = value
    plain = {
        "builder": blueprint.builder,
        "config": config,
        "functions": functions,
        "specs": blueprint.specs.to_plain(),
    }
    if blueprint.penalty is not None:
        check_plain(blueprint.penalty, "penalty")
        plain["penalty"] = blueprint.penalty
    return plain


def _blueprint(data: Mapping[str, Any], path: Any) -> Blueprint:
    """Return the blueprint in a file."""
    try:
        name, settings, specs = data["builder"], data["config"], data["specs"]
        if name not in BUILDERS:
            raise ValueError(
                f"the builder {name!r} is unknown; there are {sorted(BUILDERS)}"
            )
        config = resolve_config(BUILDERS[name].config, None, dict(settings))
        return Blueprint(name, config, EnvSpecs.from_plain(specs), data.get("penalty"))
    except Exception as err:  # the file may hold plain data of any kind
        raise _foreign_settings(path, err) from err


def _foreign_settings(path: Any, err: Exception) -> ValueError:
    return ValueError(
        f"The settings in {os.fspath(path)!r} do not fit this version of torchrl_wm "
        f"({type(err).__name__}: {err}). Update torchrl_wm, or make the model and load into it: "
        f"load_world_model(path, world_model)."
    )


def _check_same_model(data: Any, own: Blueprint | None, path: Any) -> None:
    """Refuse weights of another builder or of other specs, though their shapes may fit."""
    if data is None or own is None:
        return
    here = _plain_blueprint(own)
    for name, what in (("builder", "by the builder"), ("specs", "for the env specs")):
        there, mine = data.get(name), here[name]
        if name == "specs":
            there, mine = _without_bounds(there), _without_bounds(mine)
        if there != mine:
            raise ValueError(
                f"{os.fspath(path)!r} holds a model made {what} {there!r}, and the given "
                f"one was made {what} {mine!r}."
            )
    there, mine = data.get("penalty"), own.penalty
    if (there is None) != (mine is None):
        found, fix = "without a penalty", "without_penalty(world_model)"
        if there is not None:
            found, fix = "with a penalty", f"with_penalty(world_model, **{there})"
        raise ValueError(
            f"{os.fspath(path)!r} holds a model {found}, and the given one is of the other kind. "
            f"Load into a view of the given one, which shares its weights: "
            f"load_world_model(path, {fix})."
        )
    changed = {
        key: (value, here["config"][key])
        for key, value in _settings(data, path).items()
        if key in here["config"] and here["config"][key] != value
    }
    if there != mine:
        changed["penalty"] = (there, mine)
    if changed:
        warnings.warn(
            f"The model in {os.fspath(path)!r} was made with other settings than the given one "
            f"(file, given): {changed}. The weights are loaded; the given model keeps its "
            f"settings.",
            stacklevel=3,
        )


def _without_bounds(specs: Any) -> Any:
    """Return plain specs without the actions' bounds, on which no weight depends."""
    if not isinstance(specs, dict) or not isinstance(specs.get("actions"), list):
        return specs
    actions = [
        {key: value for key, value in action.items() if key != "spec"}
        if isinstance(action, dict)
        else action
        for action in specs["actions"]
    ]
    return {**specs, "actions": actions}


def _settings(data: Mapping[str, Any], path: Any) -> dict[str, Any]:
    settings = data.get("config")
    if not isinstance(settings, dict):
        raise _foreign_settings(path, TypeError("the config is no dictionary"))
    return settings
