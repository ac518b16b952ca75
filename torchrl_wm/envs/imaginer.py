"""What imagines under a :class:`~torchrl_wm.WorldModelEnv`: starts, actors, steps, graphs.

It works on flat tensors and knows no env. The way of a rollout leads from a start
(:mod:`.starts`) through many steps (:mod:`.unroll`), each by the step kernel (:mod:`.step`),
to one tensordict (:mod:`.flattening`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase

from torchrl_wm.envs.acting import Policy
from torchrl_wm.envs.flattening import assemble, nested_dims, only_tensors
from torchrl_wm.envs.layout import Layout
from torchrl_wm.envs.layout_builder import LayoutBuilder, Reference
from torchrl_wm.envs.start_states import StartStates
from torchrl_wm.envs.starts import Starts
from torchrl_wm.envs.step import StepKernel
from torchrl_wm.envs.unroll import Act, imagined, stacked, unroll
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.world_model.compiling import Compiler
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.memory import HeldMemory
from torchrl_wm.modules.world_model.program import Program


class Start(NamedTuple):
    """The state that steps begin from.

    Args:
        values: its entries by flat key, ``[*B, ...]``.
        at: its batch size ``*B`` and device.
        nested: the dims that nested tensordicts have beside ``*B``, by their keys.
    """

    values: FlatTensors
    at: Placement
    nested: dict[NestedKey, torch.Size]

    @classmethod
    def of(cls, state: TensorDictBase) -> Start:
        """Return the start that a state is.

        Raises:
            TypeError: if it has entries that are no tensors.
        """
        at = Placement(state.batch_size, state.device)
        return cls(only_tensors(state, "the start has"), at, nested_dims(state))


class Imaginer:
    """Imagines with a world model, on flat tensors.

    Args:
        world_model: the model that predicts. It may get other components, which are noticed.
        layout: the entries of the env.
        start_states: where episodes begin when no state is given; None if nothing says so.
        batch_size: ``*B`` of the env.
        device: where to imagine; None leaves tensors where they are.
        decode: whether all that the decoder writes is decoded.
        check_finite: raise where a prediction is NaN or infinite.
    """

    def __init__(
        self,
        world_model: WorldModel,
        layout: Layout,
        *,
        start_states: StartStates | None,
        batch_size: torch.Size,
        device: torch.device | None,
        decode: bool,
        check_finite: bool,
    ) -> None:
        self.world_model = world_model
        self.start_states = start_states
        self.batch_size, self.device = batch_size, device
        self.decode, self.check_finite = decode, check_finite
        self._compiler: Compiler | None = None
        self._program: Program | None = None
        #: The memory after the newest step.
        self.held = HeldMemory()
        self.use(layout)

    def __getstate__(self) -> dict[str, Any]:
        # These hold on to networks: a copy makes its own, and is eager.
        return {**self.__dict__, "kernel": None, "_compiler": None, "_program": None}

    # The model as it is now ----------------------------------------------

    def use(self, layout: Layout) -> None:
        """Imagine these entries from now on."""
        self.layout = layout
        #: What makes the states that episodes begin with.
        self.starts = Starts(self.world_model, layout, self.start_states, self.device)
        #: What predicts one step.
        self.kernel = self._make_kernel()

    def refreshed(self) -> Imaginer:
        """Return the imaginer itself, after a look at the model, whose components may be others."""
        if self.kernel is None:  # in a copy
            self.kernel = self._make_kernel()
        if not self.kernel.is_current():
            self.use(self._rewired())
        self.kernel.refresh()
        return self

    def _make_kernel(self) -> StepKernel:
        return StepKernel(self.world_model, self.layout, self.check_finite)

    def to(self, device: torch.device) -> None:
        """Imagine on another device, where the model is now."""
        self.device = device
        self.use(self.layout.to(device))

    def _rewired(self) -> Layout:
        """Return the layout for replaced components, which must fit the entries there are.

        Raises:
            ValueError: if they change the entries of the env.
        """
        old = self.layout
        builder = LayoutBuilder(
            self.world_model,
            Reference.of_layout(old),
            old.observation,
            batch_size=self.batch_size,
            device=self.device,
            time_limit=old.time_limit,
        )
        new = builder.build(self.decode)
        changed = new.keys ^ old.keys | (new.memory.keys() ^ old.memory.keys())
        changed = sorted(changed, key=str)
        if changed:
            raise ValueError(
                f"A component of the world model was replaced by one that changes the entries of "
                f"the env: {changed}. Make a new WorldModelEnv."
            )
        return replace(new, dropped=old.dropped, observed=old.observed)

    # Imagining -----------------------------------------------------------

    def start(
        self,
        given: TensorDictBase,
        kept: FlatTensors,
        policy: Policy,
        honour: bool = True,
    ) -> Start:
        """Return where an episode begins, as a reset makes it.

        Args:
            given: the caller's tensordict, ``[*B]``.
            kept: its entries that stay (:meth:`Starts.kept_flat
                <torchrl_wm.envs.starts.Starts.kept_flat>`).
            policy: what acts. If it reads no done entries, those that are never True
                are left out.
            honour: whether the tensordict may say where to begin.
        """
        heeds_done = policy.may_read(self.layout.endings.keys)
        values = {**kept, **self.starts.begin(given, honour, heeds_done)}
        return Start(
            values, Placement(given.batch_size, self.device), nested_dims(given)
        )

    def policy(self, given: Callable | None, takes: Callable | None) -> Policy:
        """Return a policy as it acts here: what the caller gives, and what takes tensordicts."""
        program = None
        if isinstance(takes, TensorDictModuleBase):
            if self._program is None or not self._program.is_for(takes):
                self._program = Program([takes])  # the last one is kept
            program = self._program
        return Policy(given, takes, program)

    def rollout(
        self, start: Start, act: Act, max_steps: int, stop: bool
    ) -> TensorDictBase:
        """Return at most ``max_steps`` steps, ``[*B, T]``, and hold the memory after the last one.

        Args:
            start: the state that they begin from, which is used up.
            act: writes the actions.
            max_steps: the number of steps.
            stop: whether the first end of a trajectory ends all of them.
        """
        kernel, at = self.kernel, start.at
        endings = kernel.layout.endings
        ends = _any_done if stop and endings.can_end else None
        self.held.forget()  # that of the last one is not needed any more
        made, memory = unroll(kernel, act, start.values, max_steps, at, ends)
        last = {key: made[join("next", key)][-1] for key in kernel.layout.latent}
        self._hold(last, memory)
        return assemble(stacked(made, endings, at), self._nested(start), at)

    def imagine(
        self, start: Start, act: Act | None, actions: FlatTensors | None, horizon: int
    ) -> TensorDictBase:
        """Return exactly ``horizon`` steps and the mask of what is valid, ``[*B, H]``.

        The memory after the last step is held.

        Args:
            start: the state that they begin from.
            act: writes the actions; None if they are given.
            actions: what to do, ``[*B, H, *A]`` by key.
            horizon: the number of steps ``H``.
        """
        kernel = self.kernel
        run = partial(imagined, kernel, act, horizon, start.at)
        program = getattr(act, "program", None)
        if self._compiler is not None and (act is None or program is not None):
            # A program is made for its networks and keys: two that agree are one.
            made_for = None if program is None else program.made_for
            run = self._compiler.wrap(
                run,
                (kernel, kernel.program),
                () if program is None else program.modules,
                (made_for, horizon, start.at),
            )
        self.held.forget()
        flat, mask, memory = run(start.values, actions)
        dim, keys = len(start.at.batch_size), kernel.layout.latent
        last = {key: flat[join("next", key)].select(dim, -1) for key in keys}
        self._hold(last, memory)
        flat["collector", "mask"] = mask
        return assemble(flat, self._nested(start), start.at)

    def _hold(self, latents: FlatTensors, memory: FlatTensors) -> None:
        """Hold the memory of the last step, without the graph of those before."""
        if memory:
            memory = {key: value.detach() for key, value in memory.items()}
            self.held.keep(latents, memory)

    def _nested(self, start: Start) -> dict[NestedKey, torch.Size]:
        own = {unravel_key(key): dims for key, dims in self.layout.nested.items()}
        return {**start.nested, **own}

    def compile(self, options: dict[str, Any]) -> None:
        """Make :meth:`imagine` one graph, with the ``options`` of :func:`torch.compile`."""
        self._compiler = Compiler(options, "imagine", "env.eager()")

    def eager(self) -> None:
        """Undo :meth:`compile`."""
        self._compiler = None


def _any_done(values: FlatTensors) -> bool:
    return bool(values["next", "done"].any())
