"""Small operations on nested keys that every layer of the package shares."""

from __future__ import annotations

from collections.abc import Iterable

from tensordict import NestedKey, TensorDictBase, unravel_key


def as_tuple(key: NestedKey) -> tuple[str, ...]:
    """Return the names in a key: ``"a"`` gives ``("a",)``, ``("a", ("b",))`` gives ``("a", "b")``."""
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def join(*parts: NestedKey) -> NestedKey:
    """Return several keys as a flat one: "next" and ("agents", "reward") give a 3-tuple."""
    return unravel_key(tuple(name for part in parts for name in as_tuple(part)))


def is_next(key: NestedKey) -> bool:
    """Return whether ``key`` points below ``"next"``."""
    return as_tuple(key)[0] == "next"


def strip_next(key: NestedKey) -> NestedKey:
    """Return ``("next", "latent")`` as ``"latent"``; a root key stays as it is."""
    names = as_tuple(key)
    return unravel_key(names[1:] if names[0] == "next" else names)


def sibling(key: NestedKey, name: str) -> NestedKey:
    """Return the key called ``name`` beside ``key``, at the same depth."""
    return unravel_key((*as_tuple(key)[:-1], name))


def suffixed(key: NestedKey, suffix: str) -> NestedKey:
    """Return the key beside ``key`` that is called the same with ``suffix`` appended."""
    return sibling(key, as_tuple(key)[-1] + suffix)


def unique(keys: Iterable[NestedKey]) -> list[NestedKey]:
    """Return the keys flattened, each once, in order of first appearance."""
    return list(dict.fromkeys(unravel_key(key) for key in keys))


def missing_from(
    tensordict: TensorDictBase, keys: Iterable[NestedKey]
) -> list[NestedKey]:
    """Return the ``keys`` that ``tensordict`` does not hold."""
    return [key for key in keys if tensordict.get(key, None) is None]


def leaf_keys(tensordict: TensorDictBase) -> list[NestedKey]:
    """Return the keys that ``tensordict`` holds, nested ones as flat tuples."""
    return sorted(tensordict.keys(True, True), key=str)


def overlap(one: NestedKey, other: NestedKey) -> bool:
    """Return whether two keys name the same entry, or one what is below the other."""
    names, others = as_tuple(one), as_tuple(other)
    shorter = min(len(names), len(others))
    return names[:shorter] == others[:shorter]
