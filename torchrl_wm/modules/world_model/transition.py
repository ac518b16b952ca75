"""Dynamics and posterior on a flat dictionary of tensors: predict, then correct.

A head that has latents or memory of its own, such as an LSTM over what the model predicts, moves
them after the correction.

Where nobody asks for predictions and an observation stands for a latent, only those modules of the
dynamics are run that write what else moves on: a diffusion model shifts its stack of frames, and
samples none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tensordict import NestedKey
from tensordict.nn import TensorDictSequential
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
        heads: the heads of the model, by name. Those that carry nothing and read no memory are
            left out.
        memory: the keys of what is carried beside the latents, and not recorded.
    """

    def __init__(
        self,
        dynamics: nn.Module,
        posterior: nn.Module | None,
        latents: Sequence[NestedKey],
        heads: Mapping[str, nn.Module] | None = None,
        memory: Sequence[NestedKey] = (),
    ) -> None:
        self.dynamics, self.posterior = dynamics, posterior
        self.latents, self.memory = list(latents), list(memory)
        self._given_heads = dict(heads or {})
        #: The state: latents, then memory; and where they are predicted.
        self.state = [(key, join("next", key)) for key in (*latents, *memory)]
        #: The entries that are carried, and not recorded.
        self.unrecorded = {*memory, *(join("next", key) for key in memory)}
        places = {place for _, place in self.state}
        #: The heads that read memory, which nobody but the filter can run; and all that it runs,
        #: which may have latents of their own, too; by name.
        self.remembering = {
            name: head
            for name, head in (heads or {}).items()
            if not self.unrecorded.isdisjoint(unique(head.in_keys))
        }
        self.heads = {}
        read = set(places)
        for name, head in reversed((heads or {}).items()):
            # The head before it may predict what one reads.
            if name in self.remembering or read & {*written_keys(head)}:
                self.heads = {name: head, **self.heads}
                read.update(unique(head.in_keys))
        of_heads = {key for head in self.heads.values() for key in written_keys(head)}
        self._moved = [pair for pair in self.state if pair[1] not in of_heads]
        self._judged = [pair for pair in self.state if pair[1] in of_heads]
        #: What those that read memory predict.
        self._verdicts = [
            key
            for head in self.remembering.values()
            for key in written_keys(head)
            if key not in places
        ]
        #: What heads read of what the dynamics write beside the state; a step that does without
        #: predictions makes it all the same.
        read = {key for head in self.heads.values() for key in unique(head.in_keys)}
        others = {*written_keys(dynamics)} - {place for _, place in self._moved}
        self._read_by_heads = frozenset(read & others)
        steps = (dynamics, *self.heads.values())
        reads = unique([key for module in steps for key in unique(module.in_keys)])
        #: The keys that a step reads beside latents: the action, and constant context.
        carried = {key for key, _ in self.state}
        self.context = [k for k in reads if not is_next(k) and k not in carried]
        self.written = {*written_keys(dynamics), *of_heads}
        self._predict = Program([dynamics])
        #: The programs of a part of the dynamics, by the places that it writes.
        self._carry: dict[frozenset[NestedKey], Program] = {}
        self._judge = {name: Program([head]) for name, head in self.heads.items()}
        self._correct = None
        if posterior is not None:
            self._correct = Program([posterior])
            self._at_next = any(is_next(key) for key in unique(posterior.in_keys))
            self._corrections = [
                (strip_next(key), join("next", strip_next(key)))
                for key in written_keys(posterior)
            ]

    @property
    def places(self) -> list[NestedKey]:
        """The entries that a step of the filter records, all below "next"."""
        of_heads = [*(place for _, place in self._judged), *self._verdicts]
        corrected = [] if self._correct is None else [p for _, p in self._corrections]
        predicted = [key for key in written_keys(self.dynamics) if is_next(key)]
        every = unique([*predicted, *corrected, *of_heads])
        return [place for place in every if place not in self.unrecorded]

    def known(self, encoded: FlatTensors) -> FlatTensors:
        """Return the next latents that the encoder alone determines, by the latents' keys.

        Args:
            encoded: what the encoder makes of the next observations, by ``("next", key)``.
        """
        if self._correct is not None:
            return {}
        return {key: encoded[place] for key, place in self._moved if place in encoded}

    def is_seen(self, encoded: FlatTensors) -> bool:
        """Return whether the encoder determines all that a step needs of the dynamics' predictions."""
        return self._correct is None and not self._unseen(encoded)

    def _unseen(self, encoded: FlatTensors) -> frozenset[NestedKey]:
        """Return what a step needs of the dynamics where the encoder writes its latents."""
        moved = [place for _, place in self._moved if place not in encoded]
        return self._read_by_heads.union(moved)

    def sparing(self, heads: Iterable[str], encoded: Iterable[NestedKey]) -> Transition:
        """Return a transition that carries only the memory which some things depend on.

        These are the latents that the encoder does not write, and what some heads write. It is
        for steps without predictions and without a posterior.

        Args:
            heads: the names of the heads.
            encoded: what the encoder writes of the next observation, as ``("next", key)``.
        """
        carried = dict(zip((place for _, place in self.state), self.state))
        wanted = {join("next", key) for key in self.latents}.difference(encoded)
        kept: dict[str, nn.Module] = {}
        count = -1
        while count < len(wanted) + len(kept):
            count = len(wanted) + len(kept)
            for name, head in self._given_heads.items():
                if name in heads or not wanted.isdisjoint(written_keys(head)):
                    kept[name] = head
                    wanted.update(unique(head.in_keys))
            part = self._predict.part(wanted.difference(encoded))
            read = wanted.union(*(unique(module.in_keys) for module in part.modules))
            wanted.update(p for p, (key, _) in carried.items() if key in read)
            wanted.difference_update(encoded)
        memory = [key for key in self.memory if join("next", key) in wanted]
        whole = part is self._predict
        dynamics = self.dynamics if whole else TensorDictSequential(*part.modules)
        return Transition(dynamics, None, self.latents, kept, memory)

    def is_current(self) -> bool:
        """Return whether all components still have the networks, keys and hooks they had."""
        programs = [self._predict, *self._judge.values()]
        if self._correct is not None:
            programs.append(self._correct)
        return all(program.is_current() for program in programs)

    def predict(
        self, state: FlatTensors, context: FlatTensors, at: Placement
    ) -> FlatTensors:
        """Run the dynamics.

        Args:
            state: latents and memory, ``[*B, ...]`` by flat key; not modified.
            context: the action, and whatever else the dynamics read; not modified.
            at: the batch size and device of both.

        Returns:
            State, context and what the dynamics write, ``("next", ...)`` and others.
        """
        values = {**context, **state}
        _run("dynamics", self.dynamics, self._predict, values, at)
        return values

    def carry(
        self,
        state: FlatTensors,
        context: FlatTensors,
        encoded: FlatTensors,
        at: Placement,
    ) -> FlatTensors:
        """Run the modules of the dynamics that write what the encoder does not determine.

        A posterior corrects predictions: with one, all of them are run.

        Args:
            state, context, at: as for :meth:`predict`.
            encoded: what the encoder makes of the next observation, by ``("next", key)``.

        Returns:
            State, context and what these modules write.
        """
        if self._correct is not None:
            return self.predict(state, context, at)
        unseen = self._unseen(encoded)
        values = {**context, **state}
        if not unseen:
            return values
        program = self._carry.get(unseen)
        if program is None:
            program = self._carry[unseen] = self._predict.part(unseen)
        if program is self._predict:
            return self.predict(state, context, at)
        _run("dynamics", program, program, values, at)
        return values

    def imagine(
        self, state: FlatTensors, context: FlatTensors, at: Placement
    ) -> FlatTensors:
        """Run the dynamics, and the heads that have latents or memory of their own.

        The arguments and the result are those of :meth:`predict`, with what the heads write.
        """
        values = self.predict(state, context, at)
        self._run_heads(values, at)
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
            The entries that dynamics and posterior write under "next", with what heads carry
            and predict with it; and the next state, whose latents are corrected.
        """
        out, state = self._corrected(values, encoded, at)
        if self.heads:
            judged = {**values, **out}
            predicted = all(place in values for _, place in self._moved)
            if self._verdicts and self._correct is None and predicted:
                # What is predicted with memory is trained on predicted latents, as by any head.
                # Its memory moves below: here it may be written to in vain.
                mine = [key for key, _ in self._judged if key in self.unrecorded]
                first = {**judged, **{key: judged[key].clone() for key in mine}}
                self._run_heads(first, at)
                out.update((key, first[key]) for key in self._verdicts)
            # What is carried moves on the corrected latents.
            judged.update((place, state[key]) for key, place in self._moved)
            self._run_heads(judged, at)
            for key, place in self._judged:
                out[place] = state[key] = judged[place]
            for key in self._verdicts:
                out.setdefault(key, judged[key])
        return out, state

    def _corrected(
        self, values: FlatTensors, encoded: FlatTensors, at: Placement
    ) -> tuple[FlatTensors, FlatTensors]:
        """Return what :meth:`correct` does, without what heads carry."""
        predicted = {key: value for key, value in values.items() if _below_next(key)}
        if self._correct is None:
            known = self.known(encoded)
            state = {
                key: known[key] if key in known else predicted[place]
                for key, place in self._moved
            }
            return predicted, state
        if self._at_next:
            values.update(encoded)
            _run("posterior", self.posterior, self._correct, values, at)
            places = [place for _, place in self._corrections]
            out = {key: values[key] for key in (*predicted, *places)}
        else:
            below = {strip_next(k): v for k, v in {**predicted, **encoded}.items()}
            _run("posterior", self.posterior, self._correct, below, at)
            out = {place: below[strip_next(place)] for place in predicted}
            out.update((place, below[key]) for key, place in self._corrections)
        return out, {key: out[place] for key, place in self._moved}

    def _run_heads(self, values: FlatTensors, at: Placement) -> None:
        for name, program in self._judge.items():
            _run(name, self.heads[name], program, values, at)


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
