"""Code written for TorchRL's three classes runs after a change of the import.

These calls use nothing but TorchRL's signatures, on the kind of reference env
that TorchRL's own tests use: one with a batch size and the latent in its specs.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs.model_based import WorldModelEnv as TorchRLEnv
from torchrl.modules import WorldModel as TorchRLModel
from torchrl.objectives import WorldModelLoss as TorchRLLoss
from torchrl.testing import CatLinear
from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss


def build(done: bool = False) -> WorldModel:
    def component(module, inputs, outputs):
        return TensorDictModule(module, in_keys=inputs, out_keys=outputs)

    return WorldModel(
        component(torch.nn.Linear(8, 4), ["observation"], ["latent"]),
        component(CatLinear(6, 4), ["latent", "action"], [("next", "latent")]),
        component(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        done_head=component(
            torch.nn.Linear(4, 1), [("next", "latent")], [("next", "done")]
        )
        if done
        else None,
        decoder=component(
            torch.nn.Linear(4, 8), ["latent"], ["reconstructed_observation"]
        ),
    )


def reference_env() -> SpecEnv:
    return SpecEnv(
        [3],
        action_spec=Unbounded((2,)),
        observation_key="latent",
        observation=4,
        done_names=("done",),
    )


@pytest.mark.parametrize(
    "ours,theirs",
    [
        (WorldModel, TorchRLModel),
        (WorldModelEnv, TorchRLEnv),
        (WorldModelLoss, TorchRLLoss),
    ],
)
def test_signatures_are_kept(ours, theirs) -> None:
    """Every argument of TorchRL's class is one of ours, of the same kind and order."""
    kept = inspect.signature(ours.__init__).parameters
    for name, parameter in inspect.signature(theirs.__init__).parameters.items():
        assert kept[name].kind == parameter.kind, name
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    ours_names, theirs_names = (
        [
            name
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if parameter.kind is positional
        ]
        for cls in (ours, theirs)
    )
    assert ours_names == theirs_names


def test_accepted_keys_are_kept() -> None:
    ours = WorldModelLoss._AcceptedKeys()
    for name, default in vars(TorchRLLoss._AcceptedKeys()).items():
        assert getattr(ours, name) == default


def test_rollout_into_a_replay_buffer() -> None:
    model = build()
    env = WorldModelEnv(model, base_env=reference_env())
    assert env.batch_size == (3,)
    start = model.encode(TensorDict({"observation": torch.randn(3, 8)}, [3]))
    policy = TensorDictModule(
        torch.nn.Linear(4, 2), in_keys=["latent"], out_keys=["action"]
    )
    rollout = env.rollout(max_steps=5, policy=policy, tensordict=start)
    assert rollout.shape == (3, 5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(rollout.reshape(-1))
    assert len(buffer) == 15


def test_explicit_specs_and_latent_key() -> None:
    env = WorldModelEnv(
        build(),
        base_env=reference_env(),
        observation_spec=Composite(latent=Unbounded((2, 4)), shape=[2]),
        batch_size=torch.Size([2]),
        device="cpu",
        latent_key="latent",
    )
    start = TensorDict({"latent": torch.zeros(2, 4)}, [2])
    assert env.rollout(3, tensordict=start).shape == (2, 3)


def test_every_loss_term() -> None:
    model = build(done=True)
    loss = WorldModelLoss(
        model, losses=["reward", "done", "reconstruction"], reward_weight=2.0
    )
    batch = TensorDict(
        {
            "observation": torch.randn(3, 8),
            "action": torch.randn(3, 2),
            "next": {
                "reward": torch.randn(3, 1),
                "done": torch.zeros(3, 1, dtype=torch.bool),
                "terminated": torch.zeros(3, 1, dtype=torch.bool),
            },
        },
        [3],
    )
    out = loss(batch)
    assert set(out.keys()) == {"loss_reward", "loss_done", "loss_reconstruction"}
    assert all(value.shape == () for value in out.values())
    out.sum(reduce=True).backward()
    assert all(p.grad is not None for p in model.parameters())
