"""The terms of the world model loss: small objects of one shape.

A term says which components it trains, which labels it reads, and turns the
model's predictions and the labels into one number per sample.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import symlog
from torchrl.objectives.utils import distance_loss

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    is_next,
    join,
    leaf_keys,
    sibling,
    strip_next,
    unique,
)
from torchrl_wm.modules.world_model.wiring import written_keys

if TYPE_CHECKING:
    from torchrl_wm.objectives.world_model_loss import WorldModelLoss

#: Gives the unit in which an entry is compared, by its key.
Scale = Callable[[NestedKey], "torch.Tensor | float"]
DISTANCES = ("l2", "l1", "smooth_l1", "symlog")
#: What a done head writes that is read as logits where it is a float.
_LOGITS = ("terminated_logits", "continue_pred", "terminated", "done")


class LossTerm(abc.ABC):
    """One term of :class:`~torchrl_wm.WorldModelLoss`.

    Args:
        name: the loss appears as ``loss_<name>``.
        weight: what it is multiplied with.

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

    #: The heads whose outputs the term reads; they are run only if some term needs them.
    components: tuple[str, ...] = ()
    #: Those of its own :meth:`modules` that have target parameters, too.
    delayed: tuple[str, ...] = ()

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight

    def modules(self) -> dict[str, nn.Module]:
        """Modules beside the world model's components that the term trains, by name.

        The loss holds their parameters as ``<name>_params``, and, for names in
        ``delayed``, as ``target_<name>_params``.
        """
        return {}

    def check(self, world_model: WorldModel) -> None:
        """Refuse, at the loss's construction, a model that lacks a component.

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
    def labels(self, world_model: WorldModel, keys) -> list[NestedKey]:
        """The entries of the batch that the term reads, beside the model's inputs.

        Args:
            world_model: the model that is trained.
            keys: the loss's ``tensor_keys``.
        """

    @abc.abstractmethod
    def __call__(
        self, predicted: TensorDictBase, batch: TensorDictBase, loss: WorldModelLoss
    ) -> torch.Tensor:
        """The loss of each sample.

        Args:
            predicted: what the model made of the batch, ``[*B]``: latents at
                the root, predictions under ``"next"``.
            batch: the real transitions, ``[*B]``.
            loss: the loss module, for its ``tensor_keys``, ``encode_next`` and
                ``decode_next``.

        Returns:
            ``[*B]`` float: the mean over feature dims.
        """


def label_key(keys: Any, name: str) -> NestedKey:
    """Where the label ``name`` stands in the batch: under ``true_<name>``, if that was set."""
    own = getattr(keys, f"true_{name}")
    return getattr(keys, name) if own == f"true_{name}" else own


class RewardTerm(LossTerm):
    """Distance of the predicted reward from the real one.

    Args:
        distance: ``"l2"``, ``"l1"``, ``"smooth_l1"`` or ``"symlog"``.
        weight: what the term is multiplied with.
        key: the reward, below "next"; by default the loss's ``reward`` key. With
            several rewards give one term for each:
            ``losses=[RewardTerm(key=("red", "reward"), name="red"), ...]``.
        name: the loss appears as ``loss_<name>``.
        scale: see :class:`ReconstructionTerm`.
    """

    components = ("reward_head",)

    def __init__(
        self,
        distance: str = "l2",
        weight: float = 1.0,
        key: NestedKey | None = None,
        name: str = "reward",
        scale: Scale | None = None,
    ) -> None:
        super().__init__(name, weight)
        self.distance = check_distance("reward_loss", distance, DISTANCES)
        self.key = key
        self.scale = scale

    def labels(self, world_model: WorldModel, keys) -> list[NestedKey]:
        return [join("next", self.key or label_key(keys, "reward"))]

    def __call__(self, predicted, batch, loss):
        keys = loss.tensor_keys
        key = join("next", self.key or keys.reward)
        reward = prediction(predicted, key, "reward_head", loss)
        label = None
        if self.key is None:
            label = batch.get(join("next", keys.true_reward), None)
        if label is None:
            label = read_label(batch, key, self.name)
        reward, label = _in_units(self.scale, key, reward, label)
        return distance(reward, label, self.distance, key, batch)


class DoneTerm(LossTerm):
    """Binary cross-entropy of the termination head's logits, or a distance of its probability.

    The label is ``terminated``; without one, ``done & ~truncated``; without
    that, ``done``. A time limit is not a termination.

    Args:
        distance: ``"bce"`` on the logits, or a distance of their sigmoid.
        weight: what the term is multiplied with.
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

    def labels(self, world_model: WorldModel, keys) -> list[NestedKey]:
        labels = [join("next", label_key(keys, n)) for n in ("terminated", "done")]
        if self.real_next:
            observed = unique(world_model.encoder.in_keys)
            labels += [join("next", key) for key in observed]
        return labels

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
        _same_shape(logits, label, key)
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
    def prediction_key(loss: WorldModelLoss) -> tuple[NestedKey, bool]:
        """What the head writes, and whether it is the logit of going on."""
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
    def label(batch: TensorDictBase, loss: WorldModelLoss) -> torch.Tensor:
        """Whether the real episodes terminated, ``[*B, 1]``."""
        keys = loss.tensor_keys
        for key in (keys.true_terminated, keys.terminated):
            terminated = batch.get(join("next", key), None)
            if terminated is not None:
                return terminated
        done = batch.get(join("next", keys.true_done), None)
        if done is None:
            done = batch.get(join("next", keys.done), None)
        if done is None:
            raise missing_label(
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
        weight: what the term is multiplied with.
        target: ``"observation"`` decodes the encoded latents and compares with
            the observation they came from; ``"next"`` decodes the *predicted*
            latents and compares with the next observation, and so trains the
            dynamics, too.
        scale: gives, for a key without its "next", what prediction and label are
            divided by first, such as a fitted standard deviation: then features
            of all sizes count alike.
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

    def pairs(self, world_model: WorldModel, keys) -> list[tuple[NestedKey, NestedKey]]:
        """What the decoder writes, each with the observation it stands for."""
        written = written_keys(world_model.decoder)
        by_name = {strip_next(key): key for key in written}
        if keys.reconstructed_observation in by_name:
            return [(by_name[keys.reconstructed_observation], keys.observation)]
        if len(written) == 1 and keys.observation not in by_name:
            if strip_next(written[0]) not in unique(world_model.encoder.in_keys):
                return [(written[0], keys.observation)]
        return [(key, strip_next(key)) for key in written]

    def _of_next(self, key: NestedKey) -> bool:
        # A decoder that writes below "next" says by itself what it decodes.
        return self.target == "next" or is_next(key)

    def labels(self, world_model: WorldModel, keys) -> list[NestedKey]:
        return [
            join("next", observation) if self._of_next(key) else observation
            for key, observation in self.pairs(world_model, keys)
        ]

    def __call__(self, predicted, batch, loss):
        total = 0.0
        decoded_next = None
        for key, observation in self.pairs(loss.world_model, loss.tensor_keys):
            if not self._of_next(key):
                decoded, label_key = predicted.get(key), observation
            else:
                label_key = join("next", observation)
                if is_next(key):
                    decoded = predicted.get(key)
                else:
                    if decoded_next is None:
                        decoded_next = loss.decode_next(predicted)
                    decoded = decoded_next.get(key)
            label = read_label(batch, label_key, self.name)
            total = total + self.compare(decoded, label, label_key, batch)
        return total

    def compare(self, predicted, target, key, batch) -> torch.Tensor:
        """How far a decoded observation is from the real one, ``[*B]``."""
        predicted, target = _in_units(self.scale, key, predicted, target)
        return distance(predicted, target, self.distance, key, batch)


class LatentTerm(LossTerm):
    """Distance of the predicted next latents from those of the next observation.

    The target is the encoder's (or, with ``delay_encoder``, the target
    encoder's) latent of the next observation, without gradient. A batch that
    has ``target_latent`` uses that.
    """

    def __init__(self, distance: str = "l2", weight: float = 1.0) -> None:
        super().__init__("latent", weight)
        self.distance = check_distance("latent_loss", distance, DISTANCES)

    def labels(self, world_model: WorldModel, keys) -> list[NestedKey]:
        return [join("next", key) for key in unique(world_model.encoder.in_keys)]

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
                    f"{keys.predicted_latent!r}. Say which latent it is the target of: "
                    f"loss.set_keys(predicted_latent=('next', ...))."
                )
            return self.compare(value, target.detach(), name, batch)
        latents = loss.world_model.latent_keys
        targets = loss.encode_next(batch)
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
            total = total + self.compare(
                predicted.get(name), targets.get(key).detach(), name, batch
            )
        return total

    def compare(self, predicted, target, key, batch) -> torch.Tensor:
        """How far a predicted latent is from its target, ``[*B]``."""
        return distance(predicted, target, self.distance, key, batch)


def _ends_in_sigmoid(module: nn.Module, key: NestedKey) -> bool:
    """Whether what ``module`` writes under ``key`` comes out of an ``nn.Sigmoid``."""
    if isinstance(module, TensorDictSequential):
        writers = [m for m in module.module.children() if key in written_keys(m)]
        return bool(writers) and _ends_in_sigmoid(writers[-1], key)
    if isinstance(module, TensorDictModule):
        return _ends_in_sigmoid(module.module, key)
    if isinstance(module, nn.Sequential) and len(module):
        return _ends_in_sigmoid(module[-1], key)
    return isinstance(module, nn.Sigmoid)


# What the terms share ------------------------------------------------------


def check_distance(argument: str, value: str, known: tuple[str, ...]) -> str:
    """Refuse an unknown distance where it is given, not at the first batch."""
    if value not in known:
        raise ValueError(
            f"Unknown {argument}={value!r}. Valid choices are {list(known)}."
        )
    return value


def distance(
    value: torch.Tensor,
    label: torch.Tensor,
    name: str,
    key: NestedKey,
    batch: TensorDictBase,
) -> torch.Tensor:
    """The distance per sample, ``[*B]``; shapes must be equal, nothing is broadcast.

    ``"symlog"`` is the squared distance of the symmetric logarithms (arXiv 2301.04104, eq. 10).
    """
    _same_shape(value, label, key)
    # Not in the lower precision of the two, where both could round to the same.
    dtype = torch.promote_types(value.dtype, label.dtype)
    value, label = value.to(dtype), label.to(dtype)
    if name == "symlog":  # squares of large numbers would drown the small ones
        value, label, name = symlog(value), symlog(label), "l2"
    loss = distance_loss(value, label, name)
    return per_sample(loss, batch)


def _in_units(
    scale: Scale | None, key: NestedKey, value: torch.Tensor, label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and label divided by the scale of their entry."""
    if scale is None:
        return value, label
    _same_shape(value, label, key)
    unit = scale(strip_next(key))
    return value / unit, label / unit


def read_label(batch: TensorDictBase, key: NestedKey, term: str) -> torch.Tensor:
    """An entry of the batch, or an error that says which loss needs it."""
    value = batch.get(key, None)
    if value is None:
        raise missing_label(batch, key, term)
    return value


def missing_label(
    batch: TensorDictBase, key: NestedKey, term: str, also: NestedKey | None = None
) -> MissingEntryError:
    """The error for a label that is not in the batch."""
    alternative = "" if also is None else f" (nor {also!r})"
    return MissingEntryError(
        f"The loss {term!r} needs the label {key!r}{alternative}, and the batch has {leaf_keys(batch)}. Add "
        f"it to the batch, name it with loss.set_keys(...), or leave {term!r} out of losses."
    )


def prediction(
    predicted: TensorDictBase, key: NestedKey, component: str, loss: WorldModelLoss
) -> torch.Tensor:
    """What ``component`` predicted under ``key``, or an error that says what it writes."""
    value = predicted.get(key, None)
    if value is None:
        written = written_keys(getattr(loss.world_model, component))
        raise MissingEntryError(
            f"{component} writes {written}, not {key!r}. Change its out_key to {key!r}, or, for "
            f"another key below 'next', call loss.set_keys({as_tuple(key)[-1]}=<that key>, "
            f"true_{as_tuple(key)[-1]}={strip_next(key)!r})."
        )
    return value


def _same_shape(value: torch.Tensor, label: torch.Tensor, key: NestedKey) -> None:
    if value.shape != label.shape:
        raise ValueError(
            f"The prediction {key!r} has the shape {tuple(value.shape)}, its label "
            f"{tuple(label.shape)}. They must be equal; nothing is broadcast."
        )


def per_sample(loss: torch.Tensor, batch: TensorDictBase) -> torch.Tensor:
    """``[*B, *feature]`` as ``[*B]``, by the mean over the feature dims."""
    dims = batch.batch_dims
    return loss if loss.ndim == dims else loss.flatten(dims).mean(-1)
