"""What the tests share: both implementations, small world models, reference envs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchrl.envs.model_based
import torchrl.modules
import torchrl.objectives
import torchrl_wm
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, ModelBasedEnvBase
from torchrl.modules import MLP

OBS, LATENT, ACTION = 3, 4, 2

#: What ``pytest.raises`` raises when the call went through.
DID_NOT_RAISE = pytest.fail.Exception


# The two implementations ----------------------------------------------------


class RepairedEnv(torchrl.envs.model_based.WorldModelEnv):
    """TorchRL's env with repaired specs and nothing else, to see what lies behind them.

    As shipped it expands leaf specs (rows 2) and takes the reference env's
    observation spec for the latent's (row 3), which hides most other failures.
    Here the full specs are expanded and the latent stands in the observation
    spec, as its docstring says. ``_step`` and ``_reset`` are TorchRL's own.
    """

    #: Whether the state spec names the latents, too.
    declares_state = False

    def __init__(
        self,
        world_model: torchrl.modules.WorldModel,
        base_env: EnvBase,
        *,
        observation_spec: Composite | None = None,
        batch_size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        latent_key: NestedKey = "latent",
    ) -> None:
        size = torch.Size(base_env.batch_size if batch_size is None else batch_size)
        # Not TorchRL's own constructor, where the specs go wrong.
        ModelBasedEnvBase.__init__(
            self,
            world_model.step_module,
            device=base_env.device if device is None else device,
            batch_size=size,
            allow_done_after_reset=True,
        )
        self._world_model = world_model
        self.latent_key = latent_key
        self.full_action_spec = base_env.full_action_spec_unbatched.expand(size).clone()
        self.full_reward_spec = base_env.full_reward_spec_unbatched.expand(size).clone()
        self.full_done_spec = base_env.full_done_spec_unbatched.expand(size).clone()
        if observation_spec is None:
            inputs = base_env.full_observation_spec_unbatched.zero((1,))
            latent = world_model.encode(inputs).get(latent_key)
            observation_spec = batched({latent_key: latent.shape[1:]}, size)
        self.observation_spec = observation_spec.clone()
        if self.declares_state:
            self.state_spec = observation_spec.clone()


class RepairedStateEnv(RepairedEnv):
    """:class:`RepairedEnv` that also keeps the latents inside a ``TransformedEnv``."""

    declares_state = True


class RepairedFreeBatchEnv(RepairedEnv):
    """:class:`RepairedEnv` whose steps take any batch size, as a planner needs it."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        out.batch_size = tensordict.batch_size
        return out


@dataclass(frozen=True)
class Implementation:
    """The classes of one implementation.

    Args:
        name: ``"torchrl"`` or ``"ours"``.
        world_model, env, loss: the classes as shipped.
        repaired_env, repaired_state_env, repaired_free_batch_env: the env with
            repaired specs; ours needs no repair.
    """

    name: str
    world_model: type
    env: type
    loss: type
    repaired_env: type
    repaired_state_env: type
    repaired_free_batch_env: type

    @property
    def is_ours(self) -> bool:
        return self.name == "ours"


TORCHRL = Implementation(
    "torchrl",
    torchrl.modules.WorldModel,
    torchrl.envs.model_based.WorldModelEnv,
    torchrl.objectives.WorldModelLoss,
    RepairedEnv,
    RepairedStateEnv,
    RepairedFreeBatchEnv,
)
OURS = Implementation(
    "ours",
    torchrl_wm.WorldModel,
    torchrl_wm.WorldModelEnv,
    torchrl_wm.WorldModelLoss,
    *[torchrl_wm.WorldModelEnv] * 3,
)


def fails_upstream(*raises: type[BaseException]) -> pytest.MarkDecorator:
    """Run a test on both: TorchRL must fail it, by one of ``raises``, ours must pass.

    Args:
        raises: how TorchRL fails, so that another failure is not taken for it.
    """
    return _on_both(
        pytest.mark.xfail(strict=True, raises=raises, reason="TorchRL 0.14.1")
    )


def works_upstream() -> pytest.MarkDecorator:
    """Run a test on both: what TorchRL gets right must stay right in ours."""
    return _on_both()


def _on_both(*upstream: pytest.MarkDecorator) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "impl",
        [
            pytest.param(TORCHRL, marks=upstream, id="torchrl"),
            pytest.param(OURS, id="ours"),
        ],
    )


# Reference envs --------------------------------------------------------------


class PointEnv(EnvBase):
    """A point that actions push around; the reward is minus its distance from 0.

    Args:
        action_spec: without batch dims; ``[ACTION]`` in [-1, 1] by default.
        batch_size: any.
        done_names: which of done, terminated and truncated there are.
    """

    def __init__(
        self,
        action_spec: TensorSpec | None = None,
        batch_size: Sequence[int] = (),
        done_names: Sequence[str] = ("done", "terminated"),
    ) -> None:
        super().__init__(batch_size=torch.Size(batch_size))
        size = self.batch_size
        if action_spec is None:
            action_spec = Bounded(-1.0, 1.0, shape=(ACTION,))
        flag = Categorical(2, shape=(1,), dtype=torch.bool)
        self.full_action_spec = Composite(action=action_spec).expand(size).clone()
        self.full_observation_spec = batched({"observation": (OBS,)}, size)
        self.full_reward_spec = batched({"reward": (1,)}, size)
        self.full_done_spec = (
            Composite({name: flag.clone() for name in done_names}).expand(size).clone()
        )

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        out = self.full_done_spec.zero()
        return out.set("observation", torch.randn(*self.batch_size, OBS))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        dims = self.batch_dims
        action = tensordict.get("action").float()
        push = action.reshape(*self.batch_size, -1).mean(dims, keepdim=True)
        observation = tensordict.get("observation") + 0.1 * push
        out = self.full_done_spec.zero()
        out.set("observation", observation)
        return out.set("reward", -observation.norm(dim=-1, keepdim=True))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            torch.manual_seed(seed)


class TeamEnv(EnvBase):
    """A reference env of several agents, with nested action, reward and observation.

    Only its specs are of interest.
    """

    def __init__(self, n_agents: int = 2) -> None:
        super().__init__(batch_size=torch.Size([]))
        group = torch.Size([n_agents])

        def of_agents(**leaves: TensorSpec) -> Composite:
            return Composite(agents=Composite(leaves).expand(group).clone())

        self.full_action_spec = of_agents(action=Bounded(-1.0, 1.0, shape=(1,)))
        self.full_observation_spec = of_agents(observation=Unbounded(shape=(OBS,)))
        self.full_reward_spec = of_agents(reward=Unbounded(shape=(1,)))
        self.full_done_spec = Composite(
            done=Categorical(2, shape=(1,), dtype=torch.bool),
            terminated=Categorical(2, shape=(1,), dtype=torch.bool),
        )

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        return self.full_observation_spec.rand().update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise NotImplementedError("Only the specs of this env are read.")

    def _set_seed(self, seed: int | None) -> None:
        pass


def batched(
    shapes: dict[NestedKey, Sequence[int]], batch_size: Sequence[int] = ()
) -> Composite:
    """Unbounded specs of the given feature shapes, for ``batch_size`` envs."""
    spec = Composite(shape=())
    for key, shape in shapes.items():
        spec[key] = Unbounded(shape=torch.Size(shape))
    return spec.expand(torch.Size(batch_size)).clone()


# World models ----------------------------------------------------------------


def small_model(
    impl: Implementation,
    *,
    latent_key: NestedKey = "latent",
    action: int = ACTION,
    **replaced: Any,
) -> Any:
    """Encoder, dynamics and reward head of random weights.

    Args:
        impl: whose WorldModel to make.
        latent_key: where the latent stands.
        action: how many numbers an action has.
        replaced: components to use instead, or beside these.
    """
    next_latent = unravel_key(("next", latent_key))
    components = {
        "encoder": Mod(torch.nn.Linear(OBS, LATENT), ["observation"], [latent_key]),
        "dynamics": Mod(
            MLP(LATENT + action, LATENT, num_cells=[16]),
            [latent_key, "action"],
            [next_latent],
        ),
        "reward_head": Mod(
            torch.nn.Linear(LATENT, 1), [next_latent], [("next", "reward")]
        ),
        **replaced,
    }
    return impl.world_model(**components)


def countdown_model(impl: Implementation, **replaced: Any) -> Any:
    """A model whose latent, which is the observation, falls by one at each step.

    So a start value says after how many steps its row is at 0. The reward is
    the mean of the new latent.
    """
    components = {
        "encoder": Mod(torch.nn.Identity(), ["observation"], ["latent"]),
        "dynamics": Mod(
            lambda latent, action: latent - 1.0,
            ["latent", "action"],
            [("next", "latent")],
        ),
        "reward_head": Mod(
            lambda latent: latent.mean(-1, keepdim=True),
            [("next", "latent")],
            [("next", "reward")],
        ),
        **replaced,
    }
    return impl.world_model(**components)


def at_zero(latent: torch.Tensor) -> torch.Tensor:
    """Whether a countdown has come to its end: ``[*B, 1]`` bool."""
    return latent.mean(-1, keepdim=True) < 0.5


def ending_head(*names: str, function: Callable[[torch.Tensor], Any] = at_zero) -> Mod:
    """A done head that writes ``function`` of the next latent under ``names``."""

    def predict(latent: torch.Tensor) -> Any:
        value = function(latent)
        return value if len(names) == 1 else tuple(value.clone() for _ in names)

    return Mod(predict, [("next", "latent")], [("next", name) for name in names])


def countdown_start(*steps: float) -> TensorDict:
    """Latents (and what they were encoded from) that end after the given steps."""
    latent = torch.tensor(steps, dtype=torch.float32)[:, None].expand(-1, OBS).clone()
    return TensorDict({"latent": latent}, batch_size=[len(steps)])


def random_start(world_model: Any, *batch_size: int) -> TensorDictBase:
    """Encoded random observations: latents alone."""
    inputs = TensorDict(
        {"observation": torch.randn(*batch_size, OBS)}, batch_size=batch_size
    )
    with torch.no_grad():
        return world_model.encode(inputs).exclude("observation")


def actor(latent_key: NestedKey = "latent", action_key: NestedKey = "action") -> Mod:
    """A deterministic policy over latents, with actions in [-1, 1]."""
    return Mod(
        lambda latent: torch.tanh(latent[..., :ACTION]), [latent_key], [action_key]
    )


def critic(*in_keys: NestedKey, width: int = LATENT) -> Mod:
    """A value network."""
    in_keys = in_keys or ("latent",)
    return Mod(MLP(width, 1, num_cells=[8]), list(in_keys), ["state_value"])


def hand_rollout(
    world_model: Any,
    start: TensorDictBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    steps: int,
    latent_keys: Sequence[NestedKey] = ("latent",),
) -> TensorDict:
    """What a rollout should contain, by a loop over the components alone.

    Returns:
        Latents and actions at the root, latents and rewards under "next",
        ``[*B, steps]``.
    """
    state = start.select(*latent_keys)
    rows = []
    for _ in range(steps):
        row = policy(state.copy())
        work = world_model.reward_head(world_model.dynamics(row.copy()))
        row.set("next", work.get("next").select(*latent_keys, "reward"))
        rows.append(row)
        state = row.get("next").select(*latent_keys)
    return torch.stack(rows, dim=start.batch_dims)


def transitions(*batch_size: int) -> TensorDict:
    """Random real transitions, none of which ends an episode."""
    flag = torch.zeros(*batch_size, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": torch.randn(*batch_size, OBS),
            "action": torch.randn(*batch_size, ACTION),
            "next": {
                "observation": torch.randn(*batch_size, OBS),
                "reward": torch.randn(*batch_size, 1),
                "done": flag.clone(),
                "terminated": flag.clone(),
                "truncated": flag.clone(),
            },
        },
        batch_size=batch_size,
    )


# Odds and ends -----------------------------------------------------------------


def assert_equal(left: TensorDictBase, right: TensorDictBase) -> None:
    """Every entry of ``right`` is in ``left`` and close to it."""
    for key in right.keys(True, True):
        try:
            torch.testing.assert_close(left[key], right[key])
        except AssertionError as err:
            raise AssertionError(f"{key!r}: {err}") from None
