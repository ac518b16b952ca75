"""Dynamics and posterior on a flat dictionary of tensors: predict, then correct."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey
from torch import nn

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, strip_next, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.program import Program
from torchrl_wm.modules.world_model.run_components import failure
from torchrl_wm.modules.world_model.wiring import written_keys


class Transition:
    """Dynamics and posterior of a model, without the tensordicts around their networks.

    Args:
        dynamics: predicts the next latents.
        posterior: corrects them by an encoded observation. Without one, what the encoder
            writes takes the place of what was predicted.
        latents: the keys of the latents.
    """

    def __init__(
        self,
        dynamics: nn.Module,
        posterior: nn.Module | None,
        latents: Sequence[NestedKey],
    ) -> None:
        self.dynamics, self.posterior = dynamics, posterior
        #: The latents, and where the dynamics write them.
        self.latents = [(key, join("next", key)) for key in latents]
        reads = unique(dynamics.in_keys)
        #: The keys that the dynamics read beside latents: the action, and constant context.
        self.context = [k for k in reads if not is_next(k) and k not in latents]
        self.written = set(written_keys(dynamics))
        self._predict = Program([dynamics])
        self._correct = None
        if posterior is not None:
            self._correct = Program([posterior])
            self._at_next = any(is_next(key) for key in unique(posterior.in_keys))
            self._corrected = [
                (strip_next(key), join("next", strip_next(key)))
                for key in written_keys(posterior)
            ]

    def is_current(self) -> bool:
        """Return whether both components still have the networks, keys and hooks they had."""
        return self._predict.is_current() and (
            self._correct is None or self._correct.is_current()
        )

    def predict(
        self, state: FlatTensors, context: FlatTensors, at: Placement
    ) -> FlatTensors:
        """Run the dynamics.

        Args:
            state: the latents, ``[*B, ...]`` by flat key; not modified.
            context: the action, and whatever else the dynamics read; not modified.
            at: the batch size and device of both.

        Returns:
            State, context and what the dynamics write, ``("next", ...)`` and others.
        """
        values = {**context, **state}
        _run("dynamics", self.dynamics, self._predict, values, at)
        return values

    def correct(
        self, values: FlatTensors, encoded: FlatTensors, at: Placement
    ) -> tuple[FlatTensors, FlatTensors]:
        """Correct a prediction by the observation that it should have led to.

        Args:
            values: what :meth:`predict` returns; it is used up.
            encoded: what the encoder makes of the next observation, by
                ``("next", key)``.
            at: the batch size and device of both.

        Returns:
            The entries that dynamics and posterior write under "next", and the corrected
            latents.
        """
        predicted = {key: value for key, value in values.items() if _below_next(key)}
        if self._correct is None:
            state = {
                key: encoded[place] if place in encoded else predicted[place]
                for key, place in self.latents
            }
            return predicted, state
        if self._at_next:
            values.update(encoded)
            _run("posterior", self.posterior, self._correct, values, at)
            places = [place for _, place in self._corrected]
            out = {key: values[key] for key in (*predicted, *places)}
        else:
            below = {strip_next(k): v for k, v in {**predicted, **encoded}.items()}
            _run("posterior", self.posterior, self._correct, below, at)
            out = {place: below[strip_next(place)] for place in predicted}
            out.update((place, below[key]) for key, place in self._corrected)
        return out, {key: out[place] for key, place in self.latents}


def _below_next(key: NestedKey) -> bool:
    """Return what ``is_next`` does, of a key that is flat."""
    return type(key) is tuple and key[0] == "next"


def _run(
    name: str, module: nn.Module, program: Program, values: FlatTensors, at: Placement
) -> None:
    """Run a component's program, and name the component where it fails."""
    if at.trusted:
        program(values, at)
        return
    missing = [key for key in unique(module.in_keys) if key not in values]
    if missing:
        raise MissingEntryError(
            f"{name} reads {missing}, and there are {sorted(values, key=str)}."
        )
    try:
        program(values, at)
    except Exception as err:
        raise failure(name, module, values, at.batch_size, err) from err
