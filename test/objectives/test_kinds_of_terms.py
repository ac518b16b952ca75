"""Terms that need no prediction, terms of the whole batch, and targets with gradient."""

from __future__ import annotations

import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, OBS, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import DoneTerm, LatentTerm, LossTerm, RewardTerm

KEYS = ["latent", ("deep", "latent")]


class Denoising(LossTerm):
    """Reads latents and real next latents, and no prediction."""

    needs_prediction = False

    def __init__(self, latent) -> None:
        super().__init__("denoising")
        self.latent = latent

    def labels(self, world_model, keys):
        return [("next", "observation")]

    def __call__(self, predicted, batch, loss):
        assert "next" not in predicted.keys()
        target = loss.encode_next(batch)[self.latent]
        return (predicted[self.latent] - target).pow(2).mean(-1)


class Variance(LossTerm):
    """One number for the whole batch: how far the latents' variance is below 1."""

    per_sample = False

    def __init__(self, latent="latent") -> None:
        super().__init__("variance")
        self.latent = latent

    def labels(self, world_model, keys):
        return []

    def __call__(self, predicted, batch, loss):
        valid = loss.valid(batch)
        latents = predicted[self.latent]
        latents = latents.flatten(0, -2) if valid is None else latents[valid]
        return (1 - latents.var(0)).relu().mean()


def must_not_run(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: pytest.fail("the sampler was run"))


@pytest.mark.parametrize("key", KEYS)
def test_no_term_needs_a_prediction(key) -> None:
    model, batch = make_model(latent=key), transitions(4, 3)
    must_not_run(model.dynamics)
    must_not_run(model.reward_head)
    loss = WorldModelLoss(model, losses=[Denoising(key)])
    out = loss(batch.exclude("action"))  # which only the dynamics read
    assert "action" not in loss.in_keys
    expected = model.encode(batch.select("observation"))[key]
    following = model.encode(batch["next"].select("observation"))[key]
    torch.testing.assert_close(
        out["loss_denoising"], (expected - following).pow(2).mean()
    )
    out["loss_denoising"].backward()
    assert model.encoder.module[0].weight.grad.any()


def test_latents_that_are_handed_out_are_predicted() -> None:
    model = make_model()

    class Free(Denoising):
        def __call__(self, predicted, batch, loss):
            return predicted["latent"].sum(-1)

    loss = WorldModelLoss(model, losses=[Free("latent")], return_latents=True)
    assert ("next", "latent") in loss(transitions(4))["latents"].keys(True)


@pytest.mark.parametrize("key", KEYS)
def test_rewards_judged_on_real_next_latents(key) -> None:
    torch.manual_seed(0)
    model = WorldModel(
        linear(["observation"], [key], (OBS, LATENT)),
        linear([key, "action"], [join("next", key)], (LATENT + ACTION, LATENT)),
        linear(
            [join("next", key), "action"], [("next", "reward")], (LATENT + ACTION, 1)
        ),
    )
    batch = transitions(5)
    must_not_run(model.dynamics)
    loss = WorldModelLoss(model, losses=[RewardTerm(real_next=True)])
    assert {"action", ("next", "observation")} <= set(loss.in_keys)
    value = loss(batch)["loss_reward"]
    real = TensorDict({"action": batch["action"]}, [5])
    real["next"] = model.encode(batch["next"].select("observation"))
    error = model.reward_head(real)["next", "reward"] - batch["next", "reward"]
    torch.testing.assert_close(value, error.pow(2).mean())


class Diffusion(nn.Module):
    """Stands for a sampler of many steps, which a loss must not run."""

    def forward(self, frame, action):
        pytest.fail("the sampler was run")


def test_a_filter_runs_no_sampler_for_a_head_with_a_memory() -> None:
    """As DIAMOND: frames are the latents, and an LSTM judges real frames."""
    torch.manual_seed(0)
    cell, read = nn.GRUCell(OBS, 3), nn.Linear(3, 1)

    def judge(frame, state):
        state = cell(frame.reshape(-1, OBS), state.reshape(-1, 3)).reshape(state.shape)
        return read(state), state

    head = Mod(
        nn.Identity(),
        [("next", "frame"), "lstm"],
        [("next", "reward"), ("next", "lstm")],
    )
    head.module.forward = judge
    head.module.parts = nn.ModuleList([cell, read])
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["frame"]),
        Mod(Diffusion(), ["frame", "action"], [("next", "frame")]),
        head,
        initial_state=TensorDict({"lstm": torch.zeros(3)}),
    )
    batch = transitions(2, 4)
    batch["is_init"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    loss = WorldModelLoss(model, losses=[RewardTerm(real_next=True)])(batch)
    state, rewards = torch.zeros(2, 3), []
    for t in range(4):
        reward, state = judge(batch["next", "observation"][:, t], state)
        rewards.append(reward)
    error = torch.stack(rewards, 1) - batch["next", "reward"]
    torch.testing.assert_close(loss["loss_reward"], error.pow(2).mean())
    # Nor does the front of a policy.
    step = TensorDict({"observation": batch["observation"][:, 0]}, [2])
    step = model.observer()(step.set("is_init", torch.ones(2, 1, dtype=torch.bool)))
    step.update({"action": batch["action"][:, 0], "is_init": batch["is_init"][:, 0]})
    step["observation"] = batch["next", "observation"][:, 0]
    expected = judge(batch["next", "observation"][:, 0], torch.zeros(2, 3))[1]
    torch.testing.assert_close(model.observer()(step)["lstm"], expected)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stop", [True, False])
def test_gradients_of_targets(key, stop) -> None:
    model, batch = make_model(latent=key), transitions(6)
    loss = WorldModelLoss(model, losses=[LatentTerm(stop_gradient=stop)])
    loss(batch)["loss_latent"].backward()
    found = [p.grad.clone() for p in model.encoder.parameters()]
    model.zero_grad()
    predicted = model.step(model.encode(batch.select("observation", "action")))
    target = model.encode(batch["next"].select("observation"))[key]
    target = target.detach() if stop else target
    (predicted[join("next", key)] - target).pow(2).mean().backward()
    for grad, parameter in zip(found, model.encoder.parameters()):
        torch.testing.assert_close(grad, parameter.grad)


def test_a_target_encoder_gets_no_gradient() -> None:
    loss = WorldModelLoss(
        make_model(), losses=[LatentTerm(stop_gradient=False)], delay_encoder=True
    )
    with pytest.raises(ValueError, match="Leave out delay_encoder"):
        loss(transitions(4))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_number_for_the_batch(key, reduction) -> None:
    model, batch = make_model(latent=key), transitions(4, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2] = False
    batch["collector", "mask"] = mask
    batch["observation"][2] = float("nan")
    losses = ["reward", Variance(key)]
    out = WorldModelLoss(model, losses=losses, reduction=reduction)(batch)
    latents = model.encode(batch.select("observation"))[key][mask]
    expected = (1 - latents.var(0)).relu().mean()
    whole = {"mean": expected, "sum": expected, "none": mask * expected}
    torch.testing.assert_close(out["loss_variance"], whole[reduction])


def test_a_number_for_each_sample_is_refused_there() -> None:
    class Wrong(Variance):
        def __call__(self, predicted, batch, loss):
            return predicted["latent"].sum(-1)

    loss = WorldModelLoss(make_model(), losses=[Wrong()])
    with pytest.raises(ValueError, match="per_sample=False.*one number"):
        loss(transitions(4))


def test_decay_weighs_samples_and_not_the_batch() -> None:
    batch = transitions(4, 3)
    for name in ("done", "terminated", "truncated"):
        batch["next", name] = torch.zeros(4, 3, 1, dtype=torch.bool)
    loss = WorldModelLoss(
        make_model(), losses=[Variance(("next", "latent"))], multi_step=True, decay=0.5
    )
    plain = WorldModelLoss(
        loss.world_model, losses=[Variance(("next", "latent"))], multi_step=True
    )
    torch.testing.assert_close(
        loss(batch)["loss_variance"], plain(batch)["loss_variance"]
    )


def test_terminations_need_none_either() -> None:
    model, batch = make_model(done="terminated_logits"), transitions(4)
    must_not_run(model.dynamics)
    loss = WorldModelLoss(model, losses=[DoneTerm(real_next=True)])
    assert loss(batch)["loss_done"].requires_grad


def test_a_posterior_that_reads_a_prediction_reads_nothing_of_the_batch() -> None:
    """A term of the posterior needs predictions, which are no inputs."""

    class Corrections(LossTerm):
        components = ("posterior",)

        def labels(self, world_model, keys):
            return []

        def __call__(self, predicted, batch, loss):
            return predicted["next", "latent"].pow(2).mean(-1)

    model = WorldModel(
        linear(["observation"], ["seen"], (OBS, LATENT)),
        Mod(
            lambda z, a: (z + 1, 2 * z),
            ["latent", "action"],
            [("next", "latent"), ("next", "more")],
        ),
        posterior=Mod(
            lambda z, more, seen: z + more + seen,
            ["latent", "more", "seen"],
            ["latent"],
        ),
        initial_state={"latent": torch.zeros(LATENT)},
    )
    batch = transitions(2, 3)
    batch["latent"] = torch.zeros(2, 3, LATENT)  # stored: no episode begins here
    for name in ("done", "terminated", "truncated"):
        batch["next", name] = torch.zeros(2, 3, 1, dtype=torch.bool)
    loss = WorldModelLoss(model, losses=[Corrections("corrections")])
    assert "more" not in loss.in_keys
    assert loss(batch)["loss_corrections"].requires_grad
