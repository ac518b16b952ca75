"""The recipes by name. A recipe is imported when it is loaded, not before.

Listing them does not import torch, so that the help of the command line is quick.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torchrl_wm._checks import did_you_mean

#: The entry point group in which other packages name their recipes.
GROUP = "torchrl_wm.recipes"
_PACKAGE = "torchrl_wm"


@dataclass(frozen=True)
class Entry:
    """A recipe by name.

    Args:
        name: its name for ``torchrl-wm train``.
        target: the class, or ``"module:Class"``.
        summary: one line for the help.
        origin: who registers it, for errors.
    """

    name: str
    target: Any
    summary: str
    origin: str

    @property
    def path(self) -> str:
        """The class as ``"module:Class"``."""
        return self.target if isinstance(self.target, str) else path_of(self.target)

    def load(self) -> type:
        """Return the class.

        Raises:
            ValueError: if it cannot be imported.
            TypeError: if it is no recipe.
        """
        found = self.target
        if isinstance(found, str):
            try:
                found = load_object(found)
            except ValueError as err:
                raise ValueError(
                    f"The recipe {self.name!r} of {self.origin} cannot be imported from {found!r}: "
                    f"{err}"
                ) from err
        _check(found, self.name)
        _name(found, self.name)
        return found


_BUILT_IN = {
    "pets": (
        "torchrl_wm.trainers.recipes.pets:PETS",
        "Learn an ensemble trial by trial, and act by planning through it.",
    ),
    "mbpo": (
        "torchrl_wm.trainers.recipes.mbpo:MBPO",
        "Learn a policy by SAC on short rollouts of a learned ensemble.",
    ),
    "tdmpc2": (
        "torchrl_wm.trainers.recipes.tdmpc2:TDMPC2",
        "Learn a latent model with action values, and act by planning through both.",
    ),
    "dreamer": (
        "torchrl_wm.trainers.recipes.dreamer:Dreamer",
        "Learn an actor and a critic in what a recurrent model imagines.",
    ),
    "planet": (
        "torchrl_wm.trainers.recipes.planet:PlaNet",
        "Learn a recurrent model, and act by planning through it.",
    ),
    "mopo": (
        "torchrl_wm.trainers.recipes.mopo:MOPO",
        "Learn a policy from a log alone, in a model that charges for what it does not know.",
    ),
    "model": (
        "torchrl_wm.trainers.recipes.model:ModelRecipe",
        "Learn only a world model, from logged data.",
    ),
}
#: The recipes that this process registered, beside the built-in ones.
_REGISTERED: dict[str, Entry] = {}


def register_recipe(name: str, recipe: type | None = None) -> Any:
    """Register a recipe under a name, for ``torchrl-wm train NAME`` and for commands on its runs.

    An installed package can name its recipes in the entry point group
    ``torchrl_wm.recipes`` instead.

    Args:
        name: the name on the command line and in the folders of runs.
        recipe: a subclass of :class:`~torchrl_wm.trainers.Recipe`. Without it the call is a
            decorator.

    Returns:
        The recipe.

    Raises:
        ValueError: if another recipe has the name, or the recipe another name.
        TypeError: if it is no recipe.

    Examples:
        >>> from torchrl_wm.trainers import PETS, register_recipe
        >>> @register_recipe("my-pets")
        ... class MyPETS(PETS):
        ...     '''PETS with another planner.'''
        >>> MyPETS.name
        'my-pets'
    """
    if recipe is None:
        return lambda found: register_recipe(name, found)
    _check(recipe, name)
    known = _REGISTERED.get(name) or _built_in(name)
    if known is not None and known.path != path_of(recipe):
        raise ValueError(
            f"The recipe name {name!r} is taken by {known.path} of {known.origin}. Register "
            f"{path_of(recipe)} under another name."
        )
    _name(recipe, name)
    if known is None or known.origin != _PACKAGE:
        summary = (recipe.__doc__ or "").strip().split("\n")[0]
        _REGISTERED[name] = Entry(name, recipe, summary, recipe.__module__)
    return recipe


def recipe_names() -> list[str]:
    """Return the names of all recipes, the built-in ones first."""
    found = set(_REGISTERED) | {point.name for point in _points()}
    return [*_BUILT_IN, *sorted(found - set(_BUILT_IN))]


def find_recipe(name: str, path: str | None = None) -> Entry:
    """Return the recipe of a name.

    Args:
        name: the name, or ``"module:Class"`` of a module that registers it.
        path: where a run says that its recipe is, ``"module:Class"``. If no recipe has the name,
            the module is imported, which registers the recipe.

    Raises:
        ValueError: if there is none, or two packages register it.
    """
    if ":" in name:
        return _of_module(name)
    if path is not None and name not in recipe_names():
        with suppress(ImportError):
            importlib.import_module(path.partition(":")[0])
    found = [_REGISTERED.get(name), _built_in(name), *_installed(name)]
    entries = {entry.path: entry for entry in found if entry is not None}
    if len(entries) > 1:
        listed = [f"{entry.path} of {entry.origin}" for entry in entries.values()]
        raise ValueError(
            f"The recipe name {name!r} is registered more than once: {listed}. Remove one of the "
            f"packages, or have one of them choose another name."
        )
    if not entries:
        names = recipe_names()
        raise ValueError(
            f"There is no recipe {name!r}.{did_you_mean(name, names)} Valid choices are {sorted(names)}. A recipe of your "
            f"own is registered by torchrl_wm.trainers.register_recipe, in a module that you name "
            f"(torchrl-wm train module:Class) or import, or by an installed package in the entry "
            f"point group {GROUP!r}."
        )
    return next(iter(entries.values()))


def _of_module(name: str) -> Entry:
    """Return the recipe that ``"module:Class"`` registers."""
    kind = load_object(name)
    _check(kind, name)
    if getattr(kind, "name", None) not in recipe_names():
        raise ValueError(
            f"{name!r} is registered under no name. Decorate it: "
            f"@torchrl_wm.trainers.register_recipe('its-name')."
        )
    return find_recipe(kind.name)


def load_object(name: str) -> Any:
    """Return the object that ``"module:name"`` names.

    Raises:
        ValueError: if there is no such module, or nothing of that name in it.
    """
    module, _, attributes = name.partition(":")
    try:
        if module.startswith(".") or "/" in module:
            raise ImportError("this is a path, not the name of a module")
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as err:
        raise ValueError(
            f"There is no {name!r} ({type(err).__name__}: {err}). Give 'module:name', with the "
            f"module where Python finds it, in the working directory or in PYTHONPATH."
        ) from err
    return found


def path_of(kind: type) -> str:
    """Return a class as ``"module:Class"``."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _built_in(name: str) -> Entry | None:
    if name not in _BUILT_IN:
        return None
    target, summary = _BUILT_IN[name]
    return Entry(name, target, summary, _PACKAGE)


def _points() -> Any:
    return entry_points(group=GROUP)


def _installed(name: str) -> list[Entry]:
    return [
        Entry(name, point.value, f"From {_origin(point)}.", _origin(point))
        for point in _points()
        if point.name == name
    ]


def _origin(point: Any) -> str:
    """Return the package that has an entry point."""
    return point.dist.name if point.dist is not None else point.value


def _name(recipe: type, name: str) -> None:
    """Give a recipe its name, under which its runs are saved."""
    own = vars(recipe).get("name") or name  # a subclass has a name of its own
    if own != name:
        raise ValueError(
            f"The recipe {path_of(recipe)} has the name {own!r} already, and its runs are saved "
            f"under it. Register a subclass of it as {name!r}."
        )
    recipe.name = name


def _check(recipe: Any, name: str) -> None:
    """Refuse a class without the parts of a recipe."""
    missing = [part for part in ("config_class", "learn") if not hasattr(recipe, part)]
    if not isinstance(recipe, type) or missing:
        raise TypeError(
            f"The recipe {name!r} must be a subclass of torchrl_wm.trainers.Recipe, got "
            f"{recipe!r}, which {f'has no {missing}' if missing else 'is no class'}."
        )
