"""The latents that the loss hands out: those that its terms compared, detached or not."""

from __future__ import annotations

import pytest
import torch
from _models import gru_model, make_model, rssm_model, transitions
from torchrl.envs import GymEnv

from torchrl_wm import WorldModelLoss
from torchrl_wm.models import make_ensemble_world_model

MASK = ("collector", "mask")


def alive(*size: int):
    """Transitions of episodes that go on."""
    batch = transitions(*size)
    for name in ("done", "terminated", "truncated"):
        batch["next", name] = torch.zeros(*size, 1, dtype=torch.bool)
    return batch


@pytest.mark.parametrize("key", ["latent", ("deep", "latent")])
def test_one_step(key) -> None:
    model, batch = make_model(latent=key), transitions(2, 3)
    latents = WorldModelLoss(model, return_latents=True)(batch)["latents"]
    expected = model.step(model.encode(batch.select("observation", "action")))
    assert latents.batch_size == (2, 3)
    assert torch.equal(latents[key], expected[key])
    assert torch.equal(latents["next", key], expected["next", key])
    assert latents[MASK].all() and latents[MASK].shape == (2, 3)


@pytest.mark.parametrize("key", ["latent", ("deep", "latent")])
def test_open_loop_hands_out_what_it_rolled(key) -> None:
    """The encoding of the first observation, and all that is predicted from it."""
    model, batch = make_model(latent=key), alive(2, 4)
    batch["next", "done"][0, 1] = True
    loss = WorldModelLoss(model, multi_step=True, decay=0.5, return_latents=True)
    latents = loss(batch)["latents"]
    step = model.encode(batch[:, 0].select("observation"))
    for t in range(4):
        step = model.step(step.set("action", batch["action"][:, t]))
        torch.testing.assert_close(latents[key][:, t], step[key])
        torch.testing.assert_close(latents["next", key][:, t], step["next", key])
        step = step.get("next").select(key)
    assert latents[MASK].tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("make", [rssm_model, gru_model])
def test_recurrent_models_hand_out_what_they_filtered(make) -> None:
    model, batch = make(), alive(2, 4)
    torch.manual_seed(0)
    latents = WorldModelLoss(model, return_latents=True)(batch)["latents"]
    torch.manual_seed(0)
    observed = model.observe(batch)
    assert sorted(latents.keys(), key=str) == sorted(
        [*model.latent_keys, "next", "collector"]
    )
    for key in (*model.latent_keys, *(("next", key) for key in model.latent_keys)):
        torch.testing.assert_close(latents[key], observed[key])


def test_ensembles_hand_out_the_latents_that_the_dynamics_propagate() -> None:
    env = GymEnv("Pendulum-v1")
    model, loss = make_ensemble_world_model(env, hidden=(8,), normalize=False)
    loss = WorldModelLoss(model, losses=loss.terms, return_latents=True)
    latents = loss(env.rollout(5))["latents"]
    assert latents["next", "observation"].shape == (5, 3)


@pytest.mark.parametrize("options", [{}, {"multi_step": True, "decay": 0.5}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_gradients_are_the_same(options, reduction) -> None:
    model, batch = make_model(), alive(2, 4)
    options = {"losses": ["reward", "latent"], "reduction": reduction, **options}
    out = []
    for handed_out in (False, True):
        loss = WorldModelLoss(model, **options, return_latents=handed_out)
        losses = loss(batch)
        if handed_out:
            latents = losses.pop("latents")
            assert latents.batch_size == (2, 4)
            assert not any(v.requires_grad for v in latents.values(True, True))
        model.zero_grad()
        losses.sum(reduce=True).backward()
        out.append((losses, [p.grad.clone() for p in model.parameters()]))
    assert (out[0][0] == out[1][0]).all()
    assert all(torch.equal(a, b) for a, b in zip(out[0][1], out[1][1]))


@pytest.mark.parametrize("key", ["latent", ("deep", "latent")])
def test_a_loss_on_attached_latents_trains_the_model(key) -> None:
    model, batch = make_model(latent=key), alive(2, 4)
    loss = WorldModelLoss(model, return_latents=True, detach_latents=False)
    latents = loss(batch)["latents"]
    latents["next", key].sum().backward()
    expected = [p.grad.clone() for p in model.dynamics.parameters()]
    assert any(grad.any() for grad in expected)
    model.zero_grad()
    rolled = model.step(model.encode(batch.select("observation", "action")))
    rolled["next", key].sum().backward()
    for parameter, grad in zip(model.dynamics.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad)


def test_out_keys_and_dispatch() -> None:
    model, batch = make_model(latent=("deep", "latent")), transitions(5)
    loss = WorldModelLoss(model, return_latents=True)
    out = loss(batch)
    assert set(loss.out_keys) == set(out.keys(True, True))
    reward, latent, following, mask = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_reward=batch["next", "reward"],
    )
    assert torch.equal(reward, out["loss_reward"])
    assert torch.equal(latent, out["latents", "deep", "latent"])
    assert torch.equal(following, out["latents", "next", "deep", "latent"])
    assert mask.all()
    assert WorldModelLoss(model).out_keys == ["loss_reward"]


@pytest.mark.parametrize("multi_step", [False, True])
def test_invalid_samples_are_named(multi_step) -> None:
    """Padding of any content gives finite latents, and the mask tells them apart."""
    batch = alive(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    batch.set(MASK, mask)
    batch["observation"][1, 2:] = batch["action"][1, 2:] = float("nan")
    loss = WorldModelLoss(make_model(), multi_step=multi_step, return_latents=True)
    latents = loss(batch)["latents"]
    assert torch.equal(latents[MASK], mask)
    assert all(value.isfinite().all() for value in latents.values(True, True))


@pytest.mark.parametrize("make", [make_model, gru_model])
def test_they_compile_in_one_graph(make) -> None:
    batch = transitions(2, 3)
    loss = WorldModelLoss(make(), return_latents=True)
    expected = loss(batch)
    torch._dynamo.reset()
    out = torch.compile(loss, fullgraph=True, backend="eager")(batch)
    for key in loss.out_keys:
        torch.testing.assert_close(out[key], expected[key])
