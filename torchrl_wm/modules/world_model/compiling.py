"""torch.compile: graphs that are kept as long as they are true, and those of the filter."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from tensordict import NestedKey

from torchrl_wm import _upstream
from torchrl_wm.modules.world_model.filter_steps import (
    contiguous,
    filter_step,
    FilterInputs,
    InputKeys,
)
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.transition import Transition

Run = TypeVar("Run", bound=Callable)
Scope = Literal["step", "scan"]
Tensors = list[torch.Tensor]

#: How many graphs are kept: a policy that is made anew again and again would leave its own.
MOST_GRAPHS = 64


class Compiler:
    """A compiler of functions on tensors, which keeps its graphs as long as they are true.

    On a machine where nothing can be compiled, it warns once, and leaves functions eager.

    Args:
        options: for :func:`torch.compile`; ``fullgraph`` is True and ``dynamic``
            False unless given.
        what: the name of what is compiled, for the warning where nothing can be.
        undo: the call that makes it eager again, for the warning.
    """

    def __init__(self, options: dict[str, Any], what: str, undo: str) -> None:
        self.options = {"fullgraph": True, "dynamic": False, **options}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            # Or all graphs of a process would count towards one limit, of eight. Before
            # this option existed, the limit was that of a code object.
            self.options.setdefault("isolate_recompiles", True)
        self.what, self.undo = what, undo
        self.failed = False
        self._graphs: OrderedDict[tuple, tuple[tuple, Callable]] = OrderedDict()
        self._model: tuple = ()

    def wrap(
        self,
        run: Run,
        model: Sequence[object],
        policy: Sequence[object],
        key: Hashable,
        eager: Run | None = None,
    ) -> Run:
        """Return the compiled ``run``, or what is eager if it cannot be compiled.

        Args:
            run: the function.
            model: the objects of the model that a graph of it is made for, by identity.
                Graphs for others than these are let go.
            policy: the same, of the policy. Graphs of the latest ones are kept.
            key: what else tells one graph from another.
            eager: does the same without the compiler; ``run`` by default. It also raises
                the error of a wrong input or network as it was meant, and not as tracing
                raises it.
        """
        eager = run if eager is None else eager
        if self.failed:
            return eager
        if tuple(map(id, model)) != tuple(map(id, self._model)):
            self._graphs.clear()
            self._model = tuple(model)
        # The objects that a graph was made for are held, so that no id is used again.
        key = (*map(id, policy), key, torch.is_grad_enabled())
        if key not in self._graphs:
            if "isolate_recompiles" in self.options:
                graph = torch.compile(run, **self.options)
            else:
                graph = torch.compile(_with_code_of_its_own(run), **self.options)
            self._graphs[key] = (tuple(policy), graph)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph = self._graphs[key][1]

        def call(*args: Any) -> Any:
            if self.failed:
                return eager(*args)
            try:
                return graph(*args)
            except _upstream.backend_errors() as err:
                self._fail(err)
                return eager(*args)
            except _upstream.tracing_errors():
                eager(*args)
                raise

        return call

    def _fail(self, err: Exception) -> None:
        """Warn that nothing can be compiled, and remember it."""
        self.failed = True
        reason = " ".join(str(err).partition("\n\n")[0].split())
        warnings.warn(
            f"{self.what} could not be compiled and stays eager ({type(err).__name__}: "
            f"{reason}). Is there a C++ compiler? {self.undo} silences this.",
            stacklevel=4,
        )


def _with_code_of_its_own(function: Callable) -> Callable:
    """Return ``function`` behind a code object that no other function has."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__code__ = call.__code__.replace()
    return call


class FilterCompiler:
    """A compiler of the steps of a filter after the first.

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
        self.scope = scope
        self._scan, self._warm = functions if scope == "scan" else (None, None)
        for device in devices if scope == "scan" else ():
            self._warm(device)
        self._compiler = Compiler(options, "The rollout", "world_model.eager_rollout()")

    def __call__(
        self,
        transition: Transition,
        state: FlatTensors,
        first: FlatTensors,
        inputs: FilterInputs,
        at: Placement,
    ) -> FlatTensors | None:
        """Make the steps after the first.

        Args:
            transition: predicts and corrects.
            state: the latents after the first step.
            first: what the first step put out.
            inputs: those of all steps, ``[*B, T, ...]``.
            at: the batch size ``*B``, and the device.

        Returns:
            The entries of these steps, ``[*B, T - 1, ...]``; None if they stay eager.
        """
        if self._compiler.failed or torch.compiler.is_compiling():
            # The graph around this one takes the loop in. A scan within it would leave
            # TorchRL's type of exploration changed behind it (torch 2.13).
            return None
        dim = len(at.batch_size)
        # The strides of a slice depend on T, and graphs on strides.
        steps = [contiguous(x.movedim(dim, 0)[1:]) for x in inputs.tensors()]
        start = [contiguous(value) for value in state.values()]
        keys = tuple(state), inputs.keys(), tuple(first)
        step = _StepOnLists(transition, *keys, at, self._scan)
        if self.scope == "scan":
            self._warm(start[0].device)
            run, eager = step.scan, step.loop
        else:
            run = eager = step
        run = self._compiler.wrap(run, [transition], (), (keys, at), eager)
        outs = (
            run(start, steps) if self.scope == "scan" else step.loop(start, steps, run)
        )
        return {key: value.movedim(0, dim) for key, value in zip(first, outs)}


class _StepOnLists:
    """A step of the filter on lists of tensors, which graphs and scans take best.

    Args:
        transition: predicts and corrects.
        state_keys: the keys of the latents.
        input_keys: those of the inputs (:meth:`FilterInputs.keys`).
        out_keys: those of the entries that a step puts out.
        at: the batch size ``*B``, and the device.
        scan: TorchRL's scan, for :meth:`scan`.
    """

    def __init__(
        self,
        transition: Transition,
        state_keys: tuple[NestedKey, ...],
        input_keys: InputKeys,
        out_keys: tuple[NestedKey, ...],
        at: Placement,
        scan: Callable | None,
    ) -> None:
        self.transition, self.at, self._scan = transition, at, scan
        self.state_keys, self.input_keys = state_keys, input_keys
        self.out_keys = out_keys

    def __call__(self, state: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
        """Return the next latents, and the entries of the step."""
        following, out = filter_step(
            self.transition,
            dict(zip(self.state_keys, state)),
            FilterInputs.from_tensors(self.input_keys, now),
            self.at,
        )
        return (
            [following[key] for key in self.state_keys],
            [out[key] for key in self.out_keys],
        )

    def loop(
        self, state: Tensors, steps: Tensors, one: Callable | None = None
    ) -> Tensors:
        """Make all steps, ``[T, *B, ...]``, by ``one``, the step itself by default."""
        one, outs = self if one is None else one, []
        for now in zip(*(value.unbind(0) for value in steps)):
            state, out = one(state, list(now))
            outs.append(out)
        return [torch.stack(column) for column in zip(*outs)]

    def scan(self, state: Tensors, steps: Tensors) -> Tensors:
        """Make all steps, ``[T, *B, ...]``, as one higher-order scan."""

        def body(state: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
            following, out = self(state, now)
            # A scan takes no output that is another one, or an input.
            return (
                [new.to(old.dtype).clone() for new, old in zip(following, state)],
                [value.clone() for value in out],
            )

        return self._scan(body, state, steps, dim=0)[1]
