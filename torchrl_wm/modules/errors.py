"""Exceptions of the package."""

from __future__ import annotations


class MissingEntryError(KeyError):
    """The error of an entry that is needed and missing.

    A :class:`KeyError` whose message prints as it is, without the quotes and
    escapes that Python puts around the argument of one.
    """

    def __str__(self) -> str:
        return Exception.__str__(self)
