"""What tells whether a world model is good."""

from __future__ import annotations

from torchrl_wm.diagnostics.open_loop import open_loop_error
from torchrl_wm.diagnostics.plots import plot_open_loop_error, plot_prediction

__all__ = ["open_loop_error", "plot_open_loop_error", "plot_prediction"]
