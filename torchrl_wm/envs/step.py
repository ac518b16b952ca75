"""The step kernel: one imagined transition, shared by everything that imagines."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.envs.layout import Layout, read_decoded
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, leaf_keys, missing_from, unique


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
        self.step_module = world_model.step_module
        self.inputs = [k for k in unique(self.step_module.in_keys) if not is_next(k)]
        # Actions are asked for even if the model ignores some of them: a
        # rollout without its actions is of no use to anybody.
        self.required = unique([*self.inputs, *layout.action_keys])

    def is_current(self) -> bool:
        """Whether the model still has the components this kernel was made for."""
        now = self.world_model.components
        return now.keys() == self.components.keys() and all(
            now[name] is module for name, module in self.components.items()
        )

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Predict one step.

        Args:
            tensordict: latents, action and context, batch size ``[*B]``. It is
                not modified.

        Returns:
            What belongs under ``"next"``: latents, context, decoded
            observations, reward and done entries.
        """
        self._check_inputs(tensordict)
        work = self.step_module(tensordict.select(*self.inputs))
        predicted = work.get("next")
        layout = self.layout
        batch_size = tensordict.batch_size
        out = TensorDict({}, batch_size=batch_size, device=tensordict.device)
        for key in layout.latent:
            out.set(key, predicted.get(key))
        for key in layout.context:
            out.set(key, tensordict.get(key))
        if layout.decoded:
            decoded = read_decoded(
                self.world_model, out.select(*layout.state), list(layout.decoded)
            )
            for key, value in decoded.items():
                out.set(key, value)
        for key in layout.reward_keys:
            out.set(key, predicted.get(key))
        time_is_up = None
        if self.counter_key is not None:
            count = tensordict.get(self.counter_key, None)
            if (
                count is None
            ):  # a state from elsewhere, e.g. a planner's: time starts here
                count = torch.zeros(
                    (*batch_size, 1), dtype=torch.int64, device=tensordict.device
                )
            # Batched envs' shared buffers mark even integers as in need of a graph.
            count = count.detach() + 1
            out.set(self.counter_key, count)
            time_is_up = count >= self.max_steps
        for key, flag in layout.endings.read(predicted, time_is_up).items():
            out.set(key, flag)
        if self.check_finite:
            self._check_finite(tensordict, out)
        return self.with_nested_dims(out)

    def with_nested_dims(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Give nested tensordicts the batch dims that their specs have."""
        for key, dims in self.layout.nested.items():
            node = tensordict.get(key, None)
            if node is not None:
                node.batch_size = (*tensordict.batch_size, *dims)
        return tensordict

    def _check_finite(
        self, tensordict: TensorDictBase, predicted: TensorDictBase
    ) -> None:
        bad = {
            key: ~value.isfinite()
            for key, value in predicted.items(True, True)
            if value.is_floating_point()
        }
        bad = {key: flags for key, flags in bad.items() if flags.any()}
        if not bad:
            return
        inputs = [
            key
            for key in self.required
            if tensordict.get(key).is_floating_point()
            and not tensordict.get(key).isfinite().all()
        ]
        rows = {
            key: flags.flatten(predicted.batch_dims).any(-1).sum().item()
            if predicted.batch_dims
            else 1
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

    def _check_inputs(self, tensordict: TensorDictBase) -> None:
        missing = missing_from(tensordict, self.required)
        if not missing:
            dims = tensordict.batch_dims
            for key in self.layout.action_keys:
                shape = tensordict.get(key).shape[dims:]
                if shape != self.layout.action[key].shape:
                    raise ValueError(
                        f"The action {key!r} has the feature shape {tuple(shape)} in a tensordict "
                        f"of batch size {tuple(tensordict.batch_size)}; the action spec asks for "
                        f"{tuple(self.layout.action[key].shape)}."
                    )
                dtype = self.layout.action[key].dtype
                value = tensordict.get(key)
                if value.is_floating_point() and dtype.is_floating_point:
                    if value.dtype != dtype:
                        raise ValueError(
                            f"The action {key!r} is {value.dtype}, its spec {dtype}. Convert it: "
                            f"action.to({dtype})."
                        )
            return
        actions = [key for key in missing if key in self.layout.action_keys]
        if actions:
            raise MissingEntryError(
                f"No action: the imagined env reads {actions}, and the tensordict has "
                f"{leaf_keys(tensordict)}. Let a policy write it, or call "
                f"env.rand_action(tensordict)."
            )
        raise MissingEntryError(
            f"One imagined step reads {missing}, and the tensordict has "
            f"{leaf_keys(tensordict)}. Start from env.reset(world_model.encode(observations)). "
            f"A planner that acts in the real env needs the encoder before it: "
            f"TensorDictSequential(world_model.encoder, planner)."
        )
