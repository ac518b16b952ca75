"""The arguments that a callable takes, resolved once from its parameters' names and order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

#: The names of parameters that mean each argument.
NAMES = {
    "model": {"model", "world_model", "wm", "m"},
    "state": {
        *("state", "latent", "latents", "model_state", "latent_state", "prev_state"),
        *("hidden", "carry", "belief", "s", "z", "h"),
    },
    "obs": {"obs", "observation", "observations", "next_obs", "next_observation", "o"},
    "action": {"action", "actions", "act", "a", "u"},
    "seed": {"seed"},
    "options": {"options"},
}
#: Arguments that only parameters of such names get.
EXTRA = {"np_random": {"np_random", "rng"}}

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


@dataclass
class Bound:
    """A callable with the arguments it takes.

    Args:
        function: the callable.
        positional: the arguments given by position.
        keywords: the arguments given by name, by the parameter.
    """

    function: Callable
    positional: tuple[str, ...]
    keywords: dict[str, str]

    def takes(self, role: str) -> bool:
        """Return whether the callable gets this argument."""
        return role in self.positional or role in self.keywords.values()

    def __call__(self, given: dict[str, Any]) -> Any:
        """Call it with those of the ``given`` arguments, by role, that it takes."""
        positional = map(given.__getitem__, self.positional)
        if not self.keywords:
            return self.function(*positional)
        keywords = {name: given[role] for name, role in self.keywords.items()}
        return self.function(*positional, **keywords)


def bind(
    function: Callable,
    roles: Sequence[str],
    name: str,
    aliases: dict[str, str] | None = None,
) -> Bound:
    """Find out which of ``roles`` a callable takes, and how.

    The names of the parameters tell. A required one may have a name of its own if the
    documented order decides: all parameters are there, or the first ones are. Optional
    parameters with other names keep their defaults.

    Args:
        function: the callable.
        roles: the arguments there are, in the documented order.
        name: the name of the callable, for messages.
        aliases: names that mean another argument here, as ``{"obs": "state"}``.

    Raises:
        TypeError: if it is not callable, or if its parameters are not clear.
    """
    if not callable(function):
        raise TypeError(f"{name} must be callable, got {type(function).__name__}.")
    parameters = _parameters(function)
    if parameters is None:  # a builtin
        return Bound(function, tuple(roles), {})
    known = _named(parameters, roles, aliases)
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if takes_more and all(
        i < len(roles) and known[p.name] in (None, roles[i])
        for i, p in enumerate(positional)
    ):
        return Bound(function, tuple(roles), {})
    required = [p for p in positional if p.default is p.empty]
    if not all(known[p.name] for p in required) and _in_order(required, known, roles):
        known.update({p.name: role for p, role in zip(required, roles)})
    needed = [*keyword_only, *positional]
    unclear = [p.name for p in needed if p.default is p.empty and not known[p.name]]
    taken = [known[p.name] for p in needed if known[p.name]]
    twice = sorted({role for role in taken if taken.count(role) > 1})
    if unclear or twice:
        problem = (
            f"it is not clear what its parameters {unclear} are"
            if unclear
            else f"more than one of its parameters could be {twice}"
        )
        raise TypeError(
            f"{name}{_shown(function)}: {problem}. It is called as {name}({', '.join(roles)}), "
            f"and may take fewer of these. Give its parameters these names, or take all "
            f"{len(roles)} in this order. Known are {_known_names(roles)}."
        )
    return _bound(function, positional, keyword_only, known, name)


def _named(
    parameters: Sequence[inspect.Parameter],
    roles: Sequence[str],
    aliases: dict[str, str] | None,
) -> dict[str, str | None]:
    """Return the role of each parameter that its name tells, by the name."""
    known = {p.name: _role(p.name, roles, aliases) for p in parameters}
    claimed = {known[p.name] for p in parameters if p.default is p.empty}
    for p in parameters:
        # `lambda state, s=scale: ...`: a default under a short or second name is its own.
        if p.default is not p.empty and (len(p.name) == 1 or known[p.name] in claimed):
            known[p.name] = None
    return known


def _in_order(
    required: Sequence[inspect.Parameter],
    known: dict[str, str | None],
    roles: Sequence[str],
) -> bool:
    """Return whether the required parameters are the documented ones, in their order."""
    named = sum(known[p.name] is not None for p in required)
    # `lambda a, b, c`: letters in a row; if one is also a name, that is by chance.
    letters = len(required) == len(roles) and named == 1
    in_place = len(required) <= len(roles) and all(
        known[p.name] in (None, role) or (letters and len(p.name) == 1)
        for p, role in zip(required, roles)
    )
    return in_place and (
        len(required) == len(roles)
        or known[required[0].name] is not None
        or all(_is_unused(p.name) for p in required if not known[p.name])
    )


def _bound(
    function: Callable,
    positional: Sequence[inspect.Parameter],
    keyword_only: Sequence[inspect.Parameter],
    known: dict[str, str | None],
    name: str,
) -> Bound:
    """Return the callable with its arguments: by position up to an unknown one, then by name."""
    args: list[str] = []
    keywords: dict[str, str] = {}
    gap = False
    for p in positional:
        role = known[p.name]
        if role is None:
            gap = True  # an optional parameter that keeps its default
        elif not gap:
            args.append(role)
        elif p.kind is p.POSITIONAL_ONLY:
            raise TypeError(
                f"{name}{_shown(function)}: {p.name!r} comes after an optional parameter that is "
                f"not known, and cannot be given by name. Put it first."
            )
        else:
            keywords[p.name] = role
    keywords.update({p.name: known[p.name] for p in keyword_only if known[p.name]})
    return Bound(function, tuple(args), keywords)


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _role(
    name: str, roles: Sequence[str], aliases: dict[str, str] | None
) -> str | None:
    for role, names in {**NAMES, **EXTRA}.items():
        if name in names:
            role = (aliases or {}).get(role, role)
            return role if role in roles or role in EXTRA else None
    return None


def _known_names(roles: Sequence[str]) -> str:
    return "; ".join(f"{role}: {', '.join(sorted(NAMES[role]))}" for role in roles)


def _is_unused(name: str) -> bool:
    return name.startswith("_")


def _shown(function: Callable) -> str:
    if isinstance(function, nn.Module):
        function = function.forward
    return str(inspect.signature(function))
