"""Negative log-likelihood of Gaussian predictions: single ones, and ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, factorial, log, pi
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.blocks.gaussian import BoundedLogVar
from torchrl_wm.modules.keys import as_tuple, is_next, join, sibling, unique
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.comparisons import next_observations, read_label
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.terms import LossContext, LossTerm


class GaussianNLLTerm(LossTerm):
    """Negative log-likelihood of real entries under predicted Gaussians, in nats per dimension.

    All members of an ensemble are trained, whichever of them the dynamics propagate
    (PETS, arXiv 1805.12114, eq. 1; MBPO, arXiv 1906.08253). The target of a latent is
    the encoder's latent of the next observation, without gradient.

    Args:
        targets: the predicted entries below "next", in the order in which the
            Gaussians' dims join them; by default the component's own
            (:attr:`~torchrl_wm.modules.EnsembleDynamics.targets`), else the model's
            latents.

    Keyword Args:
        loc, log_var: the means and log-variances among the predictions,
            ``[*B, D]``, or ``[*B, E, D]`` for an ensemble.
        component: the component that writes them.
        bootstrap: let each member see its own sample of the data. Each transition
            counts 0, 1, 2, ... times for a member, Poisson distributed with mean 1,
            as in a bootstrap of many samples. The counts are a hash of the transition
            itself (the encoder's and the step's inputs, and the labels), so that they
            are the same in every epoch, whatever the replay buffer does.
        seed: the seed of the counts.
        beta: the exponent of the variance by which the likelihood is weighted, 0 to 1
            (beta-NLL, arXiv 2203.09168). With 0, the plain likelihood, rows that are
            hard to predict get a large variance, hence hardly a gradient, and stay
            badly predicted; the paper advises 0.5. The weights of a batch have mean 1
            in each dimension.
        bound_weight: the weight of the distance of learned log-variance bounds
            (:meth:`~torchrl_wm.modules.BoundedLogVar.width`).
        weight: the factor of the term.
        name: the loss appears as ``loss_<name>``.

    .. note:: A batch that has ``"member_weight"``, ``[*B, E]`` float, uses these counts
        in place of drawn ones.

    Raises:
        ValueError: at the loss's construction, if the component does not write
            means and log-variances.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelLoss
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.objectives import GaussianNLLTerm
        >>> env, small = GymEnv("Pendulum-v1"), {"hidden": (32, 32), "normalize": False}
        >>> world_model, _ = make_ensemble_world_model(env, **small)
        >>> loss = WorldModelLoss(world_model, losses=[GaussianNLLTerm(bootstrap=True)])
        >>> loss(env.rollout(20))["loss_nll"].isfinite().item()
        True
    """

    def __init__(
        self,
        targets: Sequence[NestedKey] | None = None,
        *,
        loc: NestedKey = ("next", "loc"),
        log_var: NestedKey = ("next", "log_var"),
        component: str = "dynamics",
        bootstrap: bool = False,
        seed: int = 0,
        beta: float = 0.0,
        bound_weight: float = 0.01,
        weight: float = 1.0,
        name: str = "nll",
    ) -> None:
        super().__init__(name, weight)
        self.components = (component,)
        self.component = component
        self.targets = None if targets is None else unique(targets)
        self.loc, self.log_var = unique([loc])[0], unique([log_var])[0]
        self.bootstrap, self.seed = bootstrap, seed
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must lie between 0 and 1, got {beta}.")
        self.beta, self.bound_weight = beta, bound_weight

    @classmethod
    def of_head(
        cls, component: str, target: NestedKey, **settings: Any
    ) -> GaussianNLLTerm:
        """Return the term that trains a :class:`~torchrl_wm.modules.GaussianHead`.

        Args:
            component: the component that is the head, e.g. ``"reward_head"``.
            target: the entry that it predicts, without the "next".
            settings: other arguments of the term.

        Examples:
            >>> from torchrl_wm.objectives import GaussianNLLTerm
            >>> GaussianNLLTerm.of_head("reward_head", ("agent", "reward")).loc
            ('next', 'agent', 'reward_loc')
        """
        name = as_tuple(target)[-1]
        keys = {
            part: join("next", sibling(target, f"{name}_{part}"))
            for part in ("loc", "log_var")
        }
        return cls([target], component=component, **keys, **settings)

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        written = written_keys(getattr(world_model, self.component))
        missing = [key for key in (self.loc, self.log_var) if key not in written]
        if missing:
            raise ValueError(
                f"The loss {self.name!r} needs the means and log-variances {missing}, and "
                f"{self.component} writes {written}. EnsembleDynamics and GaussianHead write "
                f"them; else name the keys: GaussianNLLTerm(loc=..., log_var=..., component=...)."
            )

    def _targets(self, world_model: WorldModel) -> list[NestedKey]:
        """Return the predicted entries, without the "next"."""
        if self.targets is not None:
            return self.targets
        own = getattr(getattr(world_model, self.component), "targets", None)
        return world_model.latent_keys if own is None else own

    def _encoded(self, world_model: WorldModel) -> list[NestedKey]:
        """Return the targets that the encoder writes."""
        encoded = written_keys(world_model.encoder)
        return [key for key in self._targets(world_model) if key in encoded]

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        encoded = self._encoded(world_model)
        given = [key for key in self._targets(world_model) if key not in encoded]
        observed = next_observations(world_model) if encoded else []
        return [*observed, *(join("next", key) for key in given)]

    def __call__(self, predicted, batch, loss):
        target = self._joined(batch, loss)  # [*B, D]
        loc, log_var = predicted.get(self.loc), predicted.get(self.log_var)
        expected = target.shape[-1]
        members = loc.ndim == target.ndim + 1 and loc.shape[-1] == expected
        if not members:
            loc, log_var = _flat(loc, batch), _flat(log_var, batch)
        if loc.shape[-1] != expected or log_var.shape != loc.shape:
            raise ValueError(
                f"The loss {self.name!r} compares {self._targets(loss.world_model)}, {expected} "
                f"numbers, with means of the shape {tuple(loc.shape)} and log-variances of the "
                f"shape {tuple(log_var.shape)}. Their last dim must be {expected}."
            )
        nll = gaussian_nll(target.unsqueeze(-2) if members else target, loc, log_var)
        if self.beta:
            weights = (self.beta * log_var.detach()).exp()
            nll = nll * weights / self._mean_of_valid(weights, batch, loss)
        value = nll.mean(-1)  # [*B, E] or [*B]
        if members:
            value = (value * self._member_weights(loc, batch, loss)).mean(-1)
        value = value.to(loc.dtype)
        if self.bound_weight:
            component = getattr(loss.world_model, self.component)
            for module in component.modules():
                if isinstance(module, BoundedLogVar):
                    value = value + self.bound_weight * module.width()
        return value

    def _mean_of_valid(
        self, weights: torch.Tensor, batch: TensorDictBase, loss: LossContext
    ) -> torch.Tensor:
        """Return the mean of each dimension, ``[D]``, over members and all rows but padding."""
        rows, valid = weights.flatten(0, -2), loss.valid(batch)
        if valid is None and not loss.processes.groups:
            return rows.mean(0)
        lead = weights.shape[:-1]
        counts = torch.ones(lead, dtype=weights.dtype, device=weights.device)
        if valid is not None:
            counts = counts * valid.reshape(
                valid.shape + (1,) * (len(lead) - valid.ndim)
            )
        counts = counts.reshape(-1, 1)
        total = loss.processes.average(counts.sum())
        # A batch with nothing valid is masked as a whole: any mean but zero will do.
        none = (total == 0).to(weights.dtype)
        return (loss.processes.average((rows * counts).sum(0)) + none) / (total + none)

    def _joined(self, batch: TensorDictBase, loss: LossContext) -> torch.Tensor:
        """Return the real entries side by side, ``[*B, D]``."""
        parts = []
        encoded = self._encoded(loss.world_model)
        latents = loss.encode_next(batch) if encoded else None
        for key in self._targets(loss.world_model):
            if key in encoded:
                value = latents.get(key).detach()
            else:
                value = read_label(batch, join("next", key), self.name)
            parts.append(_flat(value, batch))
        return torch.cat(parts, -1)

    def _transitions(self, batch: TensorDictBase, loss: LossContext) -> torch.Tensor:
        """Return the inputs and labels of the batch, which identify transitions: ``[*B, D]``.

        The encoded target does not: it changes with the encoder, and is the same for
        all states that lead to one.
        """
        world_model = loss.world_model
        inputs = unique([*world_model.encoder.in_keys, *world_model.step_in_keys])
        roots = [key for key in inputs if not is_next(key)]
        keys = [*roots, *self.labels(world_model, loss.tensor_keys)]
        values = [batch.get(key, None) for key in keys]
        rows = [_flat(value, batch).float() for value in values if value is not None]
        return torch.cat(rows, -1)

    def _member_weights(
        self, loc: torch.Tensor, batch: TensorDictBase, loss: LossContext
    ) -> torch.Tensor | float:
        """Return the weights of samples for members, ``[*B, E]``."""
        members = loc.shape[-2]
        given = batch.get("member_weight", None)
        if given is not None:
            expected = (*batch.batch_size, members)
            if tuple(given.shape) != expected:
                raise ValueError(
                    f"'member_weight' has the shape {tuple(given.shape)}; one weight for each "
                    f"sample and member is expected, {expected}."
                )
            return given
        if not self.bootstrap:
            return 1.0
        return self.member_counts(batch, loss, members).to(loc.dtype)

    def member_counts(
        self, batch: TensorDictBase, loss: LossContext, members: int
    ) -> torch.Tensor:
        """Return how often each transition counts for each member, ``[*B, E]`` int64.

        A batch that has them as floats under ``"member_weight"`` saves computing them.

        Args:
            batch: the transitions.
            loss: the loss that the term is part of.
            members: ``E``.
        """
        return bootstrap_counts(self._transitions(batch, loss), members, self.seed)


def gaussian_nll(
    value: torch.Tensor, loc: torch.Tensor, log_var: torch.Tensor
) -> torch.Tensor:
    """Return ``-log N(value; loc, exp(log_var))``, elementwise, in nats.

    Examples:
        >>> import torch
        >>> from torchrl_wm.objectives import gaussian_nll
        >>> gaussian_nll(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0))
        tensor(0.9189)
    """
    return 0.5 * ((value - loc).pow(2) * (-log_var).exp() + log_var + log(2 * pi))


def bootstrap_counts(rows: torch.Tensor, members: int, seed: int = 0) -> torch.Tensor:
    """Return how often each row counts for each member: Poisson(1) numbers, a hash of the row.

    Args:
        rows: ``[*B, D]`` float.
        members: ``E``.
        seed: the seed of the hash.

    Returns:
        ``[*B, E]`` int64.

    Examples:
        >>> import torch
        >>> from torchrl_wm.objectives import bootstrap_counts
        >>> rows = torch.randn(1000, 3)
        >>> counts = bootstrap_counts(rows, 5)
        >>> bool((counts[10:20] == bootstrap_counts(rows[10:20], 5)).all())
        True
        >>> bool((counts.float().mean(0) - 1).abs().max() < 0.2)
        True
    """
    bits = (rows.detach().float() + 0.0).contiguous().view(torch.int32).long()
    place = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    row = _mixed(_mixed(bits + place * _GOLDEN).sum(-1) + seed)  # [*B]
    member = torch.arange(1, members + 1, device=rows.device) * _GOLDEN
    mixed = _mixed(row.unsqueeze(-1) + member)  # [*B, E]
    uniform = (mixed & (2**53 - 1)).double() / 2**53
    counts = torch.zeros_like(mixed)
    cumulative = 0.0
    for count in range(10):
        cumulative += exp(-1) / factorial(count)
        counts = counts + (uniform >= cumulative)
    return counts


def _flat(value: torch.Tensor, batch: TensorDictBase) -> torch.Tensor:
    """Return ``[*B, *feature]`` as ``[*B, n]``."""
    return value.reshape(*batch.batch_size, -1)


#: 2**64 over the golden ratio, as a signed number; its multiples are spread evenly.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mixed(value: torch.Tensor) -> torch.Tensor:
    """Return integers mixed by the finaliser of SplitMix64: every bit depends on every bit."""
    for shift, factor in (
        (30, 0xBF58476D1CE4E5B9 - 2**64),
        (27, 0x94D049BB133111EB - 2**64),
    ):
        value = (value ^ _shifted(value, shift)) * factor
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a shift to the right that brings in zeros; int64's own brings in the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
