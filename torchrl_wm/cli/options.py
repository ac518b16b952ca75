"""Forms of options that are easier to read than tyro's own."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args, Union

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

#: The ``registry`` for ``tyro.cli``.
OPTIONS = ConstructorRegistry()
#: The type of ``LogSettings.action_bounds``; importing that class would import torch.
_BOUNDS = tuple[Union[float, tuple[float, ...]], Union[float, tuple[float, ...]]]


@OPTIONS.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Show ``int | None`` as INT, and read "none" as None, but not for a string."""
    kinds = get_args(info.type)
    if len(kinds) != 2 or NoneType not in kinds:
        return None
    (kind,) = (one for one in kinds if one is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(kind, info.markers)
    )

    def read(words: list[str]) -> Any:
        if kind is not str and [word.lower() for word in words] == ["none"]:
            return None
        return spec.instance_from_str(words)

    return PrimitiveConstructorSpec(
        nargs=spec.nargs,
        metavar=spec.metavar,
        instance_from_str=read,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else spec.str_from_instance(value)
        ),
    )


@OPTIONS.primitive_rule
def _bounds(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read ``-1,1`` as the bounds of actions, and several of them as those of each dim."""
    if info.type != _BOUNDS:
        return None

    def read(words: list[str]) -> Any:
        pairs = [[float(number) for number in word.split(",")] for word in words]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{' '.join(words)!r} is not LOW,HIGH, such as -1,1")
        low, high = zip(*pairs)
        return (low[0], high[0]) if len(pairs) == 1 else (low, high)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="LOW,HIGH [LOW,HIGH ...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 2,
        str_from_instance=lambda value: [
            ",".join(str(number) for number in pair)
            for pair in (zip(*value) if isinstance(value[0], tuple) else [value])
        ],
    )
