"""Steps of the filter through time, on tensors.

A step of the filter takes the latents from one real observation to the next: it predicts, and
corrects where there is an observation. (An imagined step, which predicts rewards and ends, too,
is that of :mod:`torchrl_wm.envs.step`.) Steps run one after the other here;
:mod:`~torchrl_wm.modules.world_model.compiling` makes graphs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from tensordict import NestedKey

from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, where
from torchrl_wm.modules.world_model.transition import Transition

InputKeys = tuple[Optional[tuple[NestedKey, ...]], ...]
#: The entry that says where episodes begin.
IS_INIT = "is_init"


@dataclass
class FilterInputs:
    """The inputs of steps of the filter, ``[*B, T, ...]`` by flat key; ``[*B, ...]`` of one.

    Args:
        context: the action, and whatever else the dynamics read beside latents.
        encoded: the encoded next observations, by ``("next", key)``; None to
            predict without correction.
        begins: where episodes begin, bool; None where they never do.
        fresh: the latents and the memory that an episode would begin with.
    """

    context: FlatTensors
    encoded: FlatTensors | None = None
    begins: torch.Tensor | None = None
    fresh: FlatTensors | None = None

    def keys(self) -> InputKeys:
        """Return the keys of all parts."""
        parts = (self.context, self.encoded, self.fresh)
        return tuple(None if part is None else tuple(part) for part in parts)

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors, in the order of the keys, ``begins`` last."""
        parts = (self.context, self.encoded or {}, self.fresh or {})
        flat = [value for part in parts for value in part.values()]
        return flat if self.begins is None else [*flat, self.begins]

    @classmethod
    def from_tensors(cls, keys: InputKeys, tensors: Sequence) -> FilterInputs:
        """Undo :meth:`keys` and :meth:`tensors`."""
        rest = list(tensors)
        parts = []
        for names in keys:
            count = 0 if names is None else len(names)
            parts.append(None if names is None else dict(zip(names, rest[:count])))
            rest = rest[count:]
        return cls(parts[0], parts[1], rest[0] if rest else None, parts[2])

    def unbind(self, dim: int) -> list[FilterInputs]:
        """Return the inputs of each step."""
        keys = self.keys()
        columns = [value.unbind(dim) for value in self.tensors()]
        return [self.from_tensors(keys, row) for row in zip(*columns)]


#: Makes the steps after the first: of the transition, the latents and the entries after the first
#: step, all inputs, and where. Returns ``[*B, T - 1, ...]`` by key; None leaves them to a loop.
LaterSteps = Callable[
    [Transition, FlatTensors, FlatTensors, FilterInputs, Placement],
    Optional[FlatTensors],
]


def filter_step(
    transition: Transition,
    state: FlatTensors,
    now: FilterInputs,
    at: Placement,
    predicts: bool = True,
) -> tuple[FlatTensors, FlatTensors]:
    """Make one step.

    Args:
        transition: predicts and corrects.
        state: the latents and the memory that it starts from.
        now: the inputs of this step.
        at: the batch size ``*B``, and the device.
        predicts: whether the predictions are of use beside the next latents.

    Returns:
        The next latents and memory; and the entries of this step: the latents it started
        from, what was written under "next", and, without correction, what the
        dynamics wrote at the root.
    """
    if now.begins is not None:
        state = where(now.begins, now.fresh, state)
    if now.encoded is not None:
        if predicts:
            values = transition.predict(state, now.context, at)
        else:
            values = transition.carry(state, now.context, now.encoded, at)
        written, following = transition.correct(values, now.encoded, at)
        made, left_out = {**state, **written}, transition.unrecorded
    else:
        made = transition.imagine(state, now.context, at)
        following = {key: made[place] for key, place in transition.state}
        left_out = transition.unrecorded | (now.context.keys() - transition.written)
    return following, {k: value for k, value in made.items() if k not in left_out}


def filter_steps(
    transition: Transition,
    state: FlatTensors,
    inputs: FilterInputs,
    at: Placement,
    later_steps: LaterSteps | None = None,
    predicts: bool = True,
) -> FlatTensors:
    """Make all steps.

    The first is always eager: it checks what the components write, and says which entries
    there are.

    Args:
        transition: predicts and corrects.
        state: the latents and the memory that the first step starts from, ``[*B, ...]``.
        inputs: ``[*B, T, ...]``. An episode that begins at the first step is
            already in ``state``.
        at: the batch size ``*B``, and the device.
        later_steps: makes the steps after the first; a loop by default.
        predicts: see :func:`filter_step`.

    Returns:
        The entries of the steps, ``[*B, T, ...]`` by flat key.
    """
    dim = len(at.batch_size)
    steps = inputs.unbind(dim)
    first = FilterInputs(steps[0].context, steps[0].encoded)
    state, out = filter_step(transition, state, first, at, predicts)
    at = at._replace(trusted=True)
    if later_steps is not None and predicts and len(steps) > 1:
        later = later_steps(transition, state, out, inputs, at)
        if later is not None:
            return {
                key: torch.cat([out[key].unsqueeze(dim), later[key]], dim)
                for key in out
            }
    outs = [out]
    for now in steps[1:]:
        state, out = filter_step(transition, state, now, at, predicts)
        outs.append(out)
    return {key: torch.stack([out[key] for out in outs], dim) for key in outs[0]}


def filter_states(
    transition: Transition, state: FlatTensors, inputs: FilterInputs, at: Placement
) -> Iterator[FlatTensors]:
    """Make all steps, and hand out only states; the arguments are those of :func:`filter_steps`.

    Yields:
        The latents and the memory at the root of each step; and, last, those after them.
    """
    for number, now in enumerate(inputs.unbind(len(at.batch_size))):
        if number and now.begins is not None:
            state = where(now.begins, now.fresh, state)
        yield state
        now = FilterInputs(now.context, now.encoded)
        state, _ = filter_step(transition, state, now, at, predicts=False)
        at = at._replace(trusted=True)
    yield state


def contiguous(value: torch.Tensor) -> torch.Tensor:
    """Return the same values with the strides of their shape, dims of size 1 included."""
    return value.clone(memory_format=torch.contiguous_format)
