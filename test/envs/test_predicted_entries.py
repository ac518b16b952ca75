"""Entries that the model predicts beside the latents, and the caller declares."""

from __future__ import annotations

import pytest
import torch
from _models import LATENT, linear, make_model, observations, SpecEnv
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModelEnv
from torchrl_wm.modules.keys import join

KEYS = ["disagreement", ("model", "disagreement")]


def doubtful_model(key="disagreement"):
    """A model whose dynamics also say how sure they are: the latent's size."""
    model = make_model()
    size = Mod(
        lambda z: z.abs().mean(-1, keepdim=True),
        [("next", "latent")],
        [join("next", key)],
    )
    model.dynamics = TensorDictSequential(model.dynamics, size)
    return model


def spec_of(key, *shape: int) -> Composite:
    spec = Composite(shape=())
    spec[key] = Unbounded(shape or (1,))
    return spec


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [[], [3]])
def test_a_declared_prediction_is_carried(key, size) -> None:
    model = doubtful_model(key)
    env = WorldModelEnv(
        model,
        SpecEnv(),
        batch_size=size,
        start_states=observations(10),
        observation_spec=spec_of(key),
    )
    check_env_specs(env)
    assert env.observation_spec[key].shape == (*size, 1)
    assert key not in env.state_spec.keys(True, True)
    out = env.rollout(4)
    assert torch.equal(
        out.get(join("next", key)),
        out["next", "latent"].abs().mean(-1, keepdim=True),
    )
    first, later = out[..., 0].get(key), out[..., 1:].get(key)
    assert torch.equal(first, torch.zeros(*size, 1))
    assert torch.equal(later, out[..., :-1].get(join("next", key)))
    imagined = env.imagine(4)
    assert imagined.get(join("next", key)).shape == (*size, 4, 1)


def test_an_undeclared_prediction_is_not_carried() -> None:
    env = WorldModelEnv(doubtful_model(), SpecEnv(), start_states=observations(10))
    assert "disagreement" not in env.rollout(2)["next"].keys()


def test_a_reset_starts_it_at_zero_whatever_was_given() -> None:
    model = doubtful_model()
    env = WorldModelEnv(model, SpecEnv(), observation_spec=spec_of("disagreement"))
    start = model.encode(observations(3)).set("disagreement", torch.ones(3, 1))
    assert torch.equal(env.reset(start)["disagreement"], torch.zeros(3, 1))
    assert torch.equal(
        env.rollout(2, tensordict=start)["disagreement"][:, 0], torch.zeros(3, 1)
    )
    locked = WorldModelEnv(
        model,
        SpecEnv(),
        batch_size=[3],
        start_states=observations(9),
        observation_spec=spec_of("disagreement"),
    )
    td = locked.rollout(2)[:, -1]["next"].exclude("reward")
    rows = torch.tensor([[True], [False], [True]])
    fresh = locked.reset(td.clone().set("_reset", rows))["disagreement"]
    assert torch.equal(fresh, torch.where(rows, 0.0, td["disagreement"]))


def test_it_reaches_transforms_collectors_and_buffers() -> None:
    env = WorldModelEnv(
        doubtful_model(),
        SpecEnv(),
        batch_size=[2],
        start_states=observations(10),
        observation_spec=spec_of("disagreement"),
    )
    collector = Collector(
        TransformedEnv(env, StepCounter(5)),
        None,
        frames_per_batch=20,
        total_frames=20,
    )
    (batch,) = list(collector)
    collector.shutdown()
    buffer = ReplayBuffer(storage=LazyTensorStorage(20))
    buffer.extend(batch.reshape(-1).detach())
    assert (buffer[:]["next", "disagreement"] > 0).all()


def test_wrong_declarations_are_named() -> None:
    model = doubtful_model()
    with pytest.raises(ValueError, match=r"has \['doubt'\].*'disagreement'"):
        WorldModelEnv(model, SpecEnv(), observation_spec=spec_of("doubt"))
    with pytest.raises(ValueError, match=r"dynamics writes \('next', 'disagreement'\)"):
        WorldModelEnv(model, SpecEnv(), observation_spec=spec_of("disagreement", 3))
    with pytest.raises(ValueError, match=r"has \['reward'\]"):
        WorldModelEnv(model, SpecEnv(), observation_spec=spec_of("reward"))


def test_a_replaced_component_has_to_predict_it_still() -> None:
    model = doubtful_model()
    env = WorldModelEnv(model, SpecEnv(), observation_spec=spec_of("disagreement"))
    env.rollout(2, tensordict=observations(2))
    model.reward_head = linear([("next", "latent")], [("next", "reward")], [LATENT, 1])
    assert env.rollout(2, tensordict=observations(2))["next", "disagreement"].any()
    model.dynamics = make_model().dynamics
    with pytest.raises(ValueError, match="disagreement"):
        env.rollout(2, tensordict=observations(2))
