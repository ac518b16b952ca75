"""The term that reconstructs observations as the Dreamers do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from tensordict import NestedKey
from torchrl.modules import symlog

from torchrl_wm.modules.keys import is_next, strip_next, unique
from torchrl_wm.objectives.comparisons import distance, read_label
from torchrl_wm.objectives.terms import ReconstructionTerm


class ObservationTerm(ReconstructionTerm):
    """Squared distance of decoded observations from the real ones, summed over their dims.

    It is a sum, where :class:`ReconstructionTerm` takes the mean, because an RSSM
    balances its KL with a log-likelihood: with ``weight=0.5`` the term is the
    negative log-likelihood of a Gaussian of unit variance, up to a constant (PlaNet,
    arXiv 1811.04551, eq. 3). In symlog space it is DreamerV3's (arXiv 2301.04104,
    eq. 4).

    With a recurrent model, the observation that a sequence begins with is
    reconstructed, too, and counts in the first step.

    Args:
        distance: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        weight: the factor of the term.
        target: ``"next"`` decodes the predicted (in recurrent models, filtered)
            latents, ``"observation"`` the encoded ones.
        symlog: the observations to compare in symlog space: all (True), none
            (False), or their keys.
        scale: the divisors of observations, by key: 255 for images of bytes.
    """

    def __init__(
        self,
        distance: str = "l2",
        weight: float = 1.0,
        target: str = "next",
        *,
        symlog: bool | Iterable[NestedKey] = False,
        scale: Mapping[NestedKey, float] | None = None,
    ) -> None:
        super().__init__(distance, weight, target)
        self.symlog = symlog if isinstance(symlog, bool) else unique(symlog)
        self.scale = {unique([k])[0]: v for k, v in (scale or {}).items()}

    def __call__(self, predicted, batch, loss) -> torch.Tensor:
        value = super().__call__(predicted, batch, loss)
        if self.target != "next" or not loss.world_model.is_recurrent:
            return value
        # Nothing else trains the latents that a sequence begins with.
        first, labels = predicted[..., 0], batch[..., 0]
        decoded = loss.world_model.decode(first.exclude("next").copy())
        begin = 0.0
        for key, observation in self.pairs(loss.world_model, loss.tensor_keys):
            if not is_next(key):
                label = read_label(labels, observation, self.name)
                begin = begin + self.compare(
                    decoded.get(key), label, observation, labels
                )
        rest = value.shape[-1] - 1
        return value + F.pad(torch.as_tensor(begin).unsqueeze(-1), (0, rest))

    def compare(self, predicted, target, key, batch) -> torch.Tensor:
        name = strip_next(key)
        size = target[(0,) * batch.batch_dims].numel()
        target = target.to(predicted.dtype)
        if name in self.scale:
            predicted, target = (x / self.scale[name] for x in (predicted, target))
        if self.symlog is True or (self.symlog and name in self.symlog):
            predicted, target = symlog(predicted), symlog(target)
        return size * distance(predicted, target, self.distance, key, batch)
