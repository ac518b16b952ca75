"""PlaNet's and the Dreamers' models, made from an env's specs."""

from __future__ import annotations

import pytest
import torch
from _built import CASES, DotEnv, made_env, relative_error, sequences, train
from _models import SpecEnv
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule as Mod,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import GymEnv, InitTracker, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import DreamerActor, MLP, TanhNormal
from torchrl.modules.models.model_based import RSSMRollout, RSSMRolloutV3
from torchrl.objectives import (
    DreamerActorLoss,
    DreamerV3ActorLoss,
    DreamerV3ValueLoss,
    DreamerValueLoss,
)
from torchrl.objectives.utils import ValueEstimators

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import (
    load_world_model,
    make_rssm_world_model,
    RSSMConfig,
    save_world_model,
)
from torchrl_wm.modules import ContinuationModel

SMALL = {
    "belief_size": 16,
    "state_size": 5,
    "categoricals": 3,
    "classes": 4,
    "hidden_size": 8,
    "num_cells": 8,
    "depth": 1,
    "pixel_depth": 2,
}
CONFIGS = {
    "planet": RSSMConfig.planet(**SMALL),
    "dreamer-v2": RSSMConfig.dreamer_v2(**SMALL),
    "dreamer-v3": RSSMConfig.dreamer_v3(**SMALL),
}


def decoding_env(world_model, env, **kwargs) -> WorldModelEnv:
    """Decodes everything, bytes and one-hot vectors as floats."""
    spec = Composite(shape=())
    for key in world_model.decoder.out_keys:
        leaf = env.full_observation_spec[key]
        dtype = leaf.dtype if leaf.dtype.is_floating_point else torch.float32
        spec[key] = Unbounded(leaf.shape, dtype=dtype)
    return WorldModelEnv(world_model, env, observation_spec=spec, **kwargs)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("observations, action", CASES)
class TestSpecs:
    def test_env(self, config, observations, action) -> None:
        env = made_env(observations, action)
        world_model, _ = make_rssm_world_model(env, CONFIGS[config])
        starts = sequences(env, 9).exclude("next", "action")
        for imagined in (
            WorldModelEnv(world_model, env, start_states=starts),
            decoding_env(world_model, env, start_states=starts, batch_size=[2]),
        ):
            check_env_specs(imagined)
        out = decoding_env(world_model, env).imagine(3, tensordict=starts)
        for key in ("state", "belief", *world_model.decoder.out_keys):
            assert out["next", key].shape == (9, 3, *out[key].shape[2:])
        assert (out["next", "belief"] != out["belief"]).any(-1).all()

    def test_loss(self, config, observations, action) -> None:
        env = made_env(observations, action)
        world_model, loss = make_rssm_world_model(env, CONFIGS[config])
        losses = loss(sequences(env, 2, 3))
        assert all(value.isfinite() for value in losses.values())
        losses.sum(reduce=True).backward()
        for name, part in world_model.components.items():
            params = getattr(loss, name + "_params")
            grads = [p.grad for p in params.values(True, True) if p.requires_grad]
            assert any(g is not None and g.any() for g in grads), (name, part)


def test_nested_keys() -> None:
    """Reward, done and action anywhere."""
    env = SpecEnv(
        observation_key=("robot", "seen"),
        action_key=("robot", "push"),
        reward_key=("robot", "gain"),
    )
    world_model, loss = make_rssm_world_model(env, RSSMConfig(**SMALL))
    data = sequences(env, 2, 3)
    assert world_model.reward_head.out_keys == [
        ("next", "robot", "gain_logits"),
        ("next", "robot", "gain"),
    ]
    losses = loss(data)
    assert set(losses.keys()) == {
        "loss_reconstruction",
        "loss_reward",
        "loss_kl",
        "loss_done",
    }
    starts = data[:, 0].select(("robot", "seen"))
    check_env_specs(WorldModelEnv(world_model, env, start_states=starts))


FLAGS = [
    (),
    (("next", "done"),),
    ("is_init",),
    (("next", "agents", "done"),),
    (("agents", "is_init"),),
    ("is_init", ("next", "done")),
]


class TestFiltering:
    """With the same weights and noise, to the bit what TorchRL's own rollouts give."""

    def data(self, world_model, flags):
        """A slice of an episode; what says where episodes begin says that none does."""
        data = sequences(made_env("vector"), 2, 6).exclude(
            *(("next", name) for name in ("done", "terminated", "truncated"))
        )
        for key in flags:
            data[key] = torch.zeros(2, 6, 1, dtype=torch.bool)
        sizes = world_model.initial_state(())
        for key in ("state", "belief"):
            data[key] = torch.randn(2, 6, *sizes[key].shape)
        given = data.clone()
        given["next", "embedding"] = world_model.encoder.module(
            data["next", "observation"]
        )
        return data, given

    @pytest.mark.parametrize("flags", FLAGS)
    def test_gaussian(self, flags) -> None:
        world_model, _ = make_rssm_world_model(made_env(), CONFIGS["planet"])
        data, given = self.data(world_model, flags)
        torch.manual_seed(3)
        out = world_model.observe(data)
        torch.manual_seed(3)
        rollout = RSSMRollout(world_model.dynamics, world_model.posterior)(given)
        for key in ("state", "belief", "prior_mean", "prior_std", "posterior_mean"):
            assert torch.equal(out["next", key], rollout["next", key]), key

    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("config", ["dreamer-v2", "dreamer-v3"])
    def test_categorical(self, config, flags) -> None:
        world_model, _ = make_rssm_world_model(made_env(), CONFIGS[config])
        data, given = self.data(world_model, flags)
        torch.manual_seed(3)
        out = world_model.observe(data)
        torch.manual_seed(3)
        rollout = RSSMRolloutV3(
            world_model.dynamics, world_model.posterior, reset_key=None
        )(given)
        for key in ("state", "belief", "prior_logits", "posterior_logits"):
            assert torch.equal(out["next", key], rollout["next", key]), key

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("size", [(4,), (2, 4), (2, 3, 4)])
    def test_any_batch_shape(self, config, size) -> None:
        world_model, _ = make_rssm_world_model(made_env(), CONFIGS[config])
        data = sequences(made_env(), *size).refine_names(..., "time")
        out = world_model.observe(data)
        assert out["next", "belief"].shape == (*size, 16)

    def test_restarts_where_an_episode_begins(self) -> None:
        """The second episode's beliefs do not depend on the first one's actions."""
        world_model, loss = make_rssm_world_model(made_env(), CONFIGS["planet"])
        data = sequences(made_env(), 2, 6)
        data["is_init"] = torch.zeros(2, 6, 1, dtype=torch.bool)
        data["is_init"][:, 3] = True
        belief = world_model.observe(data)["belief"]
        assert not belief[:, 3].any() and belief[:, 2].any()


class TestActing:
    def test_in_the_real_env(self) -> None:
        real = GymEnv("CartPole-v1")
        world_model, loss = make_rssm_world_model(real, RSSMConfig(**SMALL))
        observer = world_model.observer()
        env = TransformedEnv(GymEnv("CartPole-v1"), InitTracker())
        env = env.append_transform(observer.make_tensordict_primer())
        actor = Mod(
            lambda belief: real.action_spec.rand(belief.shape[:-1]),
            ["belief"],
            ["action"],
        )
        with torch.no_grad():
            data = env.rollout(
                100, TensorDictSequential(observer, actor), break_when_any_done=False
            )
        assert data["is_init"].sum() > 1
        assert not data["belief"][data["is_init"].squeeze(-1)].any()
        assert loss(data)["loss_kl"].isfinite()


def actor_and_value(features: int, actions: int):
    """TorchRL's Dreamer actor, and a value."""
    latents = ["state", "belief"]
    actor = ProbabilisticTensorDictSequential(
        Mod(DreamerActor(actions, depth=1, num_cells=8), latents, ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"],
            ["action"],
            distribution_class=TanhNormal,
            return_log_prob=False,
        ),
    )
    return actor, Mod(MLP(features, 1, num_cells=[8]), latents, ["state_value"])


class TestDreamerLosses:
    """TorchRL's actor and value losses over our env."""

    def parts(self, config):
        env = made_env()
        world_model, _ = make_rssm_world_model(env, CONFIGS[config])
        sizes = world_model.initial_state(())
        features = sum(sizes[key].shape[-1] for key in sizes.keys())
        actor, value = actor_and_value(features, 2)
        imagined = WorldModelEnv(world_model, env)
        starts = world_model.observe(sequences(env, 3, 4))["next"]
        starts = starts.select("state", "belief").detach()
        with torch.no_grad():
            value(actor(starts.clone()))  # lazy layers
        return world_model, imagined, actor, value, starts

    @pytest.mark.parametrize("config", CONFIGS)
    def test_first(self, config) -> None:
        world_model, env, actor, value, starts = self.parts(config)
        if world_model.done_head is not None:
            # The first Dreamer has none, and its loss stops where an episode does.
            last = list(world_model.done_head.modules())[-1]
            torch.nn.init.constant_(last.bias, 50.0)
        loss = DreamerActorLoss(actor, value, env, imagination_horizon=5)
        # Without time_dim TorchRL takes the feature dim for the time: one-step targets.
        loss.make_value_estimator(
            ValueEstimators.TDLambda, gamma=0.9, lmbda=0.8, time_dim=-2
        )
        losses, fake = loss(starts.reshape(-1))
        assert fake.batch_size == (12, 5)
        losses["loss_actor"].backward()
        assert all(p.grad is not None and p.grad.any() for p in actor.parameters())
        assert all(p.grad is None for p in world_model.parameters())
        # The targets are the returns of the rewards that our env predicted.
        values = value(fake["next"].select("state", "belief"))["state_value"]
        expected, ahead = [], values[:, -1]
        for t in reversed(range(5)):
            ahead = fake["next", "reward"][:, t] + 0.9 * (
                0.2 * values[:, t] + 0.8 * ahead
            )
            expected.insert(0, ahead)
        torch.testing.assert_close(fake["lambda_target"], torch.stack(expected, 1))
        DreamerValueLoss(value)(fake)[0]["loss_value"].backward()
        assert all(p.grad.any() for p in value.parameters())

    @pytest.mark.parametrize("reinforce", [False, True])
    def test_third(self, reinforce) -> None:
        world_model, env, actor, value, starts = self.parts("dreamer-v3")
        goes_on = ContinuationModel(world_model)
        loss = DreamerV3ActorLoss(
            actor,
            value,
            env,
            continuation_model=goes_on,
            imagination_horizon=5,
            use_reinforce=reinforce,
        )
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.8)
        losses, fake = loss(starts.reshape(-1))
        assert fake.batch_size == (12, 5)
        logits = world_model.done_head(fake.select("next"))["next", "continue_pred"]
        torch.testing.assert_close(fake["next", "continuation"], logits.sigmoid())
        losses["loss_actor"].backward()
        assert all(p.grad is not None and p.grad.any() for p in actor.parameters())
        value_loss = DreamerV3ValueLoss(value, actor_loss=loss)
        value_loss(fake)[0]["loss_value"].backward()
        assert all(p.grad is None for p in world_model.parameters())


class TestConfig:
    def test_papers(self) -> None:
        """What sets the three apart, and overrides."""
        env = made_env()
        gaussian, loss = make_rssm_world_model(env, CONFIGS["planet"])
        assert gaussian.done_head is None and loss.losses == [
            "reconstruction",
            "reward",
            "kl",
        ]
        assert gaussian.dynamics.out_keys[0] == ("next", "prior_mean")
        categorical, loss = make_rssm_world_model(
            env, CONFIGS["dreamer-v3"], free_nats=0.5
        )
        assert categorical.dynamics.out_keys[0] == ("next", "prior_logits")
        assert ("next", "reward_logits") in categorical.reward_head.out_keys
        assert loss.terms[-2].free_nats == 0.5 and loss.terms[-2].balance == (1.0, 0.1)
        assert loss.losses[-1] == "done"
        again = make_rssm_world_model(env, CONFIGS["dreamer-v2"])[0]
        assert again.reward_head.out_keys == [("next", "reward")]

    def test_bad_settings(self) -> None:
        for settings, said in (
            ({"latent": "normal"}, "Unknown latent='normal'"),
            ({"recurrent": "lstm"}, "Unknown recurrent='lstm'"),
            ({"belief_size": 20}, "blocks=8 do not divide belief_size=20"),
        ):
            with pytest.raises(ValueError, match=said):
                RSSMConfig(**settings)
            with pytest.raises(ValueError, match=said):
                make_rssm_world_model(made_env(), **settings)
        with pytest.raises(TypeError, match="no setting 'belief_dim'.*'belief_size'"):
            make_rssm_world_model(made_env(), belief_dim=3)

    def test_class_numbers_are_refused_by_name(self) -> None:
        env = made_env()
        env.observation_spec = Composite(cell=Categorical(5), x=Unbounded((2,)))
        with pytest.raises(ValueError, match=r"\['cell'\] are class numbers"):
            make_rssm_world_model(env)
        world_model, _ = make_rssm_world_model(
            env, RSSMConfig(**SMALL), observation_keys=["x"]
        )
        assert world_model.decoder.out_keys == ["x"]

    def test_first_reward_is_zero(self) -> None:
        """A two-hot head that is not trained yet promises nothing."""
        world_model, _ = make_rssm_world_model(made_env(), RSSMConfig(**SMALL))
        env = WorldModelEnv(world_model, made_env())
        starts = sequences(made_env(), 4).select("observation")
        assert not env.imagine(3, tensordict=starts)["next", "reward"].any()


def test_masked_padding_gives_finite_gradients() -> None:
    env = made_env("pixels and vector")
    _, loss = make_rssm_world_model(env, RSSMConfig(**SMALL))
    data = sequences(env, 2, 5)
    data["collector", "mask"] = torch.ones(2, 5, dtype=torch.bool)
    data["collector", "mask"][:, 3:] = False
    torch.manual_seed(1)
    expected = loss(data)
    data["x"][:, 3:] = float("nan")
    data["next", "x"][:, 3:] = float("nan")
    data["next", "reward"][:, 3:] = float("nan")
    torch.manual_seed(1)
    losses = loss(data)
    for key, value in losses.items():
        torch.testing.assert_close(value, expected[key])
    losses.sum(reduce=True).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_file(tmp_path) -> None:
    """From a file alone, the same model."""
    env = made_env("pixels and vector")
    world_model, _ = make_rssm_world_model(env, RSSMConfig(**SMALL))
    save_world_model(world_model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    data = sequences(env, 4)
    torch.manual_seed(0)
    expected = world_model(data.clone())["next"]
    torch.manual_seed(0)
    out = again(data.clone())["next"]
    for key in ("reward", "terminated", *world_model.latent_keys):
        assert torch.equal(out[key], expected[key]), key


def test_compiles() -> None:
    """Imagining is one graph."""
    world_model, _ = make_rssm_world_model(made_env(), RSSMConfig(**SMALL))
    env = WorldModelEnv(world_model, made_env())
    starts = world_model.encode(sequences(made_env(), 4).select("observation"))
    starts = starts.select("state", "belief").detach()
    actions = sequences(made_env(), 4, 3).select("action")
    belief = env.imagine(3, tensordict=starts, actions=actions)["next", "belief"][:, 0]
    env.compile(backend="eager", fullgraph=True)
    compiled = env.imagine(3, tensordict=starts, actions=actions)
    # The first step's belief is not drawn.
    torch.testing.assert_close(compiled["next", "belief"][:, 0], belief)


# Real data -----------------------------------------------------------------

LEARNERS = {
    "planet": RSSMConfig.planet(
        belief_size=48, hidden_size=48, num_cells=48, depth=1, state_size=8
    ),
    "dreamer-v3": RSSMConfig(
        belief_size=48,
        hidden_size=48,
        num_cells=48,
        depth=1,
        categoricals=8,
        classes=8,
        reward_bins=63,
    ),
}
#: Free nats keep a state of few numbers from being predicted well in a short training.
SHORT = {"free_nats": 0.0, "kl_balance": (0.8, 0.2), "pixel_depth": 8}


def learned(
    real,
    config,
    episodes: int,
    length: int,
    steps: int,
    training=None,
    seed: int = 0,
    **settings,
):
    """A model trained on random episodes, and its env and error on others."""
    training = {"rows": 16, "length": 6, **(training or {})}
    real.set_seed(seed)
    data = [real.rollout(length) for _ in range(episodes)]
    world_model, loss = make_rssm_world_model(
        real, LEARNERS[config], **{**SHORT, **settings}
    )
    history = train(loss, data, steps=steps, **training)
    held_out = [real.rollout(length) for _ in range(10)]
    env = decoding_env(world_model, real, batch_size=[])
    return history, relative_error(env, held_out, 6), env


def test_learns() -> None:
    """After a moment, predictions of CartPole are better than that nothing changes."""
    history, error, _ = learned(GymEnv("CartPole-v1"), "dreamer-v3", 40, 60, steps=120)
    assert history[-1] < 0.3 * history[0]
    assert (error["observation"][2:] < 0.9).all(), error


def test_learns_from_pixels() -> None:
    history, error, _ = learned(DotEnv(), "dreamer-v3", 30, 12, steps=150)
    assert history[-1] < 0.3 * history[0]
    assert (error["pixels"][3:] < 1.0).all(), error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "pixels"])
@pytest.mark.parametrize("config", LEARNERS)
def test_learns_well(config, name) -> None:
    real = DotEnv() if name == "pixels" else GymEnv(name)
    history, error, _ = learned(real, config, 50, 60, steps=1000)
    (error,) = error.values()
    assert history[-1] < 0.2 * history[0]
    assert error[-1] < 0.6 and (error[2:] < 0.9).all(), error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "pixels"])
@pytest.mark.parametrize("config", LEARNERS)
def test_beats_persistence_from_the_first_step(config, name, seed) -> None:
    """On longer slices, with as many categorical variables as the first step needs."""
    torch.manual_seed(seed)
    settings = {}
    if config == "dreamer-v3":
        settings = {"categoricals": 32, "classes": 16, "reconstruction_weight": 10.0}
    training = {"rows": 32, "length": 16, "lr": 4e-3, "one_cycle": True}
    real = DotEnv() if name == "pixels" else GymEnv(name)
    _, error, _ = learned(real, config, 50, 60, 500, training, seed, **settings)
    (error,) = error.values()
    assert (error < 1.0).all(), error


@pytest.mark.parametrize("key", ["observation", ("robot", "seen")])
@pytest.mark.parametrize("size", [90.0, -1e4])
def test_outputs_too_large_for_symexp_are_pulled_back(key, size) -> None:
    env = SpecEnv(observation_key=key)
    world_model, loss = make_rssm_world_model(env, CONFIGS["dreamer-v3"])
    linear = [m for m in world_model.decoder.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        linear.bias.fill_(size)
    value = loss(sequences(env, 2, 3))["loss_reconstruction"]
    assert value.isfinite()
    value.backward()
    gradient = linear.bias.grad
    assert gradient.isfinite().all() and (gradient * size > 0).all()
