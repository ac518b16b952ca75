"""What TorchRL 0.14.1's own world model classes get wrong, and ours must not.

Every test is one body for both implementations: TorchRL's is a strict xfail,
ours has to pass. Where TorchRL's class is right the test runs on both, so that
a change of import takes nothing away. The numbers are rows of a list of
failures found by running TorchRL's classes; (1a)-(1e) are its sections.
"""

from __future__ import annotations

import doctest
import inspect
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
from tensordict import (
    LazyStackedTensorDict,
    TensorDict,
    TensorDictBase,
    TensorDictParams,
)
from tensordict.nn import EnsembleModule, NormalParamExtractor, TensorDictModule as Mod
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    MultiOneHot,
    OneHot,
    ReplayBuffer,
    Unbounded,
)
from torchrl.envs import (
    check_env_specs,
    EnvCreator,
    GymEnv,
    InitTracker,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TensorDictPrimer,
    TransformedEnv,
)
from torchrl.modules import (
    CEMPlanner,
    MLP,
    MPPIPlanner,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, DreamerActorLoss, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE, TD0Estimator, TDLambdaEstimator
from upstream._common import (
    ACTION,
    actor,
    assert_equal,
    at_zero,
    batched,
    countdown_model,
    countdown_start,
    critic,
    DID_NOT_RAISE,
    ending_head,
    fails_upstream,
    hand_rollout,
    Implementation,
    LATENT,
    OBS,
    PointEnv,
    random_start,
    small_model,
    TeamEnv,
    transitions,
    works_upstream,
)

close = torch.testing.assert_close


# 1a. Specs and construction ---------------------------------------------------


@fails_upstream(TypeError)
@pytest.mark.parametrize("which", ["world_model", "env", "loss"])
def test_docstring_example_is_true(impl: Implementation, which: str) -> None:
    """Row 1: the example in the docstring runs, and prints what it says."""
    text = inspect.getdoc(getattr(impl, which))
    test = doctest.DocTestParser().get_doctest(text, {}, which, None, 0)
    assert test.examples
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    try:
        doctest.DebugRunner(optionflags=flags).run(test, out=io.StringIO().write)
    except doctest.UnexpectedException as err:
        raise err.exc_info[1] from None  # what the example itself raised


@fails_upstream(AssertionError)
def test_specs_keep_feature_dims(impl: Implementation) -> None:
    """Row 2: for n envs every spec is ``[n, *feature]``."""
    base = GymEnv("Pendulum-v1")
    env = impl.env(small_model(impl, action=1), base, batch_size=[3])
    assert env.action_spec.shape == (3, 1)
    assert env.reward_spec.shape == (3, 1)
    assert env.full_done_spec["done"].shape == (3, 1)
    assert (env.action_spec.space.high == base.action_spec.space.high).all()


ACTION_SPECS = {
    "unbounded": Unbounded(shape=(2,)),
    "bounded": Bounded(-2.0, 2.0, shape=(2,)),
    "one-hot": OneHot(3),
    "multi-one-hot": MultiOneHot([2, 3]),
    "scalar categorical": Categorical(3),
}


@fails_upstream(AssertionError, RuntimeError, ValueError)
@pytest.mark.parametrize("reference_batch", [(), (3,), (2,)], ids=str)
@pytest.mark.parametrize("family", ACTION_SPECS)
def test_specs_of_each_family(
    impl: Implementation, family: str, reference_batch: tuple[int, ...]
) -> None:
    """Row 2b: whatever the kind of action, and however many reference envs."""
    spec = ACTION_SPECS[family]
    base = PointEnv(spec, reference_batch)
    still = Mod(
        lambda latent, action: latent, ["latent", "action"], [("next", "latent")]
    )
    env = impl.env(small_model(impl, dynamics=still), base, batch_size=[3])
    expected = spec.expand(3, *spec.shape)
    assert env.action_spec == expected
    assert env.reward_spec.shape == (3, 1)
    assert env.full_done_spec["done"].shape == (3, 1)
    action = env.rand_action(TensorDict(batch_size=[3]))["action"]
    assert action.shape == (3, *spec.shape)
    assert expected.is_in(action)


@fails_upstream(AssertionError)
def test_rollout_shapes_agree(impl: Implementation) -> None:
    """Row 2c: in a rollout action, reward and done have the same batch dims."""
    model = small_model(impl)
    env = impl.env(model, PointEnv(Unbounded(shape=(ACTION,)), (3,)))
    rollout = env.rollout(5, actor(), tensordict=random_start(model, 3))
    assert rollout["action"].shape == (3, 5, ACTION)
    assert rollout["next", "done"].shape == (3, 5, 1)
    assert rollout["next", "reward"].shape == (3, 5, 1)


@fails_upstream(TypeError)
def test_batch_size_may_be_an_int(impl: Implementation) -> None:
    """Row 2d: the signature says ``int``."""
    env = impl.env(small_model(impl), PointEnv(), batch_size=3)
    assert env.batch_size == (3,)
    assert env.action_spec.shape == (3, ACTION)


@fails_upstream(AssertionError)
def test_latent_moves(impl: Implementation) -> None:
    """Row 3: with the default specs a rollout is what the components predict."""
    model = small_model(impl)
    env = impl.env(model, PointEnv(Unbounded(shape=(ACTION,)), (3,)))
    start = random_start(model, 3)
    rollout = env.rollout(5, actor(), tensordict=start)
    expected = hand_rollout(model, start, actor(), 5)
    assert not expected["latent"][:, 0].allclose(expected["latent"][:, 4])
    close(rollout["latent"], expected["latent"])
    assert_equal(rollout, expected)


@fails_upstream(RuntimeError)
@pytest.mark.parametrize("batch_size", [(5,), (2, 4)], ids=str)
def test_env_without_batch_size_takes_any(
    impl: Implementation, batch_size: tuple[int, ...]
) -> None:
    """Row 5: ``batch_size=[]`` and not batch-locked means any start batch."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[])
    assert not env.batch_locked
    start = random_start(model, *batch_size)
    rollout = env.rollout(3, actor(), tensordict=start)
    assert rollout.batch_size == (*batch_size, 3)
    assert_equal(rollout, hand_rollout(model, start, actor(), 3))


@fails_upstream(AssertionError)
def test_env_with_batch_size_says_that_it_is_locked(impl: Implementation) -> None:
    """Row 5: an env that takes three rows only does not say that it takes any."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    with pytest.raises(RuntimeError):
        env.rollout(3, actor(), tensordict=random_start(model, 5))
    assert env.batch_locked


@fails_upstream(AssertionError)
def test_model_stays_on_one_device(impl: Implementation) -> None:
    """Row 6: ``device`` moves the whole model or nothing."""
    model = small_model(impl)
    env = impl.repaired_env(
        model,
        PointEnv(),
        observation_spec=batched({"latent": (LATENT,)}),
        device="meta",
    )
    assert env.device == torch.device("meta")
    assert len({parameter.device for parameter in model.parameters()}) == 1


@fails_upstream(AssertionError)
def test_replaced_component_is_used(impl: Implementation) -> None:
    """Row 7: the model, and an env made before, run the component it has now."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    model.reward_head = Mod(
        lambda latent: latent.sum(-1, keepdim=True) + 100.0,
        [("next", "latent")],
        [("next", "reward")],
    )
    start = random_start(model, 3)
    expected = hand_rollout(model, start, actor(), 2)
    assert (expected["next", "reward"] > 50).all()
    stepped = model.step(expected[:, 0].exclude("next"))
    close(stepped["next", "reward"], expected[:, 0]["next", "reward"])
    rollout = env.rollout(2, actor(), tensordict=start)
    close(rollout["next", "reward"], expected["next", "reward"])


# 1b. Resets and dones -----------------------------------------------------------


def _in_batched_env(kind: type, make: Callable[[], Any]) -> TensorDictBase:
    env = kind(2, make)
    try:
        with torch.no_grad():  # TorchRL's shared buffers take no graph
            return env.reset().clone()
    finally:
        env.close(raise_if_closed=False)


def _after_check(make: Callable[[], Any]) -> TensorDictBase:
    env = make()
    check_env_specs(env)
    check_env_specs(env, seed=1)
    return env.reset()


USES = {
    "reset": lambda make: make().reset(),
    "check_env_specs": _after_check,
    "EnvCreator": lambda make: EnvCreator(make)().reset(),
    "SerialEnv": partial(_in_batched_env, SerialEnv),
    "ParallelEnv": partial(_in_batched_env, ParallelEnv),
}
# A process that starts anew imports torch first.
SLOW_USES = {"ParallelEnv"}


@fails_upstream(TypeError)
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(use, marks=[pytest.mark.slow] if use in SLOW_USES else [])
        for use in USES
    ],
)
def test_env_starts_by_itself(impl: Implementation, use: str) -> None:
    """Row 8: with a source of start states it is an env like any other."""
    model = small_model(impl)
    source = random_start(model)

    def make() -> Any:
        return impl.env(model, PointEnv(), batch_size=[3], start_states=source)

    out = USES[use](make)
    assert out.batch_size[-1:] == (3,)
    close(out["latent"], source["latent"].expand_as(out["latent"]))


@works_upstream()
def test_specs_are_checked_from_a_given_start(impl: Implementation) -> None:
    """Row 8b: ``check_env_specs`` takes the start, if it has been reset to.

    It neither resets to it nor, with a seed, hands it on: that is TorchRL's
    function, and the same for both envs.
    """
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = env.reset(random_start(model, 3))
    assert not start["done"].any()
    assert start["done"].shape == (3, 1)
    check_env_specs(env, tensordict=start)


TRANSFORMS = {
    "StepCounter": lambda: StepCounter(max_steps=4),
    "RewardSum": lambda: RewardSum(),
    "InitTracker": lambda: InitTracker(),
}


@fails_upstream(RuntimeError)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_env_imagines(impl: Implementation, transform: str) -> None:
    """Row 9: a transform does not strip the latent that the caller starts from."""
    model = small_model(impl)
    base = PointEnv(done_names=("done", "terminated", "truncated"))
    env = TransformedEnv(
        impl.repaired_env(model, base, batch_size=[3]), TRANSFORMS[transform]()
    )
    start = random_start(model, 3)
    rollout = env.rollout(6, actor(), tensordict=start)
    steps = 4 if transform == "StepCounter" else 6
    assert rollout.batch_size == (3, steps)
    assert_equal(rollout, hand_rollout(model, start, actor(), steps))
    if transform == "StepCounter":
        assert rollout["step_count"][0, :, 0].tolist() == [0, 1, 2, 3]
        assert (
            rollout["next", "truncated"][..., 0].tolist() == [[False] * 3 + [True]] * 3
        )
    if transform == "RewardSum":
        total = rollout["next", "reward"].cumsum(1)
        close(rollout["next", "episode_reward"], total)
    if transform == "InitTracker":
        assert rollout["is_init"][..., 0].tolist() == [[True] + [False] * 5] * 3


@fails_upstream(TypeError)
def test_finished_rows_start_anew(impl: Implementation) -> None:
    """Row 10: past a predicted done a row goes on from the source of starts."""
    model = countdown_model(impl, done_head=ending_head("done", "terminated"))
    env = impl.env(
        model, PointEnv(), batch_size=[2], start_states=countdown_start(9)[0]
    )
    rollout = env.rollout(
        6, actor(), tensordict=countdown_start(2, 8), break_when_any_done=False
    )
    assert rollout["latent"][..., 0].tolist() == [
        [2, 1, 9, 8, 7, 6],
        [8, 7, 6, 5, 4, 3],
    ]
    done = rollout["next", "done"][..., 0]
    assert done.tolist() == [[False, True] + [False] * 4, [False] * 6]


@fails_upstream(RuntimeError)
def test_rollout_until_all_are_done(impl: Implementation) -> None:
    """Row 11: ``break_when_all_done=True`` steps on the rows that are left."""
    model = countdown_model(impl, done_head=ending_head("done", "terminated"))
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    rollout = env.rollout(
        9,
        actor(),
        tensordict=countdown_start(1, 4, 3),
        break_when_any_done=False,
        break_when_all_done=True,
    )
    # A row that has ended repeats its last transition.
    assert rollout["latent"][..., 0].tolist() == [[1] * 4, [4, 3, 2, 1], [3, 2, 1, 1]]
    assert rollout["next", "done"][..., 0].long().tolist() == [
        [1, 1, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 1, 1],
    ]


@fails_upstream(RuntimeError)
def test_done_rows_do_not_cut_the_others(impl: Implementation) -> None:
    """Row 12: one predicted done need not end the trajectories that are alive."""
    model = countdown_model(impl, done_head=ending_head("done", "terminated"))
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = countdown_start(1, 9, 8)
    rollout = env.rollout(6, actor(), tensordict=start, break_when_any_done=False)
    assert rollout.batch_size == (3, 6)
    expected = hand_rollout(model, start, actor(), 6)
    assert_equal(rollout[1:], expected[1:])
    assert rollout["next", "done"][0, 0].item()
    assert not rollout["next", "done"][1:].any()


@fails_upstream(DID_NOT_RAISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_done_head_of_another_dtype_is_refused(
    impl: Implementation, dtype: torch.dtype
) -> None:
    """Row 13: at construction, and by name, not with a crash in the rollout."""
    head = ending_head("done", function=lambda latent: at_zero(latent).to(dtype))
    model = countdown_model(impl, done_head=head)
    with pytest.raises(ValueError, match="done_head.*done"):
        impl.repaired_env(model, PointEnv(), batch_size=[3])


@fails_upstream(AssertionError)
def test_lone_done_is_a_termination(impl: Implementation) -> None:
    """Row 14: so a value target does not bootstrap through it."""
    model = countdown_model(impl, done_head=ending_head("done"))
    env = impl.repaired_env(model, PointEnv(), batch_size=[2])
    rollout = env.rollout(5, actor(), tensordict=countdown_start(3, 3))
    assert rollout.batch_size == (2, 3)
    assert rollout["next", "done"][0, :, 0].tolist() == [False, False, True]
    estimator = TD0Estimator(gamma=0.9, value_network=critic(width=OBS))
    target = estimator.value_estimate(rollout)
    close(target[:, -1], rollout["next", "reward"][:, -1])
    assert rollout["next", "terminated"][:, -1].all()


@fails_upstream(AssertionError)
def test_termination_is_a_done(impl: Implementation) -> None:
    """Row 15: ``done == terminated | truncated``, whichever the head writes."""
    model = countdown_model(impl, done_head=ending_head("terminated"))
    env = impl.repaired_env(model, PointEnv(), batch_size=[2])
    rollout = env.rollout(5, actor(), tensordict=countdown_start(3, 4))
    assert rollout.batch_size == (2, 3)
    assert rollout["next", "terminated"][:, -1, 0].tolist() == [True, False]
    assert rollout["next", "done"][:, -1, 0].tolist() == [True, False]


@fails_upstream(DID_NOT_RAISE)
def test_missing_reward_is_refused(impl: Implementation) -> None:
    """Row 16: a renamed reward is an error, not a reward of zero for ever."""
    head = Mod(torch.nn.Linear(LATENT, 1), [("next", "latent")], [("next", "rew")])
    model = small_model(impl, reward_head=head)
    with pytest.raises(ValueError, match="reward"):
        impl.repaired_env(model, PointEnv(), batch_size=[3])


@works_upstream()
def test_partial_reset_touches_the_masked_rows_only(impl: Implementation) -> None:
    """Row 17: the others keep their latent and their done."""
    model = countdown_model(impl, done_head=ending_head("done", "terminated"))
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    given = countdown_start(5, 6, 7)
    ended = torch.tensor([[True], [True], [False]])
    given.update({"done": ended, "terminated": ended.clone()})
    given.set("_reset", torch.tensor([[True], [False], [True]]))
    out = env.reset(given)
    assert out["latent"][:, 0].tolist() == [5, 6, 7]
    assert out["done"][:, 0].tolist() == [False, True, False]
    assert out["terminated"][:, 0].tolist() == [False, True, False]


def _continue_logit(latent: torch.Tensor) -> torch.Tensor:
    return latent.mean(-1, keepdim=True) - 0.5


@fails_upstream(AssertionError)
def test_continue_logits_end_the_episode(impl: Implementation) -> None:
    """Row 18: a head may predict the logit of going on; its sign decides."""
    head = ending_head("continue_pred", function=_continue_logit)
    env = impl.repaired_env(
        countdown_model(impl, done_head=head), PointEnv(), batch_size=[2]
    )
    rollout = env.rollout(5, actor(), tensordict=countdown_start(3, 4))
    assert rollout.batch_size == (2, 3)
    assert rollout["next", "terminated"][:, -1, 0].tolist() == [True, False]


@works_upstream()
def test_rollout_truncates_when_told_to(impl: Implementation) -> None:
    """Row 19: ``set_truncated=True`` works once there is a truncated entry."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3]).add_truncated_keys()
    start = random_start(model, 3)
    rollout = env.rollout(4, actor(), tensordict=start, set_truncated=True)
    assert rollout["next", "truncated"][..., 0].tolist() == [[False] * 3 + [True]] * 3
    assert rollout["next", "done"][..., 0].tolist() == [[False] * 3 + [True]] * 3
    assert not rollout["next", "terminated"].any()
    assert_equal(rollout, hand_rollout(model, start, actor(), 4))


@fails_upstream(AssertionError)
def test_stale_entries_of_a_replay_sample_are_left_out(impl: Implementation) -> None:
    """Row 20: real entries do not stand still in a rollout and look alive."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = model.encode(transitions(3).update({"reward": torch.ones(3, 1)}))
    start.set("goal", torch.randn(3, 7))
    goal = start["goal"].clone()
    rollout = env.rollout(4, actor(), tensordict=start)
    close(rollout["goal"], goal[:, None].expand(3, 4, 7))  # that one is the caller's
    assert "reward" not in rollout.keys()
    assert "observation" not in rollout.keys()
    assert "observation" not in rollout["next"].keys()


# 1c. Keys ---------------------------------------------------------------------------


@works_upstream()
def test_nested_latent_key(impl: Implementation) -> None:
    """Row 21: a nested latent moves as a flat one does."""
    key = ("state", "latent")
    model = small_model(impl, latent_key=key)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3], latent_key=key)
    start = random_start(model, 3)
    policy = actor(latent_key=key)
    rollout = env.rollout(5, policy, tensordict=start)
    assert_equal(rollout, hand_rollout(model, start, policy, 5, latent_keys=[key]))


class _Split(torch.nn.Module):
    """A linear layer over all its inputs, whose output is cut in two."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, 2 * LATENT)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(torch.cat(values, -1)).chunk(2, -1)


def _belief_model(impl: Implementation, **replaced: Any) -> Any:
    """A latent of two parts, both of which the dynamics move."""
    return impl.world_model(
        **{
            "encoder": Mod(_Split(OBS), ["observation"], ["latent", "belief"]),
            "dynamics": Mod(
                _Split(2 * LATENT + ACTION),
                ["latent", "belief", "action"],
                [("next", "latent"), ("next", "belief")],
            ),
            "reward_head": Mod(
                MLP(2 * LATENT, 1, num_cells=[8]),
                [("next", "latent"), ("next", "belief")],
                [("next", "reward")],
            ),
            **replaced,
        }
    )


@fails_upstream(AssertionError)
def test_every_latent_moves(impl: Implementation) -> None:
    """Row 22: not only the one that ``latent_key`` names."""
    model = _belief_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = random_start(model, 3)
    rollout = env.rollout(5, actor(), tensordict=start)
    expected = hand_rollout(model, start, actor(), 5, ["latent", "belief"])
    close(rollout["latent"][:, :2], expected["latent"][:, :2])
    close(rollout["belief"], expected["belief"])
    assert_equal(rollout, expected)


@fails_upstream(DID_NOT_RAISE)
def test_reset_names_the_latent_that_lacks(impl: Implementation) -> None:
    """Row 22b: at the reset, not in the first step."""
    env = impl.repaired_env(_belief_model(impl), PointEnv(), batch_size=[3])
    start = TensorDict({"latent": torch.randn(3, LATENT)}, batch_size=[3])
    with pytest.raises(RuntimeError, match="belief"):
        env.reset(start)


@fails_upstream(TypeError)
def test_initial_state_supplies_what_the_encoder_does_not(impl: Implementation) -> None:
    """Row 22b: a recurrent belief starts from the model's initial state."""
    encoder = Mod(torch.nn.Linear(OBS, LATENT), ["observation"], ["latent"])
    belief = torch.randn(LATENT)
    initial = TensorDict({"belief": belief})
    model = _belief_model(impl, encoder=encoder, initial_state=initial)
    assert sorted(model.in_keys) == ["action", "observation"]
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = random_start(model, 3)
    out = env.reset(start)
    close(out["belief"], belief.expand(3, LATENT))
    close(out["latent"], start["latent"])


@fails_upstream(RuntimeError)
def test_multi_agent_rollout(impl: Implementation) -> None:
    """Row 23: nested action and reward, one of each per agent."""
    key, n_agents = ("agents", "latent"), 2
    next_key = ("next", "agents", "latent")
    model = impl.world_model(
        Mod(torch.nn.Linear(OBS, LATENT), [("agents", "observation")], [key]),
        Mod(
            MLP(LATENT + 1, LATENT, num_cells=[8]),
            [key, ("agents", "action")],
            [next_key],
        ),
        Mod(torch.nn.Linear(LATENT, 1), [next_key], [("next", "agents", "reward")]),
    )
    env = impl.repaired_env(
        model,
        TeamEnv(n_agents),
        batch_size=[3],
        latent_key=key,
        observation_spec=_agents_spec(n_agents),
    )
    agents = TensorDict(
        {"latent": torch.randn(3, n_agents, LATENT)}, batch_size=[3, n_agents]
    )
    start = TensorDict({"agents": agents}, batch_size=[3])
    policy = Mod(lambda latent: latent[..., :1].tanh(), [key], [("agents", "action")])
    rollout = env.rollout(5, policy, tensordict=start)
    assert rollout["agents", "action"].shape == (3, 5, n_agents, 1)
    assert rollout["next", "agents", "reward"].shape == (3, 5, n_agents, 1)
    latent = start[key]
    for t in range(5):
        close(rollout[key][:, t], latent)
        action = latent[..., :1].tanh()
        latent = model.dynamics.module(torch.cat([latent, action], -1))
        reward = model.reward_head.module(latent)
        close(rollout["next", "agents", "reward"][:, t], reward)


def _agents_spec(n_agents: int) -> Composite:
    latent = Unbounded(shape=(3, n_agents, LATENT))
    agents = Composite(latent=latent, shape=(3, n_agents))
    return Composite(agents=agents, shape=(3,))


@fails_upstream(KeyError)
def test_decoded_observation_is_of_the_next_latent(impl: Implementation) -> None:
    """Row 24: what the spec names is decoded from the latent it stands beside."""
    decoder = Mod(torch.nn.Linear(LATENT, OBS), ["latent"], ["decoded"])
    model = small_model(impl, decoder=decoder)
    spec = batched({"latent": (LATENT,), "decoded": (OBS,)}, (3,))
    env = impl.repaired_env(model, PointEnv(), batch_size=[3], observation_spec=spec)
    rollout = env.rollout(4, actor(), tensordict=random_start(model, 3))
    close(rollout["next", "decoded"], decoder.module(rollout["next", "latent"]))
    close(rollout["decoded"], decoder.module(rollout["latent"]))


@fails_upstream(AssertionError)
def test_decoded_observation_is_there_from_the_start(impl: Implementation) -> None:
    """Row 25: so that the rollout is dense and value estimators find both."""
    decoder = Mod(
        torch.nn.Linear(LATENT, OBS), [("next", "latent")], [("next", "observation")]
    )
    model = small_model(impl, decoder=decoder)
    spec = batched({"latent": (LATENT,), "observation": (OBS,)}, (3,))
    env = impl.repaired_env(model, PointEnv(), batch_size=[3], observation_spec=spec)
    rollout = env.rollout(4, actor(), tensordict=random_start(model, 3))
    assert not isinstance(rollout, LazyStackedTensorDict)
    close(rollout["observation"], decoder.module(rollout["latent"]))
    close(rollout["next", "observation"], decoder.module(rollout["next", "latent"]))
    value = critic("observation", width=OBS)
    out = GAE(gamma=0.9, lmbda=0.0, value_network=value)(rollout.copy())
    expected = rollout["next", "reward"] + 0.9 * value.module(
        out["next", "observation"]
    )
    close(out["value_target"], expected)


# 1d. Downstream -----------------------------------------------------------------------

GOAL = 0.3


def _goal_model(impl: Implementation, **replaced: Any) -> Any:
    """Actions push the latent, which is best at ``GOAL``, and to go on is good."""
    return impl.world_model(
        **{
            "encoder": Mod(torch.nn.Linear(OBS, ACTION), ["observation"], ["latent"]),
            "dynamics": Mod(torch.add, ["latent", "action"], [("next", "latent")]),
            "reward_head": Mod(
                lambda latent: 1 - (latent - GOAL).pow(2).sum(-1, keepdim=True),
                [("next", "latent")],
                [("next", "reward")],
            ),
            **replaced,
        }
    )


def _cem(env: Any) -> CEMPlanner:
    return CEMPlanner(env, 2, optim_steps=8, num_candidates=256, top_k=16)


def _mppi(env: Any) -> MPPIPlanner:
    value = Mod(
        lambda latent: torch.zeros_like(latent[..., :1]), ["latent"], ["state_value"]
    )
    return MPPIPlanner(
        env,
        TDLambdaEstimator(gamma=1.0, lmbda=1.0, value_network=value),
        temperature=1.0,
        planning_horizon=2,
        optim_steps=8,
        num_candidates=256,
        top_k=16,
    )


PLANNERS = {"CEM": _cem, "MPPI": _mppi}


@fails_upstream(RuntimeError)
@pytest.mark.parametrize("planner", PLANNERS)
def test_planner_plans(impl: Implementation, planner: str) -> None:
    """Row 26: TorchRL's planners find the best action for each row of a batch."""
    env = impl.repaired_env(_goal_model(impl), PointEnv(), batch_size=[])
    latent = torch.tensor([[0.0, 0.0], [0.5, -0.5], [-0.4, 0.2]])
    start = env.reset(TensorDict({"latent": latent}, batch_size=[3]))
    action = PLANNERS[planner](env)(start)["action"]
    close(action, GOAL - latent, atol=0.1, rtol=0.0)


@fails_upstream(RuntimeError)
@pytest.mark.parametrize("planner", PLANNERS)
def test_planner_goes_on_past_a_predicted_done(
    impl: Implementation, planner: str
) -> None:
    """Row 26b: some candidates end; the plan is made all the same."""
    head = ending_head(
        "done", "terminated", function=lambda x: x.amax(-1, keepdim=True) > 0.7
    )
    model = _goal_model(impl, done_head=head)
    env = impl.repaired_free_batch_env(model, PointEnv(), batch_size=[])
    latent = torch.tensor([[0.0, 0.0], [0.5, -0.5], [-0.4, 0.2]])
    flag = torch.zeros(3, 1, dtype=torch.bool)
    start = TensorDict(
        {"latent": latent, "done": flag, "terminated": flag.clone()}, batch_size=[3]
    )
    action = PLANNERS[planner](env)(start)["action"]
    close(action, GOAL - latent, atol=0.1, rtol=0.0)


def _imagined_batch(impl: Implementation, policy: Any) -> TensorDictBase:
    """A rollout of the env as it comes, of default specs, in 3 envs and 4 steps."""
    model = small_model(impl)
    env = impl.env(model, PointEnv(Unbounded(shape=(ACTION,)), (3,)))
    rollout = env.rollout(4, policy, tensordict=random_start(model, 3))
    return rollout.detach()


def _stochastic_actor() -> ProbabilisticActor:
    net = torch.nn.Sequential(
        MLP(LATENT, 2 * ACTION, num_cells=[8]), NormalParamExtractor()
    )
    return ProbabilisticActor(
        Mod(net, ["latent"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


@fails_upstream(KeyError, RuntimeError)
@pytest.mark.parametrize("estimator", [GAE, TDLambdaEstimator], ids=["GAE", "TDLambda"])
def test_value_estimators_read_a_rollout(impl: Implementation, estimator: type) -> None:
    """Row 27: an imagined batch goes into TorchRL's value estimators as it is."""
    rollout = _imagined_batch(impl, actor())
    value = critic()
    out = estimator(gamma=0.9, lmbda=0.95, value_network=value)(rollout)
    close(out["latent"][:, 1:], out["next", "latent"][:, :-1])
    expected = torch.zeros(3, 1)
    for t in reversed(range(4)):
        step = out[:, t]
        td_error = (
            step["next", "reward"]
            + 0.9 * value.module(step["next", "latent"])
            - value.module(step["latent"])
        )
        expected = td_error + 0.9 * 0.95 * expected
        close(step["advantage"], expected)


@fails_upstream(KeyError, RuntimeError)
def test_ppo_reads_a_rollout(impl: Implementation) -> None:
    """Row 27: the policy that acted has ratio 1, so its gain is the advantage."""
    policy, value = _stochastic_actor(), critic()
    rollout = _imagined_batch(impl, policy)
    GAE(gamma=0.9, lmbda=0.95, value_network=value)(rollout)
    assert rollout["advantage"].shape == (3, 4, 1)
    loss = ClipPPOLoss(policy, value, entropy_bonus=False)(rollout)
    close(loss["loss_objective"], -rollout["advantage"].mean())


@fails_upstream(KeyError, RuntimeError)
def test_sac_reads_a_rollout(impl: Implementation) -> None:
    """Row 27: the Q networks are trained towards reward and next value."""
    policy = _stochastic_actor()
    rollout = _imagined_batch(impl, policy)
    q_net = ValueOperator(MLP(LATENT + ACTION, 1, num_cells=[8]), ["latent", "action"])
    loss = SACLoss(
        policy, q_net, num_qvalue_nets=2, loss_function="l2", target_entropy=-ACTION
    )
    loss.make_value_estimator(gamma=0.0)  # then the target is the reward
    out = loss(rollout.reshape(-1))
    inputs = torch.cat([rollout["latent"], rollout["action"]], -1).reshape(
        -1, LATENT + ACTION
    )
    total = 0.0
    for params in loss.qvalue_network_params.unbind(0):
        with params.to_module(q_net):
            error = q_net.module(inputs) - rollout["next", "reward"].reshape(-1, 1)
        total = total + error.pow(2).mean()
    close(out["loss_qvalue"], total)


@works_upstream()
def test_replay_buffer_takes_a_rollout(impl: Implementation) -> None:
    """Row 28: what comes out is what was imagined."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = random_start(model, 3)
    with torch.no_grad():
        rollout = env.rollout(4, actor(), tensordict=start).reshape(-1)
        expected = hand_rollout(model, start, actor(), 4).reshape(-1)
    buffer = ReplayBuffer(storage=LazyTensorStorage(20))
    buffer.extend(rollout)
    assert len(buffer) == 12
    assert_equal(buffer[:], expected)


@fails_upstream(RuntimeError)
def test_dreamer_actor_loss_starts_from_any_batch(impl: Implementation) -> None:
    """Row 29: the loss imagines from ``[B * T]`` states, however many there are."""
    model = impl.world_model(
        Mod(torch.nn.Linear(OBS, LATENT), ["observation"], ["state"]),
        Mod(
            _Split(2 * LATENT + ACTION),
            ["state", "belief", "action"],
            [("next", "state"), ("next", "belief")],
        ),
        Mod(torch.nn.Linear(LATENT, 1), [("next", "state")], [("next", "reward")]),
    )
    spec = batched({"state": (LATENT,), "belief": (LATENT,)})
    net = torch.nn.Linear(LATENT, ACTION)
    policy = Mod(net, ["state"], ["action"])
    value = critic("state")

    def loss_from(data: TensorDict, batch_size: int | None) -> torch.Tensor:
        size = [] if batch_size is None else [batch_size]
        env = impl.repaired_env(
            model,
            PointEnv(),
            batch_size=size,
            observation_spec=spec.expand(size),
            latent_key="state",
        )
        loss = DreamerActorLoss(policy, value, env, imagination_horizon=3)
        return loss(data)[0]["loss_actor"]

    data = TensorDict(
        {"state": torch.randn(6, LATENT), "belief": torch.randn(6, LATENT)},
        batch_size=[6],
    )
    expected = loss_from(data, 6)
    close(loss_from(data, None), expected)
    gradient = torch.autograd.grad(loss_from(data, None), net.weight)[0]
    assert gradient.abs().sum() > 0


@works_upstream()
def test_gradients_flow_through_a_rollout(impl: Implementation) -> None:
    """Row 30: and are those of a loop over the networks."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    net = torch.nn.Linear(LATENT, ACTION)
    policy = Mod(net, ["latent"], ["action"])
    start = random_start(model, 3)
    weights = [net.weight, *model.dynamics.parameters()]
    imagined = env.rollout(4, policy, tensordict=start)["next", "reward"].sum()
    by_hand = hand_rollout(model, start, policy, 4)["next", "reward"].sum()
    close(torch.autograd.grad(imagined, weights), torch.autograd.grad(by_hand, weights))


@fails_upstream(DID_NOT_RAISE)
def test_model_of_another_dtype_is_refused(impl: Implementation) -> None:
    """Row 31: by name and at construction; dtypes are the specs'."""
    model = small_model(impl).double()
    with pytest.raises((ValueError, RuntimeError), match="encoder|dynamics"):
        impl.repaired_env(
            model,
            PointEnv(),
            batch_size=[3],
            observation_spec=batched({"latent": (LATENT,)}, (3,)),
        )


@fails_upstream(AssertionError)
@pytest.mark.parametrize("noise", ["random actions", "stochastic dynamics"])
def test_seed_repeats_a_rollout(impl: Implementation, noise: str) -> None:
    """Row 32: ``set_seed`` seeds what is random."""
    replaced: dict[str, Any] = {}
    if noise == "stochastic dynamics":
        replaced["dynamics"] = Mod(
            lambda latent, action: latent + torch.randn_like(latent),
            ["latent", "action"],
            [("next", "latent")],
        )
    model = small_model(impl, **replaced)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = random_start(model, 3)
    policy = None if noise == "random actions" else actor()
    rollouts = []
    for seed in (1, 2, 1):
        env.set_seed(seed)
        rollouts.append(
            env.rollout(4, policy, tensordict=start.clone())["next", "latent"]
        )
    assert not rollouts[0].allclose(rollouts[1])
    assert rollouts[0].equal(rollouts[2])


@works_upstream()
def test_step_compiles(impl: Implementation) -> None:
    """Row 33: to one graph, with the same result."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = actor()(env.reset(random_start(model, 3)))
    expected = env.step(start.clone())
    torch.compiler.reset()
    compiled = torch.compile(env.step, fullgraph=True, backend="eager")
    assert_equal(compiled(start.clone()), expected)


@fails_upstream(torch._dynamo.exc.Unsupported)
def test_rollout_compiles(impl: Implementation) -> None:
    """Row 33: a rollout that does not stop early is one graph."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = env.reset(random_start(model, 3))
    policy = actor()

    def imagine(tensordict: TensorDictBase) -> TensorDictBase:
        return env.rollout(
            3,
            policy,
            tensordict=tensordict,
            auto_reset=False,
            break_when_any_done=False,
        )

    torch.compiler.reset()
    compiled = torch.compile(imagine, fullgraph=True, backend="eager")
    assert_equal(compiled(start.clone()), hand_rollout(model, start, policy, 3))


@works_upstream()
def test_serial_env_starts_from_given_states(impl: Implementation) -> None:
    """Row 34: each env from its own part of a stacked start."""
    model = small_model(impl)
    env = SerialEnv(2, lambda: impl.repaired_env(model, PointEnv(), batch_size=[3]))
    start = random_start(model, 2, 3)
    with torch.no_grad():  # TorchRL's shared buffers take no graph
        rollout = env.rollout(4, actor(), tensordict=start)
        expected = hand_rollout(model, start, actor(), 4)
    assert rollout.batch_size == (2, 3, 4)
    assert_equal(rollout, expected)


@fails_upstream(TypeError)
def test_collector_collects_imagined_frames(impl: Implementation) -> None:
    """Row 35: the imagined env in the place of a real one, as in a Trainer."""
    model = small_model(impl)
    source = random_start(model, 20)
    env = impl.env(model, PointEnv(), batch_size=[3], start_states=source)
    collector = Collector(env, actor(), frames_per_batch=12, total_frames=24)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    assert [batch.batch_size for batch in batches] == [(3, 4), (3, 4)]
    first = batches[0]
    known = (first["latent"][:, 0, None] == source["latent"]).all(-1).any(-1)
    assert known.all()
    assert_equal(first, hand_rollout(model, first[:, 0], actor(), 4).detach())
    close(batches[1]["latent"][:, 0], first["next", "latent"][:, -1])


@fails_upstream(AssertionError)
def test_state_dict_holds_each_tensor_once(impl: Implementation) -> None:
    """Row 36: the components are the only state, of the model and of the env."""
    model = small_model(impl)
    n_tensors = len(list(model.parameters()))
    assert len(model.state_dict()) == n_tensors
    assert len(list(TensorDict.from_module(model).keys(True, True))) == n_tensors
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    assert len(env.state_dict()) == n_tensors


@fails_upstream(RuntimeError)
def test_env_state_loads_into_a_model(impl: Implementation) -> None:
    """Row 36: what an env saves of its model is a world model."""
    env = impl.repaired_env(small_model(impl), PointEnv(), batch_size=[3])
    other = small_model(impl)
    other.load_state_dict(env.world_model.state_dict())
    start = random_start(other, 3)
    rollout = env.rollout(2, actor(), tensordict=start)
    assert_equal(rollout, hand_rollout(other, start, actor(), 2))


@fails_upstream(TypeError)
def test_model_takes_keywords(impl: Implementation) -> None:
    """Row 37: as every TensorDictModule."""
    model = small_model(impl)
    batch = transitions(5)
    out = model(observation=batch["observation"], action=batch["action"])
    expected = model(batch.select("observation", "action"))
    close(out, tuple(expected[key] for key in model.out_keys))


def _ensemble_model(impl: Implementation, **kwargs: Any) -> Any:
    member = Mod(
        MLP(LATENT + ACTION, LATENT, num_cells=[16]),
        ["latent", "action"],
        [("next", "latent")],
    )
    return small_model(impl, dynamics=EnsembleModule(member, 5, **kwargs))


@fails_upstream(DID_NOT_RAISE)
def test_dynamics_that_add_a_dim_are_refused(impl: Implementation) -> None:
    """Row 38: an ensemble of which no member is chosen is named at construction."""
    with pytest.raises((ValueError, RuntimeError), match="dynamics"):
        impl.repaired_env(_ensemble_model(impl), PointEnv(), batch_size=[3])


@works_upstream()
def test_one_ensemble_member_per_row(impl: Implementation) -> None:
    """Row 38: with a batch dim for the members each follows its own."""
    model = _ensemble_model(impl, expand_input=False)
    env = impl.repaired_env(
        model,
        PointEnv(),
        batch_size=[5, 3],
        observation_spec=batched({"latent": (LATENT,)}, (5, 3)),
    )
    start = random_start(model, 3).expand(5, 3).clone()
    rollout = env.rollout(4, actor(), tensordict=start)
    assert_equal(rollout, hand_rollout(model, start, actor(), 4))
    last = rollout["next", "latent"][:, :, -1]
    assert not last[0].allclose(last[1])


def _env_with_source(impl: Implementation, model: Any, latent: torch.Tensor) -> Any:
    """An env that starts from ``latent`` by itself, by what each has to offer."""
    if impl.is_ours:
        source = TensorDict({"latent": latent}, batch_size=[])
        return impl.env(model, PointEnv(), batch_size=[3], start_states=source)
    primer = TensorDictPrimer(
        batched({"latent": (LATENT,)}),
        default_value={"latent": lambda: latent.expand(3, LATENT).clone()},
        expand_specs=True,
        call_before_env_reset=True,
    )
    env = impl.repaired_state_env(model, PointEnv(), batch_size=[3])
    return TransformedEnv(env, primer)


@fails_upstream(AssertionError)
def test_source_of_starts_yields_to_a_given_start(impl: Implementation) -> None:
    """Row 39: the caller's start is not overwritten."""
    model = small_model(impl)
    latent = torch.randn(LATENT)
    env = _env_with_source(impl, model, latent)
    rollout = env.rollout(2, actor())
    close(rollout["latent"][:, 0], latent.expand(3, LATENT), msg="no start at all")
    start = random_start(model, 3)
    rollout = env.rollout(2, actor(), tensordict=start.clone())
    assert rollout["latent"][:, 0].equal(start["latent"])


def _saved(env: Any) -> Any:
    file = io.BytesIO()
    torch.save(env, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(env: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(env))


@works_upstream()
@pytest.mark.parametrize(
    "through", [_saved, _pickled], ids=["torch.save", "cloudpickle"]
)
def test_env_can_be_saved(impl: Implementation, through: Callable[[Any], Any]) -> None:
    """Row 40: and imagines the same afterwards."""
    model = small_model(impl)
    env = impl.repaired_env(model, PointEnv(), batch_size=[3])
    start = random_start(model, 3)
    again = through(env)
    assert again is not env
    rollout = again.rollout(3, actor(), tensordict=start.clone())
    assert_equal(rollout, hand_rollout(model, start, actor(), 3))


# 1e. The loss ---------------------------------------------------------------------------


def _logit_head(*names: str) -> Mod:
    """A trainable head that writes floats under the given names."""
    return Mod(
        torch.nn.Linear(LATENT, 1), [("next", "latent")], [("next", n) for n in names]
    )


def _predict(model: Any, batch: TensorDictBase) -> TensorDictBase:
    """What the components make of a batch, without its labels."""
    return model(batch.select("observation", "action"))


@fails_upstream(TypeError)
def test_loss_takes_keywords(impl: Implementation) -> None:
    """1e: a loss has in_keys and out_keys, and can be called by them."""
    loss = impl.loss(small_model(impl))
    batch = transitions(5)
    value = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_reward=batch["next", "reward"],
    )
    close(value, loss(batch)["loss_reward"])
    assert {"observation", "action", ("next", "reward")} <= set(loss.in_keys)
    assert loss.out_keys == ["loss_reward"]


@fails_upstream(TypeError)
def test_loss_per_sample(impl: Implementation) -> None:
    """1e: ``reduction="none"`` gives what prioritised replay needs."""
    model = small_model(impl)
    batch = transitions(5)
    value = impl.loss(model, reduction="none")(batch)["loss_reward"]
    error = _predict(model, batch)["next", "reward"] - batch["next", "reward"]
    close(value, error.pow(2).squeeze(-1))


@fails_upstream(AssertionError)
def test_padding_is_left_out(impl: Implementation) -> None:
    """1e: where the batch's mask says so, a NaN harms neither loss nor gradient."""
    model = small_model(impl)
    batch = transitions(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = mask[2, 5:] = False
    valid = batch[mask]
    for key in ("observation", "action", ("next", "reward"), ("next", "observation")):
        batch[key][~mask] = float("nan")
    batch.set(("collector", "mask"), mask)
    loss = impl.loss(model)
    value = loss(batch)["loss_reward"]
    close(value, loss(valid)["loss_reward"])
    gradients = torch.autograd.grad(value, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@fails_upstream(AssertionError)
def test_sample_weights_count(impl: Implementation) -> None:
    """1e: the weights that TorchRL's prioritised replay writes are heeded."""
    model = small_model(impl)
    batch = transitions(4)
    batch.set("priority_weight", torch.tensor([1.0, 0.0, 0.0, 0.0]))
    loss = impl.loss(model)
    close(loss(batch)["loss_reward"], loss(batch[:1])["loss_reward"])


@fails_upstream(AssertionError)
def test_loss_holds_functional_parameters(impl: Implementation) -> None:
    """1e: ``functional`` is True, so the parameters are TensorDictParams."""
    model = small_model(impl)
    loss = impl.loss(model)
    assert loss.functional
    names = ("encoder", "dynamics", "reward_head")
    parts = [getattr(loss, f"{name}_params", None) for name in names]
    assert all(isinstance(part, TensorDictParams) for part in parts)
    held = {id(parameter) for part in parts for parameter in part.values(True, True)}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert len(list(loss.parameters())) == len(held)


@fails_upstream(TypeError)
def test_target_encoder_follows_slowly(impl: Implementation) -> None:
    """1e: target parameters that SoftUpdate moves."""
    model = small_model(impl)
    loss = impl.loss(model, losses=["latent"], delay_encoder=True)
    update = SoftUpdate(loss, eps=0.9)
    before = model.encoder.module.weight.detach().clone()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(1.0)
    update.step()
    target = loss.target_encoder_params["module", "weight"]
    close(target, before + 0.1)


@fails_upstream(NotImplementedError)
def test_done_loss_is_cross_entropy(impl: Implementation) -> None:
    """1e: ``done_loss="bce"`` on logits."""
    model = small_model(impl, done_head=_logit_head("done"))
    batch = _with_endings(transitions(5), terminated=[0, 3])
    value = impl.loss(model, losses=["done"], done_loss="bce")(batch)["loss_done"]
    logits = _predict(model, batch)["next", "done"]
    label = batch["next", "terminated"].float()
    close(value, torch.nn.functional.binary_cross_entropy_with_logits(logits, label))


def _with_endings(
    batch: TensorDict, terminated: list[int] = (), truncated: list[int] = ()
) -> TensorDict:
    batch = batch.clone()
    for row in terminated:
        batch["next", "terminated"][row] = True
        batch["next", "done"][row] = True
    for row in truncated:
        batch["next", "truncated"][row] = True
        batch["next", "done"][row] = True
    return batch


@fails_upstream(DID_NOT_RAISE)
@pytest.mark.parametrize("term", ["reward", "done", "reconstruction", "latent"])
def test_unknown_distance_is_refused(impl: Implementation, term: str) -> None:
    """1e: when the loss is made, not at the first batch."""
    model = small_model(
        impl,
        done_head=_logit_head("done"),
        decoder=Mod(torch.nn.Linear(LATENT, OBS), ["latent"], ["decoded"]),
    )
    with pytest.raises(ValueError, match="huber"):
        impl.loss(model, losses=[term], **{f"{term}_loss": "huber"})


@fails_upstream(AttributeError)
def test_one_done_head_trains_and_steps(impl: Implementation) -> None:
    """1e: the logits that the loss trains are those that end episodes."""
    head = _logit_head("terminated_logits")
    model = countdown_model(
        impl, done_head=Mod(torch.nn.Linear(OBS, 1), head.in_keys, head.out_keys)
    )
    linear = model.done_head.module
    with torch.no_grad():  # right for starts above 0.5
        linear.weight.fill_(-1.0 / OBS)
        linear.bias.fill_(0.5)
    batch = _with_endings(transitions(5), terminated=[2])
    value = impl.loss(model, losses=["done"])(batch)["loss_done"]
    assert torch.autograd.grad(value, linear.weight)[0].abs().sum() > 0
    env = impl.repaired_env(model, PointEnv(), batch_size=[2])
    rollout = env.rollout(6, actor(), tensordict=countdown_start(3, 5))
    assert rollout.batch_size == (2, 3)
    assert rollout["next", "terminated"][:, -1, 0].tolist() == [True, False]


@fails_upstream(DID_NOT_RAISE)
def test_bool_done_head_is_refused(impl: Implementation) -> None:
    """1e: a bool has no gradient, so there is nothing to train."""
    head = ending_head("done")
    model = small_model(impl, done_head=head)
    with pytest.raises(TypeError, match="done_head.*bool"):
        impl.loss(model, losses=["done"])(transitions(5))


@fails_upstream(DID_NOT_RAISE)
@pytest.mark.parametrize(
    ("term", "component"), [("done", "done_head"), ("reconstruction", "decoder")]
)
def test_missing_component_is_named(
    impl: Implementation, term: str, component: str
) -> None:
    """1e: a loss whose head the model lacks is refused when it is made."""
    with pytest.raises(ValueError, match=component):
        impl.loss(small_model(impl), losses=[term])


@fails_upstream(AssertionError)
def test_missing_label_is_named(impl: Implementation) -> None:
    """1e: the error says which loss needs which entry."""
    model = small_model(impl, done_head=_logit_head("done"))
    batch = transitions(5)
    batch["next"] = batch["next"].exclude("done", "terminated", "truncated")
    with pytest.raises(KeyError, match="'done'.*label.*terminated"):
        impl.loss(model, losses=["done"])(batch)


@fails_upstream(AttributeError, KeyError)
@pytest.mark.parametrize("renamed", [False, True], ids=["default keys", "set_keys"])
def test_head_that_writes_terminated_alone(impl: Implementation, renamed: bool) -> None:
    """1e: is trained against the terminations of the batch."""
    model = small_model(impl, done_head=_logit_head("terminated"))
    loss = impl.loss(model, losses=["done"])
    if renamed:
        loss.set_keys(done="terminated")
    batch = _with_endings(transitions(5), terminated=[0, 3])
    value = loss(batch)["loss_done"]
    logits = _predict(model, batch)["next", "terminated"]
    label = batch["next", "terminated"].float()
    close(value, torch.nn.functional.binary_cross_entropy_with_logits(logits, label))


@fails_upstream(AssertionError)
def test_time_limit_is_no_termination(impl: Implementation) -> None:
    """1e: a truncated step is trained as one on which the episode goes on."""
    model = small_model(impl, done_head=_logit_head("done"))
    loss = impl.loss(model, losses=["done"])
    going_on = transitions(5)
    truncated = _with_endings(going_on, truncated=[1, 2])
    close(loss(truncated), loss(going_on))


@fails_upstream(AttributeError)
def test_latent_loss_encodes_its_target(impl: Implementation) -> None:
    """1e: with default keys the target is the next observation's latent."""
    model = small_model(impl)
    batch = transitions(5)
    value = impl.loss(model, losses=["latent"])(batch)["loss_latent"]
    predicted = _predict(model, batch)["next", "latent"]
    target = model.encoder.module(batch["next", "observation"]).detach()
    close(value, (predicted - target).pow(2).mean())
    weight = model.encoder.module.weight
    by_hand = torch.autograd.grad((predicted - target).pow(2).mean(), weight)
    close(torch.autograd.grad(value, weight), by_hand)


@fails_upstream(AssertionError)
def test_latent_target_is_detached(impl: Implementation) -> None:
    """1e: no gradient reaches what made the target."""
    model = small_model(impl)
    loss = impl.loss(model, losses=["latent"])
    loss.set_keys(predicted_latent=("next", "latent"))
    batch = transitions(5)
    target = torch.randn(5, LATENT, requires_grad=True)
    batch.set("target_latent", target * 1.0)
    value = loss(batch)["loss_latent"]
    predicted = _predict(model, batch)["next", "latent"]
    close(value, (predicted - target).pow(2).mean())
    value.backward()
    assert target.grad is None
    assert model.dynamics.module[0].weight.grad.abs().sum() > 0


@fails_upstream(AssertionError)
def test_decoder_of_the_next_observation_is_trained(impl: Implementation) -> None:
    """1e: the label is read before the model writes in its place."""
    decoder = Mod(
        torch.nn.Linear(LATENT, OBS), [("next", "latent")], [("next", "observation")]
    )
    model = small_model(impl, decoder=decoder)
    loss = impl.loss(model, losses=["reconstruction"])
    loss.set_keys(
        observation=("next", "observation"),
        reconstructed_observation=("next", "observation"),
    )
    batch = transitions(5)
    value = loss(batch)["loss_reconstruction"]
    decoded = _predict(model, batch)["next", "observation"]
    close(value, (decoded - batch["next", "observation"]).pow(2).mean())


@fails_upstream(TypeError)
def test_reconstruction_can_train_the_dynamics(impl: Implementation) -> None:
    """1e: it can be of the predicted next observation, not only of the encoded one."""
    decoder = Mod(torch.nn.Linear(LATENT, OBS), ["latent"], ["decoded"])
    model = small_model(impl, decoder=decoder)
    loss = impl.loss(model, losses=["reconstruction"], reconstruction_target="next")
    loss.set_keys(reconstructed_observation="decoded")
    batch = transitions(5)
    value = loss(batch)["loss_reconstruction"]
    decoded = decoder.module(_predict(model, batch)["next", "latent"])
    close(value, (decoded - batch["next", "observation"]).pow(2).mean())
    assert (
        torch.autograd.grad(value, model.dynamics.module[0].weight)[0].abs().sum() > 0
    )


@fails_upstream(TypeError)
def test_multi_step_loss_is_open_loop(impl: Implementation) -> None:
    """1e: over ``[B, T]`` the model predicts from its own predictions."""
    model = small_model(impl)
    batch = transitions(4, 6)
    loss = impl.loss(model, losses=["latent"], multi_step=True)
    latent = model.encoder.module(batch["observation"][:, 0])
    errors = []
    for t in range(6):
        latent = model.dynamics.module(torch.cat([latent, batch["action"][:, t]], -1))
        target = model.encoder.module(batch["next", "observation"][:, t]).detach()
        errors.append((latent - target).pow(2).mean())
    close(loss(batch)["loss_latent"], torch.stack(errors).mean())


@fails_upstream(TypeError)
def test_multi_step_loss_stops_where_an_episode_does(impl: Implementation) -> None:
    """1e: nothing is predicted across the start of an episode."""
    loss = impl.loss(small_model(impl), losses=["latent"], multi_step=True)
    batch = transitions(4, 6)
    is_init = torch.zeros(4, 6, 1, dtype=torch.bool)
    is_init[:, [0, 3]] = True
    batch.set("is_init", is_init)
    close(loss(batch)["loss_latent"], loss(batch[:, :3])["loss_latent"])


@works_upstream()
def test_loss_with_a_nested_reward_key(impl: Implementation) -> None:
    """1e: ``set_keys`` takes nested keys."""
    head = Mod(
        torch.nn.Linear(LATENT, 1), [("next", "latent")], [("next", "team", "reward")]
    )
    model = small_model(impl, reward_head=head)
    loss = impl.loss(model)
    loss.set_keys(reward=("team", "reward"), true_reward=("team", "true_reward"))
    batch = transitions(5)
    batch.set(("next", "team", "reward"), batch["next"].pop("reward"))
    value = loss(batch)["loss_reward"]
    error = (
        _predict(model, batch)["next", "team", "reward"]
        - batch["next", "team", "reward"]
    )
    close(value, error.pow(2).mean())


@works_upstream()
def test_loss_leaves_its_input_alone(impl: Implementation) -> None:
    """1e: so that it can be called again."""
    loss = impl.loss(small_model(impl))
    batch = transitions(5)
    before = batch.clone()
    first = loss(batch)["loss_reward"]
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert_equal(batch, before)
    close(loss(batch)["loss_reward"], first)


@works_upstream()
def test_loss_compiles(impl: Implementation) -> None:
    """1e: to one graph, with the same result."""
    loss = impl.loss(small_model(impl))
    batch = transitions(5)
    expected = loss(batch)["loss_reward"]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    close(compiled(batch)["loss_reward"], expected)
