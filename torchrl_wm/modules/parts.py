"""Whether a model still consists of the modules that its builder made."""

from __future__ import annotations

from torch import nn


def remember_parts(model: nn.Module) -> None:
    """Take what the model consists of now for what its builder made of it."""
    # Not registered, as they are already; copies and pickles hold their own.
    model.__dict__["_made_of"] = _parts(model)


def has_its_parts(model: nn.Module) -> bool:
    """Whether no module of it, however deep, was replaced, added or taken away since."""
    return model.__dict__.get("_made_of") == _parts(model)


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in model.named_modules() if part is not model]
