"""Entries joined into one vector and split again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)

from torchrl_wm.modules import Entry, JoinEntries, SplitEntries

SPECS = {
    "vector": (lambda: Unbounded((3,)), 3),
    "scalar": (lambda: Unbounded(()), 1),
    "matrix": (lambda: Bounded(-1.0, 1.0, (2, 3)), 6),
    "double": (lambda: Unbounded((2,), dtype=torch.float64), 2),
    "categorical": (lambda: Categorical(4), 4),
    "categorical column": (lambda: Categorical(4, (1,)), 4),
    "categories": (lambda: Categorical(3, (2,)), 6),
    "multi-categorical": (lambda: MultiCategorical((2, 3)), 5),
    "one-hot": (lambda: OneHot(4), 4),
    "multi-one-hot": (lambda: MultiOneHot((2, 3)), 5),
    "binary": (lambda: Binary(3), 3),
    "bool": (lambda: Categorical(2, (1,), dtype=torch.bool), 1),
}


@given(
    st.lists(st.sampled_from(sorted(SPECS)), min_size=1, max_size=4),
    st.sampled_from([(), (1,), (5,), (2, 3)]),
)
@settings(deadline=None, max_examples=60)
def test_every_spec_takes_its_size_at_every_batch_shape(names, size) -> None:
    specs = [SPECS[name][0]() for name in names]
    entries = [Entry.from_spec(("a", str(i)), spec) for i, spec in enumerate(specs)]
    sizes = [SPECS[name][1] for name in names]
    assert [entry.size for entry in entries] == sizes
    join = JoinEntries(entries)
    values = [spec.rand(size) for spec in specs]
    vector = join(*values)
    assert vector.shape == (*size, sum(sizes)) and vector.dtype == torch.float32
    assert join.out_features == sum(sizes)
    for entry, value, part in zip(entries, values, vector.split(sizes, -1)):
        if entry.classes:
            flat = value.reshape(*size, -1)
            expected = [F.one_hot(flat[..., i], n) for i, n in enumerate(entry.classes)]
            assert torch.equal(part, torch.cat(expected, -1).float())
        else:
            assert torch.equal(part, value.reshape(*size, -1).float())


def test_split_gives_back_what_was_joined_in_its_dtype() -> None:
    specs = [Unbounded((3,)), Unbounded((), dtype=torch.float64), Unbounded((2, 3))]
    entries = [Entry.from_spec(str(i), spec) for i, spec in enumerate(specs)]
    values = [spec.rand((5, 2)) for spec in specs]
    back = SplitEntries(entries)(JoinEntries(entries, dtype=torch.float64)(*values))
    for value, again in zip(values, back):
        assert torch.equal(value, again) and value.dtype == again.dtype


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", [(), (4,), (2, 2)])
def test_one_entry_splits_as_itself(shape, size) -> None:
    entry = Entry.from_spec("x", Unbounded(shape))
    value = torch.randn((*size, *shape))
    assert torch.equal(SplitEntries([entry])(JoinEntries([entry])(value)), value)


def test_split_refuses_what_floats_do_not_give_back() -> None:
    with pytest.raises(ValueError, match="'level' is torch.int64"):
        SplitEntries([Entry.from_spec("level", Categorical(3))])


def test_join_refuses_other_shapes_and_counts() -> None:
    join = JoinEntries([Entry.from_spec(("robot", "pose"), Unbounded((3,)))])
    with pytest.raises(ValueError, match=r"\('robot', 'pose'\) has the shape \(5, 2\)"):
        join(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"\['robot.pose'\], and got 2 tensors"):
        join(torch.zeros(3), torch.zeros(3))


def test_join_has_no_state_and_compiles_to_one_graph() -> None:
    join = JoinEntries([Entry.from_spec("action", MultiCategorical((2, 3)))])
    assert not join.state_dict()
    action = torch.tensor([[0, 2], [1, 0]])
    compiled = torch.compile(join, backend="eager", fullgraph=True)
    assert torch.equal(compiled(action), join(action))


def test_the_vector_follows_the_dtype_of_the_model() -> None:
    entries = [Entry.from_spec(("deep", "x"), Unbounded((2,)))]
    network = nn.Sequential(JoinEntries(entries), nn.Linear(2, 1))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert network.to(dtype)(torch.ones(3, 2)).dtype is dtype
    assert network.to("cpu")[0].dtype is torch.float32
