"""Forms of options that are easier to read than tyro's own."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

#: The ``registry`` for ``tyro.cli``.
OPTIONS = ConstructorRegistry()


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
