"""The pass of a loss over the world model: the components that run, and their inputs."""

from __future__ import annotations

from collections.abc import Iterable

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.blocks.entries import check_numbers
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    is_next,
    join,
    leaf_keys,
    missing_from,
    unique,
)
from torchrl_wm.modules.world_model.filtering import IS_INIT
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.objectives.comparisons import next_observations
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.terms import LossTerm


class ModelPass:
    """One pass over the components that some terms need.

    Single transitions are encoded and predicted; with ``multi_step`` sequences are rolled
    open loop, and a recurrent model filters them.

    Args:
        world_model: the model.
        terms: the readers of the predictions.
        multi_step: roll sequences open loop.

    Attributes:
        inputs: the root entries of a batch that the components read.
    """

    def __init__(
        self,
        world_model: WorldModel,
        terms: Iterable[LossTerm],
        multi_step: bool,
        predicts: bool = False,
    ) -> None:
        self.world_model, self.multi_step = world_model, multi_step
        terms = list(terms)
        #: Whether anything reads what the dynamics predict.
        self.predicts = predicts or multi_step or any(t.needs_prediction for t in terms)
        components = _needed(world_model, terms)
        filters = self.predicts or world_model.is_recurrent
        if not filters:
            components.pop("dynamics")
        # Terms without predictions let heads judge real latents, beside which these may read more.
        judging = (t for t in terms if not t.needs_prediction)
        judges = {n: world_model.components[n] for t in judging for n in t.components}
        self._judges = tuple(judges)
        self.inputs = _root_inputs({**components, **judges})
        if world_model.is_recurrent:
            # Latents are filtered from the observations; they may be given, too.
            found = (*world_model.latent_keys, *world_model.memory_keys)
            self.inputs = [key for key in self.inputs if key not in found]
            for name in world_model.filter.transition.remembering:
                components.pop(name, None)  # run by the filter, on the way
        ahead = [name for name in ("encoder", "dynamics") if name in components]
        self._ahead = {name: components.pop(name) for name in ahead}
        self._heads = components

    def check(self, batch: TensorDictBase) -> None:
        """Raise an error if the batch lacks an input, or numbers its classes in ``[*B, 1]``."""
        missing = missing_from(batch, self.inputs)
        if missing:
            raise MissingEntryError(
                f"The world model reads {missing}, and the batch has {leaf_keys(batch)}."
            )
        # Not all models fail on class numbers with a dim too many: some broadcast.
        columns = {key: batch.get(key) for key in self.inputs}
        columns = {k: v for k, v in columns.items() if not v.is_floating_point()}
        if columns:
            check_numbers(self.world_model.dynamics, columns, batch.batch_size)

    def __call__(self, batch: TensorDictBase, keys: LossKeys) -> TensorDictBase:
        """Run the components.

        Args:
            batch: ``[*B]``, or ``[*B, T]`` for sequences. It is not modified.
            keys: the loss's ``tensor_keys``.

        Returns:
            Latents at the root and predictions under "next".
        """
        if self.multi_step or self.world_model.is_recurrent:
            self._check_sequence(batch)
        if self.multi_step:
            predicted = self.world_model.filter.predict_sequence(batch, self.inputs)
        elif self.world_model.is_recurrent:
            predicted = self._filtered(batch, keys)
        else:
            predicted = run_components(self._ahead, batch.select(*self.inputs))
        return run_components(self._heads, predicted)

    def _filtered(self, batch: TensorDictBase, keys: LossKeys) -> TensorDictBase:
        """Return latents filtered from the observations, with the predictions on the way."""
        model = self.world_model
        observed = next_observations(model)
        missing = missing_from(batch, observed)
        if missing:
            raise MissingEntryError(
                f"A recurrent world model is trained on sequences of observations, and the "
                f"batch lacks {missing}; it has {leaf_keys(batch)}."
            )
        # Latents and the marks of where episodes begin are read if the batch has them.
        begins = [
            key
            for key in unique(batch.keys(True, True))
            if as_tuple(key)[-1] in (IS_INIT, "done")
        ]
        read = (*self.inputs, *observed, *model.latent_keys, *begins)
        steps = batch.select(*read, strict=False)
        done = keys.find_label(batch, "done")
        if done is not None:  # the label may have a key of its own
            steps.set(("next", "done"), done)
        # The observations themselves are labels; the heads do not read them.
        hidden = [join("next", key) for key in model.latent_keys]
        labels = [key for key in observed if key not in hidden]
        return model.filter.observe_sequence(
            steps, self.predicts, self._judges
        ).exclude(*labels)

    def _check_sequence(self, batch: TensorDictBase) -> None:
        """Raise an error if the batch may not be sequences, ``[*B, T]``."""
        names = batch.names
        named_last = bool(names) and names[-1] == "time"
        if named_last or (batch.batch_dims > 1 and "time" not in names[:-1]):
            return
        why = "a recurrent world model"
        if self.multi_step:
            why = "multi_step=True"
        elif self.world_model.memory_keys:
            why = "a world model with memory"
        raise ValueError(
            f"{why} is trained on sequences, [*B, T] with time last, and the batch has the "
            f"batch size {tuple(batch.batch_size)}. Sample slices and give them their "
            f"shape: buffer.sample().reshape(-1, T), or WorldModelLoss(..., slice_len=T); name "
            f"the time of a single sequence: td.refine_names('time')."
        )


def _needed(
    world_model: WorldModel, terms: Iterable[LossTerm]
) -> dict[str, TensorDictModuleBase]:
    """Return the components to run: all that a term reads, and all that these read."""
    components = dict(world_model.components)
    components.pop("posterior", None)
    wanted = {"encoder", "dynamics"}
    reading = (term for term in terms if term.needs_prediction)
    wanted.update(name for term in reading for name in term.components)
    wanted.discard("posterior")  # run where sequences are filtered
    read = {key for name in wanted for key in unique(components[name].in_keys)}
    for name in reversed(list(components)):
        if name not in wanted and read & set(unique(components[name].out_keys)):
            wanted.add(name)
            read.update(unique(components[name].in_keys))
    return {name: module for name, module in components.items() if name in wanted}


def _root_inputs(components: dict[str, TensorDictModuleBase]) -> list[NestedKey]:
    """Return the root keys that components read and none before them writes."""
    written: set[NestedKey] = set()
    read: list[NestedKey] = []
    for module in components.values():
        read += [key for key in unique(module.in_keys) if key not in written]
        written.update(unique(module.out_keys))
    return [key for key in unique(read) if not is_next(key)]
