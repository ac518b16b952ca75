"""The value term: its parameters, its targets, and modules that terms bring along.

Its formula is in ``test/models/test_tdmpc2.py``, where it is part of TD-MPC2's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from _models import ACTION, gru_model, LATENT, linear, make_model, transitions
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    set_interaction_type,
    TensorDictModule as Mod,
)
from torch import nn
from torchrl.data import Bounded, Categorical
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SoftUpdate

from torchrl_wm import WorldModelLoss
from torchrl_wm.modules import Entry, QEnsemble
from torchrl_wm.objectives import LossTerm, ValueTerm

ENTRY = Entry.from_spec("action", Bounded(-1.0, 1.0, (ACTION,)))


def parts():
    q = QEnsemble({"latent": LATENT}, [ENTRY], num_cells=[8], dropout=0.0)
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    return make_model(), q, policy


def test_the_loss_holds_online_and_target_parameters() -> None:
    model, q, policy = parts()
    loss = WorldModelLoss(model, losses=["reward", ValueTerm(q, policy)])
    mine = {id(p) for p in loss.parameters()}
    assert {id(p) for p in q.parameters()} <= mine
    assert not {id(p) for p in policy.parameters()} & mine
    update = SoftUpdate(loss, tau=0.25)
    name = ("networks", "0", "weight")
    online, target = loss.q_ensemble_params[name], loss.target_q_ensemble_params[name]
    assert torch.equal(online.data, target.data)
    online.data.add_(1.0)
    update.step()
    torch.testing.assert_close(
        online.data - target.data, torch.full(online.shape, 0.75)
    )
    # And in its state, so that it goes on where it was left.
    keys = loss.state_dict().keys()
    assert any(key.startswith("target_q_ensemble_params") for key in keys)


def test_class_numbers_survive_soft_updates() -> None:
    """The target networks hold whole numbers, too, which are not to drift."""
    entry = Entry.from_spec("action", Categorical(9))
    q = QEnsemble({"latent": LATENT}, [entry], num_cells=[8], dropout=0.0)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(torch.randn_like(parameter))
    policy = Mod(lambda z: torch.zeros_like(z[..., 0]).long(), ["latent"], ["action"])
    loss = WorldModelLoss(
        make_model(action_dim=1),
        losses=[ValueTerm(q, policy)],
    )
    update = SoftUpdate(loss, tau=0.003)
    latent, action = torch.randn(1, LATENT).expand(9, -1), torch.arange(9)
    before = q.logits([latent], [action])
    assert len(before.unique(dim=0)) == 9
    for _ in range(20):
        update.step()
    with loss.target_parameters("q_ensemble"):
        assert torch.equal(q.logits([latent], [action]), before)


def test_gradients() -> None:
    """Of the values through the latents, not of the targets, nor of the policy."""
    model, q, policy = parts()
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = WorldModelLoss(model, losses=[ValueTerm(q, policy)], multi_step=True)
    SoftUpdate(loss, tau=0.1)
    loss(transitions(3, 4))["loss_value"].backward()
    for part in (model.encoder, model.dynamics, q):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in policy.parameters())


def test_bootstraps_through_truncations_alone() -> None:
    model, q, policy = parts()
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = transitions(2)
    batch["next", "reward"] = torch.ones(2, 1)
    for name in ("done", "terminated", "truncated"):
        batch["next", name] = torch.zeros(2, 1, dtype=torch.bool)
    term = ValueTerm(q, policy, subset=None)
    loss = WorldModelLoss(model, losses=[term])
    SoftUpdate(loss, tau=0.1)
    alive = term._target(batch, loss)
    batch["next", "done"][:] = batch["next", "truncated"][:] = True
    assert torch.equal(term._target(batch, loss), alive)
    batch["next", "terminated"][0] = True
    target = term._target(batch, loss)
    assert target[0] == 1.0 and target[1] == alive[1] and alive[1] != 1.0


@pytest.mark.parametrize("around", [None, *InteractionType])
def test_the_policy_is_sampled_in_eval_mode(around) -> None:
    model, q, _ = parts()
    actor = ProbabilisticActor(
        Mod(
            nn.Sequential(
                nn.Linear(LATENT, 2 * ACTION), nn.Dropout(0.5), NormalParamExtractor()
            ),
            ["latent"],
            ["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    seen = []
    actor.register_forward_hook(
        lambda module, inputs, out: seen.append((out["action"], module.training))
    )
    loss = WorldModelLoss(model, losses=[ValueTerm(q, actor)])
    SoftUpdate(loss, tau=0.1)
    with set_interaction_type(around):
        batch = transitions(4)
        loss(batch), loss(batch)
    (first, mode), (second, _) = seen
    assert not mode and actor.training
    assert not torch.equal(first, second)


def test_parameters_are_restored_after_an_error() -> None:
    model, q, policy = parts()
    broken = Mod(lambda x: x[..., :1], ["latent"], ["action"])
    loss = WorldModelLoss(model, losses=[ValueTerm(q, broken)])
    SoftUpdate(loss, tau=0.1)
    before = copy.deepcopy(dict(q.named_parameters()))
    with pytest.raises(ValueError, match="'action'"):
        loss(transitions(3))
    after = dict(q.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_terms_of_your_own_bring_modules() -> None:
    """What is trained beside the model's components is named by the term."""

    class Probe(LossTerm):
        def __init__(self, name="probe") -> None:
            super().__init__(name)
            self.net = nn.Linear(LATENT, 1)

        def modules(self):
            return {"my_probe": self.net}

        def labels(self, world_model, keys):
            return []

        def __call__(self, predicted, batch, loss):
            return self.net(predicted["next", "latent"]).pow(2).squeeze(-1)

    probe = Probe()
    loss = WorldModelLoss(make_model(), losses=[probe])
    loss(transitions(3))["loss_probe"].backward()
    assert loss.my_probe_params["weight"].grad.any()
    with pytest.raises(
        ValueError, match="'other' calls a module of its own 'my_probe'"
    ):
        WorldModelLoss(make_model(), losses=[probe, Probe("other")])


class TestWrongUse:
    def test_policy(self) -> None:
        _, q, _ = parts()
        with pytest.raises(
            ValueError, match=r"for \['action'\], and it writes \['a'\]"
        ):
            ValueTerm(q, linear(["latent"], ["a"], [LATENT, ACTION]))

    def test_model(self) -> None:
        _, q, policy = parts()
        q.latent_keys = ["belief"]
        with pytest.raises(ValueError, match=r"\['belief'\].*encoder writes"):
            WorldModelLoss(gru_model(), losses=[ValueTerm(q, policy)])

    def test_reward(self) -> None:
        model, q, policy = parts()
        loss = WorldModelLoss(model, losses=[ValueTerm(q, policy)])
        SoftUpdate(loss, tau=0.1)
        batch = transitions(3)
        batch["next", "reward"] = torch.zeros(3, 2)
        with pytest.raises(ValueError, match=r"'reward' has \(3, 2\)"):
            loss(batch)


def test_terms_share_one_encoding_of_the_next_observations() -> None:
    model, q, policy = parts()
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(torch.randn_like(parameter))
    batch, calls = transitions(5), []
    terms = ["latent", ValueTerm(q, policy, subset=None)]
    loss = WorldModelLoss(model, losses=terms)
    apart = [WorldModelLoss(model, losses=[term])(batch) for term in terms]
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    both = loss(batch)
    assert len(calls) == 2  # the observations, and the next ones
    assert torch.equal(both["loss_latent"], apart[0]["loss_latent"])
    assert torch.equal(both["loss_value"], apart[1]["loss_value"])
    # The next call, and calls from outside, encode anew: the model may have changed.
    first = loss.encode_next(batch)["latent"]
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1.0)
    assert not torch.equal(loss.encode_next(batch)["latent"], first)
    assert not torch.equal(loss(batch)["loss_latent"], both["loss_latent"])


def test_a_call_that_fails_leaves_no_encoding_behind() -> None:
    class Failing(LossTerm):
        def labels(self, world_model, keys):
            return []

        def __call__(self, predicted, batch, loss):
            raise RuntimeError("no value")

    model, batch = make_model(), transitions(5)
    loss = WorldModelLoss(model, losses=["latent", Failing("failing")])
    with pytest.raises(RuntimeError, match="no value"):
        loss(batch)
    first = loss.encode_next(batch)["latent"]
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1.0)
    assert not torch.equal(loss.encode_next(batch)["latent"], first)
