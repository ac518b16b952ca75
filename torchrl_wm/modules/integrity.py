"""A mark that tells a model with the modules of its builder from one that was changed."""

from __future__ import annotations

from torch import nn


def mark_pristine(model: nn.Module) -> None:
    """Note that the modules of a model, as they are now, are those of its builder."""
    model.pristine_parts = _parts(model)  # a list, which registers none of them again


def is_pristine(model: nn.Module) -> bool:
    """Return whether no module of a model, however deep, was replaced, added or taken away."""
    return getattr(model, "pristine_parts", None) == _parts(model)


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in model.named_modules() if part is not model]
