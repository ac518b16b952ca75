"""The names of logged arrays and columns: ours, common others, and those that a user maps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Union

from torchrl_wm.modules.errors import MissingEntryError

#: How ``names`` is given: our names and theirs, either way round.
Names = Mapping[str, Union[str, Sequence[str]]]
#: Where an array came from: its name, and those within it if it is a dictionary.
Path = tuple[str, ...]

#: The arrays of transitions, each with other names that are read without being mapped.
ALIASES: dict[str, tuple[str, ...]] = {
    "observations": ("observation", "obs"),
    "actions": ("action", "act", "acts"),
    "rewards": ("reward",),
    "terminations": ("termination", "terminated", "terminal", "terminals"),
    "truncations": ("truncation", "truncated", "timeout", "timeouts"),
    "next_observations": ("next_observation", "next_obs"),
    "dones": ("done",),
    "episodes": ("episode", "episode_id", "episode_index"),
    "steps": ("step", "t", "timestep", "timesteps"),
}
#: Those that there must be.
REQUIRED = ("observations", "actions", "rewards")
#: Those that tell where an episode ends.
TELL_ENDS = ("terminations", "truncations", "dones", "episodes", "steps")
_OURS = {other: ours for ours, others in ALIASES.items() for other in (ours, *others)}
_VECTORS = ("observations", "next_observations", "actions")
#: A number of a vector: obs_0, obs.0, obs[0], obs0; or a part of it: observation.x
_NUMBERED = re.compile(r"(?P<base>.*?[^\d_.\[])[_.\[]?(?P<number>\d+)\]?$")
_PART = re.compile(r"(?P<base>[^.]+)\.(?P<part>.+)$")


def parse_names(text: str) -> dict[str, str]:
    """Return the names that ``--names`` maps: ``state=observations,act=actions``.

    Raises:
        ValueError: if it is written otherwise.
    """
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
        raise ValueError(
            f"names must be written like state=observations,act=actions, with the name in the data "
            f"before each =, got {text!r}."
        )
    pairs = [(theirs.strip(), ours.strip()) for theirs, ours in pairs]
    twice = sorted({one for one, _ in pairs if [p[0] for p in pairs].count(one) > 1})
    if twice:
        raise ValueError(f"names maps {twice} more than once: {text!r}.")
    return dict(pairs)


def renames_of(names: Names | str | None) -> dict[str, str]:
    """Return our name by theirs, in the given order.

    Args:
        names: ``{"observations": "state"}``, ``{"observations": ["x", "y"]}`` or
            ``{"state": "observations"}``, which tell themselves apart as only one of the two is
            ours; or the text that :func:`parse_names` reads.

    Raises:
        ValueError: if neither or both of two names are ours.
    """
    if names is None:
        return {}
    if isinstance(names, str):
        names = parse_names(names)
    if not isinstance(names, Mapping):
        raise ValueError(
            f"names must be a dictionary such as {{'observations': 'state'}}, got "
            f"{type(names).__name__}."
        )
    out: dict[str, str] = {}
    for key, value in names.items():
        for other in [value] if isinstance(value, str) else value:
            ours, theirs = _sides(str(key), str(other))
            if theirs in out:
                raise ValueError(f"names maps {theirs!r} more than once: {names}.")
            out[theirs] = ours
    return out


def _sides(one: str, other: str) -> tuple[str, str]:
    """Return which of two names is ours, and the other."""
    known = [name.split("/")[0] in ALIASES for name in (one, other)]
    if one == other or sum(known) == 1:
        return (one, other) if known[0] else (other, one)
    what = "both of them are ours" if all(known) else "neither of them is ours"
    raise ValueError(
        f"names maps {one!r} and {other!r}, and {what}: {list(ALIASES)}. Map a name in the data to "
        f"one of these, names={{'observations': 'state'}}, on the command line --names "
        f"state=observations; a dictionary's entry is 'observations/arm'."
    )


def assigned(
    paths: Sequence[Path], renames: Mapping[str, str], what: str
) -> tuple[dict[Path, list[Path]], list[str]]:
    """Return which arrays make which of ours.

    Args:
        paths: where the arrays are found.
        renames: our name by theirs.
        what: what has the arrays, for messages.

    Returns:
        By our path, such as ``("observations", "arm")``, the arrays that make it, side by side
        if there are several; and the names of those that are not read.

    Raises:
        KeyError: if a required one is missing, or ``renames`` has a name that is not there.
        ValueError: if two arrays have the same meaning, or numbers of a vector are missing.
    """
    found = ["/".join(path) for path in paths]
    given, used = list(renames), set()
    renames = {**_next_renames(found, renames), **renames}
    groups: dict[Path, list[tuple[Any, Path]]] = {}
    unread, mapped = [], set(renames.values())
    for path, name in zip(paths, found):
        target, place = _by_renames(path, name, renames, used)
        if target is None:
            target, place = _by_itself(path)
            # What is mapped replaces what would be read without.
            if target is not None and {target[0], "/".join(target)} & mapped:
                target = None
        if target is None:
            unread.append(name)
        else:
            groups.setdefault(target, []).append((place, path))
    lacking = [name for name in given if name not in used]
    if lacking:
        raise MissingEntryError(
            f"names maps {lacking}, which {what} does not have: {_listed(found)}."
        )
    _check_required({target[0] for target in groups}, found, what)
    return {target: _ordered(target, g, what) for target, g in groups.items()}, unread


def _next_renames(found: list[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Return those of the next observations: ``next_state`` if there is ``state``."""
    bases = {base for name in found for base, _ in _split(name)}
    return {
        f"next_{theirs}": f"next_{ours}"
        for theirs, ours in renames.items()
        if ours.split("/")[0] == "observations"
        and f"next_{theirs}" in bases.union(found)
    }


def _by_renames(
    path: Path, name: str, renames: Mapping[str, str], used: set[str]
) -> tuple[Path | None, Any]:
    """Return the path that a user's names give an array, and its place among several."""
    candidates = [(name, None, ()), (path[0], None, path[1:])]
    if len(path) == 1:
        candidates += [(base, place, ()) for base, place in _split(name)]
    order = list(renames)
    for theirs, place, rest in candidates:
        if theirs in renames:
            used.add(theirs)
            target = (*renames[theirs].split("/"), *rest)
            return target, (order.index(theirs), place)
    return None, None


def _by_itself(path: Path) -> tuple[Path | None, Any]:
    """Return the path that an array has by its own name, and its place among several."""
    # A "T" may be a temperature.
    name = path[0] if len(path[0]) == 1 else path[0].casefold()
    ours = _OURS.get(name)
    if ours is not None:
        return (ours, *path[1:]), None
    for base, place in _split(path[0]) if len(path) == 1 else ():
        ours = _OURS.get(base.casefold())
        if ours in _VECTORS:
            return (ours,), (0, place)
    return None, None


def _split(name: str) -> list[tuple[str, Any]]:
    """Return a name without the number or part at its end, and this: ``obs_0``, ``obs.x``."""
    out: list[tuple[str, Any]] = []
    match = _NUMBERED.match(name)
    if match:
        out.append((match["base"], int(match["number"])))
    match = _PART.match(name)
    if match:
        out.append((match["base"], match["part"]))
    return out


def _ordered(target: Path, group: list[tuple[Any, Path]], what: str) -> list[Path]:
    """Return arrays that make one of ours in their order."""
    names = ["/".join(path) for _, path in group]
    if len(group) == 1:
        return [group[0][1]]
    ours = "/".join(target)
    if any(place is None for place, _ in group):
        raise ValueError(
            f"{_listed(names)} of {what} would all be read as {ours}. Say which one is: "
            f"names={{{ours!r}: {names[0]!r}}}, on the command line --names {names[0]}={ours}."
        )
    numbers = sorted(place[1] for place, _ in group if isinstance(place[1], int))
    if numbers and len({place[0] for place, _ in group}) == 1:
        whole = range(numbers[0], numbers[0] + len(group))
        if numbers != list(whole) or numbers[0] > 1:
            raise ValueError(
                f"The numbers of {ours} of {what} have gaps, or begin after 1: {_listed(names)}."
            )
        group = sorted(group, key=lambda item: item[0][1])
    else:  # parts stay as they are found, names as they are mapped
        group = sorted(group, key=lambda item: item[0][0])
    return [path for _, path in group]


def _check_required(ours: set[str], found: list[str], what: str) -> None:
    missing = [name for name in REQUIRED if name not in ours]
    if missing:
        raise MissingEntryError(
            f"The arrays of {what} are {_listed(sorted(found))}: {missing} are missing. "
            f"{list(REQUIRED)} are required, and what tells where episodes end, one or several of "
            f"{list(TELL_ENDS)}; next_observations are optional. Map other names: "
            f"names={{{missing[0]!r}: 'NAME'}}, on the command line --names NAME={missing[0]}."
        )


def _listed(names: Sequence[str], most: int = 20) -> str:
    """Return names as a list that is not too long for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


def unread_note(unread: Sequence[str]) -> str:
    """Return what to say of arrays that are not read."""
    return (
        f"Not read, as their names say nothing of a transition: {_listed(sorted(set(unread)))}. To "
        f"read one, map it: names={{'observations': 'NAME'}}, on the command line --names "
        f"NAME=observations."
    )
