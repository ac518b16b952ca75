"""The ``torchrl-wm`` command."""

from __future__ import annotations

from torchrl_wm.cli.main import main

__all__ = ["main"]
