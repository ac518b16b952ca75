"""From observations to latents over time: encode, predict, correct.

Time runs as in any TorchRL data. With the observation ``o``, the action ``a`` and the
latent ``z``, one transition is ::

    root:   o_t      a_t      z_t          z_t: all that o_0..o_t and a_0..a_(t-1) tell
    next:   o_(t+1)           z_(t+1)

A step of the filter predicts ``z_(t+1)`` from ``(z_t, a_t)`` by the dynamics and corrects it
by ``o_(t+1)``: with a posterior, by what that writes; without one, by the latents that the
encoder writes. An episode begins at the initial state, corrected by its first observation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from tensordict import is_tensor_collection, NestedKey, TensorDictBase
from torch import nn

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, leaf_keys, missing_from, unique
from torchrl_wm.modules.world_model.filter_steps import (
    contiguous,
    filter_states,
    filter_step,
    filter_steps,
    FilterInputs,
    IS_INIT,
    LaterSteps,
)
from torchrl_wm.modules.world_model.flat import (
    FlatTensors,
    Placement,
    to_flat,
    to_tensordict,
    where,
)
from torchrl_wm.modules.world_model.initial_state import InitialState
from torchrl_wm.modules.world_model.memory import check_all_or_none, owned
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.modules.world_model.sequence_pass import (
    check_sequence_module,
    run_sequence,
)
from torchrl_wm.modules.world_model.transition import Transition
from torchrl_wm.modules.world_model.wiring import written_keys

#: The components that judge what the dynamics predict; they may have latents of their own.
HEADS = ("reward_head", "done_head")


class Filter:
    """The part of a world model that makes latents of observations, of a step or of sequences.

    :attr:`~torchrl_wm.WorldModel.filter` is that of the model's present components: the model
    makes another one when a component is replaced.

    Args:
        components: the model's components, by name.
        initial_state: the first values of the latents that the encoder does not write.
        latents: the keys of the latents.
        memory: the keys of what is carried beside them, and not recorded.
        sequence: filters whole sequences in one pass; None leaves them to a loop of steps.
        later_steps: compiles the steps of a sequence after the first; None leaves them
            eager.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        initial_state: InitialState | None,
        latents: Sequence[NestedKey],
        memory: Sequence[NestedKey] = (),
        sequence: nn.Module | None = None,
        later_steps: LaterSteps | None = None,
    ) -> None:
        self.encoder, self.dynamics = components["encoder"], components["dynamics"]
        self.posterior = components.get("posterior")
        self.heads = {k: components[k] for k in HEADS if k in components}
        self.initial_state = initial_state
        self.latents, self.memory = list(latents), list(memory)
        self.sequence = sequence
        self.later_steps = later_steps
        self._transition: Transition | None = None
        #: Those of :meth:`_sparing`, by the names of heads, and what they were made of.
        self._sparing_ones: tuple[Transition | None, dict[frozenset, Transition]]
        self._sparing_ones = (None, {})
        if sequence is not None:
            check_sequence_module(sequence, self.transition, components)

    @property
    def is_recurrent(self) -> bool:
        """True if latents depend on more than the latest observation."""
        if self.posterior is not None or self.memory:
            return True
        encoded = set(written_keys(self.encoder))
        return any(key not in encoded for key in self.latents)

    @property
    def observations(self) -> list[NestedKey]:
        """The keys of the observations, which the encoder reads."""
        return unique(self.encoder.in_keys)

    @property
    def transition(self) -> Transition:
        """Dynamics and posterior on tensors, made anew where a network was replaced."""
        made = self._transition
        # A graph is guarded as the networks are.
        if torch.compiler.is_compiling() or made is None or not made.is_current():
            parts = (self.dynamics, self.posterior, self.latents, self.heads)
            made = Transition(*parts, self.memory)
            if not torch.compiler.is_compiling():
                self._transition = made
        return made

    def _sparing(self, heads: Iterable[str]) -> Transition:
        """Return a transition without predictions: it moves what the latents and some heads depend on.

        Args:
            heads: the names of the heads whose outputs are of use.
        """
        whole, names = self.transition, frozenset(heads)
        if self.posterior is not None or not whole.memory:
            return whole
        made_of, kept = self._sparing_ones
        if made_of is not whole:
            self._sparing_ones = made_of, kept = whole, {}
        if names not in kept:
            encoded = [join("next", key) for key in written_keys(self.encoder)]
            kept[names] = whole.sparing(names, encoded)
        return kept[names]

    def check_observable(self) -> None:
        """Refuse to filter, step by step, latents that the env's observations overwrite.

        Raises:
            ValueError: if a recurrent model's latent is what its encoder reads.
        """
        shared = [key for key in self.latents if key in self.observations]
        if shared and self.is_recurrent:
            raise ValueError(
                f"The latents {shared} are what the encoder reads, too. In a running env the "
                f"newest observation stands there when the one before is needed. Give the latent "
                f"a key of its own: encoder=TensorDictModule(nn.Identity(), {shared}, ['latent'])."
            )

    # One observation -----------------------------------------------------

    def encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encode observations, and complete the latents by the initial state.

        Latents that ``tensordict`` already has and the encoder does not write stay
        as they are. The tensordict is written to and returned.
        """
        check_tensordict(tensordict, "encode")
        _require(tensordict, self.observations, "encode")
        return self._completed(run_components({"encoder": self.encoder}, tensordict))

    def _completed(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Complete encoded observations by the other latents, and let the posterior correct them."""
        absent = missing_from(tensordict, self.latents)
        if not absent or self.initial_state is None:
            return tensordict
        encoded = written_keys(self.encoder)
        begun = [key for key in self.latents if key not in encoded]
        check_all_or_none("latents", begun, tensordict)
        initial = self.initial_state(tensordict.batch_size, tensordict.device)
        for key in absent:
            if initial.get(key, None) is not None:
                tensordict.set(key, initial.get(key))
        if self.posterior is not None:
            tensordict.update(self._corrected(tensordict))
        return tensordict

    def _corrected(self, predicted: TensorDictBase) -> TensorDictBase:
        """Return the latents as the posterior corrects them.

        Args:
            predicted: predicted latents and an encoded observation, both at the root;
                it is not modified.
        """
        posterior = {"posterior": self.posterior}
        if any(is_next(key) for key in unique(self.posterior.in_keys)):
            work = predicted.empty().set("next", predicted.copy())
            corrected = run_components(posterior, work).get("next")
        else:
            corrected = run_components(posterior, predicted.copy())
        return corrected.select(*self.latents)

    def observe_step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update the latents by the newest observation: the front of a policy.

        Args:
            tensordict: the observation, ``[*B, ...]``; the latents and the memory of the step
                before and the action taken then, if there was one; ``is_init``.

        Returns:
            The same tensordict with the present latents and memory.
        """
        self.check_observable()
        observations = self.observations
        _require(tensordict, observations)
        observed = tensordict.select(*observations)
        if not self.is_recurrent or missing_from(tensordict, self.latents):
            return tensordict.update(self._begun(observed))
        begins, transition = episode_begins(tensordict), self.transition
        missing = missing_from(tensordict, transition.context)
        # Where all episodes begin, there is no action before, and what is drawn for a step would
        # be in vain. A look at the flags waits for any other device, and breaks a graph.
        may_look = begins is not None and begins.device.type == "cpu"
        may_look = may_look and not torch.compiler.is_compiling()
        may_look = may_look or missing or self.memory
        if may_look and begins is not None and begins.all():
            return tensordict.update(self._begun(observed))
        if missing:
            raise MissingEntryError(
                f"The latents go on from the step before, and what was done then is missing: "
                f"{missing}; the tensordict has {leaf_keys(tensordict)}. Keep the action at the "
                f"root, as env.rollout does: step_mdp(td, exclude_action=False); or say with "
                f"'is_init' (torchrl.envs.InitTracker) that every episode begins here."
            )
        memory = self.given_memory(tensordict)
        if memory is None:
            raise MissingEntryError(
                f"The latents go on from the step before, and the memory {self.memory} of that step "
                f"is missing; the tensordict has {leaf_keys(tensordict)}. It is not recorded: "
                f"world_model.observer() carries it from step to step, "
                f"world_model.burn_in(sequences) makes it of recorded steps."
            )
        encoded = self.encoder(observed.copy())
        at = Placement(tensordict.batch_size, tensordict.device)
        before = {**to_flat(tensordict, self.latents), **memory}
        context = to_flat(tensordict, transition.context)
        now = FilterInputs(context, self._below_next(encoded))
        state, _ = filter_step(transition, before, now, at, predicts=False)
        if may_begin(begins):
            fresh = to_flat(self._begun(observed), state)
            state = where(begins, fresh, state)
        for key, value in state.items():
            tensordict.set(key, value)
        return tensordict

    # Sequences -----------------------------------------------------------

    def observe_sequence(
        self,
        tensordict: TensorDictBase,
        predicts: bool = True,
        heads: Iterable[str] = HEADS,
    ) -> TensorDictBase:
        """Filter whole sequences.

        Args:
            tensordict: transitions, ``[*B, T]``, with the observations at the root
                and under "next"; not modified. Latents, and memory, at the root of the
                first step are where the filter starts, unless an episode begins there. Without
                memory there, that begins anew.
            predicts: whether the predictions are of use. Without, no modules of the dynamics are
                run but those that latents which the encoder does not write, or heads, depend on.
            heads: the names of the heads whose outputs are of use, if predictions are not.

        Returns:
            A tensordict, ``[*B, T]``, with the filtered latents at the root and
            what dynamics and posterior write under "next".
        """
        transition = self.transition if predicts else self._sparing(heads)
        state, given = self._begin_sequence(tensordict, transition)
        sequence = self.sequence  # which begins with an empty memory
        if self.memory and not missing_from(tensordict, self.memory):
            sequence = None
        steps = self._steps(transition, state, given, tensordict, sequence, predicts)
        kept = tensordict.copy()
        return (kept.exclude(*self.memory) if self.memory else kept).update(steps)

    def states(self, tensordict: TensorDictBase) -> Iterator[FlatTensors]:
        """Filter sequences step by step, and hand out latents and memory, ``[*B, ...]`` by key.

        Args:
            tensordict: as for :meth:`observe_sequence`.

        Yields:
            The state at the root of each step; and, last, the one after them.
        """
        at = Placement(tensordict.batch_size[:-1], tensordict.device)
        state, given = self._begin_sequence(tensordict, self.transition)
        return filter_states(self.transition, state, given, at)

    def _begin_sequence(
        self, tensordict: TensorDictBase, transition: Transition
    ) -> tuple[FlatTensors, FilterInputs]:
        """Return the state that sequences start from, and what their steps read, ``[*B, T]``."""
        observations = self.observations
        needed = [*(join("next", key) for key in observations), *transition.context]
        _require(tensordict, needed)
        if not tensordict.batch_dims or not tensordict.batch_size.numel():
            raise ValueError(
                f"observe filters sequences, [*B, T], and the tensordict has the batch size "
                f"{tuple(tensordict.batch_size)}."
            )
        state = self._first_state(tensordict)
        begins, fresh = episode_begins(tensordict), None
        if begins is not None and may_begin(begins[..., 1:]):
            fresh = self._fresh_where(
                begins, tensordict.select(*observations, strict=False)
            )
        else:
            begins = None
        encoded = run_components(
            {"encoder": self.encoder}, tensordict.get("next").select(*observations)
        )
        context = to_flat(tensordict, transition.context)
        state = {key: state[key] for key, _ in transition.state}
        if fresh is not None:
            fresh = {key: fresh[key] for key in state}
        return state, FilterInputs(context, self._below_next(encoded), begins, fresh)

    def predict_sequence(
        self, tensordict: TensorDictBase, keep: Iterable[NestedKey]
    ) -> TensorDictBase:
        """Predict whole sequences, open loop, from the latents of their first step.

        Args:
            tensordict: the first observations or latents, and whatever the dynamics
                read beside latents, ``[*B, T]``; not modified.
            keep: entries of it that the result has, too.

        Returns:
            A tensordict, ``[*B, T]``, with the predicted latents at the root, and what
            the dynamics write.
        """
        transition = self.transition
        state = self._first_state(tensordict)
        given = FilterInputs(to_flat(tensordict, transition.context))
        steps = self._steps(transition, state, given, tensordict)
        kept = tensordict.select(*keep).apply(contiguous)  # as the steps are, for heads
        return kept.update(steps)

    def _steps(
        self,
        transition: Transition,
        state: FlatTensors,
        inputs: FilterInputs,
        tensordict: TensorDictBase,
        sequence: nn.Module | None = None,
        predicts: bool = True,
    ) -> TensorDictBase:
        """Make all steps of the sequences in ``tensordict``, ``[*B, T]``, one by one or at once."""
        size, device = tensordict.batch_size, tensordict.device
        at = Placement(size[:-1], device)
        is_parallel = sequence is not None
        if is_parallel and not predicts:
            is_parallel = not transition.is_seen(inputs.encoded)
        if is_parallel:
            steps = run_sequence(sequence, transition, state, inputs, at)
        else:
            steps = filter_steps(
                transition, state, inputs, at, self.later_steps, predicts
            )
        return to_tensordict(steps, Placement(size, device))

    def _first_state(self, tensordict: TensorDictBase) -> FlatTensors:
        """Return the latents and the memory that a sequence starts from, ``[*B, ...]`` by key.

        The encoder writes the latents that it can; the others, and the memory, are those given at
        the first step, or the initial ones if an episode begins there or none are given.
        """
        observations = self.observations
        first = tensordict[..., 0]
        known = first.select(*observations, *self.latents, strict=False)
        state = known
        if missing_from(known, self.latents) or not missing_from(known, observations):
            state = self._fresh(known)
        anew = self.initial_memory(first.batch_size, first.device)
        memory = self.given_memory(first)
        state = {**to_flat(state, self.latents), **(anew if memory is None else memory)}
        begins = episode_begins(tensordict)
        no_latents = missing_from(first, self.latents) == self.latents
        if no_latents or begins is None or not may_begin(begins[..., 0]):
            return state
        fresh = self._fresh(first.select(*observations, strict=False))
        fresh = {**to_flat(fresh, self.latents), **anew}
        return where(begins[..., 0], fresh, state)

    def _fresh_where(
        self, begins: torch.Tensor, tensordict: TensorDictBase
    ) -> FlatTensors:
        """Return latents and memory at the beginning of an episode, for the rows where one begins.

        Elsewhere they stand for nothing: on a CPU, no observation is encoded there.

        Args:
            begins: where episodes begin, ``[*B, T]`` bool.
            tensordict: the observations.
        """
        # Rows whose number is not known beforehand break graphs, and wait for a GPU.
        is_late = begins.device.type != "cpu" or torch.compiler.is_compiling()
        memory = self.initial_memory(begins.shape, tensordict.device)
        if is_late or missing_from(tensordict, self.observations):
            return {**to_flat(self._fresh(tensordict), self.latents), **memory}
        rows = run_components({"encoder": self.encoder}, tensordict[begins])
        known = tensordict.copy()
        for key in written_keys(self.encoder):
            row = rows.get(key)
            everywhere = row.new_zeros(*begins.shape, *row.shape[1:])
            known.set(key, everywhere.index_put((begins,), row))
        return {**to_flat(self._completed(known), self.latents), **memory}

    # Beginnings ----------------------------------------------------------

    def given_memory(self, tensordict: TensorDictBase) -> FlatTensors | None:
        """Return the memory in a tensordict, by key, to be written to; None if it has none.

        Raises:
            MissingEntryError: if it has some of it.
        """
        if not check_all_or_none("memory", self.memory, tensordict):
            return None if self.memory else {}
        return {key: owned(tensordict[key]) for key in self.memory}

    def initial_memory(
        self, batch_size: torch.Size, device: torch.device | None
    ) -> FlatTensors:
        """Return the memory at the beginning of an episode, ``[*B, ...]`` by key.

        Raises:
            MissingEntryError: if the initial state lacks it.
        """
        if not self.memory:
            return {}
        initial = self.initial_state(batch_size, device)
        if missing := missing_from(initial, self.memory):
            raise MissingEntryError(
                f"Nothing says where the memory {missing} begins: the model's initial state gives "
                f"{leaf_keys(initial)}. Pass WorldModel(..., initial_state=TensorDict({{...}}))."
            )
        return {key: owned(initial.get(key)) for key in self.memory}

    def _begun(self, observed: TensorDictBase) -> TensorDictBase:
        """Return latents and memory at the beginning of an episode, from its first observation."""
        fresh = self._fresh(observed)
        memory = self.initial_memory(fresh.batch_size, fresh.device)
        return fresh.update(memory)

    def _fresh(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the latents at the beginning of an episode, from all that is known of it."""
        if not missing_from(tensordict, self.observations):
            fresh = self.encode(tensordict.copy())
        elif self.initial_state is not None:
            fresh = self.initial_state(tensordict.batch_size, tensordict.device)
            fresh = fresh.exclude(*self.memory)
            fresh = fresh.update(tensordict.select(*self.latents, strict=False))
        else:
            fresh = tensordict
        missing = missing_from(fresh, self.latents)
        if missing:
            given = [] if self.initial_state is None else self.initial_state.keys()
            raise MissingEntryError(
                f"Nothing says where the latents {missing} begin: the encoder does not write them, "
                f"the tensordict has {leaf_keys(tensordict)}, and the model's initial state gives "
                f"{given}. Pass WorldModel(..., initial_state=TensorDict({{...}}))."
            )
        return fresh.select(*self.latents)

    def _below_next(self, encoded: TensorDictBase) -> FlatTensors:
        """Return what the encoder wrote, by ``("next", key)``."""
        return {join("next", key): encoded[key] for key in written_keys(self.encoder)}


# Episodes ----------------------------------------------------------------


def episode_begins(
    tensordict: TensorDictBase, done: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return where episodes begin, in the shape of the batch; None if no entry says so.

    ``is_init`` says so; without it, in a sequence, a ``done`` one step before.
    If only agents have such entries, an episode begins when it does for all of them.

    Args:
        tensordict: ``[*B]``, or ``[*B, T]`` with "next".
        done: the ends of the episodes, if they stand under another key.
    """
    flag = _whole(tensordict, IS_INIT)
    if flag is not None:
        return flag
    next_td = tensordict.get("next", None)
    if next_td is None or not tensordict.batch_dims:
        return None
    ended = done if done is not None else _whole(next_td, "done")
    if ended is None:
        return None
    ended = ended.reshape(*tensordict.batch_size, -1).bool().any(-1)
    # Rolled, not written to a slice, for which torch 2.13's inductor makes C++ that does
    # not compile.
    later = torch.arange(ended.shape[-1], device=ended.device) > 0
    return ended.roll(1, -1) & later


def may_begin(begins: torch.Tensor | None) -> bool:
    """Return whether an episode may begin somewhere, given where they do; None is nowhere.

    Fresh latents are drawn for every row. Where no episode begins that is in vain, and
    changes the random numbers that follow from those of TorchRL's rollouts.
    """
    if begins is None:
        return False
    # A look at the values would wait for any other device, and break a graph.
    if begins.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(begins.any())


def _whole(tensordict: TensorDictBase, name: str) -> torch.Tensor | None:
    """Return the entry ``name``, at the root or, for all agents, below it: ``[*B]`` bool."""
    flag = tensordict.get(name, None)
    if flag is None:
        below = [
            tensordict.get(key)
            for key in unique(tensordict.keys(True, True))
            if isinstance(key, tuple) and key[-1] == name and key[0] != "next"
        ]
    else:
        below = [flag]
    if not below:
        return None
    size = tensordict.batch_size
    return torch.stack([x.bool().reshape(*size, -1).all(-1) for x in below]).all(0)


def check_tensordict(value: object, verb: str) -> None:
    """Refuse what is no tensordict, such as a plain dictionary.

    Raises:
        TypeError: if they are something else.
    """
    if not is_tensor_collection(value):
        raise TypeError(
            f"WorldModel.{verb} takes a tensordict, got a {type(value).__name__}. Make one of "
            f"tensors: TensorDict({{...}}, batch_size=[...])."
        )


def _require(
    tensordict: TensorDictBase, keys: list[NestedKey], verb: str = "observe"
) -> None:
    missing = missing_from(tensordict, keys)
    if missing:
        raise MissingEntryError(
            f"WorldModel.{verb} reads {missing}, and the tensordict has "
            f"{leaf_keys(tensordict)}."
        )
