"""The term that keeps predicted latents consistent with encoded ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchrl_wm.modules import WorldModel
from torchrl_wm.objectives.comparisons import (
    check_distance,
    check_encoded,
    DISTANCES,
    per_sample,
)
from torchrl_wm.objectives.terms import LatentTerm


class ConsistencyTerm(LatentTerm):
    """Distance of predicted latents from the encodings of the observations.

    With ``WorldModelLoss(..., multi_step=True, decay=rho)`` this is the joint
    embedding loss of TD-MPC2 (arXiv 2310.16828, eq. 3): the first observation's
    latent is rolled through the recorded actions, and step ``t`` counts ``rho **
    t``. Targets carry no gradient; with ``delay_encoder=True`` a target encoder
    makes them. Every latent must be one that the encoder writes.

    Args:
        distance: ``"l2"``, ``"l1"``, ``"smooth_l1"``, or ``"cosine"``: 1 minus the
            cosine of the angle between the two, as in SPR (arXiv 2007.05929).
        weight: the factor of the term.
        name: the loss appears as ``loss_<name>``.
    """

    def __init__(
        self, distance: str = "l2", weight: float = 1.0, name: str = "consistency"
    ) -> None:
        check_distance("distance", distance, (*DISTANCES, "cosine"))
        super().__init__("l2" if distance == "cosine" else distance, weight)
        self.name, self.distance = name, distance

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        check_encoded(
            self.name,
            "compares latents with encodings",
            world_model.latent_keys,
            world_model,
            " For a recurrent model use KLTerm, or the loss 'latent', which compares the "
            "latents that the encoder writes.",
        )

    def compare(self, predicted, target, key, batch) -> torch.Tensor:
        if self.distance != "cosine":
            return super().compare(predicted, target, key, batch)
        return per_sample(1 - F.cosine_similarity(predicted, target, dim=-1), batch)
