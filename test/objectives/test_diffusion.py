"""The denoising term: contexts within an episode, masks, weights, and no sampler."""

from __future__ import annotations

import pytest
import torch
from _built import made_env, sequences
from _models import make_model
from _small_models import MAKE
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.modules import DiffusionSampler, fit_normalizers
from torchrl_wm.objectives import DenoisingTerm


class CountedSampler(DiffusionSampler):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


class Recorded(nn.Module):
    """A network that keeps what it is given, and says nothing."""

    def forward(self, x, noise, frames, actions):
        self.frames, self.actions = frames, actions
        return torch.zeros_like(x)


def parts(observations: str = "vector", rows: int = 2, steps: int = 6, **settings):
    torch.manual_seed(0)
    env = made_env(observations, "bounded")
    model, loss = MAKE["diffusion"](env, **settings)
    batch = sequences(env, rows, steps)
    batch["is_init"] = torch.zeros(rows, steps, 1, dtype=torch.bool)
    for key in model.encoder.in_keys:
        batch["next"][key][:, :-1] = batch[key][:, 1:]
    fit_normalizers(model, batch)
    counted = CountedSampler()
    model.dynamics.model.sampler = counted
    return env, model, loss, batch, counted


@pytest.mark.parametrize("observations", ["vector", "dictionary", "pixels"])
@pytest.mark.parametrize("head_memory", [False, True])
@pytest.mark.parametrize("context", [1, 4])
def test_no_loss_draws_frames(observations, head_memory, context) -> None:
    _, model, loss, batch, sampler = parts(
        observations, head_memory=head_memory, context=context
    )
    losses = loss(batch)
    assert sorted(losses.keys()) == ["loss_denoising", "loss_done", "loss_reward"]
    losses.sum(reduce=True).backward()
    assert sampler.calls == 0
    for name, part in (
        ("denoiser", model.dynamics.model.denoiser),
        ("reward", model.reward_head),
        ("done", model.done_head),
    ):
        grads = [p.grad for p in part.parameters()]
        assert any(g is not None and g.any() for g in grads), name
    model.observe(batch)  # predicts at every step
    assert sampler.calls == batch.shape[-1]


def test_a_policy_and_a_start_from_segments_draw_none_either() -> None:
    _, model, _, batch, sampler = parts("pixels")
    start = model.burn_in(batch)
    observer, td = model.observer(), batch[:, 0].exclude("next")
    td["is_init"] = torch.ones(2, 1, dtype=torch.bool)
    for t in range(3):
        td.update(batch[:, t].select("pixels"))
        observer(td)
        td["is_init"] = torch.zeros(2, 1, dtype=torch.bool)
    assert sampler.calls == 0
    encoded = model.encode(batch["next"][:, -1].select("pixels"))["frame"]
    torch.testing.assert_close(start["frame"], encoded)
    before = model.encode(batch[:, -3:].select("pixels"))["frame"]
    torch.testing.assert_close(start["past_frames"], before)


def contexts(loss: WorldModelLoss, batch: TensorDict, **kwargs):
    """What the network is conditioned on, ``[*B, T, K, ...]``."""
    network = loss.world_model.dynamics.model.denoiser.network = Recorded()
    loss(batch)
    size = batch.batch_size
    return [x.unflatten(0, size) for x in (network.frames, network.actions)]


@pytest.mark.parametrize("by", ["is_init", "done"])
def test_a_context_never_goes_beyond_the_beginning_of_its_episode(by) -> None:
    _, model, _, batch, _ = parts("pixels")
    if by == "is_init":
        batch["is_init"][0, 3] = True
    else:
        batch = batch.exclude("is_init")
        batch["next", "done"][0, 2] = True
    loss = WorldModelLoss(model, losses=[DenoisingTerm()])
    frames, actions = contexts(loss, batch)
    real = actions[..., -1]
    expected = torch.tensor(
        [
            [0, 0, 0, 1],
            [0, 0, 1, 1],
            [0, 1, 1, 1],
            [0, 0, 0, 1],
            [0, 0, 1, 1],
            [0, 1, 1, 1],
        ]
    )
    assert torch.equal(real[0], expected.float())
    assert torch.equal(real[1].sum(-1), torch.tensor([1.0, 2, 3, 4, 4, 4]))
    assert not frames[real == 0].any() and not actions[real == 0].any()
    encoded = model.encode(batch.select("pixels"))["frame"] / 0.5
    torch.testing.assert_close(frames[:, :, -1], encoded)
    torch.testing.assert_close(frames[1, 5], encoded[1, 2:6])


def test_a_context_never_goes_through_what_the_mask_calls_invalid() -> None:
    _, model, _, batch, _ = parts("pixels")
    batch["collector", "mask"] = torch.ones(2, 6, dtype=torch.bool)
    batch["collector", "mask"][0, 2] = False
    loss = WorldModelLoss(model, losses=[DenoisingTerm()])
    _, actions = contexts(loss, batch)
    real = actions[0, ..., -1].sum(-1)
    assert real[:2].tolist() == [1, 2] and real[3:].tolist() == [1, 2, 3]


def test_padding_of_any_kind_leaves_losses_and_gradients_finite() -> None:
    _, model, loss, batch, _ = parts()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    batch["collector", "mask"] = mask
    batch["observation"][:, 4:] = torch.nan
    batch["next", "observation"][:, 4:] = torch.nan
    total = loss(batch).sum(reduce=True)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_weights_count() -> None:
    _, model, _, batch, _ = parts()
    loss = WorldModelLoss(model, losses=[DenoisingTerm(2.0)], reduction="none")
    torch.manual_seed(3)
    each = loss(batch)["loss_denoising"]
    assert each.shape == (2, 6)
    batch["weight"] = torch.rand(2, 6)
    loss.reduction = "mean"
    torch.manual_seed(3)
    found = loss(batch)["loss_denoising"]
    weight = batch["weight"]
    torch.testing.assert_close(found, (each * weight).sum() / weight.sum())


@pytest.mark.parametrize("name", [None, "time"])
def test_single_windows(name) -> None:
    _, model, loss, batch, _ = parts()
    window = batch[0]
    window.names = [name]
    if name is None:
        with pytest.raises(ValueError, match="is trained on sequences"):
            loss(window)
    else:
        assert loss(window)["loss_denoising"].isfinite()


def test_without_context_transitions_will_do() -> None:
    _, _, loss, batch, _ = parts(context=1)
    assert loss(batch.reshape(-1))["loss_denoising"].isfinite()


def test_the_loss_falls() -> None:
    env, model, loss, _, _ = parts(hidden=(32, 32))
    torch.manual_seed(0)
    batch = sequences(env, 16, 6)
    following = 0.9 * batch["observation"]
    batch["next", "observation"] = following
    fit_normalizers(model, batch)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    values = []
    for _ in range(150):
        value = loss(batch)["loss_denoising"]
        optimizer.zero_grad(), value.backward(), optimizer.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.5 * sum(values[:10])


def test_open_loop_is_refused() -> None:
    _, model, _, batch, _ = parts()
    loss = WorldModelLoss(model, losses=[DenoisingTerm()], multi_step=True)
    with pytest.raises(ValueError, match="given real frames.*Leave out multi_step"):
        loss(batch)


def test_models_that_draw_no_frames_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'denoising' trains dynamics that draw frames"
    ):
        WorldModelLoss(make_model(), losses=[DenoisingTerm()])


def test_an_encoder_that_writes_no_frame_is_refused() -> None:
    _, model, _, _, _ = parts(context=1)
    other = WorldModel(
        Mod(nn.Identity(), ["observation"], ["seen"]), model.dynamics, model.reward_head
    )
    with pytest.raises(ValueError, match="denoises the latent 'frame'.*'seen'"):
        WorldModelLoss(other, losses=[DenoisingTerm()])
