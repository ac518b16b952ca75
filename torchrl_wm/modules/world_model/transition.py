"""One step of the filter on a flat dictionary of tensors: predict, then correct."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensordict import NestedKey
from torch import nn

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, strip_next, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.program import Program
from torchrl_wm.modules.world_model.run_components import describe
from torchrl_wm.modules.world_model.wiring import written_keys

if TYPE_CHECKING:
    from torchrl_wm.modules.world_model.world_model import WorldModel


class Transition:
    """Dynamics and posterior of a model, without the tensordicts around their networks.

    Args:
        world_model: the model. Components that it gets later need a new transition.
    """

    def __init__(self, world_model: WorldModel) -> None:
        self.dynamics: nn.Module = world_model.dynamics
        self.posterior: nn.Module | None = world_model.posterior
        #: The latents, and where the dynamics write them.
        self.latents = [(key, join("next", key)) for key in world_model.latent_keys]
        reads = unique(self.dynamics.in_keys)
        latents = [key for key, _ in self.latents]
        #: What the dynamics read beside latents: the action, and constant context.
        self.context = [k for k in reads if not is_next(k) and k not in latents]
        self.written = set(written_keys(self.dynamics))
        self._predict = Program([self.dynamics])
        self._correct = None
        if self.posterior is not None:
            self._correct = Program([self.posterior])
            self._at_next = any(is_next(key) for key in unique(self.posterior.in_keys))
            self._corrected = [
                (strip_next(key), join("next", strip_next(key)))
                for key in written_keys(self.posterior)
            ]

    def is_for(self, world_model: WorldModel) -> bool:
        """Whether the model still has the components and networks this was made for."""
        return (
            self.dynamics is world_model.dynamics
            and self.posterior is world_model.posterior
            and self._predict.is_current()
            and (self._correct is None or self._correct.is_current())
        )

    def predict(
        self, state: FlatTensors, context: FlatTensors, at: Placement
    ) -> FlatTensors:
        """Run the dynamics.

        Args:
            state: the latents, ``[*B, ...]`` by flat key; not modified.
            context: the action, and what else the dynamics read; not modified.
            at: where it happens.

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
            at: where it happens.

        Returns:
            What dynamics and posterior write under "next", and the corrected latents.
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
    """As ``is_next``, of a flat key."""
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
        raise RuntimeError(
            f"{name} failed on {describe(values, module.in_keys)} (batch size "
            f"{tuple(at.batch_size)}): {type(err).__name__}: {err}"
        ) from err
