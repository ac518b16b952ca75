"""The loss that trains a world model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import nn

from torchrl_wm.modules import penalty_of, WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, missing_from, unique
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.objectives.comparisons import next_observations
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.model_pass import ModelPass
from torchrl_wm.objectives.networks import LossWithNetworks
from torchrl_wm.objectives.samples import (
    as_slices,
    blank,
    counted,
    first_episode,
    reduce,
    REDUCTIONS,
    sample_weights,
    valid_samples,
)
from torchrl_wm.objectives.terms import (
    as_terms,
    DoneTerm,
    LatentTerm,
    LossTerm,
    ReconstructionTerm,
    RewardTerm,
)

LossName = Literal["reward", "done", "reconstruction", "latent"]


class WorldModelLoss(LossWithNetworks):
    """The loss that trains a :class:`~torchrl_wm.WorldModel` on real transitions.

    It has several terms, each returned under its own name:

    - ``"reward"``: distance of the predicted reward from the real one.
    - ``"done"``: binary cross-entropy of the termination logits. The label is
      ``("next", "terminated")``, else ``done & ~truncated``, else ``done``: a time limit
      is not a termination. The head writes ``("next", "terminated_logits")``,
      ``("next", "continue_pred")`` (logits of going on), or a float under
      ``("next", "terminated")`` or ``("next", "done")``, which is read as logits.
    - ``"reconstruction"``: distance of the decoded from the real observation, or, with
      ``reconstruction_target="next"``, of the observation decoded from the *predicted*
      latent from the real next one.
    - ``"latent"``: distance of the predicted next latents from the encoding of the next
      observation, which carries no gradient, or from the batch's ``target_latent``.

    The model runs on a copy of its inputs: the batch is never modified.

    A recurrent model (one with a posterior, or with latents that its initial state
    supplies) is trained on sequences, ``[*B, T]``: :meth:`~torchrl_wm.WorldModel.observe`
    filters the observations into latents, beginning anew where ``is_init`` says so, and
    the terms compare the filtered latents.

    With ``multi_step=True`` any model is trained on sequences, open loop: the latents of
    the first observation are rolled through all ``T`` steps with the recorded actions, as
    in TD-MPC (arXiv 2203.04955, eq. 6), and every term compares these predictions. Step
    ``t`` counts ``decay ** t``. The comparison ends with the episode, or before the first
    step that the mask calls invalid.

    With ``return_latents=True`` the entry ``"latents"`` holds the latents of this pass,
    by default detached, so that a policy can be trained on them without a second one: ``[*B]`` or
    ``[*B, T]``, whatever the reduction, those at the root and those that follow under
    ``"next"``. With ``multi_step`` they are the rolled ones, in recurrent models the
    filtered ones. ``("collector", "mask")``, ``[*B]`` bool, is True where a step counts.

    Several processes may train it, under
    :class:`~torch.nn.parallel.DistributedDataParallel` or ``fully_shard(loss)``: a mean is then
    one over the valid samples of all of them, so that the averaged gradients are those of the
    joined batch. With ``"sum"`` they are those of the joined batch over the number of processes.

    The model is a submodule of the loss. ``loss.<name>_params`` are the parameters of a
    component or of a term's module, ``loss.target_<name>_params`` its target parameters,
    which begin anew, as a copy, if its networks are replaced.

    Args:
        world_model: the model to train.

    Keyword Args:
        losses: names of terms, or :class:`~torchrl_wm.objectives.LossTerm`
            objects. ``["reward"]`` by default.
        reward_loss, reconstruction_loss, latent_loss: the distance, ``"l2"``,
            ``"l1"``, ``"smooth_l1"``, or ``"symlog"``: l2 of the symmetric logarithms.
        done_loss: ``"bce"`` on the logits, or a distance of their sigmoid from the label.
        reward_weight, done_weight, reconstruction_weight, latent_weight: the factors of
            the terms.
        reconstruction_target: ``"observation"`` or ``"next"``.
        delay_encoder: let target parameters (``target_encoder_params``) encode the targets
            of latents. They begin as a copy; :class:`~torchrl.objectives.SoftUpdate` or
            :class:`~torchrl.objectives.HardUpdate` move them. Normalisers are always the
            encoder's own, also if they are fitted later.
        multi_step: compare open-loop predictions over whole sequences.
        decay: the weight of a step relative to the one before it, in (0, 1].
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for one number per
            sample, ``[*B]``.
        return_latents: add the latents to the output. Take them out before the losses are
            summed, ``latents = losses.pop("latents")``. Also an attribute.
        detach_latents: whether these latents are detached. Without, a loss on them trains the
            model, too, as DreamerV3's loss of values on real steps does. Also an attribute.
        slice_len: read a flat batch, ``[B * T]``, as slices of so many steps, ``[B, T]``. For
            learners that sample by themselves, such as TorchRL's on Ray; the sampler is a
            :class:`~torchrl.data.SliceSampler` of that ``slice_len`` with
            ``strict_length=True``.
        policy: the policy that acts on what is trained, such as a planner over the model. It is
            not trained here. TorchRL's learners publish its weights, in which the model is, to
            the collectors; they find it as ``loss.actor_network``.

    Raises:
        TypeError: if ``world_model`` is not a WorldModel, or the policy no module.
        ValueError: for unknown losses, distances or reductions, for a term whose component the
            model lacks, for a model with a penalty, and for a policy that has none of the trained
            parameters.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelLoss
        >>> obs_dim, latent_dim, action_dim = 8, 4, 2
        >>> encoder = TensorDictModule(
        ...     torch.nn.Linear(obs_dim, latent_dim), in_keys=["observation"], out_keys=["latent"]
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

        The loss can be called with keywords, as can all modules of the model:

        >>> loss_reward, loss_latent = loss_module(
        ...     observation=torch.randn(4, obs_dim),
        ...     action=torch.randn(4, action_dim),
        ...     next_reward=torch.randn(4, 1),
        ...     next_observation=torch.randn(4, obs_dim),
        ... )

        The latents of the same pass, for a policy:

        >>> loss_module.return_latents = True
        >>> losses = loss_module(batch)
        >>> latents = losses.pop("latents")
        >>> latents["latent"].shape, latents["next", "latent"].requires_grad
        (torch.Size([4, 4]), False)
        >>> losses.sum(reduce=True).backward()
    """

    _AcceptedKeys = LossKeys
    default_keys = LossKeys

    tensor_keys: LossKeys
    world_model: WorldModel

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
        detach_latents: bool = True,
        slice_len: int | None = None,
        policy: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(world_model, WorldModel):
            raise TypeError(
                f"world_model must be a torchrl_wm.WorldModel, got "
                f"{type(world_model).__module__}.{type(world_model).__name__}. Compose one: "
                f"WorldModel(encoder, dynamics, reward_head, ...)."
            )
        if penalty_of(world_model) is not None:
            raise ValueError(
                "The world model has a penalty (with_penalty), which is no part of the real reward "
                "and would be learned as one. Build the loss on the model itself, "
                "WorldModelLoss(without_penalty(world_model), ...): components are shared, so that "
                "training it trains both."
            )
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"Unknown reduction {reduction!r}. Valid choices are {list(REDUCTIONS)}."
            )
        if not 0 < decay <= 1 or (decay != 1 and not multi_step):
            raise ValueError(
                f"decay must be in (0, 1], and weighs the steps of multi_step=True; got "
                f"decay={decay} with multi_step={multi_step}."
            )
        if slice_len is not None and slice_len < 1:
            raise ValueError(f"slice_len={slice_len} must be at least 1.")
        named = {
            "reward": RewardTerm(reward_loss, reward_weight),
            "done": DoneTerm(done_loss, done_weight),
            "reconstruction": ReconstructionTerm(
                reconstruction_loss, reconstruction_weight, reconstruction_target
            ),
            "latent": LatentTerm(latent_loss, latent_weight),
        }
        self.terms = as_terms(["reward"] if losses is None else losses, named)
        self.losses = [term.name for term in self.terms]
        self.reduction = reduction
        self.delay_encoder = delay_encoder
        self.multi_step = multi_step
        self.decay = decay
        self.return_latents = return_latents
        self.detach_latents = detach_latents
        self.slice_len = slice_len
        self.world_model = world_model
        #: The batch of the present call, its valid samples, and the encoding of its next observations.
        self._batch: TensorDictBase | None = None
        self._valid: torch.Tensor | None = None
        self._encoded: dict[bool, TensorDictBase] = {}
        for term in self.terms:
            term.check(world_model)
        self._follow_parts()
        if policy is not None:
            self._name_policy(policy)

    def _name_policy(self, policy: nn.Module) -> None:
        """Let TorchRL's learners find the policy, which is no submodule: others train it."""
        if not isinstance(policy, nn.Module):
            raise TypeError(
                f"policy must be a module, whose weights a learner publishes, got "
                f"{type(policy).__name__}. Give a planner or an actor on the world model."
            )
        trained = {id(parameter) for parameter in self.parameters()}
        if trained.isdisjoint(map(id, policy.parameters())):
            raise ValueError(
                f"policy, {type(policy).__name__}, has none of the parameters that this loss "
                f"trains: what a learner publishes would never change. Give one that acts by the "
                f"same world model, such as CEMPlanner(WorldModelEnv(world_model, env), ...)."
            )
        self.__dict__["actor_network"] = policy

    # Services to terms ----------------------------------------------------

    def encode_next(
        self, batch: TensorDictBase, gradient: bool = False
    ) -> TensorDictBase:
        """Return the latents of the next observations, by the target encoder if there is one.

        All terms of a call share one encoding of its batch.

        Args:
            batch: the real transitions.
            gradient: whether gradients flow into the encoder.

        Raises:
            KeyError: if the batch lacks a next observation.
            ValueError: if gradients should flow into a target encoder.
        """
        if gradient and self.delay_encoder:
            raise ValueError(
                "With delay_encoder=True targets are encoded by target parameters, which get no "
                "gradient. Leave out delay_encoder, or let the term stop gradients: "
                "LatentTerm(stop_gradient=True)."
            )
        if batch is not self._batch:
            return self._encode_next(batch, gradient)
        if not gradient and True in self._encoded:
            return self._encoded[True].detach()
        if gradient not in self._encoded:
            self._encoded[gradient] = self._encode_next(batch, gradient)
        return self._encoded[gradient].copy()

    def _encode_next(self, batch: TensorDictBase, gradient: bool) -> TensorDictBase:
        """Encode the next observations."""
        encoder = self.world_model.encoder
        missing = missing_from(batch, next_observations(self.world_model))
        if missing:
            raise MissingEntryError(
                f"Targets such as that of the loss 'latent' are encodings of the next observation, "
                f"and the batch lacks {missing}; it has {leaf_keys(batch)}. Add it, or give the "
                f"target of 'latent' under {self.tensor_keys.target_latent!r}."
            )
        inputs = TensorDict({}, batch_size=batch.batch_size, device=batch.device)
        for key in unique(encoder.in_keys):
            inputs.set(key, batch.get(join("next", key)))
        delayed = self.target_parameters("encoder") if self.delay_encoder else None
        grad = nullcontext() if gradient else torch.no_grad()
        with grad, delayed or nullcontext():
            return run_components({"encoder": encoder}, inputs)

    def decode_next(self, predicted: TensorDictBase) -> TensorDictBase:
        """Return the observations that the predicted next latents stand for, at the root."""
        inputs = predicted.exclude("next").copy()
        for key in self.world_model.latent_keys:
            inputs.set(key, predicted.get(join("next", key)))
        return self.world_model.decode(inputs)

    def judge_real_next(
        self, name: str, predicted: TensorDictBase, batch: TensorDictBase
    ) -> TensorDictBase:
        """Return the real next latents, in place of predicted ones, with the outputs of a head.

        Args:
            name: the component.
            predicted: the model's predictions.
            batch: the real transitions.
        """
        if name in self.world_model.filter.transition.remembering:
            if self._pass().predicts:
                raise ValueError(
                    f"The {name} has memory, and runs where sequences are filtered: on predicted "
                    f"latents, as another loss needs predictions, and not on the real ones that "
                    f"real_next=True asks for. Leave real_next out, or give the other losses a "
                    f"WorldModelLoss of their own."
                )
            return predicted  # the filter has run it, on corrected latents
        inputs = predicted.exclude("next").copy()
        inputs.set("next", self.encode_next(batch).detach())
        return run_components({name: self.world_model.components[name]}, inputs)

    def valid(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        """Return where the batch's masks say that samples are valid, ``[*B]``; None without a mask.

        With ``multi_step``, a sequence is valid up to its first invalid sample.

        Raises:
            KeyError: if the batch lacks a mask that :meth:`set_keys` named.
        """
        if tensordict is self._batch:
            return self._valid
        return valid_samples(tensordict, self.loss_mask_key)

    # Keys ----------------------------------------------------------------

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        if "mask" in kwargs:
            default = self.tensor_keys.mask == self.default_keys().mask
            self.loss_mask_key = "auto" if default else self.tensor_keys.mask

    @property
    def in_keys(self) -> list[NestedKey]:
        """The inputs of the model and the labels."""
        labels = [
            key
            for term in self.terms
            for key in term.labels(self.world_model, self.tensor_keys)
        ]
        if self.world_model.is_recurrent:
            # The filter reads the observations that the steps led to.
            labels += next_observations(self.world_model)
        return unique([*self._pass().inputs, *labels])

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
            returned = [*self._returned_latents(), ("collector", "mask")]
            keys += [join("latents", key) for key in returned]
        return keys

    @out_keys.setter
    def out_keys(self, value) -> None:
        raise RuntimeError("out_keys follow from the losses given at construction.")

    def _returned_latents(self) -> list[NestedKey]:
        """Return the keys of the latents, at the root and below "next"."""
        latents = self.world_model.latent_keys
        return [*latents, *(join("next", key) for key in latents)]

    # Loss ----------------------------------------------------------------

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of a batch of real transitions.

        Args:
            tensordict: the transitions, ``[*B]``: observations and action at
                the root, labels under ``"next"``. It is not modified. With ``slice_len``,
                ``[B * T]`` will do for ``[B, T]``.

        Returns:
            One entry for each term, ``loss_<name>``: a scalar, or ``[*B]`` with
            ``reduction="none"``. With ``return_latents=True``, ``"latents"``, too.

        Raises:
            KeyError: if an input of the model or a label is missing.
            ValueError: if a prediction and its label differ in shape, or class numbers are
                ``[*B, 1]`` where their spec says ``[*B]``.
        """
        if self.slice_len is not None:
            tensordict = as_slices(tensordict, self.slice_len)
        size = tensordict.batch_size
        if not size.numel():
            raise ValueError(f"The batch is empty: its batch size is {tuple(size)}.")
        self._follow_parts()
        predict = self._pass()
        predict.check(tensordict)
        valid = self.valid(tensordict)
        if self.multi_step and valid is not None:
            # A prediction through an invalid step has nothing to compare with.
            valid = (~valid).cumsum(-1) == 0
        batch = tensordict if valid is None else blank(tensordict, valid)
        predicted = predict(batch, self.tensor_keys)
        self._batch, self._valid = batch, valid
        try:
            values = [self._compare(term, predicted, batch) for term in self.terms]
        finally:
            self._batch, self._valid, self._encoded = None, None, {}
        weights, decay = sample_weights(batch, self.tensor_keys), None
        if self.multi_step:
            within = first_episode(tensordict, self.tensor_keys)
            valid = within if valid is None else valid & within
            time = torch.arange(size[-1], device=tensordict.device)
            decay = (self.decay**time).expand(size)
        count = None
        if self.reduction == "mean":
            device = values[0].device
            count = counted(size, device, valid, weights, self.processes)
        losses = {}
        for term, value in zip(self.terms, values):
            if term.per_sample:
                value = value if decay is None else decay * value
                value = reduce(value, valid, weights, self.reduction, count)
            elif self.reduction == "none":
                value = reduce(value.expand(size), valid, weights, "none", None)
            elif count is not None:  # a mean over no samples is 0
                value = torch.where(count > 0, value, torch.zeros_like(value))
            losses[f"loss_{term.name}"] = term.weight * value
        out = TensorDict(losses, batch_size=size if self.reduction == "none" else ())
        if self.return_latents:
            if valid is None:
                valid = torch.ones(size, dtype=torch.bool, device=batch.device)
            latents = predicted.select(*self._returned_latents())
            latents = latents.detach() if self.detach_latents else latents
            out.set("latents", latents.set(("collector", "mask"), valid))
        if torch.compiler.is_compiling():
            # A graph cannot return objects that hold weak references.
            tensordict.clear_refs_for_compile_()
            out.clear_refs_for_compile_()
        return out

    def _pass(self) -> ModelPass:
        """Return the pass over the present components."""
        return ModelPass(
            self.world_model, self.terms, self.multi_step, self.return_latents
        )

    def _compare(
        self, term: LossTerm, predicted: TensorDictBase, batch: TensorDictBase
    ) -> torch.Tensor:
        """Return the value of a term for each sample, ``[*B]``, or for the whole batch."""
        value = term(predicted, batch, self)
        if not term.per_sample:
            if value.ndim:
                raise ValueError(
                    f"The loss {term.name!r} has per_sample=False: it must give one number for "
                    f"the whole batch, and gave {tuple(value.shape)}. Take its mean."
                )
            return value
        if value.shape != batch.batch_size:
            raise ValueError(
                f"The loss {term.name!r} must give one number per sample, of the batch's "
                f"shape {tuple(batch.batch_size)}, and gave {tuple(value.shape)}. Take the "
                f"mean over the feature dims; a term of the whole batch has per_sample=False."
            )
        return value
