"""The world model: named components that together predict one step ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import dispatch, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torch.nn.parameter import is_lazy

from torchrl_wm import _upstream
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, leaf_keys, missing_from, unique
from torchrl_wm.modules.world_model.compiling import FilterCompiler, Scope
from torchrl_wm.modules.world_model.filtering import check_tensordict, Filter, HEADS
from torchrl_wm.modules.world_model.flat import Placement, to_tensordict
from torchrl_wm.modules.world_model.initial_state import InitialState, InitialStateLike
from torchrl_wm.modules.world_model.memory import HeldMemory, owned
from torchrl_wm.modules.world_model.observer import Observer
from torchrl_wm.modules.world_model.wiring import (
    check_component,
    check_memory,
    check_posterior,
    check_wiring,
    latents_of,
    written_keys,
)


class _Wiring(NamedTuple):
    """The things that follow from the components of a world model."""

    #: The components and the initial state that the rest was made for.
    parts: dict[str, nn.Module | None]
    forward: TensorDictSequential
    step: TensorDictSequential
    latents: list[NestedKey]
    memory: list[NestedKey]
    filter: Filter


class WorldModel(TensorDictModuleBase):
    """A world model composed of key-driven components.

    The model encodes observations into latents, moves the latents one step
    ahead given an action, and predicts the reward, the end of the episode and
    the observations. No architecture is assumed: a component is any
    :class:`~tensordict.nn.TensorDictModule`, and the keys it names are all that
    connects it to the others.

    ``*B`` stands for any batch dims, none included. By convention:

    ===========  ======================================  =====================
    component    reads                                   writes
    ===========  ======================================  =====================
    encoder      observations ``[*B, ...]``              latents, at the root
    dynamics     latents, action                         ``("next", latent)``
    reward_head  latents, action, ``("next", latent)``   ``("next", "reward")``
    done_head    as ``reward_head``                      see below
    decoder      latents                                 observations
    posterior    ``("next", latent)``, encoded           ``("next", latent)``
                 observation (not the action)
    ===========  ======================================  =====================

    A head may have latents of its own: root keys that it reads and writes under "next", such as
    an LSTM's state. A filter moves them after the correction, on the corrected latents.

    A ``done_head`` best writes ``("next", "terminated_logits")``, a float of
    shape ``[*B, 1]``: :class:`~torchrl_wm.WorldModelLoss` trains the logits and
    :class:`~torchrl_wm.WorldModelEnv` derives the bools from them, so that one
    head does both.

    Args:
        encoder: maps observations to latents, e.g. ``observation -> latent``.
        dynamics: moves the latents, e.g. ``(latent, action) -> ("next",
            latent)``.
        reward_head: predicts the reward, e.g. ``("next", latent) -> ("next",
            "reward")``. None for a model that nobody asks for rewards: its imagined env has
            none, and its planners need a score of their own.

    Keyword Args:
        done_head: predicts the end of the episode.
        decoder: maps latents back to observations. Needed by :meth:`decode`.
        posterior: corrects predicted latents by the encoded observation they
            should have led to, as in recurrent state space models (PlaNet, arXiv
            1811.04551). Used by :meth:`observe`, never while imagining.
        initial_state: the first values of latents that the encoder does not write,
            such as a GRU's belief: a tensordict or Composite without batch dims,
            a TensorDictModule that writes them, or a function of the batch size. It also
            gives the first values of the ``memory``.
        memory: keys of what the step carries beside latents and nothing records, such as a
            transformer's cache or an LSTM's cell: root keys that dynamics or a head read and
            write under "next". No rollout, replay buffer, primer or ``info`` holds them. A
            start has all of them, or none, and they begin anew; :meth:`burn_in` makes those of
            recorded steps. Components write into them by
            :func:`~torchrl_wm.modules.write_memory`, or return new ones. Where real steps are
            filtered and nobody needs predictions, dynamics that are a sequence of modules run
            only those that write what moves on.
        sequence: filters whole sequences, ``[*B, T]``, in one parallel pass (a causal
            transformer, a parallel scan), where :meth:`observe` and the loss would else make one
            step after the other. Over ``[*B, T]`` it may read what the step reads beside
            latents, ``("next", key)`` of what the encoder writes, latents, and ``is_init``,
            which is True where an episode begins after the first step. Without a posterior,
            the latents that the encoder writes are there for all steps; others stand at the first
            step and where episodes begin, and are zero elsewhere. It writes what dynamics and
            posterior write under "next", and the next latents of heads. It holds the modules
            of the components, and no tensors of its own.
            :func:`~torchrl_wm.modules.check_sequence` compares it with the step.

    Raises:
        TypeError: if a component does not name its keys.
        ValueError: if a component reads a ``("next", k)`` that no component
            writes before it, if two components write one key, or if ``memory`` names what the
            step does not carry, or what encoder, posterior or decoder read or write.

    .. note:: The components are the only state. Replacing one
        (``world_model.reward_head = other``) takes effect at the next call, and
        :meth:`state_dict` holds every tensor once.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel
        >>> obs_dim, latent_dim, action_dim = 8, 4, 2
        >>> encoder = TensorDictModule(
        ...     torch.nn.Linear(obs_dim, latent_dim),
        ...     in_keys=["observation"],
        ...     out_keys=["latent"],
        ... )
        >>> dynamics = TensorDictModule(  # TorchRL's MLP joins its inputs
        ...     MLP(in_features=latent_dim + action_dim, out_features=latent_dim, num_cells=[32]),
        ...     in_keys=["latent", "action"],
        ...     out_keys=[("next", "latent")],
        ... )
        >>> reward_head = TensorDictModule(
        ...     torch.nn.Linear(latent_dim, 1),
        ...     in_keys=[("next", "latent")],
        ...     out_keys=[("next", "reward")],
        ... )
        >>> world_model = WorldModel(encoder, dynamics, reward_head)
        >>> world_model.latent_keys
        ['latent']
        >>> td = TensorDict(
        ...     {"observation": torch.randn(2, obs_dim), "action": torch.randn(2, action_dim)},
        ...     batch_size=[2],
        ... )
        >>> out = world_model(td)
        >>> out["next", "reward"].shape
        torch.Size([2, 1])
        >>> latent, next_latent, reward = world_model(
        ...     observation=torch.randn(2, obs_dim), action=torch.randn(2, action_dim)
        ... )
        >>> next_latent.shape
        torch.Size([2, 4])
    """

    #: The components, in the order in which :meth:`forward` runs them.
    component_names = (
        "encoder",
        "dynamics",
        "reward_head",
        "done_head",
        "decoder",
        "posterior",
    )
    #: The components that make one imagined step.
    step_names = ("dynamics", *HEADS)

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        dynamics: TensorDictModuleBase,
        reward_head: TensorDictModuleBase | None = None,
        *,
        done_head: TensorDictModuleBase | None = None,
        decoder: TensorDictModuleBase | None = None,
        posterior: TensorDictModuleBase | None = None,
        initial_state: InitialStateLike | None = None,
        memory: Sequence[NestedKey] = (),
        sequence: TensorDictModuleBase | None = None,
    ) -> None:
        _upstream.check_replaced(nn.Module)
        super().__init__()
        given = (encoder, dynamics, reward_head, done_head, decoder, posterior)
        for name, module in zip(self.component_names, given):
            if module is not None or name in ("encoder", "dynamics"):
                check_component(name, module)
            self.register_module(name, module)
        self.register_module("initial_state", None)
        self._memory = unique([memory] if isinstance(memory, str) else memory)
        self.sequence = sequence
        latents = self._wiring.latents  # checks the wiring
        if initial_state is not None:
            if not isinstance(initial_state, InitialState):
                initial_state = InitialState(initial_state)
            self.initial_state = initial_state
            self.initial_state.check(latents, self._memory, written_keys(encoder))
        elif self._memory:
            raise ValueError(
                f"Nothing says where the memory {self._memory} begins. Pass its first values, "
                f"without batch dims: WorldModel(..., initial_state=TensorDict({{...}}))."
            )

    # Components and keys -------------------------------------------------

    #: Filters whole sequences in one pass; None if there is nothing but the step. It is no
    #: submodule, whose tensors would stand twice in the state dict.
    sequence: TensorDictModuleBase | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "sequence":
            if value is not None:
                check_component(name, value)
            self.__dict__[name] = value
            return
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> WorldModel:
        """Put all components, and the sequence, into training or evaluation mode."""
        if self.sequence is not None:
            self.sequence.train(mode)
        return super().train(mode)

    @property
    def components(self) -> dict[str, nn.Module]:
        """The components that the model has, by name, in the order in which they run."""
        modules = _upstream.submodules(self)
        return {
            name: modules[name]
            for name in self.component_names
            if modules.get(name) is not None
        }

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that :meth:`forward` reads."""
        keys = self._wiring.forward.in_keys
        if self.initial_state is None:
            return keys
        supplied = self.initial_state.keys()
        return [key for key in keys if key not in supplied]

    @in_keys.setter
    def in_keys(self, value) -> None:
        pass  # The keys follow from the components; the base class assigns the attribute.

    @property
    def out_keys(self) -> list[NestedKey]:
        """The keys that :meth:`forward` writes."""
        left_out = self.filter.transition.unrecorded
        return [key for key in self._wiring.forward.out_keys if key not in left_out]

    @out_keys.setter
    def out_keys(self, value) -> None:
        pass

    @property
    def step_in_keys(self) -> list[NestedKey]:
        """The root keys that :meth:`step` reads: latents, action and context."""
        return self.step_module.in_keys

    @property
    def latent_keys(self) -> list[NestedKey]:
        """The latents: root keys that :meth:`step` reads and writes under "next", but for memory."""
        return list(self._wiring.latents)

    @property
    def memory_keys(self) -> list[NestedKey]:
        """What :meth:`step` carries beside the latents, and nothing records."""
        return list(self._wiring.memory)

    @property
    def step_module(self) -> TensorDictSequential:
        """One imagined step as a module: dynamics, reward head and done head."""
        return self._wiring.step

    @property
    def filter(self) -> Filter:
        """The part that makes latents of observations over time, for the present components."""
        return self._wiring.filter

    #: The memory of the observer that was run last: a planner behind it goes on from there.
    observed_memory: HeldMemory | None = None

    #: The last :attr:`_wiring`. A tuple is no module, and so is not registered: its modules
    #: would repeat every tensor.
    _last_wiring: _Wiring | None = None

    @property
    def _wiring(self) -> _Wiring:
        """The things that follow from the components, made anew when one was replaced."""
        made, parts = self._last_wiring, dict(self.components)
        parts["initial_state"] = self.initial_state
        parts["sequence"] = self.sequence
        if made is None or not _same(made.parts, parts):
            later_steps = None if made is None else made.filter.later_steps
            made = self._last_wiring = self._wire(parts, later_steps)
        return made

    def _wire(
        self, parts: dict[str, nn.Module | None], later_steps: FilterCompiler | None
    ) -> _Wiring:
        """Check the components and connect them."""
        components = {k: v for k, v in parts.items() if k in self.component_names}
        for name, module in components.items():
            check_component(name, module)
        ahead = {k: v for k, v in components.items() if k != "posterior"}
        check_wiring(ahead)
        if "posterior" in components:
            check_posterior(self.posterior, self.encoder, self.dynamics)
        step = TensorDictSequential(
            *(components[name] for name in self.step_names if name in components)
        )
        moving, memory = latents_of(step), self._memory
        check_memory(memory, moving, components)
        latents = [key for key in moving if key not in memory]
        filter_ = Filter(
            components,
            self.initial_state,
            latents,
            memory,
            self.sequence,
            later_steps,
        )
        forward = TensorDictSequential(*ahead.values())
        return _Wiring(parts, forward, step, latents, memory, filter_)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("observed_memory", None)
        # It holds on to networks and to compiled graphs: a copy makes its own.
        state.pop("_last_wiring", None)
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        _ = self._wiring  # so that a compiled call finds it

    # Predictions ---------------------------------------------------------

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encode, step and, with a decoder, decode.

        Args:
            tensordict: observations and action, batch size ``[*B]``.

        Returns:
            The same tensordict, with the latents at the root and the
            predictions under ``"next"`` (where they replace what stood there).
        """
        if self.initial_state is None:
            return self._wiring.forward(tensordict)
        tensordict = self.encode(tensordict)
        if self.memory_keys:
            stepped = tensordict.copy()
            if self.filter.given_memory(tensordict) is None:
                size, device = tensordict.batch_size, tensordict.device
                stepped.update(self.filter.initial_memory(size, device))
            left_out = self.filter.transition.unrecorded
            tensordict.update(self.step(stepped).exclude(*left_out))
        else:
            tensordict = self.step(tensordict)
        return tensordict if self.decoder is None else self.decoder(tensordict)

    def encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the latents of the observations in ``tensordict`` and return it.

        Latents that the encoder does not write come from the initial state
        (corrected by the posterior, if there is one), unless they are there
        already.
        """
        return self.filter.encode(tensordict)

    def observe(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Filter real observations into latents.

        With next observations, ``tensordict`` is a batch of sequences, ``[*B, T]``: a
        new tensordict has the latents of all its steps, and what dynamics and posterior
        predict under "next".

        Without, it is one step in a running env, ``[*B]``: the latents (and the memory) of
        the step before and the action taken then are at the root, where TorchRL's
        rollouts and collectors leave them, and are updated by the newest
        observation. :meth:`observer` does this as a module, and carries the memory.

        An episode begins, and the latents with it, where ``is_init`` is True; in
        sequences without ``is_init``, after a ``("next", "done")``.

        Raises:
            KeyError: if observations or actions are missing, or if a latent has no
                initial value.

        Examples:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from tensordict.nn import TensorDictModule as Mod
            >>> from torchrl_wm import WorldModel
            >>> class Dynamics(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.cell = torch.nn.GRUCell(3 + 1, 8)
            ...         self.head = torch.nn.Linear(8, 3)
            ...     def forward(self, latent, belief, action):
            ...         inputs = torch.cat([latent, action], -1)
            ...         belief = self.cell(inputs, belief)
            ...         return self.head(belief), belief
            >>> world_model = WorldModel(
            ...     Mod(torch.nn.Linear(3, 3), ["observation"], ["latent"]),
            ...     Mod(
            ...         Dynamics(),
            ...         ["latent", "belief", "action"],
            ...         [("next", "latent"), ("next", "belief")],
            ...     ),
            ...     Mod(torch.nn.Linear(8, 1), [("next", "belief")], [("next", "reward")]),
            ...     initial_state=TensorDict({"belief": torch.zeros(8)}),
            ... )
            >>> data = TensorDict(
            ...     {
            ...         "observation": torch.randn(2, 5, 3),
            ...         "action": torch.randn(2, 5, 1),
            ...         "next": {"observation": torch.randn(2, 5, 3)},
            ...     },
            ...     batch_size=[2, 5],
            ... )
            >>> world_model.observe(data)["belief"].shape
            torch.Size([2, 5, 8])
        """
        check_tensordict(tensordict, "observe")
        named = tensordict.batch_dims and tensordict.names[-1] == "time"
        if named or tensordict.get("next", None) is not None:
            return self.filter.observe_sequence(tensordict)
        return self.filter.observe_step(tensordict)

    def burn_in(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Filter real sequences, and return only where they lead: a start to imagine from.

        Beside the latents it has the ``memory`` of the last step, which no record holds.

        Args:
            tensordict: sequences, ``[*B, T]``, as for :meth:`observe`.

        Returns:
            Latents and memory after the last step, ``[*B]``.

        Raises:
            KeyError: as :meth:`observe`.

        Examples:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from tensordict.nn import TensorDictModule as Mod
            >>> from torchrl_wm import WorldModel
            >>> world_model = WorldModel(  # how fast it moves is seen only over time
            ...     Mod(torch.nn.Identity(), ["observation"], ["position"]),
            ...     Mod(
            ...         lambda position, before, action: (2 * position - before, position),
            ...         ["position", "before", "action"],
            ...         [("next", "position"), ("next", "before")],
            ...     ),
            ...     memory=["before"],
            ...     initial_state={"before": torch.zeros(1)},
            ... )
            >>> data = TensorDict({
            ...     "observation": torch.tensor([[[0.], [1.]]]), "action": torch.zeros(1, 2, 1),
            ...     "next": {"observation": torch.tensor([[[1.], [2.]]])},
            ... }, [1, 2])
            >>> start = world_model.burn_in(data)
            >>> start["position"], start["before"]
            (tensor([[2.]]), tensor([[1.]]))
            >>> "before" in world_model.observe(data).keys()
            False
        """
        (last,) = deque(self.filter.states(tensordict), maxlen=1)
        return to_tensordict(
            last, Placement(tensordict.batch_size[:-1], tensordict.device)
        )

    def compile_rollout(self, scope: Scope = "step", **kwargs: Any) -> WorldModel:
        """Compile the steps through time of :meth:`observe` and of multi-step losses.

        One step is compiled, for sequences of any length: compile time does not grow with
        ``T``, and sequences of another length use the same graph. A graph is made for each
        batch shape, set of entries and gradient mode, at its first call, and kept until a
        component is replaced; copies of the model start eager. The first step of a sequence
        is eager. A :class:`~torchrl_wm.WorldModelLoss` of the model uses the graphs, too.

        With ``"scan"``, the steps are one higher-order scan
        (:func:`torch._higher_order_ops.scan`, through TorchRL). It is slower to
        compile than a step and its graph is that of one ``T``, yet its size does
        not grow with ``T``. A loss that is compiled as a whole unrolls the steps into
        its graph with either scope.

        Random numbers are those of the compiler: samples have the distribution
        of eager ones, not their values.

        Args:
            scope: ``"step"`` or ``"scan"``, as in TorchRL's
                :class:`~torchrl.modules.RSSMRolloutV3`.
            kwargs: for :func:`torch.compile`; ``fullgraph`` is True and
                ``dynamic`` False unless given.

        Returns:
            The model itself. Without a compiler on this machine, the first call warns, and
            the steps stay eager. :meth:`eager_rollout` undoes it.

        Raises:
            ValueError: for another scope.

        Examples:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from tensordict.nn import TensorDictModule as Mod
            >>> from torchrl.modules import MLP
            >>> from torchrl_wm import WorldModel
            >>> world_model = WorldModel(
            ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
            ...     Mod(MLP(5, 4, num_cells=[8]), ["latent", "action"], [("next", "latent")]),
            ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
            ... )
            >>> data = TensorDict(
            ...     {
            ...         "observation": torch.randn(2, 5, 3),
            ...         "action": torch.randn(2, 5, 1),
            ...         "next": {"observation": torch.randn(2, 5, 3)},
            ...     },
            ...     batch_size=[2, 5],
            ... )
            >>> world_model = world_model.compile_rollout(backend="eager")  # default: inductor
            >>> world_model.observe(data)["latent"].shape
            torch.Size([2, 5, 4])
        """
        devices = {value.device for value in (*self.parameters(), *self.buffers())}
        self.filter.later_steps = FilterCompiler(scope, kwargs, devices)
        return self

    def eager_rollout(self) -> WorldModel:
        """Undo :meth:`compile_rollout`."""
        self.filter.later_steps = None
        return self

    def observer(self) -> Observer:
        """Return :meth:`observe`, one step at a time, as a module to put before a policy."""
        return Observer(self)

    @property
    def is_recurrent(self) -> bool:
        """True if latents depend on more than the latest observation."""
        return self.filter.is_recurrent

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Predict one step ahead; neither encodes nor decodes.

        Args:
            tensordict: latents, action and the context that the components read,
                batch size ``[*B]``.

        Returns:
            The same tensordict, with the predictions under ``"next"``.
        """
        sequence, memory = self.step_module, self._wiring.memory
        try:
            if not memory:
                return sequence(tensordict)
            # A component may write into its memory, and not into the caller's.
            work = tensordict.copy()
            for key in memory:
                work.set(key, owned(work[key]))
            return tensordict.update(sequence(work).exclude(*memory))
        except KeyError as err:
            inputs = [key for key in unique(sequence.in_keys) if not is_next(key)]
            missing = missing_from(tensordict, inputs)
            if not missing:
                raise
            raise MissingEntryError(
                f"WorldModel.step reads {missing}, and the tensordict has "
                f"{leaf_keys(tensordict)}."
            ) from err

    def decode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the observations that the latents in ``tensordict`` stand for.

        Raises:
            RuntimeError: if the model has no decoder.
        """
        if self.decoder is None:
            raise RuntimeError(
                "WorldModel.decode needs a decoder, and this model has none. Pass one: "
                "WorldModel(encoder, dynamics, reward_head, decoder=TensorDictModule(...))."
            )
        return self.decoder(tensordict)

    def decoded_keys(self) -> list[NestedKey]:
        """Return the keys that the decoder writes; none without a decoder."""
        return [] if self.decoder is None else written_keys(self.decoder)

    def __repr__(self) -> str:
        lines = [
            (name, f"{unique(part.in_keys)} -> {written_keys(part)}", _count(part))
            for name, part in self.components.items()
        ]
        if self.memory_keys:
            lines.append(("memory", f"{self.memory_keys}", ""))
        if self.sequence is not None:
            keys = f"{unique(self.sequence.in_keys)} -> {written_keys(self.sequence)}"
            lines.append(("sequence", keys, "shared"))
        begin = self.initial_state
        if begin is not None:
            lines.append(("initial_state", f"-> {begin.keys()}", _count(begin)))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        rows = [
            f"  {name:<{widths[0]}}  {keys:<{widths[1]}}  {count:>{widths[2]}}"
            for name, keys, count in lines
        ]
        head = f"{type(self).__name__}(latents={self.latent_keys}, parameters={_count(self)})"
        return "\n".join([head, *rows])


def _count(module: nn.Module) -> str:
    """Return the number of parameters, readable, or "lazy" if some have no shape yet."""
    parameters = list(module.parameters())
    if any(is_lazy(parameter) for parameter in parameters):
        return "lazy"
    return f"{sum(parameter.numel() for parameter in parameters):,}"


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Return whether both name the same objects."""
    return left.keys() == right.keys() and all(left[k] is right[k] for k in left)
