"""Finding out what steps a model, for the constructors of the Gymnasium envs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import gymnasium
import torch
from gymnasium import spaces
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Composite
from torchrl.envs import EnvBase, GymEnv, GymWrapper

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.start_states import StartStates
from torchrl_wm.export.adapters import AdapterSource
from torchrl_wm.export.sources import as_device, Source
from torchrl_wm.export.spaces import checked_space
from torchrl_wm.export.world_models import WorldModelSource
from torchrl_wm.modules import Entry, WorldModel
from torchrl_wm.modules.keys import unique

#: The callables that may step an object.
FUNCTIONS = [
    "reset_fn",
    "transition_fn",
    "reward_fn",
    "terminal_fn",
    "action_transform_fn",
]
StartSource = Union[StartStates, str, gymnasium.Env]


def make_source(
    world_model: Any,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    rows: int | None,
    *,
    initial_observation: Any = None,
    initial_state: Any = None,
    device: Any = None,
    torch_actions: bool = True,
    clip_observations: bool = False,
    base_env: Any = None,
    start_states: StartSource | None = None,
    decode: bool | None = None,
    **functions: Callable | None,
) -> Source:
    """Make the source of imagined steps of a model of any kind.

    Args:
        rows: the number of envs at once; None for one.
        world_model, observation_space, action_space, initial_observation, initial_state,
            device, torch_actions, clip_observations, base_env, start_states, decode,
            functions: see :class:`~torchrl_wm.GymWorldModelEnv`.

    Raises:
        TypeError: if the model cannot be stepped; the message says what to pass.
    """
    unknown = sorted(set(functions) - set(FUNCTIONS))
    if unknown:
        raise TypeError(f"Unknown arguments {unknown}. The callables are {FUNCTIONS}.")
    device = as_device(device)
    given = {"observation_space": observation_space, "action_space": action_space}
    for name, space in given.items():
        if space is not None:
            checked_space(space, name)
    model = _instance(world_model)
    of_models = {"base_env": base_env, "start_states": start_states, "decode": decode}
    if isinstance(model, WorldModel):
        model = _imagined_env(model, device=device, **of_models)
    else:
        _check_model(model, device, of_models)
    if isinstance(model, WorldModelEnv):
        _check_no_functions(functions)
        return WorldModelSource(
            model,
            rows,
            **given,
            initial={"state": initial_state, "observation": initial_observation},
            clip=clip_observations,
        )
    return AdapterSource(
        model,
        *(checked_space(space, name) for name, space in given.items()),
        rows,
        functions={name: functions.get(name) for name in FUNCTIONS},
        initial_observation=initial_observation,
        initial_state=initial_state,
        device=device,
        torch_actions=torch_actions,
        clip=clip_observations,
    )


def _instance(model: Any) -> Any:
    """Return the model itself, loaded if it is a path."""
    if isinstance(model, type):
        raise TypeError(
            f"The model is the class {model.__name__}; pass an instance of it."
        )
    return load(model) if isinstance(model, (str, Path)) else model


def _imagined_env(
    model: WorldModel,
    base_env: Any,
    start_states: StartSource | None,
    decode: bool | None,
    device: torch.device | None,
) -> WorldModelEnv:
    """Make the env that a world model imagines."""
    if base_env is None:
        base_env = _reference_env(model)  # never reset: it has only specs
    else:
        base_env = as_torchrl_env(base_env, "base_env")
        _check_serves(model, base_env)
        start_states = base_env if start_states is None else start_states
    if isinstance(start_states, (str, gymnasium.Env)):
        start_states = as_torchrl_env(start_states, "start_states")
    if isinstance(start_states, EnvBase) and start_states is not base_env:
        _check_starts(model, start_states, base_env)
    return WorldModelEnv(
        model,
        base_env,
        batch_size=[],
        device=device,
        start_states=start_states,
        decode=model.decoder is not None if decode is None else decode,
    )


def _check_model(
    model: Any, device: torch.device | None, of_models: dict[str, Any]
) -> None:
    """Refuse models that cannot be stepped, and arguments that are only for a WorldModel."""
    extra = [name for name, value in of_models.items() if value is not None]
    if extra:
        raise TypeError(
            f"{extra} go with a WorldModel or the path of a saved one, got "
            f"{type(model).__name__}."
        )
    if isinstance(model, WorldModelEnv):
        own = model.device
        if device is not None and own is not None and own.type != device.type:
            raise ValueError(
                f"device={str(device)!r}, but the WorldModelEnv is on {own}: move it, "
                f"env.to({str(device)!r})."
            )
    elif isinstance(model, EnvBase):
        raise TypeError(
            f"{type(model).__name__} is a TorchRL env, but no WorldModelEnv. Pass the "
            f"WorldModelEnv itself, without transforms; any TorchRL env becomes a Gymnasium env "
            f"by TorchRL's own EnvBase.register_gym(id, entry_point=..., to_numpy=True)."
        )
    elif isinstance(model, TensorDictModuleBase):
        raise TypeError(
            f"{type(model).__module__}.{type(model).__name__} reads and writes tensordicts and "
            f"does not know its spaces. Make a torchrl_wm.WorldModel of its parts and pass "
            f"WorldModelEnv(world_model, base_env, start_states=...); or pass transition_fn with "
            f"an object that holds the module."
        )
    elif model is None or isinstance(model, (int, float, bytes, list, tuple, dict)):
        raise TypeError(
            f"The model is {type(model).__name__}, which cannot be stepped. Pass a "
            f"WorldModelEnv, a WorldModel with base_env, or an object with spaces and "
            f"transition_fn."
        )


def _check_no_functions(functions: dict[str, Callable | None]) -> None:
    given = sorted(name for name, value in functions.items() if value is not None)
    if given:
        raise TypeError(
            f"{given} do not go with a WorldModelEnv: the components of its world model say what "
            f"a step does. Put them there, e.g. WorldModel(..., reward_head=..., done_head=...)."
        )


def _reference_env(model: WorldModel) -> EnvBase:
    """Return the specs that a ready-made model was built for, as an env.

    Raises:
        TypeError: if the model does not know them.
    """
    blueprint = getattr(model, "recipe", None)
    if blueprint is None:
        raise TypeError(
            "A WorldModel that was wired by hand does not know its spaces. Pass the env whose "
            "specs it has, base_env='Pendulum-v1' (an id, a Gymnasium or a TorchRL env), or a "
            "WorldModelEnv(world_model, base_env, start_states=...)."
        )
    try:
        return blueprint.specs.reference_env()
    except ValueError as err:
        raise TypeError(
            f"The spaces of the world model are not known. {err} This is the env whose specs the "
            f"model has: an id, a Gymnasium or a TorchRL env."
        ) from err


def _check_serves(model: WorldModel, base_env: EnvBase) -> None:
    """Refuse an env with other entries than those that a ready-made model was built for.

    Raises:
        ValueError: naming the entry that differs.
    """
    blueprint = getattr(model, "recipe", None)
    if blueprint is None:
        return  # wired by hand: the WorldModelEnv checks it
    specs = blueprint.specs
    observations = (*specs.vectors, *specs.pixels)
    for kind, entries, spec in (
        ("observation", observations, base_env.full_observation_spec_unbatched),
        ("action", specs.actions, base_env.full_action_spec_unbatched),
    ):
        for own in entries:
            other = _entry(spec, own.key)
            if other is None or not _alike(own, other):
                has = "none of that name" if other is None else _described(other)
                raise ValueError(
                    f"The world model was built for an env with the {kind} {_described(own)}; "
                    f"base_env has {has}. Pass the env that the model was built for."
                )


def _check_starts(model: WorldModel, starts: EnvBase, base_env: EnvBase) -> None:
    """Refuse an env to start from with other observations than the model's.

    Raises:
        ValueError: naming the entry that differs.
    """
    for key in unique(model.encoder.in_keys):
        own = _entry(base_env.full_observation_spec_unbatched, key)
        given = _entry(starts.full_observation_spec_unbatched, key)
        if own is not None and given is not None and not _alike(own, given):
            raise ValueError(
                f"The world model reads the observation {_described(own)}; start_states has "
                f"{_described(given)}. Let episodes begin in an env with the model's observations."
            )


def _entry(spec: Composite, key: NestedKey) -> Entry | None:
    """Return an entry of a spec without batch dims; None if the spec lacks it."""
    present = key in unique(spec.keys(True, True))
    return Entry.from_spec(key, spec[key]) if present else None


def _alike(one: Entry, other: Entry) -> bool:
    # The dtype is not compared: a model may read several.
    return (one.shape, one.classes) == (other.shape, other.classes)


def _described(entry: Entry) -> str:
    """Return the key, the shape and the numbers of classes of an entry, for messages."""
    classes = f" and the classes {list(entry.classes)}" if entry.classes else ""
    return f"{entry.key!r} of the shape {tuple(entry.shape)}{classes}"


def load(path: str | Path) -> WorldModel:
    """Load the world model that was saved at ``path``.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no saved world model at {str(path)!r}. Pass the path given to "
            f"torchrl_wm.models.save_world_model, or the model itself."
        )
    # Only a path needs the builders, which take a while to import.
    from torchrl_wm.models import load_world_model

    return load_world_model(path)


def as_torchrl_env(env: Any, name: str) -> EnvBase:
    """Return a TorchRL env for a Gymnasium env or its id."""
    if isinstance(env, EnvBase):
        return env
    if isinstance(env, str):
        return GymEnv(env)
    if isinstance(env, gymnasium.Env):
        return GymWrapper(env)
    raise TypeError(
        f"{name} must be a TorchRL env, a Gymnasium env or its id, got {type(env).__name__}."
    )
