"""FrameStorage: complete rows as a plain storage gives them, and each image once."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from torchrl_wm.trainers.frame_storage import FrameStorage
from torchrl_wm.trainers.recipe import make_replay
from torchrl_wm.trainers.sequences import sample_sequences

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
KEYS = ("pixels", ("agent", "camera"))


def image(*numbers: int) -> torch.Tensor:
    """Images ``[N, 2, 3]`` that are told apart by a number."""
    numbers = torch.tensor(numbers)
    return torch.stack([numbers + i for i in range(6)], -1).reshape(-1, 2, 3).byte()


def rows(before: list[int], after: list[int]) -> TensorDict:
    """Transitions between numbers, with two entries of images, floats and a state that is no image."""
    content = {}
    for where, numbers in (((), before), (("next",), after)):
        content[(*where, "pixels")] = image(*numbers)
        content[(*where, "agent", "camera")] = 255 - image(*numbers)
        content[(*where, "floats")] = image(*numbers).float() / 255
        content[(*where, "bytes")] = image(*numbers)[:, 0]
    content["next", "reward"] = torch.tensor(before).double().unsqueeze(-1)
    return TensorDict(content, [len(before)])


def steps(number: int, num_envs: int, length: int) -> list[TensorDict]:
    """Steps of several envs that take turns, in episodes of one length."""
    out = []
    for time in range(number):
        at = time + time // length  # an episode has one image more than steps
        begins = [7 * at + 3 * env for env in range(num_envs)]
        out.append(rows(begins, [7 + place for place in begins]))
    return out


def images_in(storage: FrameStorage) -> int:
    return storage.number_of_images // len(KEYS)


# Rows -------------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    capacity=st.integers(1, 9),
    writes=st.lists(
        st.tuples(
            st.sampled_from(["extend", "extend", "extend", "set", "add", "empty"]),
            # Few images, so that many are equal by chance.
            st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12),
        ),
        min_size=1,
        max_size=12,
    ),
    on=st.sampled_from(["memory", "disk"]),
)
def test_any_rows_are_as_in_a_plain_storage(capacity, writes, on) -> None:
    ours = TensorDictReplayBuffer(storage=FrameStorage(capacity, images=on))
    plain = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))
    for kind, numbers in writes:
        before, after, places = (list(column) for column in zip(*numbers))
        new = rows(before, after)[:capacity]
        for buffer in (ours, plain):
            if kind == "empty":
                buffer.empty()
            elif kind == "extend":
                buffer.extend(new)
            elif kind == "add":
                buffer.add(new[0])
            elif len(buffer):  # written over any rows, in any order
                there = [*dict.fromkeys(place % len(buffer) for place in places)]
                there = there[: len(new)]
                buffer.storage[torch.tensor(there)] = new[: len(there)]
        assert len(ours) == len(plain)
        if len(plain):
            assert (ours[:] == plain[:]).all()
            assert {*ours[:].keys(True, True)} == {*plain[:].keys(True, True)}
            # No image is lost track of.
            assert images_in(ours.storage) <= 2 * len(plain)
    assert images_in(copy.deepcopy(ours.storage)) == images_in(ours.storage)


@pytest.mark.parametrize(
    "index",
    [
        3,
        -1,
        slice(2, 9, 3),
        range(4),
        [5, 0],
        torch.tensor(2),
        torch.tensor([[1, 2, 3], [9, 0, 9]]),
        torch.arange(10) % 3 == 0,
        (torch.tensor([4, 1]),),
        Ellipsis,
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [10, 14])
def test_indices_of_any_form(index, number) -> None:
    ours, plain = (
        ReplayBuffer(storage=kind(10)) for kind in (FrameStorage, LazyTensorStorage)
    )
    for step in steps(number, 1, 4):
        ours.extend(step), plain.extend(step)
    mine, theirs = ours.storage[index], plain.storage[index]
    assert mine.batch_size == theirs.batch_size
    assert (mine == theirs).all()


def test_more_rows_than_there_is_room_for() -> None:
    replay = make_replay(5)
    replay.extend(rows([*range(12)], [*range(1, 13)]))
    assert sorted(replay[:]["next", "reward"].flatten().tolist()) == [7, 8, 9, 10, 11]
    begins, ends = replay[:]["pixels"][:, 0, 0], replay[:]["next", "pixels"][:, 0, 0]
    assert (ends == begins + 1).all() and images_in(replay.storage) == 6


# Each image once ------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("capacity", [1000, 31])
def test_each_image_is_kept_once(num_envs, capacity) -> None:
    replay = make_replay(capacity)
    for step in steps(40, num_envs, length=5):
        replay.extend(step)
    kept = replay[:]
    different = {int(n) for k in KEYS[:1] for n in (kept[k].sum((1, 2))).tolist()}
    different |= {int(n) for n in kept["next", "pixels"].sum((1, 2)).tolist()}
    ends = -(-len(kept) // (5 * num_envs)) * num_envs
    assert len(kept) < len(different) <= images_in(replay.storage)
    assert images_in(replay.storage) <= len(kept) + ends + num_envs
    batch = sample_sequences(replay, 200, 4, num_envs)
    follows = batch["next", "pixels"][:, :-1] == batch["pixels"][:, 1:]
    over = (batch["next", "reward"][:, :-1] + 7) != batch["next", "reward"][:, 1:]
    assert (follows.flatten(2).all(-1) | over.squeeze(-1)).all()


def test_whole_episodes_at_once() -> None:
    replay = make_replay(100)
    replay.extend(torch.cat(steps(40, 1, length=10)))
    assert images_in(replay.storage) == 44


def test_rows_in_any_order_take_more_room_and_are_right() -> None:
    there = torch.cat(steps(40, 2, length=10))
    replay = make_replay(100)
    replay.extend(there[torch.randperm(80)])
    assert 84 < images_in(replay.storage) <= 160
    assert sorted(replay[:]["next", "reward"]) == sorted(there["next", "reward"])


def test_images_that_are_no_bytes_or_have_one_end_are_kept_as_they_are() -> None:
    replay = make_replay(10)
    content = {
        "pixels": torch.rand(4, 2, 3),
        ("next", "pixels"): torch.rand(4, 2, 3),
        "picture": image(1, 2, 3, 4),
        "small": image(1, 2, 3, 4),
        ("next", "small"): image(1, 2, 3, 4)[:, :1],
    }
    replay.extend(TensorDict(content, [4]))
    assert replay.storage.number_of_images == 0
    assert all((replay[:][key] == value).all() for key, value in content.items())


# Files -------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_of(monkeypatch) -> None:
    from torchrl_wm.trainers import frame_storage

    monkeypatch.setattr(
        frame_storage.shutil, "disk_usage", lambda _: type("", (), {"free": 5})
    )
    replay = make_replay(10_000, images="disk")
    with pytest.warns(UserWarning, match="0.0 GB of images on disk.*TMPDIR"):
        replay.extend(rows([1], [2]))


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    replay = make_replay(100, images="disk")
    replay.extend(torch.cat(steps(40, 1, length=2)))
    assert not list(tmp_path.iterdir())
    assert replay[:]["pixels"].shape == (40, 2, 3)


def test_torchrls_own_files_hold_complete_rows(tmp_path) -> None:
    replay = make_replay(20)
    for step in steps(25, 1, length=4):
        replay.extend(step)
    replay.dumps(tmp_path)
    fresh = make_replay(20)
    fresh.loads(tmp_path)
    assert (fresh[:] == replay[:]).all() and fresh.write_count == 25
    assert images_in(fresh.storage) == images_in(replay.storage)
    again = make_replay(20)
    again.load_state_dict(replay.state_dict())
    assert (again[:] == replay[:]).all()
    with pytest.raises(ValueError, match="holds 20 rows.*empty"):
        again.loads(tmp_path)
    plain = TensorDictReplayBuffer(storage=LazyTensorStorage(20))
    plain.loads(tmp_path)
    assert (plain[:] == replay[:]).all()
