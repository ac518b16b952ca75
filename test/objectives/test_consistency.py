"""The consistency term against its formula."""

from __future__ import annotations

import pytest
import torch
from _models import gru_model, make_model, transitions
from torchrl.objectives import SoftUpdate

from torchrl_wm import WorldModelLoss
from torchrl_wm.objectives import ConsistencyTerm


def alive(*size: int):
    batch = transitions(*size)
    for name in ("done", "terminated", "truncated"):
        batch["next", name].zero_()
    return batch


def distances(predicted, target) -> dict[str, torch.Tensor]:
    gap = predicted - target
    near = gap.abs() < 1
    dot = (predicted * target).sum(-1)
    return {
        "l2": gap.pow(2).mean(-1),
        "l1": gap.abs().mean(-1),
        "smooth_l1": torch.where(near, 0.5 * gap.pow(2), gap.abs() - 0.5).mean(-1),
        "cosine": 1 - dot / predicted.norm(dim=-1) / target.norm(dim=-1),
    }


@pytest.mark.parametrize("distance", ["l2", "l1", "smooth_l1", "cosine"])
@pytest.mark.parametrize("key", ["latent", ("robot", "z")])
def test_formula(distance, key) -> None:
    model, batch = make_model(latent=key), alive(3, 4)
    loss = WorldModelLoss(
        model, losses=[ConsistencyTerm(distance, 20.0)], multi_step=True, decay=0.5
    )
    latent = model.encoder.module(batch["observation"][:, 0])
    total = 0.0
    for t in range(4):
        latent = model.dynamics.module(latent, batch["action"][:, t])
        target = model.encoder.module(batch["next", "observation"][:, t])
        total = total + 0.5**t * distances(latent, target)[distance].mean() / 4
    torch.testing.assert_close(loss(batch)["loss_consistency"], 20 * total)


def test_ends_masks_and_weights() -> None:
    """Each step counts as it does alone, up to the episode's end or the first masked step."""
    model, batch = make_model(), alive(3, 4)
    settings = {"losses": [ConsistencyTerm()], "multi_step": True}
    each = WorldModelLoss(model, **settings, reduction="none")(batch)
    each = each["loss_consistency"]
    batch["next", "done"][0, 1] = True
    batch["is_init"] = torch.zeros(3, 4, 1, dtype=torch.bool)
    batch["is_init"][1, 3] = True
    batch["collector", "mask"] = torch.ones(3, 4, dtype=torch.bool)
    batch["collector", "mask"][2, 1] = False
    batch["weight"] = torch.tensor([[1.0] * 4, [5.0] * 4, [2.0] * 4])
    counts = torch.tensor([[1.0, 1, 0, 0], [5, 5, 5, 0], [2, 0, 0, 0]])
    out = WorldModelLoss(model, **settings)(batch)["loss_consistency"]
    torch.testing.assert_close(out, (counts * each).sum() / counts.sum())


def test_targets_carry_no_gradient() -> None:
    """With a target encoder, they are its encodings."""
    model, batch = make_model(), alive(3, 2)
    term = ConsistencyTerm()
    loss = WorldModelLoss(model, losses=[term], multi_step=True, delay_encoder=True)
    SoftUpdate(loss, tau=0.1)
    before = loss(batch)["loss_consistency"]
    for target in loss.target_encoder_params.values(True, True):
        target.add_(1.0)
    assert loss(batch)["loss_consistency"] != before
    # The last observation is only a target: its encoding must not pull.
    batch["next", "observation"].requires_grad_()
    loss(batch)["loss_consistency"].backward()
    assert batch["next", "observation"].grad is None


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="Unknown distance='angle'.*'cosine'"):
        ConsistencyTerm("angle")
    with pytest.raises(ValueError, match=r"not \['belief'\]"):
        WorldModelLoss(gru_model(), losses=[ConsistencyTerm()])
