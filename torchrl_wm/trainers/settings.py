"""Settings of runs, the values that they take, and the errors for others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    get_args,
    get_origin,
    get_type_hints,
    Literal,
    TypeVar,
    Union,
)

import torch

from torchrl_wm._checks import check_settings

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class AtLeast:
    """The least value of a setting, in its annotation: ``steps: Annotated[int, AtLeast(1)]``."""

    value: float

    def check(self, name: str, value: Any) -> None:
        """Refuse a smaller value."""
        if value < self.value:
            raise ValueError(f"{name} must be at least {self.value}, got {value}.")


@dataclass(frozen=True)
class Above:
    """What a setting must exceed, in its annotation: ``learning_rate: Annotated[float, Above(0)]``."""

    value: float

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not above."""
        if value <= self.value:
            raise ValueError(f"{name} must be above {self.value}, got {value}.")


@dataclass(frozen=True)
class Within:
    """The range of a setting, ends included, in its annotation."""

    low: float
    high: float

    def check(self, name: str, value: Any) -> None:
        """Refuse a value outside the range."""
        if not self.low <= value <= self.high:
            raise ValueError(
                f"{name} must lie between {self.low} and {self.high}, got {value}."
            )


def default_loggers() -> tuple[str, ...]:
    """Return the loggers of a run that names none."""
    return ("csv", "tensorboard") if find_spec("tensorboard") else ("csv",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that every run has.

    Args:
        seed: the seed of networks, exploration and episodes.
        device: the device of models and policies: auto (a GPU if there is one), cpu, cuda, cuda:1.
        steps: how many steps to make in all; the episode in which they are reached is finished.
            None for no such end.
        checkpoint_interval: how many episodes pass between two checkpoints.
        logger: where the metrics go beside metrics.csv: tensorboard, wandb or mlflow, or several
            of them; csv for only that file.
    """

    seed: Annotated[int, AtLeast(0)] = 0
    device: str = "auto"
    steps: Annotated[int, AtLeast(1)] | None = None
    checkpoint_interval: Annotated[int, AtLeast(1)] = 1
    logger: tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...] = field(
        default_factory=default_loggers
    )

    #: The settings that say when a run ends; a finished run goes on with a later end.
    ENDS = ("steps",)
    #: The settings that say where a run runs; it may go on elsewhere.
    PLACES: ClassVar[tuple[str, ...]] = ("device",)

    def __post_init__(self) -> None:
        if isinstance(self.logger, str):
            object.__setattr__(self, "logger", (self.logger,))
        for name, hint in _hints(type(self)).items():
            # Numbers of other libraries, which JSON does not take, become Python's.
            object.__setattr__(self, name, checked(name, getattr(self, name), hint))
        parse_device(self.device)

    @property
    def about(self) -> str:
        """The env or data of the run, for its title and the name of its folder."""
        return ""

    @property
    def short_name(self) -> str:
        """The env or data of the run, as a part of a folder's name."""
        return slug(self.about)

    @classmethod
    def from_json(cls: type[S], settings: Mapping[str, Any]) -> S:
        """Return the settings that a file holds.

        Raises:
            ValueError: if there are settings that this class does not have.
        """
        unknown = sorted(settings.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"The run's config has the settings {unknown}, which {cls.__name__} of this "
                f"torchrl_wm does not know."
            )
        return cls(**settings)

    @classmethod
    def make(cls: type[S], config: S | None, settings: Mapping[str, Any]) -> S:
        """Return the settings, or those of ``config`` with some replaced.

        Raises:
            TypeError: if ``config`` is that of another recipe, or a setting is unknown.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(
                f"config must be a {cls.__name__}, got {type(config).__name__}. Everything else is given by "
                f"name: env=..., run=..., members=3."
            )
        check_settings(cls, sorted(settings))
        return cls(**settings) if config is None else replace(config, **settings)

    def lengthened(self: S, ends: Mapping[str, Any]) -> S:
        """Return a copy that ends later.

        Raises:
            ValueError: if it would end earlier, or something else is changed.
        """
        others = sorted(set(ends) - set(self.ENDS))
        if others:
            raise ValueError(
                f"A run goes on with the settings that it was started with, and only ends later "
                f"({list(self.ENDS)}); got {others}. For other settings start a new run."
            )
        longer = replace(self, **ends)
        for name in ends:
            before, value = getattr(self, name), getattr(longer, name)
            if before is not None and value is not None and value < before:
                raise ValueError(
                    f"{name}={value} ends the run before the {before} that it has: a run can only "
                    f"be made longer."
                )
        return longer


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """The settings of every run that acts in a real env.

    Args:
        env: the real env: a Gymnasium id such as Pendulum-v1, a task such as
            dm_control/cartpole/swingup, or module:function, your function that makes it.
        num_envs: how many real envs act at once.
        collector: where the real envs run: single means this process, processes a process for
            each env, and ray the workers of Ray, one for each env, on this machine or a cluster.
        ray_address: the Ray cluster, host:port; auto for the one in RAY_ADDRESS or on this
            machine. None starts Ray on this machine, for this run.
        ray_cpus: how many CPUs each worker of Ray asks for.
        ray_batch: how many steps a worker of Ray makes at a request. The others wait for it, and
            what is learnt reaches it one or two requests later.
        ray_push_interval: how many real steps pass at least between two times at which Ray's
            workers get new weights, between two requests.
        random_steps: how many steps to act at random first. An episode that begins before they
            are reached is random to its end.
        random_hold: for how many steps a random action is kept. In tasks of many small steps,
            actions that change at each step cancel out.
        max_episode_steps: the most steps of an episode; None for the limit that the env has.
        action_repeat: for how many steps of the env an action is repeated. They count as one
            step, and their rewards are summed.
        pixels: the height and width of images of the env to observe, from its render or from
            dm_control's first camera; None for the observations that the env has.
        pixels_only: leave out the env's own observations if there are images of it.
        evaluation_interval: how many steps pass between two evaluations; 0 for none.
        evaluation_episodes: how many episodes an evaluation has.
        stop_return: the mean return of an evaluation that ends the run; None for no such end.
        film_interval: how many steps pass between two films of the policy and of what the model
            dreams, with measurements of its open-loop error, which go to the loggers; 0 for none.
    """

    env: str = "Pendulum-v1"
    num_envs: Annotated[int, AtLeast(1)] = 1
    collector: Literal["single", "processes", "ray"] = "single"
    ray_address: str | None = None
    ray_cpus: Annotated[float, AtLeast(0)] = 1.0
    ray_batch: Annotated[int, AtLeast(1)] = 10
    ray_push_interval: Annotated[int, AtLeast(1)] = 1
    random_steps: Annotated[int, AtLeast(1)] = 200
    random_hold: Annotated[int, AtLeast(1)] = 1
    max_episode_steps: Annotated[int, AtLeast(1)] | None = None
    action_repeat: Annotated[int, AtLeast(1)] = 1
    pixels: Annotated[int, AtLeast(8)] | None = None
    pixels_only: bool = True
    evaluation_interval: Annotated[int, AtLeast(0)] = 0
    evaluation_episodes: Annotated[int, AtLeast(1)] = 5
    stop_return: float | None = None
    film_interval: Annotated[int, AtLeast(0)] = 0

    ENDS = ("steps", "stop_return")
    PLACES = ("device", "ray_address")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.collector != "ray":
            for item in fields(self):
                value = getattr(self, item.name)
                if item.name.startswith("ray_") and value != item.default:
                    raise ValueError(
                        f"{item.name}={value!r} is for the workers of Ray, and the run has "
                        f"collector={self.collector!r}: give collector='ray', or leave it out."
                    )
        if self.stop_return is not None and not self.evaluation_interval:
            raise ValueError(
                f"stop_return={self.stop_return} is checked in evaluations, and there are none: "
                f"give evaluation_interval=..., in steps."
            )

    @property
    def env_settings(self) -> dict[str, Any]:
        """The settings that :func:`~torchrl_wm.trainers.make_real_env` takes."""
        names = ("seed", "max_episode_steps", "action_repeat", "pixels", "pixels_only")
        return {name: getattr(self, name) for name in names}

    @property
    def about(self) -> str:
        return self.env


@dataclass(frozen=True, kw_only=True)
class PresetConfig(RunConfig):
    """The settings of a run that has presets; a subclass names them in a field ``preset``.

    A setting that is None has the value of the preset.
    """

    #: The presets by name; the first one is that of a CPU if ``preset`` is "auto".
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    #: The preset of other devices.
    ELSEWHERE: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        # Settled here, so that a run that is resumed on another device keeps its sizes.
        if self.preset == "auto":
            is_cpu = resolve_device(self.device).type == "cpu"
            preset = next(iter(self.PRESETS)) if is_cpu else self.ELSEWHERE
            object.__setattr__(self, "preset", preset)

    def size(self, name: str) -> Any:
        """Return a setting that presets have: this one's own value, or the preset's."""
        own = getattr(self, name)
        return self.PRESETS[self.preset][name] if own is None else own


def slug(text: str) -> str:
    """Return a text as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def parse_device(name: str) -> torch.device | None:
    """Return the device of a name, None for "auto".

    Raises:
        ValueError: if torch knows no such device.
    """
    if name == "auto":
        return None
    try:
        return torch.device(name)
    except RuntimeError as err:
        raise ValueError(
            f"device={name!r} is unknown. Give 'auto', 'cpu', 'cuda', 'cuda:1' or another device "
            f"of torch."
        ) from err


def resolve_device(name: str) -> torch.device:
    """Return the device that a setting names; "auto" is a GPU if there is one.

    Raises:
        ValueError: if this machine has no such device.
    """
    device = parse_device(name)
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device={name!r} is not on this machine: torch sees {count} CUDA devices. Give "
            f"device='auto' or 'cpu'."
        )
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as err:
        raise ValueError(
            f"device={name!r} is not on this machine ({err}). Give device='auto' or 'cpu'."
        ) from err
    return device


def checked(name: str, value: Any, hint: Any) -> Any:
    """Return a setting as Python's own type, if its annotation allows it.

    Raises:
        ValueError: if it does not; the message says which values are allowed.
    """
    if get_origin(hint) is Annotated:
        hint, *bounds = get_args(hint)
        value = checked(name, value, hint)
        for bound in bounds:
            if hasattr(bound, "check"):
                bound.check(name, value)
        return value
    if get_origin(hint) in (UnionType, Union):
        if value is None and NoneType in get_args(hint):
            return None
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return _checked_any(name, value, kinds)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(
                f"Unknown {name} {value!r}. Valid choices are {list(get_args(hint))}."
            )
        return value
    if get_origin(hint) is tuple:
        return _checked_tuple(name, value, get_args(hint))
    return _checked_plain(name, value, hint)


def _checked_any(name: str, value: Any, kinds: list) -> Any:
    """Return a setting of one of several types."""
    for kind in kinds[:-1]:
        try:
            return checked(name, value, kind)
        except ValueError:
            continue
    return checked(name, value, kinds[-1])


def _checked_tuple(name: str, value: Any, kinds: tuple) -> tuple:
    what = {int: "ints", float: "numbers"}.get(_bare(kinds[0]), "values")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a tuple of {what}, got {value!r}.")
    if kinds[-1] is Ellipsis:
        return tuple(_checked_item(name, item, kinds[0]) for item in value)
    if len(value) != len(kinds):
        raise ValueError(
            f"{name} must be a tuple of {len(kinds)} {what}, got {value!r}."
        )
    return tuple(_checked_item(name, *pair) for pair in zip(value, kinds))


def _checked_item(name: str, value: Any, kind: Any) -> Any:
    # "Unknown logger", not "Unknown each of logger".
    named = get_origin(kind) is Literal
    return checked(name if named else f"Each of {name}", value, kind)


def _checked_plain(name: str, value: Any, kind: type) -> Any:
    kind = get_origin(kind) or kind  # the content of a dictionary is not checked
    if kind is Any:
        return value
    if kind is bool:
        right = isinstance(value, bool)
    elif kind is int:
        right = isinstance(value, Integral) and not isinstance(value, bool)
    elif kind is float:
        right = isinstance(value, Real) and not isinstance(value, bool)
        right = right and value == value  # NaN passes all comparisons with bounds
    else:
        right = isinstance(value, kind)
    if not right:
        what = {bool: "a bool", int: "an int", float: "a number", str: "a string"}
        raise ValueError(
            f"{name} must be {what.get(kind, kind.__name__)}, got {value!r}."
        )
    if kind is float:
        return value if isinstance(value, (int, float)) else float(value)
    return int(value) if kind is int else value


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _hints(kind: type) -> dict[str, Any]:
    """Return the annotations of the settings, bounds included."""
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in fields(kind)}
