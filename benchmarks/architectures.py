"""How far ready-made models stray when they imagine, after the same training time on the same data.

    python benchmarks/architectures.py pendulum --out docs/benchmarks/architectures_pendulum.md
    python benchmarks/architectures.py hidden --out docs/benchmarks/architectures_hidden.md
    python benchmarks/architectures.py rooms --seeds 1 --out docs/benchmarks/architectures_rooms.md

Each model trains for so many seconds on one thread (of the processor's time, so that other work on
the machine does not count), with Adam at a rate that falls to zero, on random steps of a task:
"pendulum", Pendulum-v1, 40 episodes of 200 steps; "hidden", the same without the speed in the
observation; and "rooms", a dot that random actions push through two rooms with a door, 16 x 16
bytes, 200 episodes of 40 steps. Then it imagines from steps of held-out episodes, with the recorded actions, and is compared with what
was recorded: the root mean square of the error ``k`` steps ahead, in units of the observations'
spread for the pendulum, and of a pixel's range for the rooms. Models that draw have two rows: one
draw for each start; and "mode", as under ``set_interaction_type("deterministic")``, which has the
smaller error where the future is not certain, and may be a blur.

A model is a row of ``CONTENDERS``: its builder, its settings, and the sequences of a batch.
``--only NAME`` runs some of them, and ``--seeds`` says how many seeds the mean is over. They begin
at 2: settings of the diffusion model were chosen by the errors of seeds 0 and 1. The other models
have those of their builders.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import begin, finish, machine, parser
from tensordict import TensorDict
from tensordict.nn import set_interaction_type
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, GymEnv, ObservationTransform, TransformedEnv

from torchrl_wm import WorldModelEnv
from torchrl_wm.diagnostics import open_loop_error
from torchrl_wm.models import (
    make_diffusion_world_model,
    make_mlp_world_model,
    make_rssm_world_model,
    make_transformer_world_model,
)
from torchrl_wm.modules import fit_normalizers

#: How far ahead.
AHEAD = (1, 3, 5, 10, 20)
SIDE, DOOR = 16, (6.0, 9.0)


@dataclass(frozen=True)
class Contender:
    """A model that takes part.

    Args:
        make: its builder.
        settings: those of the builder.
        rows, steps: the sequences of a batch.
        flat: whether it is trained on single transitions.
        draws: whether its predictions are drawn.
        rate: the first learning rate.
    """

    make: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 32
    steps: int = 8
    flat: bool = False
    draws: bool = False
    rate: float = 1e-3


CONTENDERS: dict[str, dict[str, Contender]] = {
    "pendulum": {
        "MLP": Contender(make_mlp_world_model, rows=256, steps=1, flat=True),
        "transformer": Contender(
            make_transformer_world_model, {"context": 4}, steps=16
        ),
        "diffusion": Contender(make_diffusion_world_model, draws=True),
    },
    "hidden": {
        "MLP": Contender(make_mlp_world_model, rows=256, steps=1, flat=True),
        "transformer": Contender(make_transformer_world_model, rows=16, steps=32),
    },
    "rooms": {
        "MLP": Contender(make_mlp_world_model, rows=64, steps=1, flat=True),
        "RSSM": Contender(
            make_rssm_world_model,
            {"belief_size": 128, "pixel_depth": 8},
            rows=16,
            steps=12,
            draws=True,
        ),
        # Few frames at a time: more updates in the same time.
        "diffusion": Contender(
            make_diffusion_world_model,
            {"head_channels": (8, 16, 16), "head_memory": False},
            rows=8,
            steps=4,
            rate=2e-3,
            draws=True,
        ),
    },
}


class Rooms(EnvBase):
    """A dot in two rooms, pushed by the action, that passes the wall between them at a door."""

    def __init__(self) -> None:
        super().__init__()
        image = Bounded(0, 255, (SIDE, SIDE, 1), dtype=torch.uint8)
        self.observation_spec = Composite(pixels=image)
        self.action_spec = Bounded(-1, 1, (2,))
        self.reward_spec = Unbounded((1,))

    @staticmethod
    def seen(place: torch.Tensor) -> torch.Tensor:
        """The images of a dot at places ``[*B, 2]``, ``[*B, H, W, 1]`` bytes."""
        axis = torch.arange(SIDE, dtype=torch.float32)
        rows, columns = ((axis - p.unsqueeze(-1)) ** 2 for p in place.unbind(-1))
        image = (-(rows.unsqueeze(-1) + columns.unsqueeze(-2)) / 2).exp()
        wall = torch.zeros(SIDE, SIDE)
        wall[(axis < DOOR[0]) | (axis > DOOR[1]), SIDE // 2] = 0.5
        return (255 * torch.maximum(image, wall)).to(torch.uint8).unsqueeze(-1)

    @staticmethod
    def moved(place: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The places after a step. A wall stops what would pass it."""
        to = (place + 1.5 * action).clamp(1, SIDE - 2)
        wall = SIDE / 2
        crosses = (place[..., 1] < wall) != (to[..., 1] < wall)
        share = (wall - place[..., 1]) / (to[..., 1] - place[..., 1])
        row = place[..., 0] + share * (to[..., 0] - place[..., 0])
        stopped = crosses & ((row < DOOR[0]) | (row > DOOR[1]))
        column = torch.where(stopped, place[..., 1], to[..., 1])
        return torch.stack([to[..., 0], column], -1)

    def episodes(self, number: int, steps: int) -> TensorDict:
        """Episodes of random actions, ``[number, steps]``."""
        places = [1 + (SIDE - 3) * torch.rand(number, 2)]
        actions = 2 * torch.rand(number, steps, 2) - 1
        for t in range(steps):
            places.append(self.moved(places[-1], actions[:, t]))
        images = self.seen(torch.stack(places, 1))
        flag = torch.zeros(number, steps, 1, dtype=torch.bool)
        reward = torch.stack(places[1:], 1)[..., 1:] / SIDE
        return TensorDict(
            {
                "pixels": images[:, :-1],
                "action": actions,
                "next": {
                    "pixels": images[:, 1:],
                    "reward": reward,
                    "done": flag,
                    "terminated": flag.clone(),
                },
            },
            (number, steps),
        )

    def _reset(self, tensordict, **kwargs):
        raise NotImplementedError("Its episodes are made all at once.")

    def _step(self, tensordict):
        raise NotImplementedError("Its episodes are made all at once.")

    def _set_seed(self, seed):
        torch.manual_seed(seed)


@dataclass
class Task:
    """What is learned.

    Args:
        env: the env; its specs are read.
        train, held_out: episodes, ``[N, T]``.
        key: the observation that is compared.
        unit: what errors are divided by.
        ahead: how far ahead.
    """

    env: EnvBase
    train: TensorDict
    held_out: TensorDict
    key: str
    unit: torch.Tensor | float
    ahead: tuple[int, ...]


class WithoutSpeed(ObservationTransform):
    """The pendulum's observation without the angular speed."""

    def _apply_transform(self, observation: torch.Tensor) -> torch.Tensor:
        return observation[..., :2]

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec):
        shape = (*observation_spec["observation"].shape[:-1], 2)
        observation_spec["observation"] = Unbounded(shape)
        return observation_spec


def hidden(seed: int) -> Task:
    """Pendulum-v1 without the speed: it must be told from several observations."""
    return pendulum(seed, WithoutSpeed(["observation"], ["observation"]))


def pendulum(seed: int, transform: WithoutSpeed | None = None) -> Task:
    """Pendulum-v1, all observed."""
    env = GymEnv("Pendulum-v1")
    if transform is not None:
        env = TransformedEnv(env, transform)
    env.set_seed(seed)
    episodes = torch.stack([env.rollout(200) for _ in range(50)])
    train = episodes[:40]
    unit = train["observation"].flatten(0, 1).std(0)
    return Task(env, train, episodes[40:], "observation", unit, AHEAD)


def rooms(seed: int) -> Task:
    """A dot in two rooms."""
    env = Rooms()
    env.set_seed(seed)
    return Task(
        env, env.episodes(200, 40), env.episodes(40, 40), "pixels", 255.0, AHEAD
    )


TASKS = {"pendulum": pendulum, "hidden": hidden, "rooms": rooms}
#: The first seed.
FIRST = 2


def trained(contender: Contender, task: Task, seconds: float) -> tuple[Any, int]:
    """The model after so many seconds, and how many updates these were."""
    settings = {"termination": "none", **contender.settings}
    if contender.make is make_rssm_world_model:
        settings["continue_head"] = settings.pop("termination") != "none"
    model, loss = contender.make(task.env, **settings)
    fit_normalizers(model, task.train)
    optimizer = torch.optim.Adam(loss.parameters(), lr=contender.rate)
    count, number = len(task.train), task.train.shape[1]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    updates, began = 0, clock()
    while (gone := (clock() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = contender.rate * (1 - gone)
        rows = torch.randint(count, (contender.rows, 1))
        first = torch.randint(number - contender.steps + 1, (contender.rows, 1))
        batch = task.train[rows, first + torch.arange(contender.steps)]
        batch = batch.reshape(-1) if contender.flat else batch
        loss(batch).sum(reduce=True).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 100.0)
        optimizer.step(), optimizer.zero_grad()
        updates += 1
    return model, updates


def errors(model: Any, task: Task, of: str = "model") -> torch.Tensor:
    """The errors ``k`` steps ahead, in the task's unit."""
    env = WorldModelEnv(model, task.env, decode=True)
    found = open_loop_error(env, task.held_out, max(task.ahead), stride=10)
    error = (found[of, task.key] / task.unit).flatten(1).square().mean(1).sqrt()
    return error[torch.tensor(task.ahead) - 1]


def compare(name: str, seeds: int, seconds: float, only: list[str]) -> list[str]:
    """The table of a task."""
    head = " | ".join(f"k = {k}" for k in AHEAD)
    text = [
        f"| {name} | parameters | updates | {head} |",
        "|---|---|---|" + "---|" * len(AHEAD),
    ]
    chosen = CONTENDERS[name]
    if only:
        chosen = {k: v for k, v in chosen.items() if k in only}
    still: list[torch.Tensor] = []
    for label, contender in chosen.items():
        found: dict[str, list[torch.Tensor]] = {}
        updates = 0
        for seed in range(FIRST, FIRST + seeds):
            task = TASKS[name](seed)
            torch.manual_seed(seed)
            model, number = trained(contender, task, seconds)
            for kind in ("random", "mode") if contender.draws else ("mode",):
                torch.manual_seed(seed)
                mark = ", mode" if contender.draws and kind == "mode" else ""
                with set_interaction_type(kind):
                    found.setdefault(label + mark, []).append(errors(model, task))
            updates += number
            if len(still) < seeds:
                still.append(errors(model, task, "persistence"))
        size = sum(p.numel() for p in model.parameters())
        for which, values in found.items():
            row = _row(torch.stack(values).mean(0))
            text.append(f"| {which} | {size:,} | {updates // seeds} | {row} |")
            print(text[-1], flush=True)
    text.append(f"| nothing changes | | | {_row(torch.stack(still).mean(0))} |")
    print(text[-1], flush=True)
    return [*text, ""]


def _row(values: torch.Tensor) -> str:
    return " | ".join(f"{value:.4f}" for value in values.tolist())


def main() -> None:
    arguments = parser(__doc__, 75.0)
    arguments.add_argument("task", choices=TASKS)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--only", nargs="+", default=[])
    given = arguments.parse_args()
    begin(given)
    text = [
        f"Machine: {machine()}. {given.seconds:.0f} s of training each; the mean over "
        f"{given.seeds} seed(s), from {FIRST}.",
        "",
        *compare(given.task, given.seeds, given.seconds, given.only),
    ]
    finish(given, text)


if __name__ == "__main__":
    main()
