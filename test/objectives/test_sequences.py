"""The loss over sequences: open loop, filtering, target parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _models import ACTION, gru_model, LATENT, make_model, OBS, rssm_model, transitions
from hypothesis import given, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torch.distributions import kl_divergence, Normal
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.modules import Entry, fit_normalizers, NormalizedNetwork
from torchrl_wm.objectives import LossTerm

ALL = ["reward", "done", "reconstruction", "latent"]


def full_model() -> WorldModel:
    return make_model(done="terminated_logits", decoder="reconstructed_observation")


def alive(*size: int) -> TensorDict:
    """Sequences without an end."""
    batch = transitions(*size)
    for name in ("done", "terminated", "truncated"):
        batch["next", name].zero_()
    return batch


class TestOpenLoop:
    @pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
    @pytest.mark.parametrize("decay", [1.0, 0.5])
    def test_formula(self, size, decay) -> None:
        model, batch = full_model(), alive(*size)
        loss = WorldModelLoss(model, losses=ALL, multi_step=True, decay=decay)
        latent = model.encoder.module(batch["observation"][..., 0, :])
        terms = {name: [] for name in ALL}
        for t in range(size[-1]):
            now = batch[..., t]
            decoded = model.decoder.module(latent)
            latent = model.dynamics.module(latent, now["action"])
            target = model.encoder.module(now["next", "observation"])
            reward = model.reward_head.module(latent)
            logits = model.done_head.module(latent)
            errors = {
                "reward": (reward - now["next", "reward"]).pow(2),
                "done": F.binary_cross_entropy_with_logits(
                    logits, now["next", "terminated"].float(), reduction="none"
                ),
                "reconstruction": (decoded - now["observation"]).pow(2),
                "latent": (latent - target).pow(2),
            }
            for name, error in errors.items():
                terms[name].append(decay**t * error.mean())
        out = loss(batch)
        for name in ALL:
            expected = torch.stack(terms[name]).mean()
            torch.testing.assert_close(out[f"loss_{name}"], expected)

    @given(data=st.data())
    def test_stops_at_episode_ends(self, data) -> None:
        """Steps after the first end, or before which an episode begins, do not count."""
        rows, steps = 3, 5
        model, batch = full_model(), alive(rows, steps)
        ends = data.draw(
            st.lists(st.integers(1, steps), min_size=rows, max_size=rows), "ends"
        )
        by_init = data.draw(st.booleans(), "said by is_init")
        batch["is_init"] = torch.zeros(rows, steps, 1, dtype=torch.bool)
        for row, end in enumerate(ends):
            if by_init and end < steps:
                batch["is_init"][row, end] = True
            else:
                batch["next", "done"][row, end - 1] = True
        loss = WorldModelLoss(
            model, losses=ALL, multi_step=True, decay=0.7, reduction="none"
        )
        out = loss(batch)
        mean = WorldModelLoss(model, losses=ALL, multi_step=True, decay=0.7)(batch)
        for name in out.keys():
            for row, end in enumerate(ends):
                assert not out[name][row, end:].any()
                alone = loss(batch[row : row + 1, :end])[name]
                torch.testing.assert_close(out[name][row : row + 1, :end], alone)
            torch.testing.assert_close(mean[name], out[name].sum() / sum(ends))

    def test_trains_through_time(self) -> None:
        model, batch = make_model(), alive(2, 4)
        last = torch.zeros(2, 4)
        last[:, -1] = 1.0  # only the last step counts
        batch["weight"] = last
        loss = WorldModelLoss(model, losses=["reward"], multi_step=True)
        batch["action"].requires_grad_()
        loss(batch)["loss_reward"].backward()
        assert (batch["action"].grad.abs().sum((0, 2)) > 0).all()

    def test_recurrent(self) -> None:
        model, batch = gru_model(), alive(2, 4)
        loss = WorldModelLoss(model, losses=["reward"], multi_step=True)
        latent = model.encoder.module(batch["observation"][:, 0])
        belief = model.initial_state((2,))["belief"]
        errors = []
        for t in range(4):
            latent, belief = model.dynamics.module(
                latent, belief, batch["action"][:, t]
            )
            reward = model.reward_head.module(belief)
            errors.append((reward - batch["next", "reward"][:, t]).pow(2).mean())
        torch.testing.assert_close(
            loss(batch)["loss_reward"], torch.stack(errors).mean()
        )

    def test_stored_latents_and_the_encoder(self) -> None:
        """Stored beliefs are where it starts; what the encoder writes is encoded anew."""
        model, batch = gru_model(), alive(2, 4)
        batch["latent"], batch["belief"] = torch.zeros(2, 4, LATENT), torch.ones(
            2, 4, 5
        )
        loss = WorldModelLoss(model, losses=["reward"], multi_step=True)
        latent = model.encoder.module(batch["observation"][:, 0])
        belief, errors = torch.ones(2, 5), []
        for t in range(4):
            latent, belief = model.dynamics.module(
                latent, belief, batch["action"][:, t]
            )
            reward = model.reward_head.module(belief)
            errors.append((reward - batch["next", "reward"][:, t]).pow(2).mean())
        value = loss(batch)["loss_reward"]
        torch.testing.assert_close(value, torch.stack(errors).mean())
        value.backward()
        assert model.encoder.module[0].weight.grad.any()
        # An episode that begins with the slice begins with the initial state.
        batch["is_init"] = torch.zeros(2, 4, 1, dtype=torch.bool)
        batch["is_init"][:, 0] = True
        fresh = loss(batch.exclude("latent", "belief"))["loss_reward"]
        torch.testing.assert_close(loss(batch)["loss_reward"], fresh)

    @pytest.mark.parametrize("where", ["true_done", "agents"])
    def test_ends_under_other_keys(self, where) -> None:
        batch = alive(3, 4)
        ended = batch["next"].pop("done")
        ended[:, 1] = True
        loss = WorldModelLoss(make_model(), losses=["reward"], multi_step=True)
        expected = loss(batch[:, :2])["loss_reward"]
        if where == "true_done":
            batch["next", "real_done"] = ended
            loss.set_keys(true_done="real_done")
        else:
            batch["next", "agents", "done"] = ended.unsqueeze(-1).expand(3, 4, 2, 1)
        torch.testing.assert_close(loss(batch)["loss_reward"], expected)

    def test_slices_of_a_replay_buffer(self) -> None:
        sampler = SliceSampler(
            slice_len=5, end_key=("next", "done"), strict_length=True
        )
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(100), sampler=sampler, batch_size=20
        )
        data = alive(60)
        data["next", "done"][[29, 59]] = True
        buffer.extend(data)
        loss = WorldModelLoss(make_model(), losses=["latent"], multi_step=True)
        with pytest.raises(ValueError, match=r"\(20,\).*reshape\(-1, T\)"):
            loss(buffer.sample())
        assert loss(buffer.sample().reshape(-1, 5))["loss_latent"].isfinite()

    def test_masked_padding(self) -> None:
        model, batch = full_model(), alive(3, 5)
        loss = WorldModelLoss(model, losses=ALL, multi_step=True)
        expected = loss(batch[:, :3])
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[:, :3] = True
        for key in (
            "observation",
            "action",
            ("next", "observation"),
            ("next", "reward"),
        ):
            batch[key][:, 3:] = float("nan")
        batch["collector", "mask"] = mask
        out = loss(batch)
        for name in out.keys():
            torch.testing.assert_close(out[name], expected[name])
        out.sum(reduce=True).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("key", [("collector", "mask"), "there", ("my", "mask")])
    def test_stops_at_the_first_masked_step(self, key) -> None:
        """What comes behind it would be predicted from inputs that are not there."""
        model, batch = full_model(), alive(4, 5)
        ends = [5, 3, 1, 0]
        mask = torch.ones(4, 5, 1, dtype=torch.bool)
        for row, end in enumerate(ends[1:], 1):
            mask[row, end] = False
        batch.set(key, mask)
        settings = {"losses": ALL, "multi_step": True, "decay": 0.7}
        loss = WorldModelLoss(model, reduction="none", **settings)
        mean = WorldModelLoss(model, **settings)
        if key != ("collector", "mask"):
            loss.set_keys(mask=key), mean.set_keys(mask=key)
        expected = WorldModelLoss(model, reduction="none", **settings)
        out, whole = loss(batch), expected(batch.exclude(key, "collector"))
        for name in out.keys():
            for row, end in enumerate(ends):
                assert not out[name][row, end:].any()
                torch.testing.assert_close(out[name][row, :end], whole[name][row, :end])
            torch.testing.assert_close(mean(batch)[name], out[name].sum() / sum(ends))
        nothing = mean(batch[3:])
        assert all(value == 0 for value in nothing.values())

    def test_single_transitions_may_be_masked_anywhere(self) -> None:
        batch, mask = alive(2, 4), torch.tensor([True, False, True, True])
        batch["collector", "mask"] = mask.expand(2, 4)
        loss = WorldModelLoss(make_model(), losses=["reward"], reduction="none")
        out, whole = loss(batch), loss(batch.exclude("collector"))
        expected = whole["loss_reward"] * mask
        torch.testing.assert_close(out["loss_reward"], expected)
        assert expected[:, 2:].all()

    def test_bad_arguments(self) -> None:
        for decay in (0.0, -1.0, 1.5):
            with pytest.raises(ValueError, match=f"decay={decay}"):
                WorldModelLoss(make_model(), multi_step=True, decay=decay)
        with pytest.raises(ValueError, match="decay=0.9 with multi_step=False"):
            WorldModelLoss(make_model(), decay=0.9)
        loss = WorldModelLoss(make_model(), multi_step=True)
        with pytest.raises(ValueError, match="sequences.*time last.*refine_names"):
            loss(alive(4))
        loss(alive(4).refine_names("time"))  # one sequence that says so
        with pytest.raises(ValueError, match="time last"):
            loss(alive(4, 3).refine_names("time", None))


class TestFiltering:
    @pytest.mark.parametrize("version", [1, 3])
    def test_heads_see_the_filtered_latents(self, version) -> None:
        model, batch = rssm_model(version), alive(2, 5)
        loss = WorldModelLoss(
            model, losses=["reward", "reconstruction"], reconstruction_target="next"
        )
        torch.manual_seed(3)
        out = loss(batch)
        torch.manual_seed(3)
        filtered = model.observe(batch.exclude(("next", "reward")))
        reward = model.reward_head.module(
            filtered["next", "state"], filtered["next", "belief"]
        )
        decoded = model.decoder.module(
            filtered["next", "state"], filtered["next", "belief"]
        )
        expected = (reward - batch["next", "reward"]).pow(2).mean()
        torch.testing.assert_close(out["loss_reward"], expected)
        expected = (decoded - batch["next", "observation"]).pow(2).mean()
        torch.testing.assert_close(out["loss_reconstruction"], expected)
        out.sum(reduce=True).backward()
        for name in ("encoder", "dynamics", "posterior", "reward_head", "decoder"):
            grads = [p.grad for p in getattr(model, name).parameters()]
            assert any(grad is not None and grad.any() for grad in grads), name

    def test_parameters_of_every_part(self) -> None:
        model = rssm_model()
        loss = WorldModelLoss(model, losses=["reward", "reconstruction"])
        assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}

    def test_term_that_trains_the_posterior(self) -> None:
        """A KL between prior and posterior, as RSSMs need it."""

        class KL(LossTerm):
            components = ("posterior",)

            def labels(self, world_model, keys):
                return []

            def __call__(self, predicted, batch, loss):
                nxt = predicted["next"]
                prior = Normal(nxt["prior_mean"], nxt["prior_std"])
                posterior = Normal(nxt["posterior_mean"], nxt["posterior_std"])
                return kl_divergence(posterior, prior).sum(-1)

        model, batch = rssm_model(), alive(2, 5)
        out = WorldModelLoss(model, losses=["reward", KL("kl", 0.5)])(batch)
        assert out["loss_kl"] > 0
        out["loss_kl"].backward()
        assert any(p.grad is not None for p in model.posterior.parameters())
        with pytest.raises(ValueError, match="'kl' trains the posterior"):
            WorldModelLoss(make_model(), losses=[KL("kl")])

    def test_observation_as_recurrent_latent(self) -> None:
        base = gru_model()
        keys = {"latent": "observation"}
        model = WorldModel(
            Mod(torch.nn.Identity(), ["observation"], ["observation"]),
            Mod(
                lambda x, b, a: (x + b[..., :1], b + a[..., :1]),
                ["observation", "belief", "action"],
                [("next", "observation"), ("next", "belief")],
            ),
            base.reward_head,
            initial_state=base.initial_state(()),
        )
        out = WorldModelLoss(model, losses=["latent", "reward"])(alive(2, 4))
        assert out["loss_latent"].isfinite() and keys

    def test_respects_is_init(self) -> None:
        model, batch = gru_model(), alive(2, 6)
        loss = WorldModelLoss(model, losses=["reward", "latent"], reduction="none")
        batch["is_init"] = torch.zeros(2, 6, 1, dtype=torch.bool)
        batch["is_init"][:, 3] = True
        out, tail = loss(batch), loss(batch[:, 3:])
        for name in out.keys():
            torch.testing.assert_close(out[name][:, 3:], tail[name])

    def test_stored_latents_start_a_slice(self) -> None:
        model, batch = gru_model(), alive(2, 4)
        loss = WorldModelLoss(model, losses=["reward"])
        fresh = loss(batch)["loss_reward"]
        batch["latent"] = torch.randn(2, 4, LATENT)
        batch["belief"] = torch.randn(2, 4, 5)
        assert loss(batch)["loss_reward"] != fresh

    def test_flat_transitions_are_refused(self) -> None:
        loss = WorldModelLoss(gru_model(), losses=["reward"])
        with pytest.raises(ValueError, match="recurrent world model.*sequences"):
            loss(alive(8))

    def test_missing_observations(self) -> None:
        loss = WorldModelLoss(gru_model(), losses=["reward"])
        with pytest.raises(KeyError, match=r"lacks \[\('next', 'observation'\)\]"):
            loss(alive(2, 4).exclude(("next", "observation")))

    def test_padding_gives_finite_gradients(self) -> None:
        model, batch = rssm_model(), alive(2, 5)
        batch["collector", "mask"] = torch.ones(2, 5, dtype=torch.bool)
        batch["collector", "mask"][:, 3:] = False
        for key in (
            "observation",
            "action",
            ("next", "observation"),
            ("next", "reward"),
        ):
            batch[key][:, 3:] = float("nan")
        loss = WorldModelLoss(model, losses=["reward", "reconstruction"])
        loss(batch).sum(reduce=True).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)


class TestTargetEncoder:
    def test_target_is_the_delayed_encoder(self) -> None:
        model, batch = make_model(), transitions(5)
        loss = WorldModelLoss(model, losses=["latent"], delay_encoder=True)
        update = SoftUpdate(loss, tau=0.1)
        old = [p.clone() for p in model.encoder.parameters()]
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(1.0)
        with torch.no_grad():
            predicted = model(batch.clone())["next", "latent"]
        x = batch["next", "observation"]
        target = (x @ old[0].T + old[1]).tanh() @ old[2].T + old[3]
        expected = (predicted - target).pow(2).mean()
        torch.testing.assert_close(loss(batch)["loss_latent"], expected)
        update.step()
        weight = loss.target_encoder_params["module", "0", "weight"]
        torch.testing.assert_close(weight, old[0] + 0.1)
        assert not weight.requires_grad
        assert torch.equal(model.encoder.module[0].weight, old[0] + 1)

    def test_hard_update(self) -> None:
        model = make_model()
        loss = WorldModelLoss(model, losses=["latent"], delay_encoder=True)
        update = HardUpdate(loss, value_network_update_interval=2)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(1.0)
        for _ in range(3):
            update.step()
        weight = loss.target_encoder_params["module", "0", "weight"]
        assert torch.equal(weight, model.encoder.module[0].weight)

    def test_without_delay_it_is_the_encoder(self) -> None:
        loss = WorldModelLoss(make_model(), losses=["latent"])
        assert "target_encoder_params" not in dict(loss.named_modules())
        with pytest.raises(RuntimeError, match="target parameters"):
            SoftUpdate(loss, tau=0.1)

    def test_state_dict_round_trip(self) -> None:
        batch = transitions(5)
        one, two = (
            WorldModelLoss(full_model(), losses=ALL, delay_encoder=True)
            for _ in range(2)
        )
        SoftUpdate(one, tau=0.5), SoftUpdate(two, tau=0.5)
        two.load_state_dict(one.state_dict())
        assert (one(batch) == two(batch)).all()

    @pytest.mark.parametrize("update", [SoftUpdate, HardUpdate, None])
    @pytest.mark.parametrize("key", ["observation", ("robot", "state")])
    def test_it_normalises_as_the_encoder_whenever_that_is_fitted(
        self, key, update
    ) -> None:
        """Statistics are facts: the target follows them, and its weights stay behind."""
        entry = Entry(key, (OBS,), torch.float32)
        encoder = NormalizedNetwork([entry], nn.Linear(OBS, LATENT))
        dynamics = nn.Linear(LATENT + ACTION, LATENT)
        model = WorldModel(
            Mod(encoder, [key], ["latent"]),
            Mod(
                lambda s, a: dynamics(torch.cat([s, a], -1)),
                ["latent", "action"],
                [("next", "latent")],
            ),
            Mod(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
        )
        batch = transitions(50)
        seen = [5 + 3 * batch.pop("observation"), 5 + 3 * batch["next", "observation"]]
        batch.set(key, seen[0])
        batch["next"].set(key, seen[1])
        loss = WorldModelLoss(model, losses=["latent"], delay_encoder=True)
        updater = update and update(
            loss, **({"tau": 0.1} if update is SoftUpdate else {})
        )
        old = [p.clone() for p in encoder.network.parameters()]
        for scale in (1.0, 2.0):  # fitted once, and again
            fit_normalizers(model, batch.clone().set(key, scale * seen[0]))
            with torch.no_grad():
                encoder.network.weight.add_(1.0)
                x = encoder.normalizer(seen[1])
                predicted = model(batch.clone())["next", "latent"]
            expected = (predicted - (x @ old[0].T + old[1])).pow(2).mean()
            torch.testing.assert_close(loss(batch)["loss_latent"], expected)
        if update is SoftUpdate:
            updater.step()
            moved = loss.target_encoder_params["module", "network", "weight"]
            torch.testing.assert_close(moved, old[0] + 0.2)
        two = WorldModelLoss(model, losses=["latent"], delay_encoder=True)
        two.load_state_dict(loss.state_dict())
        assert (two(batch) == loss(batch)).all()

    def test_failing_encoder_keeps_its_parameters(self) -> None:
        model, batch = make_model(), transitions(5)
        loss = WorldModelLoss(model, losses=["latent"], delay_encoder=True)
        SoftUpdate(loss, tau=0.5)
        mine = list(model.encoder.parameters())
        batch["next", "observation"] = torch.randn(5, OBS + 1)
        with pytest.raises(RuntimeError):
            loss(batch)
        assert all(a is b for a, b in zip(mine, model.encoder.parameters()))


def test_functional_parameters() -> None:
    """Other parameters can be put in for a call, as with TorchRL's losses."""
    model, batch = full_model(), transitions(5)
    loss = WorldModelLoss(model, losses=ALL)
    expected = loss(batch)
    with loss.encoder_params.data.apply(torch.zeros_like).to_module(loss.encoder):
        pass  # the module has its own parameters again
    assert (loss(batch) == expected).all()
    for name in ("encoder", "dynamics", "reward_head", "done_head", "decoder"):
        assert getattr(loss, f"{name}_params").requires_grad


@pytest.mark.parametrize(
    "make,options",
    [
        (full_model, {"losses": ALL}),
        (full_model, {"losses": ALL, "multi_step": True, "decay": 0.9}),
        (gru_model, {"losses": ["reward", "latent"]}),
    ],
    ids=["one step", "open loop", "filtering"],
)
def test_compiles_in_one_graph(make, options) -> None:
    model, batch = make(), transitions(2, 3)
    loss = WorldModelLoss(model, **options)
    expected = loss(batch)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    out = compiled(batch)
    for name in expected.keys():
        torch.testing.assert_close(out[name], expected[name])


def test_nested_keys_over_sequences() -> None:
    model = make_model(latent=("deep", "latent"), action=("act", "torque"))
    flat = alive(2, 4)
    batch = flat.exclude("action").set(("act", "torque"), flat["action"])
    out = WorldModelLoss(model, losses=["reward", "latent"], multi_step=True)(batch)
    plain = make_model()
    for name, module in plain.components.items():
        module.load_state_dict(model.components[name].state_dict())
    expected = WorldModelLoss(plain, losses=["reward", "latent"], multi_step=True)(flat)
    assert (out == expected).all()


@pytest.mark.parametrize("key", ["over", ("robot", "over")])
@pytest.mark.parametrize("name", ["done", "true_done"])
def test_filters_begin_anew_where_another_key_says_so(name, key) -> None:
    model = gru_model()
    batch = alive(2, 5)
    ended = torch.zeros(2, 5, 1, dtype=torch.bool)
    batch = batch.exclude("is_init", ("next", "done"), ("next", "terminated"))
    loss = WorldModelLoss(model)
    without = loss(batch)["loss_reward"]
    ended[0, 2] = True
    expected = loss(batch.clone().set(("next", "done"), ended))["loss_reward"]
    assert not torch.equal(expected, without)
    loss.set_keys(**{name: key})
    place = ("next", *((key,) if isinstance(key, str) else key))
    got = loss(batch.clone().set(place, ended))["loss_reward"]
    assert torch.equal(got, expected)
    assert loss(batch.clone().select(*loss.in_keys)) is not None


class TestSlices:
    """Batches of learners that sample by themselves: flat, slice after slice."""

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_flat_batch_is_read_as_slices(self, nested) -> None:
        keys = {"latent": ("agent", "z"), "reward": ("agent", "reward")}
        model = make_model(**keys) if nested else make_model()
        batch = alive(4, 3)
        batch["next", "agent"] = TensorDict(
            {"reward": batch["next", "reward"]}, batch.batch_size
        )
        batch["priority_weight"] = torch.rand(4, 3)
        loss = WorldModelLoss(model, losses=["reward", "latent"], multi_step=True)
        if nested:
            loss.set_keys(reward=("agent", "reward"))
        expected = loss(batch)
        with pytest.raises(ValueError, match="slice_len=T"):
            loss(batch.reshape(-1))
        loss.slice_len = 3
        for rows in (batch, batch.reshape(-1)):
            torch.testing.assert_close(loss(rows).to_dict(), expected.to_dict())

    def test_each_step_has_its_number(self) -> None:
        loss = WorldModelLoss(
            make_model(), multi_step=True, slice_len=3, reduction="none"
        )
        assert loss(alive(12))["loss_reward"].shape == (4, 3)

    def test_a_recurrent_model(self) -> None:
        batch, loss = alive(4, 3), WorldModelLoss(gru_model(), slice_len=3)
        torch.testing.assert_close(
            loss(batch.reshape(-1))["loss_reward"], loss(batch)["loss_reward"]
        )

    def test_parts_of_slices_are_an_error(self) -> None:
        loss = WorldModelLoss(make_model(), multi_step=True, slice_len=5)
        with pytest.raises(ValueError, match="slice_len=5.*12 steps.*SliceSampler"):
            loss(alive(12))
        with pytest.raises(ValueError, match="slice_len=0"):
            WorldModelLoss(make_model(), slice_len=0)
