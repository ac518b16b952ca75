"""The loss: each term's formula written out again, its targets, masks, weights, errors."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from _models import ACTION, LATENT, linear, make_model, OBS, transitions
from hypothesis import given, strategies as st
from tensordict import lazy_stack, TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.objectives import (
    DoneTerm,
    LossContext,
    LossKeys,
    LossTerm,
    ReconstructionTerm,
    RewardTerm,
)

ALL = ["reward", "done", "reconstruction", "latent"]


def full_model() -> WorldModel:
    return make_model(done="terminated_logits", decoder="reconstructed_observation")


def predictions(model: WorldModel, batch: TensorDict) -> TensorDict:
    return model(batch.select("observation", "action"))


class TestFormulas:
    @pytest.mark.parametrize("size", [(5,), (2, 3)])
    def test_every_term(self, size) -> None:
        model, batch = full_model(), transitions(*size)
        before = batch.clone()
        out = WorldModelLoss(model, losses=ALL)(batch)
        assert (batch == before).all() and set(batch.keys(True)) == set(
            before.keys(True)
        )
        predicted = predictions(model, batch)
        nxt, real = predicted["next"], batch["next"]
        expected = {
            "loss_reward": (nxt["reward"] - real["reward"]).pow(2).mean(),
            "loss_done": F.binary_cross_entropy_with_logits(
                nxt["terminated_logits"], real["terminated"].float()
            ),
            "loss_reconstruction": (
                predicted["reconstructed_observation"] - batch["observation"]
            )
            .pow(2)
            .mean(),
            "loss_latent": (
                nxt["latent"] - model.encoder.module(real["observation"]).detach()
            )
            .pow(2)
            .mean(),
        }
        assert set(out.keys()) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value)

    @pytest.mark.parametrize(
        "name,formula",
        [
            ("l1", lambda x: x.abs()),
            ("l2", lambda x: x.pow(2)),
            (
                "smooth_l1",
                lambda x: torch.where(x.abs() < 1, 0.5 * x.pow(2), x.abs() - 0.5),
            ),
        ],
    )
    def test_distances_and_weights(self, name, formula) -> None:
        model, batch = full_model(), transitions(5)
        loss = WorldModelLoss(
            model,
            losses=ALL,
            **{f"{term}_loss": name for term in ALL},
            **{f"{term}_weight": 2.0 + i for i, term in enumerate(ALL)},
        )
        out, predicted = loss(batch), predictions(model, batch)
        differences = [
            predicted["next", "reward"] - batch["next", "reward"],
            predicted["next", "terminated_logits"].sigmoid()
            - batch["next", "terminated"].float(),
            predicted["reconstructed_observation"] - batch["observation"],
            predicted["next", "latent"]
            - model.encoder.module(batch["next", "observation"]),
        ]
        for i, (term, difference) in enumerate(zip(ALL, differences)):
            expected = (2.0 + i) * formula(difference).mean()
            torch.testing.assert_close(out[f"loss_{term}"], expected)

    def test_symlog_compares_symmetric_logarithms(self) -> None:
        model, batch = full_model(), transitions(5)
        batch["next", "reward"] *= 1e4
        out = WorldModelLoss(model, losses=["reward"], reward_loss="symlog")(batch)
        pairs = (predictions(model, batch)["next", "reward"], batch["next", "reward"])
        one, other = (x.sign() * (1 + x.abs()).log() for x in pairs)
        torch.testing.assert_close(out["loss_reward"], (one - other).pow(2).mean())

    def test_scales_are_the_units_of_errors(self) -> None:
        model, batch = full_model(), transitions(5)
        units = {"reward": 3.0, "observation": torch.arange(1.0, 7.0)}
        terms = [
            RewardTerm(scale=units.__getitem__),
            ReconstructionTerm(scale=units.__getitem__),
        ]
        out, predicted = WorldModelLoss(model, losses=terms)(batch), predictions(
            model, batch
        )
        differences = {
            "reward": predicted["next", "reward"] - batch["next", "reward"],
            "observation": predicted["reconstructed_observation"]
            - batch["observation"],
        }
        for name, key in (("reward", "reward"), ("reconstruction", "observation")):
            expected = (differences[key] / units[key]).pow(2).mean()
            torch.testing.assert_close(out[f"loss_{name}"], expected)

    def test_reconstruction_of_the_predicted_next_observation(self) -> None:
        model, batch = full_model(), transitions(5)
        loss = WorldModelLoss(
            model, losses=["reconstruction"], reconstruction_target="next"
        )
        latent = predictions(model, batch)["next", "latent"]
        decoded = model.decoder.module(latent)
        expected = (decoded - batch["next", "observation"]).pow(2).mean()
        out = loss(batch)["loss_reconstruction"]
        torch.testing.assert_close(out, expected)
        out.backward()
        assert all(p.grad is not None for p in model.dynamics.parameters())

    def test_decoder_below_next_is_compared_with_the_next_observation(self) -> None:
        model, batch = make_model(), transitions(5)
        model.decoder = linear(
            [("next", "latent")], [("next", "observation")], [LATENT, OBS]
        )
        out = WorldModelLoss(model, losses=["reconstruction"])(batch)
        decoded = model.decoder.module(predictions(model, batch)["next", "latent"])
        expected = (decoded - batch["next", "observation"]).pow(2).mean()
        assert expected > 0.01
        torch.testing.assert_close(out["loss_reconstruction"], expected)

    def test_decoder_that_writes_the_observation_itself(self) -> None:
        model, batch = make_model(decoder=True), transitions(5)
        out = WorldModelLoss(model, losses=["reconstruction"])(batch)
        latent = model.encoder.module(batch["observation"])
        expected = (model.decoder.module(latent) - batch["observation"]).pow(2).mean()
        torch.testing.assert_close(out["loss_reconstruction"], expected)

    def test_observation_as_latent(self) -> None:
        inputs = ["observation", "action"]
        model = WorldModel(
            Mod(torch.nn.Identity(), ["observation"], ["observation"]),
            linear(inputs, [("next", "observation")], [OBS + ACTION, OBS]),
            linear(inputs, [("next", "reward")], [OBS + ACTION, 1]),
        )
        batch = transitions(5)
        out = WorldModelLoss(model, losses=["latent"])(batch)
        predicted = model.dynamics.module(batch["observation"], batch["action"])
        expected = (predicted - batch["next", "observation"]).pow(2).mean()
        torch.testing.assert_close(out["loss_latent"], expected)


class TestTargets:
    def test_latent_target_is_detached(self) -> None:
        model, batch = make_model(), transitions(5)
        batch[
            "observation"
        ].zero_()  # the input path's gradient is then only the bias's
        WorldModelLoss(model, losses=["latent"])(batch)["loss_latent"].backward()
        assert not model.encoder.module[0].weight.grad.any()

    def test_given_latent_target_is_used(self) -> None:
        model, batch = make_model(), transitions(5)
        target = torch.randn(5, LATENT, requires_grad=True)
        batch["target_latent"] = target
        out = WorldModelLoss(model, losses=["latent"])(batch)["loss_latent"]
        predicted = predictions(model, batch)["next", "latent"]
        torch.testing.assert_close(out, (predicted - target).pow(2).mean())
        out.backward()
        assert target.grad is None

    @pytest.mark.parametrize(
        "drop,expected",
        [
            ((), lambda n: n["terminated"]),
            (("terminated",), lambda n: n["done"] & ~n["truncated"]),
            (("terminated", "truncated"), lambda n: n["done"]),
        ],
        ids=["terminated", "done without truncated", "done"],
    )
    def test_done_label(self, drop, expected) -> None:
        model, batch = full_model(), transitions(50)
        label = expected(batch["next"]).float()
        out = WorldModelLoss(model, losses=["done"])(
            batch.exclude(*[("next", name) for name in drop])
        )
        logits = predictions(model, batch)["next", "terminated_logits"]
        torch.testing.assert_close(
            out["loss_done"], F.binary_cross_entropy_with_logits(logits, label)
        )

    def test_float_labels(self) -> None:
        model, batch = full_model(), transitions(20)
        loss = WorldModelLoss(model, losses=["done"])
        batch = batch.exclude(("next", "terminated"))
        expected = loss(batch)["loss_done"]
        for name in ("done", "truncated"):
            batch["next", name] = batch["next", name].float()
        torch.testing.assert_close(loss(batch)["loss_done"], expected)

    @pytest.mark.parametrize("key", ["terminated_logits", "terminated", "done"])
    def test_float_heads_are_logits(self, key) -> None:
        model, batch = make_model(done=key), transitions(5)
        out = WorldModelLoss(model, losses=["done"])(batch)
        logits = predictions(model, batch)["next", key]
        expected = F.binary_cross_entropy_with_logits(
            logits, batch["next", "terminated"].float()
        )
        torch.testing.assert_close(out["loss_done"], expected)

    def test_continue_head_learns_the_opposite(self) -> None:
        model, batch = make_model(done="continue_pred"), transitions(5)
        out = WorldModelLoss(model, losses=["done"])(batch)
        logits = predictions(model, batch)["next", "continue_pred"]
        expected = F.binary_cross_entropy_with_logits(
            logits, 1 - batch["next", "terminated"].float()
        )
        torch.testing.assert_close(out["loss_done"], expected)

    def test_one_head_trains_and_steps(self) -> None:
        """The head learns when the clock runs out, and the env then ends there."""
        from _models import clock_env, clock_model, times

        model = clock_model(
            done=Mod(
                torch.nn.Linear(1, 1),
                [("next", "latent")],
                [("next", "terminated_logits")],
            )
        )
        loss = WorldModelLoss(model, losses=["done"])
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        batch = times(*[float(i) for i in range(8)])
        batch["action"] = torch.zeros(8, 1)
        batch["next"] = {"terminated": batch["observation"] + 1 >= 4}
        for _ in range(300):
            optimizer.zero_grad()
            loss(batch)["loss_done"].backward()
            optimizer.step()
        out = WorldModelEnv(model, clock_env()).rollout(10, tensordict=times(0.0))
        assert out["next", "terminated"].flatten().tolist() == [False] * 3 + [True]


class TestKeys:
    def test_nested_keys(self) -> None:
        model = make_model(
            latent=("deep", "latent"),
            observation=("obs", "vector"),
            action=("act", "torque"),
            reward=("signal", "reward"),
            done=None,
            decoder=("obs", "reconstruction"),
        )
        model.done_head = linear(
            [("next", "deep", "latent")],
            [("next", "signal", "terminated_logits")],
            [LATENT, 1],
        )
        loss = WorldModelLoss(model, losses=ALL)
        loss.set_keys(
            reward=("signal", "reward"),
            terminated=("signal", "terminated"),
            done=("signal", "done"),
            observation=("obs", "vector"),
            reconstructed_observation=("obs", "reconstruction"),
        )
        flat = transitions(5)
        batch = TensorDict({}, [5])
        batch["obs", "vector"] = flat["observation"]
        batch["act", "torque"] = flat["action"]
        batch["next", "obs", "vector"] = flat["next", "observation"]
        batch["next", "signal", "reward"] = flat["next", "reward"]
        batch["next", "signal", "terminated"] = flat["next", "terminated"]
        out = loss(batch)
        plain = full_model()
        for name, module in plain.components.items():
            module.load_state_dict(model.components[name].state_dict())
        expected = WorldModelLoss(plain, losses=ALL)(flat)
        assert (out == expected).all()
        assert ("next", "signal", "reward") in loss.in_keys

    def test_label_under_another_name_than_the_prediction(self) -> None:
        model, batch = full_model(), transitions(5)
        loss = WorldModelLoss(model, losses=["reward", "done"])
        expected = loss(batch)
        for name in ("reward", "terminated"):
            batch["next", f"real_{name}"] = batch["next"].pop(name)
        batch["next", "reward"] = torch.full((5, 1), 100.0)
        loss.set_keys(true_reward="real_reward", true_terminated="real_terminated")
        assert (loss(batch) == expected).all()

    def test_unknown_key_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not_a_key"):
            WorldModelLoss(make_model()).set_keys(not_a_key="x")

    def test_keyword_dispatch(self) -> None:
        model, batch = full_model(), transitions(5)
        loss = WorldModelLoss(model, losses=["reward", "done"])
        expected = loss(batch)
        reward, done = loss(
            observation=batch["observation"],
            action=batch["action"],
            next_reward=batch["next", "reward"],
            next_terminated=batch["next", "terminated"],
        )
        assert torch.equal(reward, expected["loss_reward"])
        assert torch.equal(done, expected["loss_done"])
        assert loss.out_keys == ["loss_reward", "loss_done"]

    def test_in_keys_are_enough(self) -> None:
        model, batch = full_model(), transitions(5)
        loss = WorldModelLoss(model, losses=ALL)
        expected = loss(batch)
        assert (loss(batch.select(*loss.in_keys)) == expected).all()


class TestReduction:
    def test_none_and_sum(self) -> None:
        model, batch = full_model(), transitions(2, 3)
        mean = WorldModelLoss(model, losses=ALL)(batch)
        none = WorldModelLoss(model, losses=ALL, reduction="none")(batch)
        total = WorldModelLoss(model, losses=ALL, reduction="sum")(batch)
        assert none.batch_size == (2, 3)
        for key in mean.keys():
            assert none[key].shape == (2, 3)
            torch.testing.assert_close(none[key].mean(), mean[key])
            torch.testing.assert_close(none[key].sum(), total[key])

    @pytest.mark.parametrize("key", ["weight", "priority_weight"])
    @pytest.mark.parametrize("shape", [(6,), (6, 1)])
    def test_weights_of_samples(self, key, shape) -> None:
        model, batch = full_model(), transitions(6)
        none = WorldModelLoss(model, losses=ALL, reduction="none")(batch)
        weight = torch.rand(6)
        batch[key] = weight.reshape(shape)
        out = WorldModelLoss(model, losses=ALL)(batch)
        weighted = WorldModelLoss(model, losses=ALL, reduction="none")(batch)
        for name in out.keys():
            expected = (none[name] * weight).sum() / weight.sum()
            torch.testing.assert_close(out[name], expected)
            torch.testing.assert_close(weighted[name], none[name] * weight)

    @given(
        rows=st.integers(1, 3),
        steps=st.integers(2, 4),
        trailing=st.booleans(),
        custom=st.booleans(),
        weighted=st.booleans(),
        data=st.data(),
    )
    def test_masked_padding_is_as_if_it_were_not_there(
        self, rows, steps, trailing, custom, weighted, data
    ) -> None:
        model, batch = full_model(), transitions(rows, steps)
        flags = data.draw(
            st.lists(st.booleans(), min_size=rows * steps, max_size=rows * steps)
        )
        mask = torch.tensor(flags).reshape(rows, steps)
        mask[0, 0] = True
        if weighted:
            batch["weight"] = torch.rand(rows, steps)
        loss = WorldModelLoss(model, losses=ALL)
        expected = loss(batch[mask])
        key = ("masks", "valid") if custom else ("collector", "mask")
        if custom:
            loss.set_keys(mask=key)
        batch.apply_(
            lambda x: x.masked_fill_(expand(~mask, x), float("nan"))
            if x.is_floating_point()
            else x
        )
        if weighted:
            batch["weight"] = batch["weight"].nan_to_num(1.0)
        batch.set(key, mask.unsqueeze(-1) if trailing else mask)
        out = loss(batch)
        for name in out.keys():
            torch.testing.assert_close(out[name], expected[name])
        out.sum(reduce=True).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_invalid_weights_and_no_weight(self) -> None:
        model, batch = full_model(), transitions(6)
        mask = torch.tensor([True] * 4 + [False] * 2)
        expected = WorldModelLoss(model, losses=ALL)(batch[:4])
        batch["collector", "mask"] = mask
        batch["weight"] = torch.where(mask, 1.0, float("nan"))
        out = WorldModelLoss(model, losses=ALL)(batch)
        for name in out.keys():
            torch.testing.assert_close(out[name], expected[name])
        batch["weight"] = torch.zeros(6)
        assert all(v == 0 for v in WorldModelLoss(model, losses=ALL)(batch).values())

    def test_all_masked_is_zero(self) -> None:
        model, batch = full_model(), transitions(4)
        batch["collector", "mask"] = torch.zeros(4, dtype=torch.bool)
        out = WorldModelLoss(model, losses=ALL)(batch)
        assert all(value == 0 for value in out.values())


def expand(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)).expand_as(value)


class TestModule:
    def test_parameters_are_the_models(self) -> None:
        model = full_model()
        loss = WorldModelLoss(model, losses=ALL)
        ours = {id(p) for p in loss.parameters()}
        assert ours == {id(p) for p in model.parameters()}
        assert len(list(loss.parameters())) == len(ours)

    def test_differentiable(self) -> None:
        model = full_model()
        WorldModelLoss(model, losses=ALL)(transitions(5)).sum(reduce=True).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_heads_that_no_term_needs_are_not_run(self) -> None:
        model = full_model()
        model.decoder.module.forward = None  # calling it would raise
        model.done_head.module.forward = None
        WorldModelLoss(model, losses=["reward", "latent"])(transitions(5))

    def test_head_that_another_head_reads_is_run(self) -> None:
        model = make_model()
        model.done_head = Mod(
            lambda r: r - 1, [("next", "reward")], [("next", "terminated_logits")]
        )
        out = WorldModelLoss(model, losses=["done"])(transitions(5))
        assert out["loss_done"].isfinite()

    def test_replaced_component_takes_effect(self) -> None:
        model, batch = full_model(), transitions(5)
        loss = WorldModelLoss(model)
        loss(batch)
        model.reward_head = copy.deepcopy(model.reward_head)
        with torch.no_grad():
            for parameter in model.reward_head.parameters():
                parameter.zero_()
        out = loss(batch)["loss_reward"]
        torch.testing.assert_close(out, batch["next", "reward"].pow(2).mean())
        assert {id(p) for p in model.reward_head.parameters()} <= {
            id(p) for p in loss.parameters()
        }

    def test_state_dict_round_trip(self) -> None:
        batch = transitions(5)
        one, two = (WorldModelLoss(full_model(), losses=ALL) for _ in range(2))
        assert not (one(batch) == two(batch)).all()
        two.load_state_dict(one.state_dict())
        assert (one(batch) == two(batch)).all()

    def test_reset_parameters(self) -> None:
        loss = WorldModelLoss(full_model(), losses=ALL)
        before = [p.clone() for p in loss.parameters()]
        loss.reset_parameters_recursive()
        assert all((a != b).any() for a, b in zip(before, loss.parameters()))

    def test_term_of_ones_own(self) -> None:
        class Size(LossTerm):
            def labels(self, world_model, keys):
                return [("next", "size")]

            def __call__(self, predicted, batch, loss):
                size = predicted["next", "latent"].norm(dim=-1)
                return (size - batch["next", "size"]).pow(2)

        model, batch = make_model(), transitions(5)
        batch["next", "size"] = torch.rand(5)
        loss = WorldModelLoss(model, losses=["reward", Size("size", weight=3.0)])
        predicted = predictions(model, batch)["next", "latent"]
        expected = (predicted.norm(dim=-1) - batch["next", "size"]).pow(2).mean()
        torch.testing.assert_close(loss(batch)["loss_size"], 3 * expected)
        assert ("next", "size") in loss.in_keys


def test_several_rewards() -> None:
    model = make_model()
    model.reward_head = linear(
        [("next", "latent")], [("next", "red", "reward")], [LATENT, 1]
    )
    blue = Mod(
        torch.nn.Linear(LATENT, 1), [("next", "latent")], [("next", "blue", "reward")]
    )
    model.reward_head = TensorDictSequential(model.reward_head, blue)
    batch = transitions(5)
    for team in ("red", "blue"):
        batch["next", team, "reward"] = torch.randn(5, 1)
    terms = [RewardTerm(key=(team, "reward"), name=team) for team in ("red", "blue")]
    out = WorldModelLoss(model, losses=terms)(batch)
    predicted = predictions(model, batch)["next"]
    for team in ("red", "blue"):
        error = predicted[team, "reward"] - batch["next", team, "reward"]
        torch.testing.assert_close(out[f"loss_{team}"], error.pow(2).mean())


def test_labels_keep_their_precision() -> None:
    head = Mod(
        lambda z: torch.full_like(z[..., :1], 1000.0).bfloat16(),
        [("next", "latent")],
        [("next", "reward")],
    )
    model, batch = make_model(), transitions(5)
    model.reward_head = head
    batch["next", "reward"].fill_(1001.5)
    out = WorldModelLoss(model)(batch)
    torch.testing.assert_close(out["loss_reward"], torch.tensor(2.25))


class TestBadInput:
    def test_terms_that_do_not_fit(self) -> None:
        class Wrong(LossTerm):
            def labels(self, world_model, keys):
                return []

            def __call__(self, predicted, batch, loss):
                return predicted["next", "latent"][..., :1]

        loss = WorldModelLoss(make_model(), losses=[Wrong("wrong")])
        with pytest.raises(ValueError, match=r"'wrong' must give.*\(5,\).*\(5, 1\)"):
            loss(transitions(5))
        Wrong.components = ("hedd",)
        with pytest.raises(ValueError, match="names the component 'hedd'"):
            WorldModelLoss(make_model(), losses=[Wrong("wrong")])

    def test_at_construction(self) -> None:
        model = make_model()
        with pytest.raises(
            ValueError, match=r"Unknown loss type\(s\): \['typo'\].*reward"
        ):
            WorldModelLoss(model, losses=["reward", "typo"])
        for name in ("reward", "done", "reconstruction", "latent"):
            with pytest.raises(ValueError, match=f"{name}_loss='huber'.*smooth_l1"):
                WorldModelLoss(model, **{f"{name}_loss": "huber"})
        with pytest.raises(ValueError, match="reward_loss='bce'"):
            WorldModelLoss(model, reward_loss="bce")
        with pytest.raises(ValueError, match="reduction 'max'"):
            WorldModelLoss(model, reduction="max")
        with pytest.raises(ValueError, match="'done' trains the done_head.*done_head="):
            WorldModelLoss(model, losses=["done"])
        with pytest.raises(ValueError, match="trains the decoder"):
            WorldModelLoss(model, losses=["reconstruction"])
        with pytest.raises(ValueError, match="'reward'.*more than once"):
            WorldModelLoss(model, losses=["reward", "reward"])
        with pytest.raises(ValueError, match="losses is empty"):
            WorldModelLoss(model, losses=[])
        with pytest.raises(ValueError, match="reconstruction_target.*'past'"):
            WorldModelLoss(model, reconstruction_target="past")
        with pytest.raises(TypeError, match="torchrl_wm.WorldModel, got.*Linear"):
            WorldModelLoss(torch.nn.Linear(1, 1))

    @pytest.mark.parametrize(
        "term,drop,named",
        [
            ("reward", ["reward"], "('next', 'reward')"),
            ("done", ["terminated", "done"], "('next', 'terminated')"),
            ("latent", ["observation"], "('next', 'observation')"),
        ],
    )
    def test_missing_label(self, term, drop, named) -> None:
        loss = WorldModelLoss(full_model(), losses=[term])
        batch = transitions(5).exclude(*[("next", name) for name in drop])
        with pytest.raises(KeyError) as err:
            loss(batch)
        assert named in str(err.value) and term in str(err.value)

    def test_missing_input(self) -> None:
        with pytest.raises(KeyError, match=r"reads \['action'\]"):
            WorldModelLoss(make_model())(transitions(5).exclude("action"))

    def test_label_of_another_shape(self) -> None:
        batch = transitions(5)
        batch["next", "reward"] = batch["next", "reward"].squeeze(-1)
        with pytest.raises(ValueError, match=r"reward.*\(5, 1\).*\(5,\)"):
            WorldModelLoss(make_model())(batch)

    def test_bool_head_cannot_be_trained(self) -> None:
        head = Mod(lambda x: x[..., :1] > 0, [("next", "latent")], [("next", "done")])
        loss = WorldModelLoss(make_model(done=head), losses=["done"])
        with pytest.raises(TypeError, match="torch.bool.*terminated_logits"):
            loss(transitions(5))

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("key", ["terminated_logits", "continue_pred", "done"])
    def test_head_that_gives_probabilities_is_told(self, key, nested) -> None:
        """TorchRL's loss compares what the head gives; here that is read as logits."""
        net = torch.nn.Sequential(torch.nn.Linear(LATENT, 1), torch.nn.Sigmoid())
        head = Mod(net, [("next", "latent")], [("next", key)])
        if nested:
            other = Mod(torch.nn.Identity(), [("next", "latent")], [("next", "seen")])
            head = TensorDictSequential(head, other)
        for distance in ("bce", "l2"):
            with pytest.warns(UserWarning, match="take the Sigmoid off") as warned:
                WorldModelLoss(
                    make_model(done=head), losses=["done"], done_loss=distance
                )
            assert [warning.filename for warning in warned] == [__file__]

    def test_probabilities_beside_the_logits_are_no_mistake(self) -> None:
        head = TensorDictSequential(
            linear([("next", "latent")], [("next", "terminated_logits")], [LATENT, 1]),
            Mod(
                torch.nn.Sigmoid(),
                [("next", "terminated_logits")],
                [("next", "probability")],
            ),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WorldModelLoss(make_model(done=head), losses=["done"])

    def test_head_under_another_key(self) -> None:
        loss = WorldModelLoss(make_model(reward="bonus"))
        with pytest.raises(KeyError, match=r"reward_head writes.*bonus.*true_reward="):
            loss(transitions(5))
        loss.set_keys(reward="bonus", true_reward="reward")  # as the message says
        loss(transitions(5))
        with pytest.raises(KeyError, match=r"done_head, which writes.*fin"):
            WorldModelLoss(make_model(done="fin"), losses=["done"])(transitions(5))

    def test_empty_batch(self) -> None:
        loss = WorldModelLoss(make_model())
        with pytest.raises(ValueError, match=r"batch is empty.*\(0,\)"):
            loss(transitions(0))

    def test_component_that_fails_is_named(self) -> None:
        batch = transitions(5)
        batch["action"] = torch.zeros(5, ACTION + 1)
        with pytest.raises(RuntimeError, match="dynamics failed on.*'action'.*(5, 3)"):
            WorldModelLoss(make_model())(batch)

    def test_messages_read_as_they_are_written(self) -> None:
        with pytest.raises(KeyError) as err:
            WorldModelLoss(make_model())(transitions(5).exclude("action"))
        assert not str(err.value).startswith(("'", '"'))

    def test_weights_of_another_shape(self) -> None:
        batch = transitions(5)
        batch["weight"] = torch.ones(5, 3)
        with pytest.raises(ValueError, match=r"'weight'.*\(5, 3\).*set_keys\(weight="):
            WorldModelLoss(make_model())(batch)

    def test_named_mask_that_is_not_there(self) -> None:
        loss = WorldModelLoss(make_model())
        loss.set_keys(mask="valid")
        with pytest.raises(KeyError, match="'valid' masks invalid samples"):
            loss(transitions(5))
        loss.set_keys(mask=None)
        loss(transitions(5))


@pytest.mark.parametrize("size", [(2, 3), (3, 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_lazy_stacks_with_a_mask(size, dim) -> None:
    """What is masked is the same as in a dense batch, also where all dims are of one size."""
    loss = WorldModelLoss(make_model(decoder=True), losses=["reward", "reconstruction"])
    dense = transitions(*size)
    dense["collector", "mask"] = torch.arange(dense.numel()).reshape(size) % 2 == 0
    lazy = lazy_stack(list(dense.unbind(dim)), dim)
    expected, got = loss(dense), loss(lazy)
    for key in expected.keys():
        torch.testing.assert_close(got[key], expected[key])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_masks_of_ones_and_zeros(dtype) -> None:
    loss, batch = WorldModelLoss(make_model()), transitions(4)
    mask = torch.tensor([True, False, True, False])
    expected = loss(batch.clone().set(("collector", "mask"), mask))
    got = loss(batch.clone().set(("collector", "mask"), mask.to(dtype)))
    assert torch.equal(got["loss_reward"], expected["loss_reward"])


@pytest.mark.parametrize("label", ["real_reward", ("env", "reward")])
def test_in_keys_name_the_labels_that_are_read(label) -> None:
    loss, batch = WorldModelLoss(make_model()), transitions(4)
    loss.set_keys(true_reward=label)
    place = ("next", *((label,) if isinstance(label, str) else label))
    batch.set(place, batch["next", "reward"] + 1)
    assert place in loss.in_keys and ("next", "reward") not in loss.in_keys
    expected = loss(batch)["loss_reward"]
    assert torch.equal(loss(batch.select(*loss.in_keys))["loss_reward"], expected)


def test_in_keys_of_ends_that_are_judged_on_real_states() -> None:
    model = make_model(done="terminated_logits")
    loss, batch = WorldModelLoss(model, losses=[DoneTerm(real_next=True)]), transitions(
        4
    )
    expected = loss(batch)["loss_done"]
    assert torch.equal(loss(batch.select(*loss.in_keys))["loss_done"], expected)


def test_terms_need_no_more_of_the_loss_than_its_context() -> None:
    model, batch = full_model(), transitions(5)
    context = SimpleNamespace(world_model=model, tensor_keys=LossKeys())
    predicted, losses = predictions(model, batch), WorldModelLoss(model, losses=ALL)
    expected = losses(batch)
    for term in (RewardTerm(), DoneTerm(), ReconstructionTerm()):
        value = term(predicted, batch, context).mean()
        torch.testing.assert_close(value, expected[f"loss_{term.name}"])
    names = [name for name in vars(LossContext) if not name.startswith("_")]
    assert names and all(hasattr(losses, name) for name in names)
