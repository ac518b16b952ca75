"""The terms of the world model loss: small objects of one shape.

A term names the components that it trains and the labels that it reads, and turns
predictions and labels into one number per sample.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, is_next, join, sibling, strip_next, unique
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.comparisons import (
    check_distance,
    check_shapes,
    distance,
    DISTANCES,
    next_observations,
    per_sample,
    prediction,
    read_label,
    reward_label,
    Scale,
)
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.processes import Processes

#: The entries of a done head that are read as logits if they are floats.
_LOGITS = ("terminated_logits", "continue_pred", "terminated", "done")


class LossContext(Protocol):
    """The loss as its terms see it.

    Attributes:
        world_model: the model that is trained.
        tensor_keys: the keys that :meth:`WorldModelLoss.set_keys` changes.
        processes: those that train the loss together. A statistic of the batch is one of all
            their batches: ``loss.processes.average(x.sum()) / loss.processes.average(count)``.
    """

    world_model: WorldModel
    tensor_keys: LossKeys
    processes: Processes

    def encode_next(
        self, batch: TensorDictBase, gradient: bool = False
    ) -> TensorDictBase:
        """Return the latents of the next observations, by the target encoder if there is one."""

    def decode_next(self, predicted: TensorDictBase) -> TensorDictBase:
        """Return the observations that the predicted next latents stand for."""

    def judge_real_next(
        self, name: str, predicted: TensorDictBase, batch: TensorDictBase
    ) -> TensorDictBase:
        """Return the outputs of a head on the real next latents."""

    def target_parameters(self, name: str) -> AbstractContextManager[None]:
        """Let a module use its target parameters for a while."""

    def valid(self, batch: TensorDictBase) -> torch.Tensor | None:
        """Return where samples are valid, ``[*B]``; None without a mask."""


class LossTerm(abc.ABC):
    """One term of :class:`~torchrl_wm.WorldModelLoss`.

    Args:
        name: the loss appears as ``loss_<name>``.
        weight: the factor of the term.

    To add a term of your own, subclass this and hand an instance to the loss:
    ``WorldModelLoss(world_model, losses=["reward", MyTerm()])``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelLoss
        >>> from torchrl_wm.objectives import LossTerm
        >>> class LatentSize(LossTerm):
        ...     def labels(self, world_model, keys):
        ...         return []  # nothing is read from the batch
        ...     def __call__(self, predicted, batch, loss):
        ...         return predicted["next", "latent"].pow(2).mean(-1)
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[8]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ... )
        >>> loss = WorldModelLoss(world_model, losses=["reward", LatentSize("size", 0.1)])
        >>> loss.out_keys
        ['loss_reward', 'loss_size']
    """

    #: The heads whose outputs the term reads. A head that no term reads is not run.
    components: tuple[str, ...] = ()
    #: Whether the term reads predictions. If no term does, the loss only encodes, and
    #: ``predicted`` has the latents of the observations: a denoising loss runs no sampler.
    needs_prediction: bool = True
    #: Whether the term gives one number per sample, ``[*B]``, or one for the whole batch, such as
    #: a statistic over it (VICReg, SIGReg). The latter counts once in a mean and in a sum, stands
    #: at each sample without a reduction, and leaves out masked samples itself
    #: (:meth:`LossContext.valid`).
    per_sample: bool = True
    #: The names of modules, among its own :meth:`modules`, that have target parameters.
    delayed: tuple[str, ...] = ()

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules, beside the model's components, that the term trains, by name.

        The loss registers them. It gives their parameters as ``<name>_params``, and,
        for names in ``delayed``, their target parameters as ``target_<name>_params``.
        """
        return {}

    def check(self, world_model: WorldModel) -> None:
        """Check, at the loss's construction, that the model has what the term needs.

        Raises:
            ValueError: naming the component and how to give it.
        """
        for component in self.components:
            if component not in world_model.component_names:
                raise ValueError(
                    f"The loss {self.name!r} names the component {component!r}; a world model "
                    f"has {list(world_model.component_names)}."
                )
            if getattr(world_model, component) is None:
                raise ValueError(
                    f"The loss {self.name!r} trains the {component}, and the world model has "
                    f"none. Pass one, WorldModel(..., {component}=TensorDictModule(...)), or "
                    f"leave {self.name!r} out of losses."
                )

    @abc.abstractmethod
    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        """Return the entries of the batch that the term reads, beside the model's inputs.

        Args:
            world_model: the model that is trained.
            keys: the loss's ``tensor_keys``.
        """

    @abc.abstractmethod
    def __call__(
        self, predicted: TensorDictBase, batch: TensorDictBase, loss: LossContext
    ) -> torch.Tensor:
        """Return the loss of each sample.

        Args:
            predicted: the model's predictions, ``[*B]``: latents at the root, what
                follows under ``"next"``.
            batch: the real transitions, ``[*B]``.
            loss: the loss module that the term is part of.

        Returns:
            ``[*B]`` float: the mean over feature dims.
        """


class RewardTerm(LossTerm):
    """Distance of the predicted reward from the real one.

    Args:
        distance: ``"l2"``, ``"l1"``, ``"smooth_l1"`` or ``"symlog"``.
        weight: the factor of the term.
        key: the reward, below "next"; by default the loss's ``reward`` key. With
            several rewards give one term for each:
            ``losses=[RewardTerm(key=("red", "reward"), name="red"), ...]``.
        name: the loss appears as ``loss_<name>``.
        scale: see :class:`ReconstructionTerm`.
        real_next: see :class:`DoneTerm`.
    """

    components = ("reward_head",)

    def __init__(
        self,
        distance: str = "l2",
        weight: float = 1.0,
        key: NestedKey | None = None,
        name: str = "reward",
        scale: Scale | None = None,
        real_next: bool = False,
    ) -> None:
        super().__init__(name, weight)
        self.distance = check_distance("reward_loss", distance, DISTANCES)
        self.key = key
        self.scale = scale
        self.real_next = real_next
        self.needs_prediction = not real_next

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        label = keys.label_key("reward") if not self.key else join("next", self.key)
        return [label, *(next_observations(world_model) if self.real_next else ())]

    def __call__(self, predicted, batch, loss):
        keys = loss.tensor_keys
        if self.real_next:
            predicted = loss.judge_real_next("reward_head", predicted, batch)
        key = join("next", self.key or keys.reward)
        reward = prediction(predicted, key, "reward_head", loss.world_model)
        label = reward_label(batch, keys, self.name, self.key)
        return distance(reward, label, self.distance, key, batch, self.scale)


class DoneTerm(LossTerm):
    """Binary cross-entropy of the termination head's logits, or a distance of its probability.

    The label is ``terminated``; without one, ``done & ~truncated``; without
    that, ``done``. A time limit is not a termination.

    Args:
        distance: ``"bce"`` on the logits, or a distance of their sigmoid.
        weight: the factor of the term.
        real_next: let the head judge the latents that the encoder makes of the
            *real* next observation, in place of the predicted ones. The head then
            learns from the first batch on, and the dynamics learn nothing from
            it; for models whose latents are observations.
    """

    components = ("done_head",)

    def __init__(
        self, distance: str = "bce", weight: float = 1.0, real_next: bool = False
    ) -> None:
        super().__init__("done", weight)
        self.distance = check_distance("done_loss", distance, ("bce", *DISTANCES))
        self.real_next = real_next
        self.needs_prediction = not real_next

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        labels = [keys.label_key(name) for name in ("terminated", "done")]
        return labels + next_observations(world_model) if self.real_next else labels

    def __call__(self, predicted, batch, loss):
        key, goes_on = self.prediction_key(loss)
        if self.real_next:
            predicted = loss.judge_real_next("done_head", predicted, batch)
        logits = predicted.get(key)
        if not logits.is_floating_point():
            raise TypeError(
                f"done_head writes {key!r} as {logits.dtype}, which has no gradient. Let it "
                f"write logits under {join('next', sibling(strip_next(key), 'terminated_logits'))!r}"
                f": the loss trains them, and WorldModelEnv derives the bools."
            )
        label = self.label(batch, loss).to(logits.dtype)
        if goes_on:
            label = 1 - label
        if self.distance != "bce":
            return distance(logits.sigmoid(), label, self.distance, key, batch)
        check_shapes(logits, label, key)
        loss_value = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
        return per_sample(loss_value, batch)

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        head = world_model.done_head
        for key in written_keys(head):
            if as_tuple(key)[-1] in _LOGITS and _ends_in_sigmoid(head, key):
                warnings.warn(
                    f"done_head writes {key!r} and ends in a Sigmoid, but the loss 'done' reads "
                    f"a float output as logits, whatever done_loss is: take the Sigmoid off.",
                    stacklevel=3,
                )

    @staticmethod
    def prediction_key(loss: LossContext) -> tuple[NestedKey, bool]:
        """Return the key that the head writes, and whether it is the logit of going on."""
        keys = loss.tensor_keys
        written = written_keys(loss.world_model.done_head)
        candidates = (
            (sibling(keys.terminated, "terminated_logits"), False),
            (sibling(keys.terminated, "continue_pred"), True),
            (keys.terminated, False),
            (keys.done, False),
        )
        for key, goes_on in candidates:
            if join("next", key) in written:
                return join("next", key), goes_on
        raise MissingEntryError(
            f"The loss 'done' finds no prediction of done_head, which writes {written}. It looks "
            f"for {[join('next', key) for key, _ in candidates]}. Change the head's out_key to "
            f"{join('next', candidates[0][0])!r}, which WorldModelEnv understands, too."
        )

    @staticmethod
    def label(batch: TensorDictBase, loss: LossContext) -> torch.Tensor:
        """Return whether the real episodes terminated, ``[*B, 1]``."""
        keys = loss.tensor_keys
        terminated = keys.find_label(batch, "terminated")
        if terminated is not None:
            return terminated
        done = keys.find_label(batch, "done")
        if done is None:
            done = read_label(
                batch,
                join("next", keys.terminated),
                "done",
                also=join("next", keys.done),
            )
        truncated = batch.get(join("next", sibling(keys.done, "truncated")), None)
        return done if truncated is None else done.bool() & ~truncated.bool()


class ReconstructionTerm(LossTerm):
    """Distance of the decoded observations from the real ones.

    Args:
        distance: ``"l2"``, ``"l1"``, ``"smooth_l1"`` or ``"symlog"``.
        weight: the factor of the term.
        target: ``"observation"`` decodes the encoded latents and compares with
            the observation they came from; ``"next"`` decodes the *predicted*
            latents and compares with the next observation, and so trains the
            dynamics, too.
        scale: gives, for a key without its "next", the divisor of prediction and
            label, such as a fitted standard deviation: then features of all sizes
            count alike.
    """

    components = ("decoder",)

    def __init__(
        self,
        distance: str = "l2",
        weight: float = 1.0,
        target: str = "observation",
        scale: Scale | None = None,
    ) -> None:
        super().__init__("reconstruction", weight)
        self.scale = scale
        self.distance = check_distance("reconstruction_loss", distance, DISTANCES)
        if target not in ("observation", "next"):
            raise ValueError(
                f"reconstruction_target must be 'observation' or 'next', got {target!r}."
            )
        self.target = target

    def pairs(
        self, world_model: WorldModel, keys: LossKeys
    ) -> list[tuple[NestedKey, NestedKey]]:
        """Return the keys that the decoder writes, each with the observation it stands for."""
        written = written_keys(world_model.decoder)
        by_name = {strip_next(key): key for key in written}
        if keys.reconstructed_observation in by_name:
            return [(by_name[keys.reconstructed_observation], keys.observation)]
        if len(written) == 1 and keys.observation not in by_name:
            if strip_next(written[0]) not in unique(world_model.encoder.in_keys):
                return [(written[0], keys.observation)]
        return [(key, strip_next(key)) for key in written]

    def _of_next(self, key: NestedKey) -> bool:
        # A decoder that writes below "next" decodes the next observation in any case.
        return self.target == "next" or is_next(key)

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        return [
            join("next", observation) if self._of_next(key) else observation
            for key, observation in self.pairs(world_model, keys)
        ]

    def __call__(self, predicted, batch, loss):
        total, decoded_next = 0.0, None
        for key, observation in self.pairs(loss.world_model, loss.tensor_keys):
            place, decoded = observation, predicted
            if self._of_next(key):
                place = join("next", observation)
                if not is_next(key):
                    if decoded_next is None:
                        decoded_next = loss.decode_next(predicted)
                    decoded = decoded_next
            label = read_label(batch, place, self.name)
            total = total + self.compare(decoded.get(key), label, place, batch)
        return total

    def compare(self, predicted, target, key, batch) -> torch.Tensor:
        """Return how far a decoded observation is from the real one, ``[*B]``."""
        return distance(predicted, target, self.distance, key, batch, self.scale)


class LatentTerm(LossTerm):
    """Distance of the predicted next latents from those of the next observation.

    The target is the encoder's (or, with ``delay_encoder``, the target
    encoder's) latent of the next observation, by default without gradient. A batch that
    has ``target_latent`` uses that, without gradient.

    Args:
        distance: the distance.
        weight: the factor of the term.
        stop_gradient: whether no gradient flows into the targets. Joint-embedding models that
            keep their latents from collapsing by another term (VICReg, LeJEPA's SIGReg, arXiv
            2511.08544) train both sides, ``stop_gradient=False``.
    """

    def __init__(
        self, distance: str = "l2", weight: float = 1.0, stop_gradient: bool = True
    ) -> None:
        super().__init__("latent", weight)
        self.distance = check_distance("latent_loss", distance, DISTANCES)
        self.stop_gradient = stop_gradient

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        return next_observations(world_model)

    def __call__(self, predicted, batch, loss):
        keys = loss.tensor_keys
        target = batch.get(keys.target_latent, None)
        if target is not None:
            value = predicted.get(keys.predicted_latent, None)
            name = keys.predicted_latent
            if value is None and len(loss.world_model.latent_keys) == 1:
                name = join("next", loss.world_model.latent_keys[0])
                value = predicted.get(name)
            if value is None:
                raise MissingEntryError(
                    f"The batch has {keys.target_latent!r}, but the world model does not write "
                    f"{keys.predicted_latent!r}. Name the latent that it is the target of: "
                    f"loss.set_keys(predicted_latent=('next', ...))."
                )
            return self.compare(value, target.detach(), name, batch)
        latents = loss.world_model.latent_keys
        targets = loss.encode_next(batch, gradient=not self.stop_gradient)
        compared = [key for key in latents if targets.get(key, None) is not None]
        if not compared:
            raise MissingEntryError(
                f"The loss 'latent' has nothing to compare: of the world model's latents "
                f"{latents} the encoder writes none. Give the targets in the batch under "
                f"{keys.target_latent!r}."
            )
        total = 0.0
        for key in compared:
            name = join("next", key)
            target = targets.get(key)
            target = target.detach() if self.stop_gradient else target
            total = total + self.compare(predicted.get(name), target, name, batch)
        return total

    def compare(self, predicted, target, key, batch) -> torch.Tensor:
        """Return how far a predicted latent is from its target, ``[*B]``."""
        return distance(predicted, target, self.distance, key, batch)


def as_terms(
    losses: str | LossTerm | Sequence[str | LossTerm], named: dict[str, LossTerm]
) -> list[LossTerm]:
    """Return terms for names and terms; raise an error for unknown or repeated names."""
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


def _ends_in_sigmoid(module: nn.Module, key: NestedKey) -> bool:
    """Return whether the entry ``key`` of ``module`` comes out of an ``nn.Sigmoid``."""
    if isinstance(module, TensorDictSequential):
        writers = [m for m in module.module.children() if key in written_keys(m)]
        return bool(writers) and _ends_in_sigmoid(writers[-1], key)
    if isinstance(module, TensorDictModule):
        return _ends_in_sigmoid(module.module, key)
    if isinstance(module, nn.Sequential) and len(module):
        return _ends_in_sigmoid(module[-1], key)
    return isinstance(module, nn.Sigmoid)
