"""Errors of workers of Ray: their answers are given here, and Ray is not started."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _on_ray import Pushing
from tensordict import TensorDict

from torchrl_wm.trainers import CollectingError, make_real_env, RunConfig
from torchrl_wm.trainers.ray_collecting import RaySteps
from torchrl_wm.trainers.ray_workers import Begin, EnvWorker, named_tensors

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra ray")


class Answer:
    """The answer to a request, or an error."""

    def __init__(self, content: Any) -> None:
        self.content = content


def asked(answer: Callable[[], Any]) -> SimpleNamespace:
    """A method of a worker."""
    return SimpleNamespace(remote=lambda *arguments: Answer(answer()))


def got(answers: list[Answer]) -> list:
    for answer in answers:
        if isinstance(answer.content, Exception):
            raise answer.content
    return [answer.content for answer in answers]


class Cluster:
    """Workers that answer requests as they are told, and are replaced by others.

    Args:
        answers: for each env those to its requests; batches of zeros after the last one.
        load: the answer to new weights.
    """

    def __init__(self, answers: dict[int, list[Exception]], load: Any = None) -> None:
        self.answers, self.load = answers, load
        self.remote_collectors = [self.worker(env) for env in range(4)]
        self.collector_kwargs: list[dict] = [{}] * 4
        self.replaced: list[list[int]] = []
        self.killed: list[Any] = []

    def worker(self, env: int) -> SimpleNamespace:
        def batch() -> Any:
            left = self.answers.get(env)
            return (
                left.pop(0) if left else TensorDict({"env": torch.full((5,), env)}, [5])
            )

        methods = {"next": asked(batch), "load_weights": asked(lambda: self.load)}
        return SimpleNamespace(**methods, env=env, __ray_ready__=asked(lambda: True))

    def add_collectors(self, makers, number, policy, kwargs, configs) -> None:
        assert len(makers) == len(kwargs) == len(configs)
        self.replaced.append([each["begin"].env for each in kwargs])
        self.remote_collectors += map(self.worker, self.replaced[-1])

    def shutdown(self) -> None:
        pass


@pytest.fixture
def steps_of(monkeypatch) -> Callable[[Cluster], RaySteps]:
    """The collector of four envs on such workers."""
    source = "_real_envs:make_nested_ragged"
    env = make_real_env(source, seed=7)

    def make(cluster: Cluster) -> RaySteps:
        config = RunConfig(env=source, collector="ray", num_envs=4, ray_batch=5)
        steps = RaySteps(config, source, env, Pushing(), torch.device("cpu"))
        monkeypatch.setattr(steps, "_make_collector", lambda: cluster)
        monkeypatch.setattr(steps._connection, "open", lambda: None)
        monkeypatch.setattr(ray, "kill", cluster.killed.append)
        monkeypatch.setattr(ray, "put", lambda weights: weights)
        monkeypatch.setattr(ray, "get", got)
        monkeypatch.setattr(ray, "wait", lambda refs, **kwargs: (list(refs), []))
        steps.begin()
        return steps

    return make


LOST = [
    ray.exceptions.RayActorError(),
    ray.exceptions.NodeDiedError("gone"),
    ray.exceptions.OutOfMemoryError("killed"),
    ray.exceptions.ObjectLostError("00" * 28, b"", ""),
]


def test_a_machine_with_all_workers_is_lost(steps_of) -> None:
    cluster = Cluster({env: [error] for env, error in enumerate(LOST)})
    lost = list(cluster.remote_collectors)
    steps = steps_of(cluster)
    made = [step["env"].tolist() for step, _ in zip(steps, range(11))]
    assert made == [[0, 1, 2, 3]] * 11
    assert cluster.replaced == [[0, 1, 2, 3]]
    assert cluster.killed == lost
    assert [worker.env for worker in cluster.remote_collectors] == [0, 1, 2, 3]
    assert steps.episodes.finished.tolist() == [1, 1, 1, 1]


def test_the_workers_of_an_env_are_lost_again_and_again(steps_of) -> None:
    # Each worker is asked for two batches at once.
    cluster = Cluster({2: [LOST[0]] * 8})
    with pytest.raises(CollectingError, match="4 workers of Ray.* env 2"):
        next(iter(steps_of(cluster)))
    assert cluster.replaced == [[2]] * 3


def test_an_error_of_the_env_loses_no_worker(steps_of) -> None:
    # The env has workers of its own.
    error = ray.exceptions.RayTaskError("next", "", LOST[0]).as_instanceof_cause()
    assert isinstance(error, ray.exceptions.RayActorError)
    cluster = Cluster({1: [error]})
    with pytest.raises(ray.exceptions.RayTaskError):
        next(iter(steps_of(cluster)))
    assert not cluster.replaced


def test_weights_that_workers_cannot_take(steps_of) -> None:
    steps = steps_of(Cluster({}, load=ValueError("The policy has changed")))
    made = 0
    with pytest.raises(ValueError, match="The policy has changed"):
        for _ in steps:
            made += 4
            steps.begin(made)  # what is learnt of them is pushed at the next request
    assert made == 2 * 20


def test_a_policy_that_changed_its_tensors() -> None:
    policy, begin = Pushing(), Begin(0, 0, 1, 0, 0, 1)
    maker = partial(make_real_env, "_real_envs:make_nested_ragged", seed=7)
    worker = EnvWorker(maker, policy, begin=begin, frames_per_batch=5, total_frames=-1)
    weights = named_tensors(Pushing())
    worker.load_weights({**weights, "value": torch.tensor(0.5)})
    assert policy.value == 0.5
    wider = {**weights, "value": torch.ones(1)}  # which copy_ would take
    fewer = {name: tensor for name, tensor in weights.items() if name != "value"}
    more = {**weights, "value_2": torch.ones(1)}
    for changed in (wider, fewer, more):
        with pytest.raises(ValueError, match="The policy has changed.*value"):
            worker.load_weights(changed)
    assert policy.value == 0.5
    worker.shutdown()
