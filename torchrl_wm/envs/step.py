"""Where an imagined step happens: :meth:`StepKernel.stages`, under rollouts, plans and exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tensordict import NestedKey, TensorDictBase
from torchrl.data import TensorSpec

from torchrl_wm.envs.decoding import as_observed, decoder_inputs, specs_to_round
from torchrl_wm.envs.entries import autocasts, fits, widened
from torchrl_wm.envs.layout import Layout
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    is_next,
    join,
    leaf_keys,
    missing_from,
    strip_next,
    unique,
)
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict
from torchrl_wm.modules.world_model.program import Program
from torchrl_wm.modules.world_model.wiring import written_keys

#: A part of a step, which works in place.
Stage = Callable[[FlatTensors, Placement], None]


class StepKernel:
    """Predicts the ``"next"`` entries of a transition.

    Args:
        world_model: the model that predicts.
        layout: the entries of the env.
        check_finite: raise where a prediction is NaN or infinite. Waits for the
            device at every step.
    """

    def __init__(
        self,
        world_model: WorldModel,
        layout: Layout,
        check_finite: bool = False,
    ) -> None:
        self.components = world_model.components
        self.world_model = world_model
        self.layout = layout
        self.check_finite = check_finite
        reads = unique(world_model.step_module.in_keys)
        self.inputs = [key for key in reads if not is_next(key)]
        # All actions, even if the model ignores some of them: a rollout without its
        # actions is of no use.
        read = [key for key in self.inputs if key not in layout.memory]
        self.required = unique([*read, *layout.action_keys])
        #: What a step writes, and where: each entry by its key below "next".
        self.outputs = {
            key: join("next", key)
            for key in (*layout.carried, *layout.memory, *layout.reward_keys)
        }
        moving = {**layout.latent, **layout.memory}
        components = (*moving, *layout.predicted, *layout.reward_keys)
        self._predicted = [self.outputs[key] for key in components]
        specs = {**moving, **layout.predicted, **layout.decoded}
        specs.update((key, layout.reward[key]) for key in layout.reward_keys)
        self._specs = {self.outputs[key]: spec for key, spec in specs.items()}
        #: Whether the components were seen to write what the layout says.
        self._is_checked = True
        self._decode = None
        #: The specs of what is decoded as floats and shown as integers or bits.
        self.rounded: dict[NestedKey, TensorSpec] = {}
        self._make_programs()

    def _make_programs(self) -> None:
        model, layout = self.world_model, self.layout
        self.program = Program([model.step_module])
        #: Whether it writes nothing but predictions.
        self._is_contained = self.program.is_known and all(
            is_next(key) for key in self.program.writes
        )
        if layout.decoded:
            self._decode = Program([model.decoder])
            self._decoded = {strip_next(k): k for k in written_keys(model.decoder)}
            self.rounded = specs_to_round(model.decoder, layout.decoded)

    def is_current(self) -> bool:
        """Return whether the model still has the components that this kernel was made for."""
        now = self.world_model.components
        return now.keys() == self.components.keys() and all(
            now[name] is module for name, module in self.components.items()
        )

    def refresh(self) -> None:
        """Make the programs anew where a component has another network or hook."""
        decoder = self._decode
        if not (self.program.is_current() and (not decoder or decoder.is_current())):
            self._make_programs()
            self._is_checked = False

    def __call__(
        self, tensordict: TensorDictBase, memory: FlatTensors
    ) -> tuple[TensorDictBase, FlatTensors]:
        """Predict one step.

        Args:
            tensordict: latents, action and context, batch size ``[*B]``. It is
                not modified.
            memory: that of the model, by key; it is used up.

        Returns:
            What belongs under ``"next"``: latents, context, decoded
            observations, declared predictions, reward and done entries; and the next memory.
        """
        self.check_inputs(tensordict)
        keys = (*self.required, *self.layout.counter)
        values = {key: tensordict.get(key, None) for key in keys}
        at = Placement(tensordict.batch_size, tensordict.device)
        made = self.predict({**values, **memory}, at)
        memory = {key: made.pop(key) for key in self.layout.memory}
        return self.layout.with_nested_dims(to_tensordict(made, at)), memory

    def predict(
        self,
        values: FlatTensors,
        at: Placement,
        endings: FlatTensors | None = None,
        decode: bool = True,
        check_finite: bool = True,
        check_rounded: bool = False,
        more: Iterable[NestedKey] = (),
    ) -> FlatTensors:
        """Predict one step, on tensors only.

        Args:
            values: latents, memory, action and context by flat key, ``[*B, ...]``; the
                dictionary is not modified, the memory is used up.
            at: the batch size ``*B`` and the device of the state.
            endings: the done entries, where they are known beforehand.
            decode: whether to decode the observations that the env carries.
            check_finite: False passes over the kernel's own check.
            check_rounded: raise where a decoded observation is NaN or infinite and would
                be rounded, which hides it. Waits for the device.
            more: entries that the env does not carry and that are to be returned, too, as far
                as the model writes them.

        Returns:
            The ``"next"`` entries by flat key, without the "next".
        """
        work = {key: values[key] for key in self.inputs}
        work.update({k: values[k] for k in self.layout.counter if k in values})
        for stage in self.stages(at, endings, decode, check_finite, check_rounded):
            stage(work, at)
        places = {**self.outputs, **{key: join("next", key) for key in more}}
        return {key: work[place] for key, place in places.items() if place in work}

    def stages(
        self,
        at: Placement,
        endings: FlatTensors | None = None,
        decode: bool = True,
        check_finite: bool = True,
        check_rounded: bool = False,
        program: Program | None = None,
    ) -> list[Stage]:
        """Return what makes one step, in order: only what this env and this moment need.

        Each stage works in place. Together they write the :attr:`outputs` of a step into flat
        tensors that hold its start and its actions; other predictions of the model may stand
        below "next", too. The arguments are those of :meth:`predict`, and ``program``, which
        predicts only some of the outputs.
        """
        checked = self.check_finite and check_finite
        decode = decode and self._decode is not None
        stages: list[Stage] = [self._isolated]
        if self._is_contained:
            used = program if program is not None and self._is_checked else self.program
            stages = [*used.trusted] if at.trusted else [used]
        if not self._is_checked:
            stages.append(partial(self._require, self._predicted))
        if self.layout.context:
            stages.append(self._keep_context)
        if decode:
            stages.append(self._show)
            if self.rounded and (check_rounded or checked):
                rounded = [self.outputs[key] for key in self.rounded]
                stages.append(partial(self._require_finite, rounded))
            if self.rounded:
                stages.append(self._round)
        if autocasts(at.device):
            stages.append(self._widen)
        if not self._is_checked:
            stages.append(self._check_shapes)
        if endings is None:
            stages.append(self._end)
        elif endings:
            known = {self.outputs[key]: flag for key, flag in endings.items()}
            stages.append(lambda values, at: values.update(known))
        if checked:
            stages.append(partial(self._require_finite, list(self.outputs.values())))
        return stages

    def _isolated(self, values: FlatTensors, at: Placement) -> None:
        """Run a model that may do more than its keys say, on what it reads; take its predictions."""
        work = {key: values[key] for key in self.inputs}
        self.program(work, at)
        values.update({key: value for key, value in work.items() if is_next(key)})

    def _keep_context(self, values: FlatTensors, at: Placement) -> None:
        for key in self.layout.context:
            values[self.outputs[key]] = values[key]

    def _show(self, values: FlatTensors, at: Placement) -> None:
        """Decode the observations of the next latents."""
        state = {key: values[self.outputs[key]] for key in self.layout.state}
        work = decoder_inputs(self.world_model, state)
        self._decode(work, at._replace(trusted=False))
        if not self._is_checked:
            self._require([self._decoded[key] for key in self.layout.decoded], work, at)
        for key in self.layout.decoded:
            values[self.outputs[key]] = work[self._decoded[key]]

    def _round(self, values: FlatTensors, at: Placement) -> None:
        """Show decoded floats as the real env shows its observations."""
        for key, spec in self.rounded.items():
            values[self.outputs[key]] = as_observed(values[self.outputs[key]], spec)

    def _widen(self, values: FlatTensors, at: Placement) -> None:
        for key, spec in self._specs.items():
            if key in values:
                values[key] = widened(values[key], spec.dtype)

    def _end(self, values: FlatTensors, at: Placement) -> None:
        """Count the step, and say which episodes have ended, by a head or by the time limit."""
        limit, time_is_up = self.layout.time_limit, None
        if limit is not None:
            values[self.outputs[limit.key]], time_is_up = limit.advance(values, at)
        values.update(self.layout.endings.read(values, at, time_is_up))

    def _require(
        self, keys: Iterable[NestedKey], values: FlatTensors, at: Placement
    ) -> None:
        lacking = [key for key in keys if key not in values]
        if lacking:
            raise ValueError(
                f"A component of the world model was changed and no longer writes {lacking}, "
                f"which the env carries. Make a new WorldModelEnv."
            )

    def _check_shapes(self, values: FlatTensors, at: Placement) -> None:
        """Refuse predictions of a network that was replaced by one that does not fit."""
        for key, spec in self._specs.items():
            value = values.get(key)
            if value is not None and not fits(value, spec, at.batch_size):
                raise ValueError(
                    f"The world model predicts {key!r} of the shape {tuple(value.shape)} and "
                    f"{value.dtype}; its spec asks for {(*at.batch_size, *spec.shape)} and "
                    f"{spec.dtype}. A network was replaced: give it these outputs, or make a "
                    f"new WorldModelEnv."
                )
        self._is_checked = all(self.outputs[k] in values for k in self.layout.decoded)

    def _require_finite(
        self, keys: Iterable[NestedKey], values: FlatTensors, at: Placement
    ) -> None:
        dims, rows = len(at.batch_size), {}
        floats = {k: v for k, v in values.items() if v.is_floating_point()}
        for key in keys:
            bad = ~floats[key].isfinite() if key in floats else None
            if bad is not None and bad.any():
                rows[key] = bad.flatten(dims).any(-1).sum().item() if dims else 1
        if not rows:
            return
        read = [key for key in self.required if key in floats]
        inputs = [key for key in read if not floats[key].isfinite().all()]
        source = (
            f"The inputs {inputs} already were not."
            if inputs
            else "All inputs were finite: look at the component that writes them, and at its "
            "training."
        )
        raise FloatingPointError(
            f"The world model predicted NaN or infinite values under {list(rows)} (rows: {rows}). "
            f"{source}"
        )

    def check_inputs(self, tensordict: TensorDictBase) -> None:
        """Refuse a state that one step cannot start from.

        Raises:
            MissingEntryError: if an entry is missing.
            ValueError: if an action does not fit its spec.
        """
        missing = missing_from(tensordict, self.required)
        if not missing:
            values = {key: tensordict.get(key) for key in self.layout.action_keys}
            self.check_actions(values, Placement(tensordict.batch_size, None))
            return
        actions = [key for key in missing if key in self.layout.action_keys]
        if actions:
            raise _no_action(actions, leaf_keys(tensordict))
        raise MissingEntryError(
            f"One imagined step reads {missing}, and the tensordict has "
            f"{leaf_keys(tensordict)}. Start from env.reset(world_model.encode(observations)). "
            f"A planner that acts in the real env needs the encoder before it: "
            f"TensorDictSequential(world_model.encoder, planner)."
        )

    def check_actions(self, values: FlatTensors, at: Placement) -> None:
        """Refuse actions that are not there, or of another shape or float type than their spec's."""
        dims = len(at.batch_size)
        for key in self.layout.action_keys:
            value, spec = values.get(key), self.layout.action[key]
            if value is None:
                raise _no_action([key], sorted(values, key=str))
            if value.shape[dims:] != spec.shape:
                raise ValueError(
                    f"The action {key!r} has the feature shape {tuple(value.shape[dims:])} in a "
                    f"tensordict of batch size {tuple(at.batch_size)}; the action spec asks for "
                    f"{tuple(spec.shape)}."
                )
            if value.dtype == spec.dtype:
                continue
            # A network of the model reads it all the same.
            value = widened(value, spec.dtype)
            floats = value.is_floating_point() and spec.dtype.is_floating_point
            if floats and value.dtype != spec.dtype:
                raise ValueError(
                    f"The action {key!r} is {value.dtype}, its spec {spec.dtype}. Convert it: "
                    f"action.to({spec.dtype})."
                )


def _no_action(
    lacking: list[NestedKey], there: Iterable[NestedKey]
) -> MissingEntryError:
    return MissingEntryError(
        f"No action: the imagined env reads {lacking}, and the tensordict has {list(there)}. Let "
        f"a policy write it, or call env.rand_action(tensordict)."
    )
