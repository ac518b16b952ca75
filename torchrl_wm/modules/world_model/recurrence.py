"""Many steps through time on tensors: a loop, a loop over a compiled step, or a scan.

Only the first step is always eager: it checks what the components write, and says which
entries there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey

from torchrl_wm import _upstream
from torchrl_wm.modules.world_model.compiling import GraphMaker
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.transition import Transition

Scope = Literal["step", "scan"]
Tensors = list[torch.Tensor]
#: One step on lists of tensors: the state and the step's inputs give the next state and what
#: the step puts out.
Advance = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


@dataclass
class Inputs:
    """What steps are given, by flat key, ``[*B, T, ...]`` or, of one step, ``[*B, ...]``.

    Args:
        context: what the dynamics read beside latents.
        encoded: the encoded next observations, by ``("next", key)``; None to
            predict without correction.
        begins: where episodes begin, bool; None where they never do.
        begun: the latents that an episode would begin with.
    """

    context: FlatTensors
    encoded: FlatTensors | None = None
    begins: torch.Tensor | None = None
    begun: FlatTensors | None = None

    def keys(self) -> tuple[tuple[NestedKey, ...] | None, ...]:
        """The keys of all parts."""
        parts = (self.context, self.encoded, self.begun)
        return tuple(None if part is None else tuple(part) for part in parts)

    def tensors(self) -> Tensors:
        """All tensors, in the order of the keys, ``begins`` last."""
        parts = (self.context, self.encoded or {}, self.begun or {})
        flat = [value for part in parts for value in part.values()]
        return flat if self.begins is None else [*flat, self.begins]

    @classmethod
    def from_tensors(
        cls, keys: tuple[tuple[NestedKey, ...] | None, ...], tensors: Sequence
    ) -> Inputs:
        """The inverse of :meth:`keys` and :meth:`tensors`."""
        rest = list(tensors)
        parts = []
        for names in keys:
            count = 0 if names is None else len(names)
            parts.append(None if names is None else dict(zip(names, rest[:count])))
            rest = rest[count:]
        return cls(parts[0], parts[1], rest[0] if rest else None, parts[2])

    def unbind(self, dim: int) -> list[Inputs]:
        """The inputs of each step."""
        keys = self.keys()
        columns = [value.unbind(dim) for value in self.tensors()]
        return [self.from_tensors(keys, row) for row in zip(*columns)]


def advance(
    transition: Transition, state: FlatTensors, now: Inputs, at: Placement
) -> tuple[FlatTensors, FlatTensors]:
    """One step.

    Returns:
        The next latents; and the entries of this step: the latents it started
        from, what was written under "next", and, without correction, what the
        dynamics wrote at the root.
    """
    if now.begins is not None:
        state = where(now.begins, now.begun, state)
    values = transition.predict(state, now.context, at)
    if now.encoded is not None:
        written, following = transition.correct(values, now.encoded, at)
        return following, {**state, **written}
    following = {key: values[place] for key, place in transition.latents}
    given = now.context.keys() - transition.written
    return following, {k: value for k, value in values.items() if k not in given}


def where(mask: torch.Tensor, new: FlatTensors, old: FlatTensors) -> FlatTensors:
    """``new`` in the rows of ``mask``, ``[*B]``, else ``old``; the entries of ``old``."""
    out = {}
    for key, value in old.items():
        rows = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        out[key] = torch.where(rows, new[key], value)
    return out


def unroll_time(
    transition: Transition,
    state: FlatTensors,
    inputs: Inputs,
    at: Placement,
    compiler: RolloutCompiler | None = None,
) -> FlatTensors:
    """All steps, one after the other.

    Args:
        transition: predicts and corrects.
        state: the latents that the first step starts from, ``[*B, ...]``.
        inputs: ``[*B, T, ...]``. An episode that begins at the first step is
            already in ``state``.
        at: where it happens.
        compiler: compiles the steps after the first.

    Returns:
        The entries of the steps, ``[*B, T, ...]`` by flat key.
    """
    dim = len(at.batch_size)
    steps = inputs.unbind(dim)
    first = Inputs(steps[0].context, steps[0].encoded)
    state, out = advance(transition, state, first, at)
    at = at._replace(trusted=True)
    if compiler is not None and len(steps) > 1:
        rest = compiler(transition, state, out, inputs, at)
        if rest is not None:
            return {
                key: torch.cat([out[key].unsqueeze(dim), rest[key]], dim) for key in out
            }
    outs = [out]
    for now in steps[1:]:
        state, out = advance(transition, state, now, at)
        outs.append(out)
    return {key: torch.stack([out[key] for out in outs], dim) for key in outs[0]}


class FlatStep:
    """:func:`advance` on lists of tensors, which compiled code and scans take best.

    Args:
        transition: predicts and corrects.
        state_keys: the keys of the state.
        input_keys: those of the inputs (:meth:`Inputs.keys`).
        out_keys: those of the entries it puts out.
        at: where it happens.
    """

    def __init__(
        self,
        transition: Transition,
        state_keys: tuple[NestedKey, ...],
        input_keys: tuple[tuple[NestedKey, ...] | None, ...],
        out_keys: tuple[NestedKey, ...],
        at: Placement,
    ) -> None:
        self.transition, self.at = transition, at
        # Looked up here, as a graph cannot.
        self._scan, _ = _upstream.scan_functions() or (None, None)
        self.state_keys, self.input_keys = state_keys, input_keys
        self.out_keys = out_keys

    def __call__(self, state: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
        following, out = advance(
            self.transition,
            dict(zip(self.state_keys, state)),
            Inputs.from_tensors(self.input_keys, now),
            self.at,
        )
        return (
            [following[key] for key in self.state_keys],
            [out[key] for key in self.out_keys],
        )

    def scan(self, state: Tensors, steps: Tensors) -> Tensors:
        """All steps, ``[T, *B, ...]``, as one higher-order scan."""

        def body(state: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
            following, out = self(state, now)
            # A scan takes no output that is another one, or an input.
            return (
                [new.to(old.dtype).clone() for new, old in zip(following, state)],
                [value.clone() for value in out],
            )

        return self._scan(body, state, steps, dim=0)[1]

    def loop(self, step: Advance, state: Tensors, steps: Tensors) -> Tensors:
        """All steps, ``[T, *B, ...]``, by ``step``."""
        outs = []
        for now in zip(*(value.unbind(0) for value in steps)):
            state, out = step(state, list(now))
            outs.append(out)
        return [torch.stack(column) for column in zip(*outs)]


class RolloutCompiler:
    """Compiles steps through time, and keeps what it compiled as long as that is true.

    Args:
        scope: ``"step"``, a loop over one compiled step, or ``"scan"``.
        options: for :func:`torch.compile`.
        devices: where the model is. TorchRL checks the gradients of scans once
            for each kind of device, which cannot be done inside a graph.
    """

    def __init__(
        self,
        scope: Scope,
        options: dict[str, Any],
        devices: Iterable[torch.device] = (),
    ) -> None:
        if scope not in ("step", "scan"):
            raise ValueError(f"scope must be 'step' or 'scan', got {scope!r}.")
        functions = _upstream.scan_functions()
        if scope == "scan" and functions is None:
            warnings.warn(
                "The installed torchrl has no scan that is known here: steps are compiled one by "
                "one, with the same result. scope='step' says so without a warning.",
                stacklevel=3,
            )
            scope = "step"
        self._warm = functions[1] if scope == "scan" else None
        for device in devices if scope == "scan" else ():
            self._warm(device)
        self.scope = scope
        self._graphs = GraphMaker(options, "The rollout", "world_model.eager_rollout()")
        self._transition: Transition | None = None
        self._compiled: dict[tuple, tuple[FlatStep, Callable]] = {}

    def __call__(
        self,
        transition: Transition,
        state: FlatTensors,
        first: FlatTensors,
        inputs: Inputs,
        at: Placement,
    ) -> FlatTensors | None:
        """The steps after the first, ``[*B, T - 1, ...]``; None where they stay eager.

        Args:
            transition: predicts and corrects.
            state: the latents after the first step.
            first: what the first step put out.
            inputs: of all steps, ``[*B, T, ...]``.
            at: where it happens.
        """
        if self._graphs.failed or torch.compiler.is_compiling():
            # What encloses this compiles it. A scan within another graph would leave
            # TorchRL's type of exploration changed behind it (torch 2.13).
            return None
        dim = len(at.batch_size)
        # The strides of a slice depend on T, and graphs on strides.
        steps = [contiguous(x.movedim(dim, 0)[1:]) for x in inputs.tensors()]
        start = [contiguous(value) for value in state.values()]
        keys = tuple(state), inputs.keys(), tuple(first)
        step, compiled = self._get(transition, keys, at)
        if self.scope == "scan":
            self._warm(start[0].device)
            outs = self._graphs.attempt(lambda: compiled(start, steps))
        else:
            outs = self._graphs.attempt(lambda: step.loop(compiled, start, steps))
        if outs is None:
            return None
        return {key: value.movedim(0, dim) for key, value in zip(first, outs)}

    def _get(
        self, transition: Transition, keys: tuple, at: Placement
    ) -> tuple[FlatStep, Callable]:
        if transition is not self._transition:
            self._transition, self._compiled = transition, {}
        case = (keys, at, torch.is_grad_enabled())
        if case not in self._compiled:
            step = FlatStep(transition, *keys, at)
            function = step.scan if self.scope == "scan" else step
            self._compiled[case] = step, self._graphs.compile(function)
        return self._compiled[case]


def contiguous(value: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of their shape, dims of size 1 included."""
    return value.clone(memory_format=torch.contiguous_format)
