"""The blocks that a world model can be made of."""

from __future__ import annotations
