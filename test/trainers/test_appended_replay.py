"""Replay buffers in checkpoints: appended once, restored exactly, removed when not needed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    PrioritizedReplayBuffer,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from torchrl_wm.trainers import RunFolder
from torchrl_wm.trainers.recipe import Counts, make_replay

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def rows(number: int, first: int = 0) -> TensorDict:
    """Transitions that can be told apart, one entry nested, of several dtypes."""
    index = torch.arange(first, first + number)
    content = {
        "frame": (index % 256).to(torch.uint8).view(-1, 1, 1).expand(-1, 2, 2),
        ("agent", "place"): index.double().unsqueeze(-1) / 7,
        ("next", "done"): (index % 3 == 0).unsqueeze(-1),
    }
    return TensorDict(content, batch_size=[number])


def frames(number: int, first: int = 0) -> TensorDict:
    """Consecutive transitions between images, in episodes of five steps."""
    index = torch.arange(first, first + number)
    time = index + index // 5  # an episode has one image more than steps
    content = {}
    for where, at in (((), time), (("next",), time + 1)):
        image = at.to(torch.uint8).view(-1, 1, 1).expand(-1, 64, 8)
        content[(*where, "agent", "camera")] = image.contiguous()
    content["next", "reward"] = index.double().unsqueeze(-1)
    return TensorDict(content, batch_size=[number])


def folder_of(path: Path, buffer: ReplayBuffer) -> RunFolder:
    """A run's folder whose checkpoints hold a buffer."""
    run = RunFolder(path)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.config = {"version": 2, "id": "x"}
    run.bind({"replay": buffer})
    return run


def restored(path: Path, like: ReplayBuffer, step: int | None = None) -> ReplayBuffer:
    """A buffer as another process reads it."""
    fresh = make_replay(like.storage.max_size)
    folder_of(path, fresh).load(step)
    return fresh


def assert_equal(one: ReplayBuffer, other: ReplayBuffer) -> None:
    assert len(one) == len(other) and one.write_count == other.write_count
    assert one.writer.state_dict() == other.writer.state_dict()
    if len(one):
        assert (one[:] == other[:]).all()
        assert set(one[:].keys(True, True)) == set(other[:].keys(True, True))
        torch.manual_seed(0)
        sample = one.sample(5)
        torch.manual_seed(0)
        assert (sample == other.sample(5)).all()


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    capacity=st.integers(1, 12),
    extends=st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from(["", "save", "resume", "empty"])),
        max_size=9,
    ),
    make_rows=st.sampled_from([rows, frames]),
)
def test_a_buffer_is_restored_exactly(
    capacity, extends, make_rows, tmp_path_factory
) -> None:
    path = tmp_path_factory.mktemp("run")
    buffer, step, first = make_replay(capacity), 0, 0
    run = folder_of(path, buffer)
    for number, then in extends:
        number = min(number, capacity)  # TorchRL takes no more at once
        if number:
            buffer.extend(make_rows(number, first))
        first += number
        if then == "empty":
            buffer.empty()
        elif then:
            step += 1
            run.save(step)
            assert_equal(restored(path, buffer), buffer)
        if then == "resume":  # another process goes on
            buffer = make_replay(capacity)
            run = folder_of(path, buffer)
            run.load()
            run.go_on()
    shutil.rmtree(path)


def test_the_checkpoint_before_keeps_its_rows(tmp_path) -> None:
    buffer = make_replay(10)
    run, contents = folder_of(tmp_path, buffer), {}
    for step in range(12):
        buffer.extend(rows(7, 7 * step))
        run.save(step)
        contents[step] = buffer[:].clone()
        for path in run.saved():
            number = int(path.name.partition("-")[2])
            again = restored(tmp_path, buffer, number)
            assert (again[:] == contents[number]).all()
        if step == 5:  # go on in another process: it does not know of those before
            buffer = make_replay(10)
            run = folder_of(tmp_path, buffer)
            run.load()
            run.go_on()
    files = list((tmp_path / "replay" / "replay").iterdir())
    assert len(files) <= 5  # three checkpoints' worth of a ring of ten rows


def test_a_checkpoint_writes_the_new_rows_alone(tmp_path) -> None:
    buffer = make_replay(100_000)
    run = folder_of(tmp_path, buffer)
    for step in range(6):
        buffer.extend(rows(10 if step else 5_000, 5_000 * step))
        run.save(step)
    sizes = [
        file.stat().st_size for file in sorted((tmp_path / "replay").rglob("*.pt"))
    ]
    assert len(sizes) == 6 and sizes[0] > 100_000 > 20 * max(sizes[1:]) / 10
    assert max(sizes[1:]) < 4_000
    parts = [file.stat().st_size for file in run.checkpoints.rglob("state.pt")]
    assert max(parts) < 3_000
    run.save(7)  # without anything new
    assert len(list((tmp_path / "replay").rglob("*.pt"))) == 6


def test_each_image_is_written_once(tmp_path) -> None:
    buffer = make_replay(400)
    run, sizes = folder_of(tmp_path, buffer), []
    for step in range(3):
        buffer.extend(frames(200, 200 * step))
        before = run.size
        run.save(step)
        sizes.append(run.size - before)
    # 200 images before steps, and one after each of 40 episodes.
    assert all(240 * 512 < size < 1.1 * 240 * 512 + 4_000 for size in sizes)
    again = restored(tmp_path, buffer)
    assert_equal(again, buffer)
    assert again.storage.number_of_images == buffer.storage.number_of_images == 480


def test_a_buffer_that_was_emptied_begins_another_series(tmp_path) -> None:
    buffer = make_replay(50)
    run = folder_of(tmp_path, buffer)
    for step in range(4):  # as many rows each time: counts alone do not tell
        buffer.empty()
        buffer.extend(rows(20, 20 * step))
        run.save(step)
        assert_equal(restored(tmp_path, buffer), buffer)
    assert restored(tmp_path, buffer, 2)["next", "done"].sum() in (6, 7)
    assert len(list((tmp_path / "replay").rglob("*.pt"))) <= 3
    buffer.empty(empty_write_count=False)
    buffer.extend(rows(3))
    run.save(9)
    assert_equal(restored(tmp_path, buffer), buffer)


def test_files_of_a_checkpoint_that_was_not_finished(tmp_path) -> None:
    buffer = make_replay(20)
    run = folder_of(tmp_path, buffer)
    for step in range(3):
        buffer.extend(rows(6, 6 * step))
        run.save(step)
    shutil.rmtree(run.saved()[-1])  # the kill came after the file of the replay
    fresh = make_replay(20)
    again = folder_of(tmp_path, fresh)
    again.load()
    assert fresh.write_count == 12 and (fresh[:]["frame"] == rows(12)["frame"]).all()
    again.go_on()
    fresh.extend(rows(9, 100))  # other steps than those that were lost
    again.save(2)
    assert_equal(restored(tmp_path, fresh), fresh)


def test_buffers_of_other_kinds(tmp_path) -> None:
    memmap = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(30, scratch_dir=tmp_path / "scratch")
    )
    plain = ReplayBuffer(storage=LazyTensorStorage(30))
    for name, buffer in {"memmap": memmap, "plain": plain}.items():
        run = folder_of(tmp_path / name, buffer)
        for step in range(2):
            buffer.extend(rows(20, 20 * step))
            run.save(step)
        again = restored(tmp_path / name, buffer)
        assert (again[:].exclude("index") == buffer[:].exclude("index")).all()


def test_a_sampler_goes_on_where_it_was(tmp_path) -> None:
    def make() -> ReplayBuffer:
        sampler = SamplerWithoutReplacement()
        return TensorDictReplayBuffer(storage=LazyTensorStorage(30), sampler=sampler)

    buffer = make()
    buffer.extend(rows(30))
    first = buffer.sample(18)["agent", "place"]
    folder_of(tmp_path, buffer).save(0)
    again = make()
    folder_of(tmp_path, again).load()
    second = again.sample(12)["agent", "place"]
    assert len(torch.cat([first, second]).unique()) == 30


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: ReplayBuffer(storage=ListStorage(10)), "ListStorage"),
        (lambda: ReplayBuffer(storage=LazyTensorStorage(9, ndim=2)), "one dim"),
        (
            lambda: PrioritizedReplayBuffer(
                alpha=0.7, beta=0.9, storage=LazyTensorStorage(9)
            ),
            "PrioritizedSampler",
        ),
    ],
)
def test_buffers_that_cannot_be_appended(make, names, tmp_path) -> None:
    try:
        buffer = make()
    except RuntimeError:
        pytest.skip("TorchRL has no trees of priorities here")
    with pytest.raises(TypeError, match=f"(?s)'replay' cannot.*{names}.*make_replay"):
        folder_of(tmp_path, buffer)


def test_parts_without_a_state(tmp_path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(TypeError, match="'count' is a int, which has no state_dict"):
        run.bind({"count": 3})
    counts = Counts(updates=3, share=0.5)
    again = Counts(updates=0, share=0.0)
    again.load_state_dict(counts.state_dict())
    assert (again.updates, again.share) == (3, 0.5)


def test_another_capacity_does_not_fit(tmp_path) -> None:
    buffer = make_replay(10)
    buffer.extend(rows(3))
    folder_of(tmp_path, buffer).save(0)
    with pytest.raises(ValueError, match="does not fit.*10 rows, and the run's has 11"):
        folder_of(tmp_path, make_replay(11)).load()
