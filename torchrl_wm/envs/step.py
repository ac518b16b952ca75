"""The step kernel: one imagined transition, shared by everything that imagines."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import TensorSpec

from torchrl_wm.envs.decoding import as_observed, decoder_inputs, specs_to_round
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


class StepKernel:
    """Predicts the ``"next"`` entries of a transition.

    Args:
        world_model: the model that predicts.
        layout: the entries of the env.
        max_steps: the number of steps after which an episode is truncated.
        counter_key: where the steps are counted; None without a time limit.
        check_finite: raise where a prediction is NaN or infinite. Waits for the
            device at every step.
    """

    def __init__(
        self,
        world_model: WorldModel,
        layout: Layout,
        *,
        max_steps: int | None,
        counter_key: NestedKey | None,
        check_finite: bool = False,
    ) -> None:
        self.components = world_model.components
        self.world_model = world_model
        self.layout = layout
        self.max_steps = max_steps
        self.counter_key = counter_key
        self.check_finite = check_finite
        reads = unique(world_model.step_module.in_keys)
        self.inputs = [key for key in reads if not is_next(key)]
        # Actions are asked for even if the model ignores some of them: a
        # rollout without its actions is of no use to anybody.
        self.required = unique([*self.inputs, *layout.action_keys])
        self.program = Program([world_model.step_module])
        self._action_specs = {key: layout.action[key] for key in layout.action_keys}
        self._specs = {**layout.latent, **layout.predicted, **layout.decoded}
        self._specs.update((key, layout.reward[key]) for key in layout.reward_keys)
        #: Whether the components were seen to write what the layout says.
        self._is_checked = True
        self._predicted = [
            (key, join("next", key))
            for key in (*layout.latent, *layout.predicted, *layout.reward_keys)
        ]
        self._decode = None
        #: What is decoded as floats and shown as integers or bits.
        self.rounded: dict[NestedKey, TensorSpec] = {}
        if layout.decoded:
            self._decode = Program([world_model.decoder])
            places = {strip_next(k): k for k in written_keys(world_model.decoder)}
            self._decoded = [(key, places[key]) for key in layout.decoded]
            self.rounded = specs_to_round(world_model.decoder, layout.decoded)

    def is_current(self) -> bool:
        """Whether the model still has the components this kernel was made for."""
        now = self.world_model.components
        return now.keys() == self.components.keys() and all(
            now[name] is module for name, module in self.components.items()
        )

    @property
    def is_straight(self) -> bool:
        """Whether a step is networks that write predictions, and nothing else."""
        return (
            self._decode is None
            and self.counter_key is None
            and not self.check_finite
            and self.program.is_known
            and all(is_next(key) for key in self.program.writes)
        )

    def refresh(self) -> None:
        """Make the programs anew where a component has another network or hook."""
        if not self.program.is_current():
            self.program = Program([self.world_model.step_module])
            self._is_checked = False
        if self._decode is not None and not self._decode.is_current():
            self._decode = Program([self.world_model.decoder])
            self.rounded = specs_to_round(self.world_model.decoder, self.layout.decoded)
            self._is_checked = False

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Predict one step.

        Args:
            tensordict: latents, action and context, batch size ``[*B]``. It is
                not modified.

        Returns:
            What belongs under ``"next"``: latents, context, decoded
            observations, declared predictions, reward and done entries.
        """
        self.check_inputs(tensordict)
        keys = self.required
        if self.counter_key is not None:
            keys = [*keys, self.counter_key]
        values = {key: tensordict.get(key, None) for key in keys}
        at = Placement(tensordict.batch_size, tensordict.device)
        out = to_tensordict(self.predict(values, at), at)
        return self.with_nested_dims(out)

    def predict(
        self,
        values: FlatTensors,
        at: Placement,
        endings: FlatTensors | None = None,
        decode: bool = True,
        check_finite: bool = True,
        check_rounded: bool = False,
    ) -> FlatTensors:
        """Predict one step, on tensors alone.

        Args:
            values: latents, action and context by flat key, ``[*B, ...]``; not
                modified.
            at: the batch size ``*B`` and the device of the state.
            endings: the done entries, where they are known beforehand.
            decode: whether to decode the observations that the env carries.
            check_finite: False passes over the kernel's own check.
            check_rounded: raise where a decoded observation is NaN or infinite and would
                be rounded, which hides it. Waits for the device.

        Returns:
            The ``"next"`` entries by flat key, without the "next".
        """
        batch_size, device, _ = at
        work = {key: values[key] for key in self.inputs}
        self.program(work, at)
        layout = self.layout
        if not self._is_checked:
            self._require(place for _, place in self._predicted if place not in work)
        out: FlatTensors = {key: work[place] for key, place in self._predicted}
        for key in layout.context:
            out[key] = values[key]
        if self._decode is not None and decode:
            reads = decoder_inputs(self.world_model, {k: out[k] for k in layout.state})
            self._decode(reads, at._replace(trusted=False))
            if not self._is_checked:
                self._require(place for _, place in self._decoded if place not in reads)
            for key, place in self._decoded:
                out[key] = reads[place]
            self._round(
                values,
                out,
                len(batch_size),
                check_rounded or (self.check_finite and check_finite),
            )
        if autocasts(device):
            for key, spec in self._specs.items():
                if key in out:
                    out[key] = widened(out[key], spec.dtype)
        if not self._is_checked:
            self._check_shapes(out, batch_size)
            self._is_checked = decode or self._decode is None
        time_is_up = None
        if self.counter_key is not None:
            count = values.get(self.counter_key)
            if (
                count is None
            ):  # a state from elsewhere, e.g. a planner's: time starts here
                count = torch.zeros((*batch_size, 1), dtype=torch.int64, device=device)
            # Batched envs' shared buffers mark even integers as in need of a graph.
            count = count.detach() + 1
            out[self.counter_key] = count
            time_is_up = count >= self.max_steps
        if endings is None:
            endings = layout.endings.read(work, batch_size, device, time_is_up)
        out.update(endings)
        if self.check_finite and check_finite:
            self._check_finite(values, out, len(batch_size))
        return out

    def with_nested_dims(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Give nested tensordicts the batch dims that their specs have."""
        for key, dims in self.layout.nested.items():
            node = tensordict.get(key, None)
            if node is not None:
                node.batch_size = (*tensordict.batch_size, *dims)
        return tensordict

    def _require(self, lacking: Iterable[NestedKey]) -> None:
        lacking = list(lacking)
        if lacking:
            raise ValueError(
                f"A component of the world model was changed and no longer writes {lacking}, "
                f"which the env carries. Make a new WorldModelEnv."
            )

    def _check_shapes(self, out: FlatTensors, batch_size: torch.Size) -> None:
        """Refuse predictions of a network that was replaced by one that does not fit."""
        for key, spec in self._specs.items():
            value = out.get(key)
            expected = (*batch_size, *spec.shape)
            if value is not None and (
                tuple(value.shape) != expected or value.dtype != spec.dtype
            ):
                raise ValueError(
                    f"The world model predicts {join('next', key)!r} of the shape "
                    f"{tuple(value.shape)} and {value.dtype}; its spec asks for {expected} and "
                    f"{spec.dtype}. A network was replaced: give it these outputs, or make a "
                    f"new WorldModelEnv."
                )

    def _round(
        self, values: FlatTensors, out: FlatTensors, dims: int, check: bool
    ) -> None:
        """Show decoded floats as the real env shows its observations."""
        if check and self.rounded:
            self._check_finite(values, {key: out[key] for key in self.rounded}, dims)
        for key, spec in self.rounded.items():
            out[key] = as_observed(out[key], spec)

    def _check_finite(
        self, values: FlatTensors, predicted: FlatTensors, dims: int
    ) -> None:
        bad = {
            key: ~value.isfinite()
            for key, value in predicted.items()
            if value.is_floating_point()
        }
        bad = {key: flags for key, flags in bad.items() if flags.any()}
        if not bad:
            return
        inputs = [
            key
            for key in self.required
            if values[key].is_floating_point() and not values[key].isfinite().all()
        ]
        rows = {
            key: flags.flatten(dims).any(-1).sum().item() if dims else 1
            for key, flags in bad.items()
        }
        source = (
            f"The inputs {inputs} already were not."
            if inputs
            else "All inputs were finite: look at the component that writes them, and at its "
            "training."
        )
        raise FloatingPointError(
            f"The world model predicted NaN or infinite values under "
            f"{[join('next', key) for key in bad]} (rows: {rows}). {source}"
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
            self.check_actions(values, tensordict.batch_size)
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

    def check_actions(self, values: FlatTensors, batch_size: torch.Size) -> None:
        """Refuse actions that are not there, or of another shape or float type than their spec's."""
        dims = len(batch_size)
        for key, spec in self._action_specs.items():
            value = values.get(key)
            if value is None:
                raise _no_action([key], sorted(values, key=str))
            if value.shape[dims:] != spec.shape:
                raise ValueError(
                    f"The action {key!r} has the feature shape {tuple(value.shape[dims:])} in a "
                    f"tensordict of batch size {tuple(batch_size)}; the action spec asks for "
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


def autocasts(device: torch.device | None) -> bool:
    """Whether networks there compute in a narrower dtype than that of their weights."""
    if device is None:
        return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return torch.is_autocast_enabled(device.type)


def widened(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast computes in half precision, in the float ``dtype`` that it stands for."""
    if value.dtype == dtype or value.dtype not in (torch.float16, torch.bfloat16):
        return value
    stands_for = dtype.is_floating_point and autocasts(value.device)
    return value.to(dtype) if stands_for else value


def _no_action(
    lacking: list[NestedKey], there: Iterable[NestedKey]
) -> MissingEntryError:
    return MissingEntryError(
        f"No action: the imagined env reads {lacking}, and the tensordict has {list(there)}. Let "
        f"a policy write it, or call env.rand_action(tensordict)."
    )
