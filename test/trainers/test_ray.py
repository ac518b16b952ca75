"""Collecting on the workers of Ray: the same steps, lost workers, runs that go on, and bad input.

All tests share a cluster that a process of its own starts.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _on_ray import Mortal, Pushing
from _real_envs import DREAMER, MBPO, PETS, Ragged, TDMPC2
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import GymEnv

from torchrl_wm import WorldModelEnv
from torchrl_wm.trainers import (
    CollectingError,
    DreamerTrainer,
    make_real_env,
    MBPOTrainer,
    PETSTrainer,
    RecipeTrainer,
    RunConfig,
    TDMPC2Trainer,
)
from torchrl_wm.trainers.policy_copies import copied_policy
from torchrl_wm.trainers.ray_collecting import RaySteps

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra ray")

#: Settings of 300 steps of the pendulum.
RAY = {"collector": "ray", "num_envs": 2, "ray_batch": 5, "logger": "csv"}
PENDULUM = {**RAY, "env": "Pendulum-v1", "max_episode_steps": 50, "random_steps": 100}
PENDULUM["evaluation_interval"] = 0

CLUSTER = """
import ray, sys
ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
print("at", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    quiet = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    quiet[
        "RAY_AUTH_MODE"
    ] = "disabled"  # as of this process, which began without a token
    # Its workers find the tests' own modules.
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **quiet, "PYTHONPATH": path},
    )
    line = process.stdout.readline()
    while line and not line.startswith("at "):
        line = process.stdout.readline()
    yield line.split()[1]
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def connected(cluster) -> Iterator[str]:
    """The cluster, to which this process stays connected: runs use the connection."""
    ray.init(cluster, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()


# Bad input, before this process is connected ----------------------------------


def refused(tmp_path: Path, kind: type[Exception], message: str, **settings) -> None:
    """A run with such settings begins nothing."""
    with pytest.raises(kind, match=message):
        PETSTrainer.start(tmp_path / "run", **{**PETS, **RAY, **settings})
    assert not (tmp_path / "run").exists()


def test_ray_is_not_installed(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(
        "torchrl_wm.trainers.ray_connection.find_spec", lambda name: None
    )
    refused(tmp_path, ImportError, r"pip install 'torchrl-wm\[ray\]'")
    # What evaluates or loads a run needs no Ray.
    PETSTrainer(**{**PETS, **RAY}).evaluate(1)


def test_nobody_answers(tmp_path, monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(
            tmp_path,
            ConnectionError,
            f"Nobody answers at ray_address='{address}'",
            ray_address=address,
        )
        monkeypatch.setenv("RAY_ADDRESS", address)
        refused(tmp_path, ConnectionError, "Nobody answers.*'auto'", ray_address="auto")
    refused(tmp_path, ConnectionError, "Nobody answers", ray_address="nowhere:x")
    client = "ray://127.0.0.1:10001"
    message = f"{{}}='{client}'.*give host:port"
    refused(tmp_path, ValueError, message.format("ray_address"), ray_address=client)
    monkeypatch.setenv("RAY_ADDRESS", client)
    refused(tmp_path, ValueError, message.format("RAY_ADDRESS"), ray_address="auto")


def test_somebody_else_answers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torchrl_wm.trainers.ray_connection.CONNECT_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        refused(
            tmp_path, ConnectionError, "does not answer as Ray", ray_address=address
        )


def test_another_version(cluster, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.1.0")
    message = (
        "(?s)does not take this process, with Ray 2.1.0.*Install the same versions"
    )
    refused(tmp_path, ConnectionError, message, ray_address=cluster)
    assert not ray.is_initialized()


def test_more_cpus_than_there_are(cluster, tmp_path) -> None:
    message = "ask for 3 CPUs.*the Ray cluster has 2. Give fewer envs"
    refused(tmp_path, ValueError, message, ray_address=cluster, num_envs=3)
    assert not ray.is_initialized()  # and the cluster goes on
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 512
    message = f"ask for {number + 1} CPUs.*this machine has"
    refused(tmp_path, ValueError, message, num_envs=1, ray_cpus=float(number + 1))


def test_runs_that_were_not_trained_are_not_connected(cluster, tmp_path) -> None:
    """The first of several runs would end the connection of the others."""
    settings = {**PETS, **RAY, "ray_cpus": 0.25}
    for number, address in enumerate([None, cluster, None], start=1):
        path = tmp_path / f"run-{number}"
        PETSTrainer.start(
            path, **{**settings, "ray_address": address, "num_envs": number}
        )
        assert not ray.is_initialized()


def test_what_cannot_be_sent(tmp_path) -> None:
    lock = threading.Lock()
    message = "(?s)collector='ray' sends.*lock.*collector='single'"
    refused(tmp_path, ValueError, message, env=lambda: (lock, Ragged())[1])
    refused(
        tmp_path,
        ValueError,
        "(?s)The policy.*cannot be sent.*lock",
        reward_function=lambda observation, action, following: lock
        and observation[..., 0],
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"ray_address": "auto"},
        {"ray_cpus": 0.5, "collector": "processes"},
        {"ray_batch": 3},
        {"ray_push_interval": 7},
    ],
)
def test_settings_of_ray_without_it(settings) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is for.*collector='ray'"):
        RunConfig(**settings)


# Steps ----------------------------------------------------------------------------


def test_the_cluster_by_other_names(connected, tmp_path) -> None:
    port = connected.rpartition(":")[2]
    for host in ("localhost", "127.0.0.1"):
        settings = {**PETS, **RAY, "ray_address": f"{host}:{port}"}
        PETSTrainer.start(tmp_path / host, **settings)
    message = "is connected to Ray at.*ray_address='localhost:1'"
    refused(tmp_path, ValueError, message, ray_address="localhost:1")


def test_steps_are_those_of_one_process(connected) -> None:
    """Entries of an agent: episodes, random ones, and weights that come one batch later."""
    source = "_real_envs:make_nested_ragged"
    settings = {**RAY, "env": source, "seed": 7, "random_hold": 2, "random_steps": 30}
    config = RunConfig(**settings, ray_push_interval=15)
    env, policy = make_real_env(source, seed=7), Pushing()
    collector = RaySteps(config, source, env, policy, torch.device("cpu"))
    collector.begin()
    all_steps, rows, total = [], [], 0
    for steps in collector:
        total += len(steps)
        rows += collector.finished(collector.count(steps, total), len(rows))
        all_steps.append(steps)
        with torch.no_grad():  # what is learnt says at which step
            policy.value.fill_(total % 10 / 100)
            policy.whole.fill_(total // 10)
        if total == 100:
            break
    collector.shutdown()
    assert ray.is_initialized()  # it was not the run that began it
    steps = torch.stack(all_steps)
    assert steps.batch_size == (50, 2)
    acts = steps["agent", "action"].squeeze(-1)
    begins = [env.reset()["agent", "observation"] for _ in range(60)]
    randoms, lengths, returns = [], [], []
    for number in range(2):
        ends = steps["next", "done"][:, number].flatten().nonzero().flatten() + 1
        for index, (begin, end) in enumerate(zip([0, *ends[:-1]], ends)):
            episode = steps[begin:end, number]
            expected = begins[number + 2 * index]
            assert torch.equal(episode["agent", "observation"][0], expected)
            assert len(episode) == expected[1]  # as the env itself said
            assert episode["is_init"].flatten().tolist() == [True] + [False] * (
                len(episode) - 1
            )
            random = 2 * begin < 30  # it begins before the random steps are over
            act = acts[begin:end, number]
            for step, action in enumerate(act.tolist()):
                if random:
                    assert action == act[step - step % 2]
                    continue
                # A batch has the weights of before the last push before it was asked for, when
                # the batch before it had come, and nothing of that was learnt.
                asked = max((int(begin) + step) // 5 - 1, 0) * 10
                pushed = max((t for t in PUSHES if t <= asked), default=0)
                assert action == pytest.approx(pushed % 10 / 100 + pushed // 10)
            randoms.append(int(random))
            lengths.append(len(episode))
            returns.append(episode["next", "agent", "reward"].sum().item())
    assert sum(randoms) > 2 and sum(randoms) < len(randoms) - 4
    random_acts = acts[:6]  # each worker draws its own
    assert not (random_acts[:, 0] == random_acts[:, 1]).any()
    found = sorted(
        (row["length"], row["random"], round(row["return"], 4)) for row in rows
    )
    made = sorted(zip(lengths, randoms, (round(value, 4) for value in returns)))
    assert [row[:2] for row in found] == [row[:2] for row in made]
    assert [row[2] for row in found] == pytest.approx(
        [row[2] for row in made], abs=1e-3
    )


#: A push is due at every second request of 10 steps: at least 15 steps after the one before.
PUSHES = range(0, 100, 20)


# Runs ---------------------------------------------------------------------------------


def check_turns(trainer: RecipeTrainer, cut: int = 0) -> None:
    """The envs take turns in the replay, each with its steps in order.

    Args:
        trainer: the run.
        cut: how many episodes were given up.
    """
    rows, breaks = trainer.data[:], 0
    for number in range(2):
        own = rows[number::2]
        goes_on = ~own["is_init"][1:, 0] if "is_init" in own.keys() else None
        over = own["next", "done"][:-1, 0]
        following, observed = own["next", "observation"][:-1], own["observation"][1:]
        same = (following == observed).all(-1)
        assert not (same & over).any()
        breaks += int((~same & ~over).sum())
        if goes_on is not None:
            assert torch.equal(same, goes_on)
    assert breaks == cut
    lengths = [row["length"] for row in trainer.metrics if "length" in row]
    assert max(lengths) == trainer.config.max_episode_steps


@pytest.fixture(scope="module")
def unseen() -> TensorDictBase:
    """Random steps of the pendulum that no run has."""
    env = GymEnv("Pendulum-v1")
    env.set_seed(12345)
    torch.manual_seed(12345)
    return torch.cat([env.rollout(100) for _ in range(4)])


@torch.no_grad()
def reward_error(trainer: RecipeTrainer, steps: TensorDictBase) -> float:
    """The share of the rewards' variance that the model does not predict."""
    env = WorldModelEnv(trainer.world_model, trainer.env, batch_size=steps.batch_size)
    start = env.reset(steps.select("observation"))
    predicted = env.step(start.set("action", steps["action"]))["next", "reward"]
    rewards = steps["next", "reward"]
    return float((predicted - rewards).square().mean() / rewards.var())


#: Settings of recipes with which they learn something of 300 steps within seconds.
LEARNING = {
    PETSTrainer: {
        **PETS,
        **PENDULUM,
        "trials": None,
        "steps": 300,
        "model_steps": 150,
        "hidden": (64,),
    },
    MBPOTrainer: {
        **MBPO,
        **PENDULUM,
        "steps": 300,
        "model_steps": 100,
        "model_interval": 50,
        "updates_per_step": 1,
        "hidden": (64,),
    },
    TDMPC2Trainer: {
        **TDMPC2,
        **PENDULUM,
        "steps": 300,
        "random_steps": 200,
        "pretraining_updates": 100,
        "learning_rate": 1e-3,
        "latent_size": 32,
        "num_cells": 64,
        "encoder_cells": 64,
        "batch_size": 32,
    },
}


def test_tdmpc2_learns(connected, unseen) -> None:
    trainer = TDMPC2Trainer(**LEARNING[TDMPC2Trainer])
    before = reward_error(trainer, unseen)
    trainer.train()
    assert trainer.collected_frames == 300 and len(trainer.data) == 300
    assert reward_error(trainer, unseen) < min(0.3, 0.5 * before)
    check_turns(trainer)


def test_pets_learns_though_a_worker_is_killed(
    connected, unseen, tmp_path, monkeypatch
) -> None:
    settings = {**LEARNING[PETSTrainer], "env": Mortal(tmp_path / "killed", 73)}
    trainer = PETSTrainer.start(tmp_path / "run", **settings)
    before = reward_error(trainer, unseen)
    kept: list[TensorDictBase] = []
    replace = trainer.collector._replace

    def replaced(envs):
        kept.append(trainer.data[:].clone())
        replace(envs)

    monkeypatch.setattr(trainer.collector, "_replace", replaced)
    trainer.train()
    # A hundred and forty steps are there when the batch of a worker's 73rd step is asked for.
    assert len(kept) == 1 and len(kept[0]) == 140
    assert (trainer.data[:140] == kept[0]).all()
    # An env gave its second episode up after 20 steps, and the others have 50.
    assert trainer.is_over and trainer.collected_frames == 300
    assert reward_error(trainer, unseen) < min(0.3, 0.5 * before)
    check_turns(trainer, cut=1)
    finished = trainer.collector.episodes.finished
    assert (finished[0] - finished[1]).abs() <= 1


def test_mbpo_learns_after_its_workers_were_lost(
    connected, unseen, tmp_path, monkeypatch
) -> None:
    settings = {**LEARNING[MBPOTrainer], "env": Mortal(tmp_path / "killed", 73)}
    trainer = MBPOTrainer.start(tmp_path / "run", **settings)
    before = reward_error(trainer, unseen)
    monkeypatch.setattr("torchrl_wm.trainers.ray_collecting.MAX_LOST", 0)
    with pytest.raises(CollectingError, match="(?s)1 workers.*saved at step 140.*run'"):
        trainer.train()
    again = MBPOTrainer.resume(tmp_path / "run", env=settings["env"])
    assert again.collected_frames == 140
    assert (again.data[:] == trainer.data[:]).all()
    assert again.collector.episodes.lengths.tolist() == [20, 20]
    again.train()
    assert (again.data[:140] == trainer.data[:]).all()
    assert again.is_over and again.learner.steps > trainer.learner.steps
    assert reward_error(again, unseen) < min(0.3, 0.5 * before)
    check_turns(again, cut=2)


def test_dreamer_learns(connected) -> None:
    settings = {**DREAMER, **PENDULUM, "max_episode_steps": 20, "random_steps": 40}
    settings["sequence_start"] = "stored"
    trainer = DreamerTrainer(**{**settings, "steps": 120, "train_ratio": 24.0})
    first: list[float] = []
    learn = trainer.recipe.learn

    def learning(steps):
        losses = learn(steps)
        if losses and not first:
            first.append(float(losses["loss_reconstruction"]))
        return losses

    trainer.recipe.learn = learning
    trainer.train()
    assert trainer.recipe.counts.updates > 50
    check_turns(trainer)
    # The latents are those of the filter on the worker.
    rows = trainer.data[:]
    belief = rows["belief"]
    assert not belief[rows["is_init"][:, 0]].equal(belief[~rows["is_init"][:, 0]])
    last = [row for row in trainer.metrics if "loss_reconstruction" in row][-1]
    assert last["loss_reconstruction"] < first[0]


# Ray of a run's own -----------------------------------------------------------------


def test_a_policy_is_copied_to_another_device() -> None:
    """With all that it holds; the same way leads from a GPU to the CPUs of workers."""
    policy = TDMPC2Trainer(**TDMPC2).policy
    copy = copied_policy(policy, "meta")
    devices = {tensor.device.type for tensor in copy.parameters()}
    assert devices == {"meta"}
    assert copy.env.device.type == copy.space.low.device.type == "meta"
    assert copy.env.imaginer.device.type == "meta"
    assert copy.env.observation_spec.device.type == "meta"
    same = copied_policy(policy, "cpu")
    now = TensorDict({"observation": torch.randn(3, 3)}, [3])
    torch.manual_seed(0)
    expected = policy(now.clone())["action"]
    torch.manual_seed(0)
    assert torch.equal(same(now.clone())["action"], expected)
    assert all(a is not b for a, b in zip(same.parameters(), policy.parameters()))


CTRL_C = """
import sys
from torchrl_wm.trainers import start_run
import ray
trainer = start_run("pets", sys.argv[1], env="Pendulum-v1", collector="ray", num_envs=2)
told = trainer.add_steps
def add_steps(steps):
    if not trainer.collected_frames:
        print("session", ray.get_runtime_context().gcs_address, flush=True)
    return told(steps)
trainer._batch_process_ops[0] = (add_steps, {})
try:
    trainer.train()
except KeyboardInterrupt:
    assert not ray.is_initialized()
    sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_ends_all_that_was_begun(tmp_path) -> None:
    """A terminal sends it to all processes: Ray is started, and ended, by the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    line = process.stdout.readline()
    while line and not line.startswith("session"):
        line = process.stdout.readline()
    address = line.split()[1]
    assert any(address in words for words in processes())
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not re.search("Traceback|Error", err), err
    assert not any(address in words for words in processes())


def processes() -> list[str]:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
