"""The term that brings an RSSM's prior and posterior together."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch.distributions import kl_divergence, Normal

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, leaf_keys, suffixed
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.terms import LossTerm


class KLTerm(LossTerm):
    """KL divergence of a recurrent model's posterior from its prior, in nats.

    With balancing it is two terms of equal value,

    ``dynamics * max(free, KL(sg(posterior) | prior))
    + representation * max(free, KL(posterior | sg(prior)))``,

    where ``sg`` stops the gradient: the first trains the prior, the second the
    posterior. Without balancing it is ``max(free, KL(posterior | prior))``. The
    KL is summed over the state's dims, and the free nats are those of one step.

    ==========  ==============  ===========  ======
    as in       balance         free nats    unimix
    ==========  ==============  ===========  ======
    PlaNet      None            3            (Gaussian), arXiv 1811.04551
    DreamerV2   (0.8, 0.2)      0            0, arXiv 2010.02193, algorithm 2
    DreamerV3   (1.0, 0.1)      1            0.01, arXiv 2301.04104, eq. 5
    ==========  ==============  ===========  ======

    The distributions follow from the entries that the model writes below "next":
    Gaussian with ``prior_mean`` and ``prior_std`` (``[*B, S]``), categorical with
    ``prior_logits`` (``[*B, categoricals, classes]``), and likewise for the posterior.

    Args:
        weight: the factor of the term.
        balance: the weights of dynamics and representation, or None.
        free_nats: the KL below which there is no gradient.
        unimix: the share of the uniform distribution that is mixed into both
            categorical distributions, as TorchRL's RSSM-V3 does when it samples.
        prior: the prefix of the prior's keys, below "next".
        posterior: the prefix of the posterior's keys.
        name: the loss appears as ``loss_<name>``.

    Raises:
        ValueError: if ``balance``, ``free_nats`` or ``unimix`` make no sense.
    """

    components = ("posterior",)

    def __init__(
        self,
        weight: float = 1.0,
        *,
        balance: tuple[float, float] | None = (1.0, 0.1),
        free_nats: float = 1.0,
        unimix: float = 0.0,
        prior: NestedKey = "prior",
        posterior: NestedKey = "posterior",
        name: str = "kl",
    ) -> None:
        super().__init__(name, weight)
        if balance is not None and (len(balance) != 2 or min(balance) < 0):
            raise ValueError(
                f"balance must be two weights, of dynamics and representation, or None, got "
                f"{balance!r}."
            )
        if free_nats < 0 or not 0 <= unimix < 1:
            raise ValueError(
                f"free_nats must not be negative and unimix be in [0, 1), got "
                f"free_nats={free_nats} and unimix={unimix}."
            )
        self.balance = balance
        self.free_nats, self.unimix = free_nats, unimix
        self.prior, self.posterior = prior, posterior

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        self._statistics(world_model)

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        return []

    def __call__(self, predicted: TensorDictBase, batch, loss) -> torch.Tensor:
        prior, posterior = (
            [self._get(predicted, key) for key in keys]
            for keys in self._statistics(loss.world_model)
        )
        dims = batch.batch_dims
        if self.balance is None:
            return self._kl(posterior, prior, dims)
        dynamics, representation = self.balance
        trains_prior = self._kl([x.detach() for x in posterior], prior, dims)
        trains_posterior = self._kl(posterior, [x.detach() for x in prior], dims)
        return dynamics * trains_prior + representation * trains_posterior

    def _kl(
        self, left: list[torch.Tensor], right: list[torch.Tensor], dims: int
    ) -> torch.Tensor:
        """Return ``max(free nats, KL(left | right))``, summed over the state's dims: ``[*B]``."""
        if len(left) == 2:
            kl = kl_divergence(Normal(*left), Normal(*right))
        else:
            left_log, right_log = (self._log_probs(x[0]) for x in (left, right))
            kl = left_log.exp() * (left_log - right_log)
        return kl.flatten(dims).sum(-1).clamp_min(self.free_nats)

    def _log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities, with the uniform distribution mixed in."""
        if not self.unimix:
            return logits.log_softmax(-1)
        uniform = self.unimix / logits.shape[-1]
        return ((1 - self.unimix) * logits.softmax(-1) + uniform).log()

    def _statistics(
        self, world_model: WorldModel
    ) -> tuple[list[NestedKey], list[NestedKey]]:
        """Return the keys of the prior's and the posterior's statistics."""
        writers = {"prior": world_model.dynamics, "posterior": world_model.posterior}
        for endings in (("logits",), ("mean", "std")):
            found = {
                which: [_ending(getattr(self, which), e) for e in endings]
                for which in writers
            }
            # The posterior may write at the root: the filter puts that below "next".
            if all(
                {*keys} <= {*map(_below, written_keys(writers[which]))}
                for which, keys in found.items()
            ):
                return found["prior"], found["posterior"]
        raise ValueError(
            f"The loss {self.name!r} compares outputs of dynamics and posterior below 'next': "
            f"{self.prior!r} and {self.posterior!r}, each with '_logits', or with '_mean' and "
            f"'_std'. dynamics write {written_keys(world_model.dynamics)}, the posterior "
            f"{written_keys(world_model.posterior)}. Name them so, or give their prefixes: "
            f"KLTerm(prior=..., posterior=...)."
        )

    def _get(self, predicted: TensorDictBase, key: NestedKey) -> torch.Tensor:
        value = predicted.get(key, None)
        if value is None:
            raise MissingEntryError(
                f"The loss {self.name!r} needs {key!r}, and the predictions have "
                f"{leaf_keys(predicted)}. The posterior only runs where sequences are filtered, "
                f"not with multi_step=True."
            )
        return value


def _ending(key: NestedKey, name: str) -> NestedKey:
    """Return ``("next", <key>_<name>)``."""
    return join("next", suffixed(key, f"_{name}"))


def _below(key: NestedKey) -> NestedKey:
    return key if is_next(key) else join("next", key)
