"""The progress that a run shows."""

from __future__ import annotations

import sys
from typing import Any

#: How many gradient steps pass before the bar is drawn again.
_FITTING_INTERVAL = 50
#: Entries of a row of the metrics that are not listed among its values.
_ELSEWHERE = ("step", "seconds", "episode", "length", "random")


class Progress:
    """A bar over steps with the time left, and a line for each row of the metrics.

    Without a terminal, as in a log file, only the lines are written.

    Args:
        title: the text before the bar.

    Raises:
        ImportError: if tqdm is missing.
    """

    def __init__(self, title: str) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as err:
            raise ImportError(
                "Progress bars need tqdm: pip install 'torchrl-wm[cli]', or pass progress=False."
            ) from err
        self._title, self._tqdm, self._bar = title, tqdm, None
        self._values: dict[str, str] = {}

    def begin(self, done: int, expected: int | None) -> None:
        """Show the bar, with the steps that are done already."""
        self._bar = self._tqdm(
            total=expected,
            initial=done,
            unit="step",
            desc=self._title,
            dynamic_ncols=True,
            disable=None,  # without a terminal
            leave=False,
        )

    def step(self, count: int = 1) -> None:
        """Count steps that were made."""
        if self._bar is not None:
            self._bar.update(count)

    def fitting(self, step: int, steps: int) -> None:
        """Show a gradient step of a long training."""
        if self._bar is not None and step % _FITTING_INTERVAL == 0:
            self._postfix(model=f"{step}/{steps}")

    def show(self, row: dict[str, Any], expected: int | None) -> None:
        """Show a row of the metrics."""
        values = {
            name: f"{value:.4g}"
            for name, value in row.items()
            if name not in _ELSEWHERE
        }
        self._values.update(values)
        if self._bar is not None and expected is not None:
            self._bar.total = max(expected, self._bar.n)
        self._postfix()
        name = f", episode {row['episode']}" if "episode" in row else ""
        listed = [f"{key} {value}" for key, value in values.items()]
        text = ", ".join([f"step {row['step']}{name}", *listed])
        self._tqdm.write(f"{text} ({row['seconds']:.0f} s)", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _postfix(self, **more: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix({**self._values, **more})
