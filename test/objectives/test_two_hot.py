"""The two-hot term against its formula."""

from __future__ import annotations

import pytest
import torch
from _models import LATENT, linear, make_model, SpecEnv, transitions
from tensordict.nn import TensorDictModule as Mod
from torchrl.modules import MLP, SymExpTwoHot

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.modules import SymlogTwoHot, TwoHotHead
from torchrl_wm.objectives import TwoHotTerm


def two_hot_model(two_hot=None, reward="reward", zero=False) -> WorldModel:
    two_hot = SymExpTwoHot(21) if two_hot is None else two_hot
    base = make_model()
    keys = [reward, (*reward[:-1], "logits")] if isinstance(reward, tuple) else None
    logits = keys[1] if keys else "reward_logits"
    tail = reward if isinstance(reward, tuple) else (reward,)
    logits = logits if isinstance(logits, tuple) else (logits,)
    return WorldModel(
        base.encoder,
        base.dynamics,
        Mod(
            TwoHotHead(MLP(LATENT, 21, num_cells=[8]), two_hot, zero=zero),
            [("next", "latent")],
            [("next", *logits), ("next", *tail)],
        ),
    )


def logits_of(model, batch):
    latent = model.encoder.module(batch["observation"])
    ahead = model.dynamics.module(latent, batch["action"])
    return model.reward_head.module.network(ahead)


@pytest.mark.parametrize("size", [(5,), (2, 3)])
def test_formula_raw(size) -> None:
    """DreamerV3: between the two bins around the reward, by its distance from them."""
    model, batch = two_hot_model(), transitions(*size)
    batch["next", "reward"] = 50 * torch.randn(*size, 1)
    loss = WorldModelLoss(model, losses=[TwoHotTerm()], reduction="none")
    grid = torch.linspace(-20, 20, 21)
    bins = grid.sign() * (grid.abs().exp() - 1)
    expected = torch.zeros(size).flatten()
    logits = logits_of(model, batch).reshape(-1, 21)
    for i, x in enumerate(batch["next", "reward"].flatten()):
        above = int((bins <= x).sum())
        share = (x - bins[above - 1]) / (bins[above] - bins[above - 1])
        log_probs = logits[i] - logits[i].exp().sum().log()
        expected[i] = -((1 - share) * log_probs[above - 1] + share * log_probs[above])
    out = loss(batch)["loss_reward"]
    torch.testing.assert_close(out, expected.reshape(size), rtol=1e-4, atol=1e-4)


def test_formula_symlog() -> None:
    model, batch = two_hot_model(SymlogTwoHot(21, 5.0)), transitions(6)
    loss = WorldModelLoss(model, losses=[TwoHotTerm(0.1)], reduction="none")
    place = batch["next", "reward"][:, 0]
    place = (place.sign() * place.abs().log1p() + 5) / 0.5
    below = place.long()
    log_probs = logits_of(model, batch).log_softmax(-1)
    pick = [log_probs[torch.arange(6), below + i] for i in (0, 1)]
    share = place - below
    expected = -0.1 * ((1 - share) * pick[0] + share * pick[1])
    torch.testing.assert_close(loss(batch)["loss_reward"], expected)


def test_masks_and_weights() -> None:
    model, batch = two_hot_model(), transitions(4)
    each = WorldModelLoss(model, losses=[TwoHotTerm()], reduction="none")(batch)
    batch["weight"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    batch["collector", "mask"] = torch.tensor([True, True, False, True])
    batch["next", "reward"][2] = float("nan")
    out = WorldModelLoss(model, losses=[TwoHotTerm()])(batch)["loss_reward"]
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0])
    torch.testing.assert_close(out, (weights * each["loss_reward"]).sum() / 7)


def test_learns_and_steps() -> None:
    """The scalar that the env hands out is what the logits were trained on."""
    model, batch = two_hot_model(SymlogTwoHot(21, 5.0), zero=True), transitions(32)
    batch["next", "reward"] = batch["observation"][:, :1] * 5
    loss = WorldModelLoss(model, losses=[TwoHotTerm()])
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss(batch)["loss_reward"].backward()
        optimizer.step()
    start = batch.select("observation")
    imagined = WorldModelEnv(model, SpecEnv()).imagine(
        1, tensordict=start, actions=batch["action"].unsqueeze(1)
    )
    error = imagined["next", "reward"][:, 0] - batch["next", "reward"]
    assert error.std() < 0.4 * batch["next", "reward"].std()


def test_nested_keys() -> None:
    reward = ("agents", "reward")
    model, batch = two_hot_model(reward=reward), transitions(5)
    batch["next", "agents", "reward"] = batch["next", "reward"]
    term = TwoHotTerm(key=reward, logits_key=("agents", "logits"), name="agents")
    loss = WorldModelLoss(model, losses=[term])
    assert ("next", "agents", "reward") in loss.in_keys
    assert loss(batch)["loss_agents"] > 0


class TestWrongUse:
    def test_other_heads(self) -> None:
        with pytest.raises(ValueError, match="has no TwoHotHead.*TwoHotTerm\\(two_hot"):
            WorldModelLoss(make_model(), losses=[TwoHotTerm()])
        base = make_model()
        bare = WorldModel(
            base.encoder,
            base.dynamics,
            linear([("next", "latent")], [("next", "reward_logits")], [LATENT, 7]),
        )
        ok = WorldModelLoss(bare, losses=[TwoHotTerm(two_hot=SymExpTwoHot(7))])
        assert ok(transitions(3))["loss_reward"] > 0
        wrong = WorldModelLoss(bare, losses=[TwoHotTerm(two_hot=SymExpTwoHot(9))])
        with pytest.raises(ValueError, match="have 7 bins, and the two-hot encoding 9"):
            wrong(transitions(3))

    def test_labels(self) -> None:
        loss = WorldModelLoss(two_hot_model(), losses=[TwoHotTerm()])
        with pytest.raises(KeyError, match=r"\('next', 'reward'\)"):
            loss(transitions(3).exclude(("next", "reward")))
        batch = transitions(3)
        batch["next", "reward"] = torch.zeros(3, 2)
        with pytest.raises(ValueError, match=r"label \('next', 'reward'\) \(3, 2\)"):
            loss(batch)
