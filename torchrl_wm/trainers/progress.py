"""What a run shows of itself while it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from torchrl_wm.trainers.recipe import RecipeTrainer

#: What the bar shows of a row, the first ones first.
_SHOWN = ("return", "evaluation_return", "loss_nll", "loss_done", "loss_qvalue")
#: How many gradient steps pass before the bar is drawn again.
_FITTING_INTERVAL = 50


class Progress:
    """A bar over real steps with the time left, and a line for each row of the metrics.

    Where nobody looks, as in a log file, there are the lines alone.

    Args:
        trainer: whose progress it is.

    Raises:
        ImportError: if tqdm is missing.
    """

    def __init__(self, trainer: RecipeTrainer) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as err:
            raise ImportError(
                "Progress bars need tqdm: pip install 'torchrl-wm[cli]', or pass progress=False."
            ) from err
        self.trainer, self._tqdm, self._bar = trainer, tqdm, None
        self._values: dict[str, str] = {}
        trainer.acting.on_step = self.step

    def step(self) -> None:
        """A real step is about to be made."""
        if self._bar is None:
            trainer = self.trainer
            self._bar = self._tqdm(
                total=trainer.expected_steps,
                initial=trainer.collected_frames,
                unit="step",
                desc=f"{trainer.algorithm} on {trainer.config.env}",
                dynamic_ncols=True,
                disable=None,  # where there is no terminal
                leave=False,
            )
        self._bar.update()

    def fitting(self, steps: int) -> Callable[[int], None]:
        """What is to be called with each gradient step of the model."""

        def show(step: int) -> None:
            if self._bar is not None and step % _FITTING_INTERVAL == 0:
                self._postfix(model=f"{step}/{steps}")

        return show

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of the metrics."""
        values = {name: f"{row[name]:.4g}" for name in _SHOWN if name in row}
        self._values.update(values)
        if self._bar is not None:
            self._bar.total = max(self.trainer.expected_steps, self._bar.n)
        self._postfix()
        name = f"episode {row['episode']}" if "episode" in row else "evaluation"
        listed = [f"{key} {value}" for key, value in values.items()]
        text = ", ".join([f"step {row['step']}, {name}", *listed])
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
