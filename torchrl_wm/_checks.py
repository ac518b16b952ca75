"""Checks of what callers give: numbers, and names among those that are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from operator import index
from typing import Any


def positive_int(name: str, value: Any, otherwise: str = "") -> int:
    """Return a count as an int.

    Args:
        name: the argument, for the message.
        value: the count.
        otherwise: what the argument may be instead, for the message: ``", or None for no limit"``.

    Raises:
        ValueError: if it is not an int, or not positive.
    """
    try:
        number = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive int{otherwise}, got {value!r}.")
    return number


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the closest known name; empty if none is close."""
    close = get_close_matches(str(name), list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_settings(kind: type, given: Iterable[str]) -> None:
    """Refuse names that are not settings of the dataclass ``kind``.

    Raises:
        TypeError: naming the first of them, the closest setting, and all settings.
    """
    known = sorted(field.name for field in fields(kind))
    for name in given:
        if name not in known:
            raise TypeError(
                f"{kind.__name__} has no setting {name!r}.{did_you_mean(name, known)} There are "
                f"{known}."
            )


def check_choice(name: str, value: Any, choices: Sequence[Any], more: str = "") -> None:
    """Refuse a value that is not one of the choices.

    Args:
        name: the argument, for the message.
        value: the value.
        choices: the values that are allowed.
        more: what the argument may be instead, for the message.

    Raises:
        ValueError: naming the value and the choices.
    """
    if value not in choices:
        raise ValueError(
            f"Unknown {name} {value!r}. Valid choices are {list(choices)}{more}."
        )
