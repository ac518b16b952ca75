"""Ensemble dynamics: propagation, elites, disagreement, units, and life in the env."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules import (
    BoundedLogVar,
    EnsembleDynamics,
    Entry,
    fit_normalizers,
    GaussianEnsemble,
    SampleMember,
    with_propagation,
)
from torchrl_wm.modules.blocks.ensemble_dynamics import PROPAGATIONS

OBS, ACTION, MEMBERS = 3, 2, 5
KEYS = ["observation", ("robot", "state")]


class Stub(nn.Module):
    """Members whose Gaussians are known: the mean of member ``m`` is ``m`` everywhere."""

    def __init__(self, members: int, sizes: tuple[int, int], log_var: float) -> None:
        super().__init__()
        self.members, self.out_features = members, sizes[1]
        self.network = nn.Module()
        self.network.in_features = sizes[0]
        self.log_var = log_var
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, value):
        shape = (self.members, *value.shape[:-1], self.out_features)
        number = torch.arange(self.members, dtype=torch.float32)
        loc = number.reshape(-1, *(1 for _ in shape[1:])).expand(shape) + self.offset
        return loc, torch.full(shape, self.log_var)


def entries(key="observation"):
    return [Entry.from_spec(key, Unbounded((OBS,)))], [
        Entry.from_spec("action", Unbounded((ACTION,)))
    ]


def dynamics_of(
    propagation="ts1", *, key="observation", ensemble=None, reward=True, **kwargs
) -> EnsembleDynamics:
    latents, actions = entries(key)
    head = Entry.from_spec("reward", Unbounded((1,))) if reward else None
    if ensemble is None:
        ensemble = GaussianEnsemble(
            MEMBERS, OBS + ACTION, OBS + bool(reward), hidden=(16,)
        )
    return EnsembleDynamics(
        ensemble, latents, actions, reward=head, propagation=propagation, **kwargs
    )


def model_of(propagation="ts1", key="observation", **kwargs) -> WorldModel:
    model = WorldModel(
        Mod(nn.Identity(), [key], [key]),
        dynamics_of(key=key, **kwargs),
        Mod(nn.Identity(), [("next", "ensemble_reward")], [("next", "reward")]),
    )
    return with_propagation(model, propagation)


def stub(log_var: float = -100.0, members: int = MEMBERS) -> Stub:
    return Stub(members, (OBS + ACTION, OBS + 1), log_var)


def inputs(*size: int, key="observation") -> TensorDict:
    td = TensorDict({"action": torch.randn(*size, ACTION)}, batch_size=size)
    return td.set(key, torch.randn(*size, OBS))


def transitions(*size: int, key="observation") -> TensorDict:
    td = inputs(*size, key=key)
    following = TensorDict({"reward": torch.randn(*size, 1) * 50 + 20}, size)
    following.set(key, td.get(key) + 0.01 * torch.randn(*size, OBS) + 3)
    return td.set("next", following)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [(), (4,), (2, 3)])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_shapes(key, size, propagation) -> None:
    dynamics = dynamics_of(propagation, key=key, normalize=False)
    td = inputs(*size, key=key)
    if propagation == "tsinf":
        td.set("member", torch.zeros(size, dtype=torch.int64))
    out = dynamics(td)["next"]
    assert out.get(key).shape == (*size, OBS)
    assert out["ensemble_reward"].shape == (*size, 1)
    assert out["loc"].shape == out["log_var"].shape == (*size, MEMBERS, OBS + 1)
    assert out["disagreement"].shape == (*size, 1)


def next_of(propagation: str, log_var: float = -100.0, n: int = 3000, **kwargs):
    """Next observations from ``[0, 0, 0]``, whose members are at 0, 1, 2, ..."""
    dynamics = dynamics_of(
        propagation, ensemble=stub(log_var), normalize=False, **kwargs
    )
    td = inputs(n)
    td["observation"].zero_()
    torch.manual_seed(0)
    return dynamics(td)["next"], dynamics


def test_ts1_follows_a_member_for_all_dims_of_a_row() -> None:
    out, _ = next_of("ts1")
    first = out["observation"][:, 0]
    assert torch.allclose(out["observation"], first.unsqueeze(-1).expand(-1, OBS))
    assert torch.allclose(out["ensemble_reward"][:, 0], first)
    counts = first.round().long().bincount(minlength=MEMBERS)
    assert (counts - 600).abs().max() < 100, counts


def test_ts1_draws_anew_at_each_step() -> None:
    model = model_of("ts1", ensemble=stub(), normalize=False)
    env = WorldModelEnv(model, SpecEnv(observation=OBS))
    out = env.imagine(6, tensordict=inputs(200).exclude("action"))
    moves = (out["next", "observation"] - out["observation"])[..., 0].round()
    assert (moves[:, :1] != moves).any(-1).float().mean() > 0.9


def test_tsinf_keeps_each_rows_member() -> None:
    model = model_of("tsinf", ensemble=stub(), normalize=False)
    env = WorldModelEnv(model, SpecEnv(observation=OBS))
    out = env.imagine(6, tensordict=inputs(500).exclude("action"))
    assert (out["member"] == out["member"][:, :1]).all()
    assert torch.equal(out["next", "member"], out["member"])
    moves = (out["next", "observation"] - out["observation"])[..., 0]
    assert torch.allclose(moves, out["member"].float(), atol=1e-4)
    assert set(out["member"].unique().tolist()) == set(range(MEMBERS))


def test_expectation_and_mean_average_the_members() -> None:
    mean, _ = next_of("mean", log_var=1.0)
    assert torch.allclose(mean["observation"], torch.full((3000, OBS), 2.0))
    sampled, _ = next_of("expectation", log_var=1.0)
    noise = sampled["observation"] - 2
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - torch.tensor(0.5).exp()) < 0.05


def test_elites_alone_make_predictions_and_all_are_written() -> None:
    held_out = inputs(50)
    # Members are at 0..4; the target is 3, so that 3, then 2 and 4, are best.
    held_out["next"] = TensorDict(
        {
            "observation": held_out["observation"] + 3.2,
            "reward": torch.full((50, 1), 3.2),
        },
        [50],
    )
    dynamics = dynamics_of("ts1", ensemble=stub(), normalize=False, elites=2)
    assert dynamics.elites.tolist() == [0, 1]
    errors = dynamics.choose_elites(held_out)
    expected = (torch.arange(5.0) - 3.2) ** 2
    assert torch.allclose(errors, expected, atol=1e-4)
    assert dynamics.elites.tolist() == [3, 4]
    out = dynamics(inputs(500))
    moved = out["next", "observation"] - out["observation"]
    assert set(moved.round().unique().tolist()) == {3.0, 4.0}
    mean = dynamics.with_propagation("mean")(inputs(5))
    assert torch.allclose(
        mean["next", "observation"] - mean["observation"], torch.tensor(3.5)
    )
    assert out["next", "loc"].shape[-2] == MEMBERS
    drawn = SampleMember(dynamics)(inputs(500))["member"]
    assert set(drawn.tolist()) == {3, 4}


@pytest.mark.parametrize("target", ["delta", "absolute"])
def test_means_are_of_the_next_latents_in_units_of_the_data(target) -> None:
    batch = transitions(200)
    ensemble = stub(log_var=0.0)
    dynamics = dynamics_of("mean", ensemble=ensemble, target=target)
    dynamics.fit_normalizers(batch)
    # Member 0 is at the targets' mean, and member m is m standard deviations away.
    out = dynamics(batch.clone())["next"]
    real = torch.cat([batch["next", "observation"], batch["next", "reward"]], -1)
    base = torch.cat([batch["observation"], torch.zeros(200, 1)], -1)
    targets = real - base if target == "delta" else real
    start = base if target == "delta" else torch.zeros_like(base)
    mean, std = targets.mean(0), targets.std(0, unbiased=False)
    for member in range(MEMBERS):
        expected = start + mean + member * std
        assert torch.allclose(out["loc"][:, member], expected, atol=1e-3)
    assert torch.allclose(out["log_var"], (2 * std.log()).expand_as(out["log_var"]))
    chosen = torch.cat([out["observation"], out["ensemble_reward"]], -1)
    assert torch.allclose(chosen, start + mean + 2 * std, atol=1e-3)


def test_disagreement_is_the_spread_in_units_of_the_targets() -> None:
    batch = transitions(100)
    dynamics = dynamics_of("mean", ensemble=stub())
    dynamics.fit_normalizers(batch)
    expected = torch.arange(5.0).std(unbiased=False)
    assert torch.allclose(dynamics(batch)["next", "disagreement"], expected)


def test_an_ensemble_of_one_works() -> None:
    model = model_of("ts1", ensemble=GaussianEnsemble(1, OBS + ACTION, OBS + 1))
    batch = transitions(20)
    fit_normalizers(model, batch)
    assert model.dynamics.choose_elites(batch).shape == (1,)
    for propagation in PROPAGATIONS:
        env = WorldModelEnv(
            with_propagation(model, propagation), SpecEnv(observation=OBS)
        )
        out = env.rollout(3, tensordict=inputs(4).exclude("action"))
        assert out["next", "observation"].isfinite().all()
    model.dynamics(batch)
    assert torch.equal(batch["next", "disagreement"], torch.zeros(20, 1))
    batch["next", "disagreement"].sum().backward()
    grads = [p.grad for p in model.dynamics.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


ACTIONS = {
    "continuous": lambda: Bounded(-1.0, 1.0, (ACTION,)),
    "matrix": lambda: Bounded(-1.0, 1.0, (2, 1)),
    "categorical": lambda: Categorical(ACTION),
}


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("action", sorted(ACTIONS))
@pytest.mark.parametrize("size", [[], [4], [2, 3]])
def test_it_lives_in_the_env(propagation, action, size) -> None:
    spec = ACTIONS[action]()
    key = KEYS[1]
    latents = [Entry.from_spec(key, Unbounded((OBS,)))]
    ensemble = GaussianEnsemble(MEMBERS, OBS + ACTION, OBS + 1, hidden=(8,))
    dynamics = EnsembleDynamics(
        ensemble,
        latents,
        [Entry.from_spec("action", spec)],
        reward=Entry.from_spec("reward", Unbounded((1,))),
        normalize=False,
    )
    model = WorldModel(
        Mod(nn.Identity(), [key], [key]),
        dynamics,
        Mod(nn.Identity(), [("next", "ensemble_reward")], [("next", "reward")]),
    )
    env = WorldModelEnv(
        with_propagation(model, propagation),
        SpecEnv(observation=OBS, observation_key=key, action_spec=spec),
        batch_size=size,
        start_states=inputs(10, key=key),
        observation_spec=Composite(disagreement=Unbounded((1,))),
        max_steps=3,
    )
    check_env_specs(env)
    env.set_seed(1)
    out = env.rollout(3)
    assert env.slow_because is None
    assert (out["next", "disagreement"] > 0).all()
    env.set_seed(1)
    assert (env.rollout(3) == out).all(), "a seed repeats the rollout"
    assert ("member" in out.keys()) == (propagation == "tsinf")


def test_a_given_member_is_followed() -> None:
    model = model_of("tsinf", ensemble=stub(), normalize=False)
    env = WorldModelEnv(model, SpecEnv(observation=OBS))
    start = inputs(6).exclude("action").set("member", torch.tensor([0, 1, 2, 3, 4, 0]))
    for out in (env.rollout(3, tensordict=start), env.imagine(3, tensordict=start)):
        assert torch.equal(out["member"][:, 1], start["member"])
    assert torch.equal(model.encode(start.clone())["member"], start["member"])
    bad = model.encode(inputs(6)).set("member", torch.zeros(6))
    with pytest.raises(ValueError, match="'member' must be int64"):
        model.dynamics(bad)


def test_views_share_everything() -> None:
    model = model_of("ts1", elites=2)
    view = with_propagation(model, "tsinf")
    assert [p.data_ptr() for p in view.parameters()] == [
        p.data_ptr() for p in model.parameters()
    ]
    fit_normalizers(model, transitions(50))
    model.dynamics.choose_elites(transitions(50))
    assert torch.equal(view.dynamics.elites, model.dynamics.elites)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view(inputs(4))
    back = with_propagation(view, "mean")
    assert (
        "member" not in back.encoder.out_keys and back.latent_keys == model.latent_keys
    )
    state = view.state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    twin = copy.deepcopy(view)
    twin.dynamics.elites.copy_(torch.tensor([4, 4]))
    assert set(twin.encode(inputs(50))["member"].tolist()) == {4}


def test_held_out_padding_is_left_out() -> None:
    dynamics, batch = dynamics_of(normalize=False), transitions(10)
    expected = dynamics.member_errors(batch[:6])
    batch["observation"][6:] = float("nan")
    batch.set(("collector", "mask"), torch.arange(10) < 6)
    assert torch.allclose(dynamics.member_errors(batch), expected)


def test_a_view_keeps_the_other_components() -> None:
    model = model_of(normalize=False)
    head = Mod(
        nn.Linear(OBS, 1), [("next", "observation")], [("next", "terminated_logits")]
    )
    model.done_head = head
    assert with_propagation(model, "tsinf").done_head is head


def test_float64_observations_stay_float64() -> None:
    latents = [Entry.from_spec("observation", Unbounded((OBS,), dtype=torch.float64))]
    dynamics = EnsembleDynamics(
        GaussianEnsemble(2, OBS, OBS, hidden=(8,)), latents, [], normalize=False
    )
    td = TensorDict({"observation": torch.randn(4, OBS).double()}, [4])
    assert dynamics(td)["next", "observation"].dtype is torch.float64


def test_wrong_wirings_are_named() -> None:
    with pytest.raises(ValueError, match="in_features=9.*ask for 5"):
        dynamics_of(ensemble=GaussianEnsemble(2, 9, OBS + 1))
    with pytest.raises(ValueError, match="out_features=3.*ask for 4"):
        dynamics_of(ensemble=GaussianEnsemble(2, OBS + ACTION, OBS))
    with pytest.raises(ValueError, match="between 1 and the 5 members, got 6"):
        dynamics_of(elites=6)
    with pytest.raises(ValueError, match="Unknown propagation 'ts2'"):
        dynamics_of("ts2")
    with pytest.raises(ValueError, match="Unknown target 'change'"):
        dynamics_of(target="change")
    with pytest.raises(KeyError, match=r"needs \('next', 'reward'\)"):
        dynamics_of().fit_normalizers(transitions(5).exclude(("next", "reward")))
    plain = model_of()
    plain.dynamics = Mod(
        nn.Linear(OBS, OBS), ["observation"], [("next", "observation")]
    )
    plain.reward_head = Mod(nn.Linear(OBS, 1), ["observation"], [("next", "reward")])
    with pytest.raises(TypeError, match="EnsembleDynamics, got TensorDictModule"):
        with_propagation(plain, "mean")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_a_view_is_in_the_mode_of_its_model(training, propagation) -> None:
    view = with_propagation(model_of("mean").train(training), propagation)
    assert all(module.training is training for module in view.modules())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("elites", [3, MEMBERS])
@pytest.mark.parametrize("rows", [1, 4, 1003])
def test_rows_that_ask_their_own_member_alone(rows, elites, key):
    model = model_of("ts1", key=key, elites=elites, normalize=False)
    view = with_propagation(model, "ts1", all_members=False)
    assert ("next", "loc") not in view.dynamics.out_keys
    ensemble, elites = model.dynamics.ensemble, model.dynamics.elites
    with torch.no_grad():  # member m adds m, with nearly no noise
        elites.copy_(torch.arange(MEMBERS)[-len(elites) :])
        for layer in ensemble.network.layers:
            layer.weight.zero_()
        ensemble.bounds = BoundedLogVar(OBS + 1, low=-20.0, high=-19.0)
        means, _ = ensemble.network.layers[-1].bias.chunk(2, -1)
        means.copy_(torch.arange(float(MEMBERS)).reshape(-1, 1, 1).expand_as(means))
    counts = torch.zeros(MEMBERS)
    for _ in range(3 if rows > 100 else 500):
        td = inputs(rows, key=key)
        change = view.dynamics(td.copy()).get(("next", key)) - td.get(key)
        member = change[..., 0].round()
        assert (change - member.unsqueeze(-1)).abs().max() < 1e-3
        counts += member.long().bincount(minlength=MEMBERS)
    share = counts[elites] / counts.sum()
    assert (share - 1 / len(elites)).abs().max() < 0.08


def test_own_members_have_gradients_and_no_batch():
    model = model_of("ts1", normalize=False)
    view = with_propagation(model, "ts1", all_members=False)
    td = inputs()
    td["action"].requires_grad_()
    view.dynamics(td)["next", "observation"].sum().backward()
    assert td["action"].grad.abs().sum() > 0


def test_what_never_changed_is_predicted_to_stay():
    dynamics = dynamics_of("ts1")
    batch = transitions(50)
    batch["next", "reward"] = torch.ones(50, 1)
    dynamics.fit_normalizers(batch)
    far = inputs(20)
    far["observation"] = 30 + far["observation"]
    out = dynamics(far)["next"]
    assert (out["ensemble_reward"] == 1).all()
    assert out["log_var"].isfinite().all() and out["observation"].std() > 0


@pytest.mark.parametrize("key", KEYS)
def test_what_never_changed_is_no_matter_of_members(key):
    """What they say of it is neither trained nor used, so none is better and none disagrees."""
    dynamics, batch = dynamics_of(key=key, elites=2), transitions(50, key=key)
    batch["next", "reward"] = torch.ones(50, 1)
    dynamics.fit_normalizers(batch)

    def judged():
        errors = dynamics.choose_elites(batch)
        spread = dynamics(batch.copy())["next", "disagreement"]
        return errors, dynamics.elites.tolist(), spread

    means, _ = dynamics.ensemble.network.layers[-1].bias.data.chunk(2, -1)
    before = judged()
    means[:, :, OBS] += torch.arange(1.0, MEMBERS + 1).flip(0).unsqueeze(-1)
    after = judged()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    assert torch.equal(before[2], after[2])
    means[:, :, 0] += torch.arange(1.0, MEMBERS + 1).flip(0).unsqueeze(-1)
    errors, elites, disagreement = judged()
    assert elites == [MEMBERS - 2, MEMBERS - 1], "what changes, counts"
    assert (disagreement > after[2]).all()
