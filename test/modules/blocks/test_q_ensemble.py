"""Action values of an ensemble."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _wirings import ACTIONS
from tensordict import TensorDict

from torchrl_wm.modules import Entry, QEnsemble, SymlogTwoHot


def entry(name: str, key="action") -> Entry:
    return Entry.from_spec(key, ACTIONS[name]())


def make(name="bounded", **settings) -> QEnsemble:
    settings = {"num_networks": 3, "num_cells": (8, 6), "dropout": 0.0, **settings}
    q = QEnsemble({"latent": 4}, [entry(name)], **settings)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return q


def test_equals_separate_networks() -> None:
    q = make()
    latent, action = torch.randn(5, 4), torch.randn(5, 2)
    logits = q.logits([latent], [action])
    first, norm, _, second, norm_2, _, last = q.networks
    for i in range(3):
        hidden = torch.cat([latent, action], -1)
        for linear, scale in ((first, norm), (second, norm_2)):
            hidden = hidden @ linear.weight[i] + linear.bias[i]
            hidden = F.layer_norm(hidden, hidden.shape[-1:])
            hidden = F.mish(hidden * scale.weight[i] + scale.bias[i])
        expected = hidden @ last.weight[i] + last.bias[i]
        torch.testing.assert_close(logits[:, i], expected)


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("size", [(), (5,), (2, 3)])
def test_any_action_and_batch_shape(name, size) -> None:
    q = make(name)
    td = TensorDict({"latent": torch.randn(*size, 4)}, batch_size=size)
    td["action"] = ACTIONS[name]().rand(size)
    out = q(td)
    assert out["state_action_value_logits"].shape == (*size, 3, 101)
    assert out["state_action_value"].shape == (*size, 1)


def test_nested_keys() -> None:
    q = QEnsemble(
        {("agent", "z"): 4, "memory": 2},
        [entry("bounded", ("agent", "push")), entry("categorical", "mode")],
        num_cells=[8],
        logits_key=("out", "logits"),
        value_key=("out", "q"),
    )
    td = TensorDict({"memory": torch.zeros(5, 2)}, [5])
    td["agent", "z"], td["agent", "push"] = torch.zeros(5, 4), torch.zeros(5, 2)
    td["mode"] = torch.zeros(5, dtype=torch.int64)
    assert q(td)["out", "q"].shape == (5, 1)
    assert q.in_keys == [("agent", "z"), "memory", ("agent", "push"), "mode"]


def test_reductions() -> None:
    q, two_hot = make(), SymlogTwoHot()
    logits = q.logits([torch.randn(50, 4)], [torch.randn(50, 2)])
    each = two_hot.decode(logits)
    torch.testing.assert_close(q.value(logits), each.mean(-1, keepdim=True))
    torch.testing.assert_close(
        q.value(logits, "min"), each.min(-1, keepdim=True).values
    )
    pairs = {
        (i, j): each[:, [i, j]].amin(-1, keepdim=True)
        for i in range(3)
        for j in range(i)
    }
    seen = set()
    for _ in range(40):
        drawn = q.value(logits, "min", subset=2)
        seen |= {pair for pair, value in pairs.items() if drawn.equal(value)}
    assert seen == set(pairs)


def test_starts_at_zero_and_learns() -> None:
    q = QEnsemble({"latent": 4}, [entry("bounded")], num_cells=[16])
    latent, action = torch.randn(16, 4), torch.randn(16, 2)
    logits = q.logits([latent], [action])
    assert not q.value(logits).any()
    target = (latent[:, :1] * action[:, :1]).expand(16, 5)
    optimizer = torch.optim.Adam(q.parameters(), lr=2e-2)
    for _ in range(80):
        loss = q.two_hot.loss(q.logits([latent], [action]), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q.eval()
    value = q.value(q.logits([latent], [action]))
    assert (value - target[:, :1]).pow(2).mean() < 0.2 * target.var()
    assert q.value(q.logits([latent], [action]), "min", 1).shape == (16, 1)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="Unknown reduce='max'"):
        make(reduce="max")
    with pytest.raises(ValueError, match="subset=4 networks cannot be drawn from 3"):
        make(subset=4)
    with pytest.raises(ValueError, match="num_networks=0 must be at least 1"):
        make(num_networks=0)
    with pytest.raises(ValueError, match="subset=0"):
        make().value(torch.zeros(2, 3, 101), subset=0)
