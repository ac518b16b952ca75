"""The loss that trains a world model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from tensordict import (
    LazyStackedTensorDict,
    NestedKey,
    TensorDict,
    TensorDictBase,
    TensorDictParams,
)
from tensordict.nn import dispatch, TensorDictModuleBase
from torch import nn
from torchrl.objectives import LossModule
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS

from torchrl_wm import _upstream
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.blocks.entries import check_numbers
from torchrl_wm.modules.blocks.normalizer import with_statistics
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    is_next,
    join,
    leaf_keys,
    missing_from,
    unique,
)
from torchrl_wm.modules.world_model.filtering import (
    episode_begins,
    IS_INIT,
    predict_sequence,
)
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.objectives.terms import (
    DoneTerm,
    LatentTerm,
    LossTerm,
    ReconstructionTerm,
    RewardTerm,
)

Result = TypeVar("Result")
LossName = Literal["reward", "done", "reconstruction", "latent"]
_REDUCTIONS = ("mean", "sum", "none")


class WorldModelLoss(LossModule):
    """Trains a :class:`~torchrl_wm.WorldModel` on real transitions.

    The loss is a sum of terms, each returned under its own name:

    - ``"reward"``: distance of the predicted reward from the real one.
    - ``"done"``: binary cross-entropy of the termination logits. The label is
      ``("next", "terminated")``, else ``done & ~truncated``, else ``done``: a
      time limit is not a termination. The head writes
      ``("next", "terminated_logits")``, ``("next", "continue_pred")`` (logits of
      going on), or a float under ``("next", "terminated")`` or
      ``("next", "done")``, which is read as logits.
    - ``"reconstruction"``: distance of the decoded from the real observation, or
      of the observation decoded from the *predicted* latent from the real next
      one (``reconstruction_target="next"``).
    - ``"latent"``: distance of the predicted next latents from the encoding of
      the next observation, which carries no gradient. A batch that has
      ``target_latent`` uses that.

    The model runs on a copy of what it reads, so the labels in the batch are
    never overwritten.

    A recurrent model (one with a posterior, or with latents that its initial
    state supplies) is trained on sequences, ``[*B, T]``: the observations are
    filtered into latents by :meth:`~torchrl_wm.WorldModel.observe`, which begins
    anew where ``is_init`` says so, and the terms look at the filtered latents.

    With ``multi_step=True`` any model is trained on sequences, open loop: the
    latents of the first observation are rolled through all ``T`` steps with the
    recorded actions, as in TD-MPC (arXiv 2203.04955, eq. 6), and every term compares
    these predictions. Step ``t`` counts ``decay ** t``; where an episode ends,
    the comparison ends with it, and so it does at the first step that the mask calls
    invalid.

    With ``return_latents=True`` the entry ``"latents"`` holds the latents that the
    terms compared, so that a policy can be trained on them without a second pass.
    They are detached, ``[*B]`` (sequences: ``[*B, T]``) whatever the reduction: the
    latents at the root and those that follow under ``"next"``. With ``multi_step`` they
    are the rolled ones, from the encoding of the first observation on; in recurrent
    models the filtered ones, as :meth:`~torchrl_wm.WorldModel.observe` gives them.
    ``("collector", "mask")``, ``[*B]`` bool, is True where a step counts in the losses.

    Args:
        world_model: the model to train.

    Keyword Args:
        losses: names of terms, or :class:`~torchrl_wm.objectives.LossTerm`
            objects. ``["reward"]`` by default.
        reward_loss, reconstruction_loss, latent_loss: the distance, ``"l2"``,
            ``"l1"``, ``"smooth_l1"``, or ``"symlog"``: l2 of the symmetric logarithms.
        done_loss: ``"bce"`` on the logits, or a distance of their sigmoid from
            the label.
        reward_weight, done_weight, reconstruction_weight, latent_weight: what
            each term is multiplied with.
        reconstruction_target: ``"observation"`` or ``"next"``.
        delay_encoder: let targets of the latent be encoded by target parameters
            (``target_encoder_params``), which :class:`~torchrl.objectives.SoftUpdate`
            or :class:`~torchrl.objectives.HardUpdate` move. They begin as a copy;
            normalisers are always those of the encoder, also where they are fitted later.
        multi_step: compare open-loop predictions over whole sequences.
        decay: the weight of a step relative to the one before it, in (0, 1].
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for one
            number per sample, ``[*B]``.
        return_latents: add the latents to the output; the attribute of that name changes
            it later. Take them out before the losses are summed,
            ``latents = losses.pop("latents")``.

    Raises:
        TypeError: if ``world_model`` is not a WorldModel.
        ValueError: for unknown losses, distances or reductions, and for a term
            whose component the model lacks.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelLoss
        >>> obs_dim, latent_dim, action_dim = 8, 4, 2
        >>> encoder = TensorDictModule(
        ...     torch.nn.Linear(obs_dim, latent_dim),
        ...     in_keys=["observation"], out_keys=["latent"],
        ... )
        >>> dynamics = TensorDictModule(
        ...     MLP(in_features=latent_dim + action_dim, out_features=latent_dim, num_cells=[32]),
        ...     in_keys=["latent", "action"], out_keys=[("next", "latent")],
        ... )
        >>> reward_head = TensorDictModule(
        ...     torch.nn.Linear(latent_dim, 1),
        ...     in_keys=[("next", "latent")], out_keys=[("next", "reward")],
        ... )
        >>> world_model = WorldModel(encoder, dynamics, reward_head)
        >>> loss_module = WorldModelLoss(world_model, losses=["reward", "latent"])
        >>> batch = TensorDict(
        ...     {
        ...         "observation": torch.randn(4, obs_dim),
        ...         "action": torch.randn(4, action_dim),
        ...         "next": {"observation": torch.randn(4, obs_dim), "reward": torch.randn(4, 1)},
        ...     },
        ...     batch_size=[4],
        ... )
        >>> loss_td = loss_module(batch)
        >>> sorted(loss_td.keys())
        ['loss_latent', 'loss_reward']
        >>> loss_td.sum(reduce=True).backward()

        Any module of the model can be called with keywords, the loss, too:

        >>> loss_reward, loss_latent = loss_module(
        ...     observation=torch.randn(4, obs_dim),
        ...     action=torch.randn(4, action_dim),
        ...     next_reward=torch.randn(4, 1),
        ...     next_observation=torch.randn(4, obs_dim),
        ... )

        The latents of the same pass, for a policy:

        >>> loss_module = WorldModelLoss(world_model, return_latents=True)
        >>> losses = loss_module(batch)
        >>> latents = losses.pop("latents")
        >>> latents["latent"].shape, latents["next", "latent"].requires_grad
        (torch.Size([4, 4]), False)
        >>> losses.sum(reduce=True).backward()
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`set_keys` can change. ``[*B]`` is the batch.

        ``reward``, ``done`` and ``terminated`` stand below "next", both in the
        batch (labels) and in the predictions. Labels that the batch has under
        another name are given by ``true_reward``, ``true_done`` and
        ``true_terminated``.

        Attributes:
            reward: the reward. Default ``"reward"``.
            true_reward: its label, if the batch has that; else ``reward``.
            done: the end of the episode. Default ``"done"``.
            true_done: its label, if the batch has that; else ``done``.
            terminated: the termination; logits are looked for beside it.
                Default ``"terminated"``.
            true_terminated: its label, if the batch has that; else
                ``terminated``.
            observation: the observation that is reconstructed.
            reconstructed_observation: what the decoder writes for it.
            predicted_latent: what ``target_latent`` is compared with.
            target_latent: a latent target given in the batch.
            mask: ``[*B]`` or ``[*B, 1]`` bool, True where a sample is valid.
            weight: ``[*B]`` or ``[*B, 1]`` weights of the samples.
            priority_weight: as ``weight``; prioritised replay writes it.
        """

        reward: NestedKey = "reward"
        true_reward: NestedKey = "true_reward"
        done: NestedKey = "done"
        true_done: NestedKey = "true_done"
        terminated: NestedKey = "terminated"
        true_terminated: NestedKey = "true_terminated"
        observation: NestedKey = "observation"
        reconstructed_observation: NestedKey = "reconstructed_observation"
        predicted_latent: NestedKey = "predicted_latent"
        target_latent: NestedKey = "target_latent"
        mask: NestedKey = ("collector", "mask")
        weight: NestedKey = "weight"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    encoder: TensorDictModuleBase
    encoder_params: TensorDictParams
    target_encoder_params: TensorDictParams
    dynamics: TensorDictModuleBase
    dynamics_params: TensorDictParams
    target_dynamics_params: TensorDictParams
    reward_head: TensorDictModuleBase
    reward_head_params: TensorDictParams
    target_reward_head_params: TensorDictParams
    done_head: TensorDictModuleBase
    done_head_params: TensorDictParams
    target_done_head_params: TensorDictParams
    decoder: TensorDictModuleBase
    decoder_params: TensorDictParams
    target_decoder_params: TensorDictParams
    posterior: TensorDictModuleBase
    posterior_params: TensorDictParams
    target_posterior_params: TensorDictParams
    initial_state: nn.Module
    initial_state_params: TensorDictParams
    target_initial_state_params: TensorDictParams

    def __init__(
        self,
        world_model: WorldModel,
        *,
        losses: Sequence[LossName | LossTerm] | None = None,
        reward_loss: str = "l2",
        done_loss: str = "bce",
        reconstruction_loss: str = "l2",
        latent_loss: str = "l2",
        reward_weight: float = 1.0,
        done_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        latent_weight: float = 1.0,
        reconstruction_target: Literal["observation", "next"] = "observation",
        reduction: Literal["mean", "sum", "none"] = "mean",
        delay_encoder: bool = False,
        multi_step: bool = False,
        decay: float = 1.0,
        return_latents: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(world_model, WorldModel):
            raise TypeError(
                f"world_model must be a torchrl_wm.WorldModel, got "
                f"{type(world_model).__module__}.{type(world_model).__name__}. Compose one: "
                f"WorldModel(encoder, dynamics, reward_head, ...)."
            )
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"Unknown reduction {reduction!r}. Valid choices are {list(_REDUCTIONS)}."
            )
        if not 0 < decay <= 1 or (decay != 1 and not multi_step):
            raise ValueError(
                f"decay must be in (0, 1], and weighs the steps of multi_step=True; got "
                f"decay={decay} with multi_step={multi_step}."
            )
        named = {
            "reward": RewardTerm(reward_loss, reward_weight),
            "done": DoneTerm(done_loss, done_weight),
            "reconstruction": ReconstructionTerm(
                reconstruction_loss, reconstruction_weight, reconstruction_target
            ),
            "latent": LatentTerm(latent_loss, latent_weight),
        }
        self.terms = _as_terms(["reward"] if losses is None else losses, named)
        self.losses = [term.name for term in self.terms]
        self.reduction = reduction
        self.delay_encoder = delay_encoder
        self.multi_step = multi_step
        self.decay = decay
        self.return_latents = return_latents
        # Not registered: the parameters stand in encoder_params and its like.
        self.__dict__["world_model"] = world_model
        self.__dict__["_held"] = {}
        for term in self.terms:
            term.check(world_model)
        self._follow_components()
        world_model.followers.add(self)

    # Components ----------------------------------------------------------

    def _parts(self) -> dict[str, nn.Module]:
        parts = dict(self.world_model.components)
        if self.world_model.initial_state is not None:
            parts["initial_state"] = self.world_model.initial_state
        for term in self.terms:
            for name, module in term.modules().items():
                if parts.setdefault(name, module) is not module:
                    raise ValueError(
                        f"The loss {term.name!r} calls a module of its own {name!r}, and there "
                        f"is another one of that name. Give it another name in modules()."
                    )
        return parts

    def _follow_components(self) -> None:
        """Hold the parameters of the model's present components, and of their present networks."""
        for name, module in self._parts().items():
            if self.__dict__.get(name) is not module:
                self._hold(name, module, _tensors_of(module))
                continue
            if torch.compiler.is_compiling():
                continue  # a graph is made for the tensors that there are
            tensors, held = _tensors_of(module), self._held[name]
            if not _same(tensors, held) and not _is_swapped(module):
                # Where only buffers are others, it was moved, and targets stay what they are.
                moved = _same(_parameters(tensors), _parameters(held))
                self._hold(name, module, tensors, renew=not moved)

    def _hold(
        self,
        name: str,
        module: nn.Module,
        tensors: list[torch.Tensor],
        *,
        renew: bool = True,
    ) -> None:
        """Hold a module's parameters; with ``renew``, begin its target parameters anew."""
        delayed = {name for term in self.terms for name in term.delayed}
        if self.delay_encoder:
            delayed.add("encoder")
        has_update = _upstream.update_flags(self).get(name)
        with warnings.catch_warnings():
            # Modules of terms cannot be annotated here.
            warnings.filterwarnings("ignore", ".*part of the annotations")
            self.convert_to_functional(
                module, name, create_target_params=renew and name in delayed
            )
        if not renew:
            _upstream.update_flags(self)[name] = has_update
            targets = _upstream.submodules(self).get(f"target_{name}_params")
            if targets is not None and _parameters(tensors):
                floats = [t for t in tensors if t.is_floating_point()]
                # Of a module: what TensorDictParams itself calls `to` makes another one.
                nn.Module.to(targets, floats[0].device, floats[0].dtype)
        self._held[name] = tensors

    def follow(self) -> None:
        """Hold what the model's components have now, after it was moved. The model calls this."""
        self.world_model.followers.add(self)
        for name, module in self._parts().items():
            self._hold(name, module, _tensors_of(module), renew=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> WorldModelLoss:
        """As any module's; the model moves along."""
        for module in self._parts().values():
            module._apply(fn)
        super()._apply(fn)
        self.follow()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.world_model.followers.add(self)

    def __deepcopy__(self, memo: dict) -> WorldModelLoss:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        # The copy trains the copy of the model: TorchRL copies parameters a second time.
        copied.follow()
        return copied

    @contextmanager
    def target_parameters(self, name: str) -> Iterator[None]:
        """Let the module ``name`` use its target parameters for a while.

        Args:
            name: the encoder (with ``delay_encoder``), or a module of a term that
                is among the ``delayed``.
        """
        module, parameters = getattr(self, name), getattr(self, name + "_params")
        target = with_statistics(
            getattr(self, f"target_{name}_params"), parameters, module
        )
        try:
            with target.to_module(module, preserve_module_state=False):
                yield
        except Exception:
            # tensordict leaves the target's parameters in a module that raised.
            parameters.to_module(module, preserve_module_state=False)
            raise

    def _with_parameters(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` while the model's components use the parameters held here."""
        for name, module in self._parts().items():
            function = partial(
                _call_with, getattr(self, name + "_params"), module, function
            )
        return function()

    def _active(self) -> list[str]:
        """The components to run: those that a term trains, and what they read."""
        components = dict(self.world_model.components)
        components.pop("posterior", None)
        wanted = {"encoder", "dynamics"}
        wanted.update(name for term in self.terms for name in term.components)
        wanted.discard("posterior")  # run where sequences are filtered
        read = {key for n in wanted for key in unique(components[n].in_keys)}
        for name in reversed(list(components)):
            if name not in wanted and read & set(unique(components[name].out_keys)):
                wanted.add(name)
                read.update(unique(components[name].in_keys))
        return [name for name in components if name in wanted]

    def encode_next(self, batch: TensorDictBase) -> TensorDictBase:
        """The latents of the next observations, by the target encoder, without gradient.

        Raises:
            KeyError: if the batch lacks a next observation.
        """
        keys = unique(self.world_model.encoder.in_keys)
        inputs = TensorDict({}, batch_size=batch.batch_size, device=batch.device)
        for key in keys:
            value = batch.get(join("next", key), None)
            if value is None:
                raise MissingEntryError(
                    f"The loss 'latent' encodes the next observation and needs the label "
                    f"{join('next', key)!r}, which the batch lacks; it has "
                    f"{leaf_keys(batch)}. Add it, or give the target "
                    f"under {self.tensor_keys.target_latent!r}."
                )
            inputs.set(key, value)
        encode = partial(run_components, {"encoder": self.encoder}, inputs)
        with torch.no_grad():
            if not self.delay_encoder:
                return encode()
            with self.target_parameters("encoder"):
                return encode()

    def decode_next(self, predicted: TensorDictBase) -> TensorDictBase:
        """The observations that the predicted next latents stand for, at the root."""
        inputs = predicted.exclude("next").copy()
        for key in self.world_model.latent_keys:
            inputs.set(key, predicted.get(join("next", key)))
        return self.world_model.decode(inputs)

    def judge_real_next(
        self, name: str, predicted: TensorDictBase, batch: TensorDictBase
    ) -> TensorDictBase:
        """What a head makes of the real next latents, in place of the predicted ones.

        Args:
            name: the component.
            predicted: what the model made of the batch.
            batch: the real transitions.

        Returns:
            The real transitions with what the head writes.
        """
        inputs = predicted.exclude("next").copy()
        inputs.set("next", self.encode_next(batch).detach())
        return run_components({name: self.world_model.components[name]}, inputs)

    # Keys ----------------------------------------------------------------

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        if "mask" in kwargs:
            default = self.tensor_keys.mask == self.default_keys().mask
            self.loss_mask_key = "auto" if default else self.tensor_keys.mask

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the loss reads: the model's inputs and the labels."""
        labels = [
            key
            for term in self.terms
            for key in term.labels(self.world_model, self.tensor_keys)
        ]
        if self.world_model.is_recurrent:
            # Filtered are the observations that steps led to.
            observed = unique(self.world_model.encoder.in_keys)
            labels += [join("next", key) for key in observed]
        return unique([*self._model_inputs(), *labels])

    @in_keys.setter
    def in_keys(self, value) -> None:
        raise RuntimeError(
            "in_keys follow from the world model and the losses. Use loss.set_keys(...)."
        )

    @property
    def out_keys(self) -> list[NestedKey]:
        """One ``loss_<name>`` for each term, and the latents if they are returned."""
        keys: list[NestedKey] = [f"loss_{term.name}" for term in self.terms]
        if self.return_latents:
            handed_out = [*self._handed_out(), ("collector", "mask")]
            keys += [join("latents", key) for key in handed_out]
        return keys

    def _handed_out(self) -> list[NestedKey]:
        """Return the keys of the latents, at the root and below "next"."""
        latents = self.world_model.latent_keys
        return [*latents, *(join("next", key) for key in latents)]

    @out_keys.setter
    def out_keys(self, value) -> None:
        raise RuntimeError("out_keys follow from the losses given at construction.")

    def _model_inputs(self) -> list[NestedKey]:
        model = self.world_model
        written: set[NestedKey] = set()
        read: list[NestedKey] = []
        for name in self._active():
            module = model.components[name]
            read += [key for key in unique(module.in_keys) if key not in written]
            written.update(unique(module.out_keys))
        keys = [key for key in unique(read) if not is_next(key)]
        if model.is_recurrent:
            # Latents are filtered from the observations; they may be given, too.
            keys = [key for key in keys if key not in model.latent_keys]
        return keys

    # Loss ----------------------------------------------------------------

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses of a batch of real transitions.

        Args:
            tensordict: the transitions, ``[*B]``: observations and action at
                the root, labels under ``"next"``. It is not modified.

        Returns:
            One entry for each term, ``loss_<name>``: a scalar, or ``[*B]`` with
            ``reduction="none"``. With ``return_latents=True``, ``"latents"``, too.

        Raises:
            KeyError: if an input of the model or a label is missing.
            ValueError: if a prediction and its label differ in shape, or class numbers are
                ``[*B, 1]`` where their spec says ``[*B]``.
        """
        if not tensordict.batch_size.numel():
            raise ValueError(
                f"The batch is empty: its batch size is {tuple(tensordict.batch_size)}."
            )
        self._follow_components()
        inputs = self._model_inputs()
        missing = missing_from(tensordict, inputs)
        if missing:
            raise MissingEntryError(
                f"The world model reads {missing}, and the batch has {leaf_keys(tensordict)}."
            )
        # Not all models fail on class numbers with a dim too many: some broadcast.
        columns = {key: tensordict.get(key) for key in inputs}
        columns = {k: v for k, v in columns.items() if not v.is_floating_point()}
        if columns:
            check_numbers(self.world_model.dynamics, columns, tensordict.batch_size)
        valid = self.valid(tensordict)
        if self.multi_step and valid is not None:
            # What is predicted through a step that is not there compares with nothing.
            valid = (~valid).cumsum(-1) == 0
        batch = tensordict if valid is None else _blank(tensordict, valid)
        values, latents = self._with_parameters(partial(self._compare, batch, inputs))
        weights = self._weights(batch)
        if self.multi_step:
            within, scale = self._until_end(tensordict)
            valid = within if valid is None else valid & within
            values = [scale * value for value in values]
        losses = {
            f"loss_{term.name}": term.weight
            * _reduce(value, valid, weights, self.reduction)
            for term, value in zip(self.terms, values)
        }
        size = tensordict.batch_size if self.reduction == "none" else ()
        out = TensorDict(losses, batch_size=size)
        if latents is not None:
            if valid is None:
                valid = torch.ones(
                    batch.batch_size, dtype=torch.bool, device=batch.device
                )
            out.set("latents", latents.set(("collector", "mask"), valid))
        if torch.compiler.is_compiling():
            # A graph cannot give back what holds weak references.
            tensordict.clear_refs_for_compile_()
            out.clear_refs_for_compile_()
        return out

    def _compare(
        self, batch: TensorDictBase, inputs: list[NestedKey]
    ) -> tuple[list[torch.Tensor], TensorDictBase | None]:
        """What each term says of each sample, ``[*B]``; and the latents, if returned."""
        if self.multi_step or self.world_model.is_recurrent:
            self._check_sequence(batch)
        if self.multi_step:
            predicted = self._heads(predict_sequence(self.world_model, batch, inputs))
        elif self.world_model.is_recurrent:
            predicted = self._filtered(batch, inputs)
        else:
            ahead = {
                name: self.world_model.components[name]
                for name in ("encoder", "dynamics")
            }
            predicted = self._heads(run_components(ahead, batch.select(*inputs)))
        values = []
        for term in self.terms:
            value = term(predicted, batch, self)
            if value.shape != batch.batch_size:
                raise ValueError(
                    f"The loss {term.name!r} must give one number per sample, of the batch's "
                    f"shape {tuple(batch.batch_size)}, and gave {tuple(value.shape)}. Take the "
                    f"mean over the feature dims."
                )
            values.append(value)
        if not self.return_latents:
            return values, None
        return values, predicted.select(*self._handed_out()).detach()

    def _heads(self, predicted: TensorDictBase) -> TensorDictBase:
        """Run the components that come after the dynamics."""
        heads = {
            name: self.world_model.components[name]
            for name in self._active()
            if name not in ("encoder", "dynamics")
        }
        return run_components(heads, predicted)

    def _filtered(
        self, batch: TensorDictBase, inputs: list[NestedKey]
    ) -> TensorDictBase:
        """Latents filtered from the observations, and what the heads make of them."""
        model = self.world_model
        observed = [join("next", key) for key in unique(model.encoder.in_keys)]
        # The latents and what says where episodes begin are read where they are.
        begins = [
            key
            for key in unique(batch.keys(True, True))
            if as_tuple(key)[-1] in (IS_INIT, "done")
        ]
        given = [
            k for k in (*model.latent_keys, *begins) if batch.get(k, None) is not None
        ]
        missing = missing_from(batch, observed)
        if missing:
            raise MissingEntryError(
                f"A recurrent world model is trained on sequences of observations, and the "
                f"batch lacks {missing}; it has {leaf_keys(batch)}."
            )
        steps = batch.select(*inputs, *observed, *given)
        done = self._done(batch)
        if done is not None:  # which may stand under a key of its own
            steps.set(("next", "done"), done)
        filtered = model.observe(steps)
        # The observations themselves are labels; the heads do not read them.
        hidden = [join("next", key) for key in model.latent_keys]
        return self._heads(filtered.exclude(*(k for k in observed if k not in hidden)))

    def _until_end(
        self, tensordict: TensorDictBase
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the first step's episode still goes on, ``[*B, T]``, and the steps' weights."""
        size = tensordict.batch_size
        begins = torch.zeros(size, dtype=torch.bool, device=tensordict.device)
        # Either may say so: a slice can lack the step before an episode's first.
        for flags in (
            episode_begins(tensordict),
            episode_begins(tensordict.exclude(IS_INIT), self._done(tensordict)),
        ):
            if flags is not None:
                begins[..., 1:] |= flags[..., 1:]
        time = torch.arange(size[-1], device=tensordict.device)
        return begins.cumsum(-1) == 0, (self.decay**time).expand(size)

    def _done(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        """The label that says where episodes end."""
        for key in (self.tensor_keys.true_done, self.tensor_keys.done):
            done = tensordict.get(join("next", key), None)
            if done is not None:
                return done
        return None

    def _check_sequence(self, tensordict: TensorDictBase) -> None:
        names = tensordict.names
        if tensordict.batch_dims > 1 and "time" not in names[:-1]:
            return
        if names and names[-1] == "time":
            return
        why = "multi_step=True" if self.multi_step else "a recurrent world model"
        raise ValueError(
            f"{why} is trained on sequences, [*B, T] with time last, and the batch has the "
            f"batch size {tuple(tensordict.batch_size)}. Sample slices and give them their "
            f"shape: buffer.sample().reshape(-1, T); name the time of a single sequence: "
            f"td.refine_names('time')."
        )

    def valid(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        """Where the batch's masks say that samples are valid, ``[*B]``; None without a mask."""
        masks = [tensordict.get(key, None) for key in self._mask_keys()]
        masks = [mask for mask in masks if mask is not None]
        if not masks:
            if self.loss_mask_key not in (None, "auto"):
                raise MissingEntryError(
                    f"The loss was told that {self.loss_mask_key!r} masks invalid samples, and "
                    f"the batch has {leaf_keys(tensordict)}. Add it, or call "
                    f"loss.set_keys(mask=None)."
                )
            return None
        valid = torch.ones(
            tensordict.batch_size, dtype=torch.bool, device=masks[0].device
        )
        for mask in masks:
            valid = valid & _per_sample(mask.bool(), valid.shape)
        return valid

    def _mask_keys(self) -> tuple[NestedKey, ...]:
        """The entries that may say which samples are valid, as TorchRL's losses take them."""
        key = self.loss_mask_key
        if key is None:
            return ()
        return AUTO_LOSS_MASK_KEYS if key == "auto" else (key,)

    def _weights(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        """The weights of the samples, ``[*B]``, or None."""
        total = None
        for key in (self.tensor_keys.weight, self.tensor_keys.priority_weight):
            weight = tensordict.get(key, None)
            if weight is None:
                continue
            size = tensordict.batch_size
            if weight.shape not in (size, (*size, 1)):
                raise ValueError(
                    f"The weights {key!r} have the shape {tuple(weight.shape)}; one per sample "
                    f"is expected, {tuple(size)} or {(*size, 1)}. If this entry is no weight, "
                    f"call loss.set_keys(weight=...) with another key."
                )
            weight = weight.reshape(size)
            total = weight if total is None else total * weight
        return total


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module, in order."""
    return [
        tensor for part in module.modules() for tensor in _upstream.own_tensors(part)
    ]


def _per_sample(mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """A mask ``[*B]``, ``[*B, 1]`` or of the first dims of ``*B``, as ``[*B]``."""
    while mask.ndim > len(size) and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    if mask.ndim > len(size):
        raise ValueError(
            f"A mask says of each sample whether it is valid, {tuple(size)} or {(*size, 1)}; this "
            f"one has the shape {tuple(mask.shape)}. Reduce it, or name another entry: "
            f"loss.set_keys(mask=...)."
        )
    return mask.reshape(mask.shape + (1,) * (len(size) - mask.ndim)).expand(size)


def _parameters(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether these are the same objects."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))


def _is_swapped(module: nn.Module) -> bool:
    """Whether other parameters stand in a module for a while, as ``TensorDict.to_module`` does."""
    return any(
        isinstance(value, torch.Tensor)
        for part in module.modules()
        for value in part.__dict__.values()
    )


def _call_with(
    parameters: TensorDictParams, module: nn.Module, function: Callable[[], Result]
) -> Result:
    with parameters.to_module(module, preserve_module_state=False):
        return function()


def _blank(tensordict: TensorDictBase, valid: torch.Tensor) -> TensorDictBase:
    """The batch with zeros in its invalid samples.

    Padding may hold anything, NaN included. Leaving it out of the reduction is
    not enough: the gradient of what the model makes of a NaN is NaN.
    """
    if isinstance(tensordict, LazyStackedTensorDict):
        tensordict = tensordict.contiguous()  # apply would go through its parts

    def blank(value: torch.Tensor) -> torch.Tensor:
        if value.dtype is torch.bool:
            return value
        rows = valid.reshape(valid.shape + (1,) * (value.ndim - valid.ndim))
        return torch.where(rows, value, torch.zeros_like(value))

    return tensordict.apply(blank)


def _reduce(
    value: torch.Tensor,
    valid: torch.Tensor | None,
    weights: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """Reduce one number per sample, ``[*B]``; invalid samples are zero and do not count."""
    if valid is not None:
        value = torch.where(valid, value, torch.zeros_like(value))
    if weights is not None:
        value = value * weights
    if reduction == "none":
        return value
    if reduction == "sum" or (weights is None and valid is None):
        return value.sum() if reduction == "sum" else value.mean()
    count = torch.ones_like(value) if weights is None else weights
    if valid is not None:
        count = torch.where(valid, count, torch.zeros_like(count))
    # All samples invalid, or of no weight: zero, not NaN.
    return value.sum() / count.sum().clamp_min(torch.finfo(value.dtype).tiny)


def _as_terms(
    losses: Sequence[LossName | LossTerm], named: dict[str, LossTerm]
) -> list[LossTerm]:
    losses = [losses] if isinstance(losses, (str, LossTerm)) else list(losses)
    unknown = [x for x in losses if not isinstance(x, LossTerm) and x not in named]
    if unknown:
        raise ValueError(
            f"Unknown loss type(s): {unknown}. Valid choices are {sorted(named)}, or a "
            f"torchrl_wm.objectives.LossTerm."
        )
    if not losses:
        raise ValueError(f"losses is empty. Valid choices are {sorted(named)}.")
    terms = [x if isinstance(x, LossTerm) else named[x] for x in losses]
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"losses has {twice} more than once; each term needs its own name."
        )
    return terms
