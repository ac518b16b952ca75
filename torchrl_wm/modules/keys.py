"""Small operations on nested keys that every layer of the package shares."""

from __future__ import annotations

from collections.abc import Iterable

from tensordict import NestedKey, TensorDictBase, unravel_key


def as_tuple(key: NestedKey) -> tuple[str, ...]:
    """The names in a key: ``"a"`` gives ``("a",)``, ``("a", ("b",))`` gives ``("a", "b")``."""
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def join(*parts: NestedKey) -> NestedKey:
    """Several keys as one flat one: "next" and ("agents", "reward") give a 3-tuple."""
    return unravel_key(tuple(name for part in parts for name in as_tuple(part)))


def is_next(key: NestedKey) -> bool:
    """Whether ``key`` points below ``"next"``."""
    return as_tuple(key)[0] == "next"


def strip_next(key: NestedKey) -> NestedKey:
    """``("next", "latent")`` as ``"latent"``; a root key stays what it is."""
    names = as_tuple(key)
    return unravel_key(names[1:] if names[0] == "next" else names)


def sibling(key: NestedKey, name: str) -> NestedKey:
    """The key called ``name`` beside ``key``, at the same depth."""
    return unravel_key((*as_tuple(key)[:-1], name))


def suffixed(key: NestedKey, suffix: str) -> NestedKey:
    """The key beside ``key`` whose name is its name with ``suffix``."""
    return sibling(key, as_tuple(key)[-1] + suffix)


def unique(keys: Iterable[NestedKey]) -> list[NestedKey]:
    """The keys flattened, each once, in order of first appearance."""
    return list(dict.fromkeys(unravel_key(key) for key in keys))


def missing_from(
    tensordict: TensorDictBase, keys: Iterable[NestedKey]
) -> list[NestedKey]:
    """Those of ``keys`` that ``tensordict`` does not hold."""
    return [key for key in keys if tensordict.get(key, None) is None]


def leaf_keys(tensordict: TensorDictBase) -> list[NestedKey]:
    """The keys that ``tensordict`` holds, nested ones as flat tuples."""
    return sorted(tensordict.keys(True, True), key=str)
