"""Logs in tables: CSV files, DataFrames, their columns and what is wrong with them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _logs import check_successive, ends_of, following, ids_of, rows_of
from torchrl.data import MultiOneHot, OneHot

from torchrl_wm.cli import main
from torchrl_wm.models import load_world_model
from torchrl_wm.trainers import load_transitions, RecordedEnv, train_world_model


class Column:
    """A column of a DataFrame, as far as numpy is concerned."""

    def __init__(self, values) -> None:
        self.values = values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.values, dtype)


class Frame:
    """What pandas' and polars' DataFrames have in common."""

    def __init__(self, columns: dict) -> None:
        self.table = columns
        self.columns = list(columns)

    def __getitem__(self, name) -> Column:
        return Column(self.table[name])


def columns_of(*lengths: int) -> dict[str, np.ndarray]:
    rows = following(rows_of(*lengths))
    return {
        "obs_0": rows["observations"][:, 0],
        "obs_1": rows["observations"][:, 1],
        "action_0": rows["actions"][:, 0],
        "reward": rows["rewards"],
        "terminated": ends_of(*lengths),
        "next_obs_1": rows["next_observations"][:, 1],  # in another order
        "next_obs_0": rows["next_observations"][:, 0],
    }


def written(path, columns: dict, separator: str = ",") -> str:
    lines = [separator.join(columns)]
    lines += [separator.join(map(str, row)) for row in zip(*columns.values())]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# Columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "semicolon", "tsv", "frame", "dictionary"])
@pytest.mark.parametrize(
    "base", ["obs_{}", "observation.{}", "obs[{}]", "observations{}", "Obs_{}"]
)
def test_columns_make_vectors(base, form, tmp_path, recwarn) -> None:
    renamed = {}
    for name, value in columns_of(3, 4).items():
        if "obs_" in name:
            head = "next_" if name.startswith("next_") else ""
            name = head + base.format(name[-1])
        renamed[name] = value
    source = {"frame": Frame, "dictionary": dict}.get(form, lambda c: c)(renamed)
    if form in ("csv", "semicolon"):
        source = written(tmp_path / "log.csv", renamed, ";" if form[0] == "s" else ",")
    elif form == "tsv":
        source = written(tmp_path / "log.tsv", renamed, "\t")
    data = load_transitions(source)
    check_successive(data)
    assert data["observation"].dtype is data["action"].dtype is torch.float32
    assert data["action"].shape == (7, 1)
    assert data["next", "terminated"].flatten().nonzero().flatten().tolist() == [2, 6]
    assert not recwarn


def test_ten_columns_are_in_the_order_of_their_numbers() -> None:
    columns = columns_of(3)
    for name in list(columns):
        if "obs" in name:
            del columns[name]
    for number in (10, 9, 2, 1, 3, 4, 5, 6, 8, 7):
        columns[f"obs_{number}"] = np.full(3, number)
        columns[f"next_obs_{number}"] = np.full(3, number)
    data = load_transitions(Frame(columns))
    assert data["observation"][0].tolist() == list(range(1, 11))
    del columns["obs_4"]
    with pytest.raises(
        ValueError, match="numbers of observations of the data have gap"
    ):
        load_transitions(Frame(columns))


def test_parts_with_slashes_are_entries_of_a_dictionary(tmp_path) -> None:
    columns = columns_of(3, 4)
    columns = {
        name.replace("next_obs_", "next_obs/arm/").replace("obs_", "obs/arm/"): value
        for name, value in columns.items()
    }
    data = load_transitions(written(tmp_path / "log.csv", columns))
    assert (data["next", "arm", "0"] == data["arm", "0"] + 1).all()


@pytest.mark.parametrize("text, dtype", [("{}", torch.int64), ("{}.0", torch.float32)])
def test_actions_written_as_integers_are_choices(text, dtype, tmp_path) -> None:
    columns = columns_of(3, 4)
    choices = np.array([0, 2, 1, 0, 1, 2, 2])
    columns["action_0"] = [text.format(number) for number in choices]
    data = load_transitions(written(tmp_path / "log.csv", columns))
    assert data["action"].dtype is dtype
    if dtype is torch.int64:
        assert data["action"].argmax(-1).tolist() == choices.tolist()
        columns["action_1"] = [str(number > 0) for number in choices]
        data = load_transitions(written(tmp_path / "log.csv", columns))
        spec = RecordedEnv(data).action_spec
        assert spec == MultiOneHot([3, 2], dtype=torch.int64)
    else:
        assert data["action"].flatten().tolist() == choices.tolist()


def test_observations_written_as_integers_are_numbers(tmp_path) -> None:
    """All of them, or only those before the steps."""
    columns = {**columns_of(3, 4)}
    for name in ("obs_0", "obs_1"):
        columns[name] = columns[name].astype(int)
    data = load_transitions(written(tmp_path / "log.csv", columns))
    check_successive(data)
    assert data["observation"].dtype is torch.float32
    one = {"obs": columns["obs_0"], "next_obs": columns["obs_0"] + 0.5}
    names = {name: value for name, value in columns.items() if "obs_" not in name}
    data = load_transitions(Frame({**names, **one}))
    assert data["observation"].dtype is data["next", "observation"].dtype
    assert (data["next", "observation"] == data["observation"] + 0.5).all()
    with pytest.raises(ValueError, match="in a CSV file 1.0 for 1"):  # class numbers?
        train_world_model(Frame({**names, **one, "next_obs": one["obs"]}), steps=1)


def test_ids_may_be_text_and_other_columns_are_named(tmp_path) -> None:
    columns = {"": range(7), **columns_of(3, 4)}
    columns["run"] = np.array(["first", "second"])[ids_of(3, 4)]
    columns["operator"] = ['"Ann, Bob"'] * 7
    file = written(tmp_path / "log.csv", columns)
    with pytest.warns(UserWarning, match=r"Not read.*\['', 'operator'\]"):
        data = load_transitions(file, names={"episodes": "run"})
    check_successive(data)


def test_several_files_are_read_one_after_the_other(tmp_path) -> None:
    for number in range(3):
        columns = columns_of(2, 3)
        written(tmp_path / f"{number}.csv", columns)
    files = sorted(tmp_path.glob("*.csv"))
    expected = load_transitions(columns_of(2, 3))
    for source in (str(tmp_path / "*.csv"), files, [str(file) for file in files]):
        data = load_transitions(source)
        assert (data == torch.cat([expected] * 3)).all()
    with pytest.raises(FileNotFoundError, match="no file that matches"):
        load_transitions(str(tmp_path / "*.npz"))
    with pytest.raises(ValueError, match="list, and its item 1 is TensorDict"):
        load_transitions([files[0], expected])


# What is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("", ValueError, "is empty: its first line must name"),
        ("1,2,3\n4,5,6\n", ValueError, "first line .* must name the columns.*'1,2,3'"),
        ("obs,obs,action\n", ValueError, r"several columns \['obs'\]"),
        ("obs,action\n1,2\n", KeyError, r"\['rewards'\] are missing"),
        (
            "obs,action,reward,done\n1,2,3\n",
            ValueError,
            "Line 2 .* has 3 cells.* 4 col",
        ),
        (
            "obs,action,reward,done\n1,x,3,0\n1,2,3,1\n",
            ValueError,
            "actions .* row 0 has 'x'",
        ),
        ("obs,action,reward,done\n1,2,3,\n", ValueError, "dones .* nan in 1 of 1"),
        ("obs,action,reward,done\n1,2,3,7\n", ValueError, "dones .* must be 0 or 1"),
        ("obs,action,reward,done\n", ValueError, "no step"),
        ("obs,action,reward\n1,2,3\n", KeyError, "Nothing in the data tells where"),
    ],
)
def test_files_that_are_no_log(text, error, message, tmp_path) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(error, match=message):
        load_transitions(tmp_path / "log.csv")


def test_a_file_that_is_no_text(tmp_path) -> None:
    (tmp_path / "log.csv").write_bytes(b"obs,action\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        load_transitions(tmp_path / "log.csv")


def test_empty_cells_of_what_is_learnt_are_found_in_training(tmp_path, capsys) -> None:
    pytest.importorskip("tyro")
    columns = {name: list(map(str, v)) for name, v in columns_of(6, 6).items()}
    columns["obs_1"][4] = ""
    file = written(tmp_path / "log.csv", columns)
    options = ["--data", file, "--run", str(tmp_path / "run"), "--steps", "2"]
    assert main(["train", "model", *options]) == 2
    said = capsys.readouterr().err
    assert "'observation' is NaN or infinite in 1 of 12" in said
    assert "first in number" in said and "in dim 1 of" in said


@pytest.mark.parametrize("name", ["obs_0", "action_0", "reward", "terminated"])
@pytest.mark.parametrize(
    "value, message",
    [
        (["a"] * 7, "must be an array of numbers, and row 0 has 'a'"),
        ([1, 0, None, 1, 1, 1, 1], "row 2 has None"),
        ([1, 0, 0, 0, 1, "x", 1], "row 5 has 'x'"),
        (np.array(["2020-01-01"] * 7, "M8[D]"), "got datetime64"),
        (np.zeros(7, complex), "got complex128"),
    ],
)
def test_columns_of_other_kinds_are_named(name, value, message) -> None:
    columns = {**columns_of(3, 4), name: value}
    ours = {"obs_0": "obs_0", "action_0": "actions", "reward": "rewards"}
    with pytest.raises(ValueError, match=f"{ours.get(name, 'term')}.*{message}"):
        load_transitions(Frame(columns))


def test_columns_of_objects_that_are_numbers(recwarn) -> None:
    """As DataFrames have after joins; and an array in each row."""
    columns = columns_of(3, 4)
    expected = load_transitions(columns)
    objects = {name: np.array(v.tolist(), object) for name, v in columns.items()}
    assert (load_transitions(Frame(objects)) == expected).all()
    rows = following(rows_of(3, 4))
    arrays = {"terminals": columns["terminated"], "rewards": rows["rewards"]}
    for name in ("observations", "next_observations", "actions"):
        arrays[name] = np.empty(7, object)
        arrays[name][:] = list(rows[name])
    assert (load_transitions(Frame(arrays)) == expected).all()
    assert not recwarn
    arrays["actions"][3] = np.zeros(2)
    with pytest.raises(ValueError, match=r"same shape in each row.*\(2,\) in row 3"):
        load_transitions(Frame(arrays))


def test_tables_with_several_columns_of_a_name() -> None:
    frame = Frame(columns_of(3))
    frame.columns.append("obs_0")
    with pytest.raises(ValueError, match=r"several columns \['obs_0'\]"):
        load_transitions(frame)


# The command line ------------------------------------------------------------------------------


def test_a_model_of_csv_files_with_names(tmp_path, capsys) -> None:
    pytest.importorskip("tyro")
    columns = columns_of(6, 5, 6)
    columns = {
        name.replace("obs_", "state_").replace("terminated", "done"): value
        for name, value in columns.items()
    }
    columns["act"] = np.arange(17) % 3
    del columns["action_0"]
    written(tmp_path / "a.csv", columns)
    written(tmp_path / "b.csv", columns)
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "*.csv"), "--run", str(run), "--steps", "4"]
    options += ["--members", "2", "--hidden", "8", "--no-report"]
    words = ["--names", "state=observations,act=actions", "--dones", "terminal"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main(["train", "model", *options, *words]) == 0
    assert "A world model of 34 transitions" in capsys.readouterr().out
    world_model = load_world_model(run / "model.pt")
    assert world_model.done_head is not None
    assert world_model.recipe.specs.actions[0].to_spec() == OneHot(3, dtype=torch.int64)
    assert main(["train", "--resume", str(run), "--steps", "6", "--no-report"]) == 0
