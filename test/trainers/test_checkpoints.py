"""Checkpoints of runs: damaged, foreign, full disks, and runs that go on from older ones."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from _runs import assert_same, interrupt, MBPO, PETS, RECIPES

from torchrl_wm import _files
from torchrl_wm.trainers import PETSTrainer, resume_run, RunFolder, start_run


class Trap:
    """Makes a folder where somebody unpickles it."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    PETSTrainer.start(path, **PETS).train()
    return path


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A run of PETS that is over, with checkpoints of the steps 48 and 60."""
    shutil.copytree(finished_once, tmp_path / "run")
    return tmp_path / "run"


def part(run: Path, name: str) -> Path:
    """The file of a part in the last checkpoint."""
    (file,) = RunFolder.open(run).saved()[-1].rglob(f"*-{name}/state.pt")
    return file


OFFER = r"(?s)damaged.*--checkpoint 48 \(in Python: checkpoint=48\)"


# Damage ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, keep",
    [
        ("learner", 0),
        ("learner", 100),
        ("learner", 0.9),
        ("replay", 0.9),
        ("trainer", 0),
        ("random", 0.5),
        ("episodes", 0.9),
    ],
)
def test_a_part_that_was_cut_off(finished, name, keep) -> None:
    file = part(finished, name)
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(ValueError, match=OFFER):
        PETSTrainer.resume(finished)
    again = PETSTrainer.resume(finished, checkpoint=48)
    assert (again.episodes, again.collected_frames) == (4, 48)
    assert len(again.data) == 48


def test_a_bit_that_flipped(finished) -> None:
    file = part(finished, "learner")
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=OFFER):
        PETSTrainer.resume(finished)


@pytest.mark.parametrize("how", ["cut", "missing", "no json", "a list", "no part"])
def test_a_damaged_manifest(finished, how) -> None:
    manifest = RunFolder.open(finished).saved()[-1] / "manifest.json"
    text = manifest.read_text()
    if how == "missing":
        manifest.unlink()
    elif how == "no part":
        content = json.loads(text)
        del content["components"]
        manifest.write_text(json.dumps(content))
    else:
        texts = {"cut": text[:90], "no json": "\x00\xff", "a list": "[]"}
        manifest.write_text(texts[how], encoding="latin-1")
    with pytest.raises(ValueError, match=OFFER):
        PETSTrainer.resume(finished)
    again = PETSTrainer.resume(finished, checkpoint=48)
    again.train()
    assert again.collected_frames == 60 and again.is_over


def test_a_damaged_file_of_the_replay(finished) -> None:
    files = sorted((finished / "replay" / "replay").iterdir())
    assert len(files) == 5
    files[-1].write_bytes(files[-1].read_bytes()[:500])  # of the steps 48 to 60
    with pytest.raises(ValueError, match=OFFER):
        PETSTrainer.resume(finished)
    assert PETSTrainer.resume(finished, checkpoint=48).collected_frames == 48
    files[1].unlink()
    with pytest.raises(ValueError, match="rows 12 to 48 are missing") as caught:
        PETSTrainer.resume(finished, checkpoint=48)
    assert "--checkpoint" not in str(caught.value)  # there is none before


def test_checkpoints_that_there_are_not(finished) -> None:
    run = RunFolder.open(finished)
    assert [step for step in (6, 36, 48, 60, 600) if run.has(step)] == [48, 60]
    with pytest.raises(FileNotFoundError, match=r"of step 36; there are \[48, 60\]"):
        PETSTrainer.resume(finished, checkpoint=36)
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        PETSTrainer.resume(finished, checkpoint=48)
    assert PETSTrainer.resume(finished).collected_frames == 0


# Foreign content ---------------------------------------------------------------


def test_foreign_files_run_no_code(finished, tmp_path) -> None:
    trap = {"state": Trap(tmp_path / "hacked")}
    segment = sorted((finished / "replay" / "replay").iterdir())[-1]
    for file in (part(finished, "learner"), segment):
        before = file.read_bytes()
        torch.save(trap, file)
        with pytest.raises(ValueError, match="Nothing of it was executed"):
            PETSTrainer.resume(finished)
        file.write_bytes(before)
    torch.save({"weights": torch.zeros(3)}, part(finished, "learner"))
    with pytest.raises(ValueError, match="does not fit the run's config.*KeyError"):
        PETSTrainer.resume(finished)
    assert not (tmp_path / "hacked").exists()


def test_checkpoints_of_other_versions(finished) -> None:
    manifest = RunFolder.open(finished).saved()[-1] / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(ValueError, match="is of a newer version. Update torchrl_wm"):
        PETSTrainer.resume(finished)
    manifest.write_text(json.dumps({**content, "format": "other"}))
    with pytest.raises(ValueError, match=OFFER):
        PETSTrainer.resume(finished)


@pytest.mark.parametrize("version, message", [(1, "earlier"), (99, "Update torchrl")])
def test_runs_of_other_versions(finished, version, message) -> None:
    config = json.loads((finished / "config.json").read_text())
    config["version"] = version
    if version == 1:
        del config["version"]  # the first had none
    (finished / "config.json").write_text(json.dumps(config))
    for look in (PETSTrainer.resume, resume_run, RunFolder.open):
        with pytest.raises(ValueError, match=message):
            look(finished)


def test_a_checkpoint_that_does_not_fit(finished) -> None:
    config = json.loads((finished / "config.json").read_text())
    config["config"]["hidden"] = [32]
    (finished / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit the run's config") as caught:
        PETSTrainer.resume(finished)
    assert "--checkpoint" not in str(caught.value)  # the others do not fit either


def test_a_folder_with_a_name_like_an_error(finished, tmp_path) -> None:
    run = finished.rename(tmp_path / "newer-run")
    manifest = RunFolder.open(run).saved()[-1] / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=OFFER):
        PETSTrainer.resume(run)


# Going on -----------------------------------------------------------------------


@RECIPES
def test_a_run_that_goes_on_from_the_checkpoint_before(
    kind, settings, tmp_path
) -> None:
    whole = kind(**settings)
    whole.train()
    interrupt(kind.start(tmp_path / "run", **settings), 57)
    before = RunFolder.open(tmp_path / "run").saved()[0]
    step = int(before.name.partition("-")[2])
    again = kind.resume(tmp_path / "run", checkpoint=step)
    assert again.collected_frames == step
    assert len(RunFolder.open(tmp_path / "run").saved()) == 2  # nothing is lost yet
    again.train()
    assert_same(again, whole)
    last = kind.resume(tmp_path / "run")
    assert_same(last, whole)


def test_what_a_kill_while_writing_leaves_behind(finished) -> None:
    run = RunFolder.open(finished)
    whole = PETSTrainer.resume(finished)
    shutil.rmtree(run.saved()[-1])  # its file of the replay had been written already
    orphans = [
        run.checkpoints / ".checkpoint-000000000060.stage-0123",
        finished / "replay" / "replay" / ".rows_000000_000000000048.pt.x",
        finished / ".metrics.csv.x",
    ]
    orphans[0].mkdir()
    for orphan in orphans[1:]:
        orphan.write_bytes(b"half")
    again = PETSTrainer.resume(finished)
    assert again.collected_frames == 48 and len(again.data) == 48
    assert all(orphan.exists() for orphan in orphans)  # to look changes nothing
    again.train()
    assert_same(again, whole)
    assert not any(orphan.exists() for orphan in orphans)


@pytest.mark.parametrize("written", [3, 9, 17, 26])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    written, tmp_path, monkeypatch
) -> None:
    whole = PETSTrainer(**PETS)
    whole.train()
    trainer = PETSTrainer.start(tmp_path / "run", **PETS)
    write, calls = torch.save, []

    def full(content, file, **kwargs):
        calls.append(1)
        if len(calls) > written:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        return write(content, file, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    good = "There is none yet"
    if written > 6:  # each checkpoint has five parts and a file of the replay
        good = f"checkpoint-{12 * (written // 6):012d}"
    with pytest.raises(OSError, match=f"No space left.*{good}.*--resume"):
        trainer.train()
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    expected = [12 * (number + 1) for number in range(written // 6)][-2:]
    assert names == [f"checkpoint-{step:012d}" for step in expected]
    again = PETSTrainer.resume(tmp_path / "run")
    again.train()
    assert_same(again, whole)


def test_a_state_that_cannot_be_read_again_is_refused_at_once(tmp_path) -> None:
    trainer = start_run("pets", tmp_path / "run", **PETS)
    trainer.recipe.learner.state_dict = lambda: {"path": Path("x")}
    with pytest.raises(
        TypeError, match="part 'learner' .ModelLearner. holds a pathlib"
    ):
        trainer.train()
    assert RunFolder.open(tmp_path / "run").saved() == []


# What they cost -------------------------------------------------------------------


def written_by_checkpoints(trainer, monkeypatch) -> list[int]:
    """The bytes that each checkpoint of a run writes."""
    sizes, write, save = [], _files._write, trainer.save

    def counted(path, *args):
        write(path, *args)
        if sizes:
            sizes[-1] += Path(path).stat().st_size

    def counted_save() -> None:
        sizes.append(0)
        save()

    monkeypatch.setattr(_files, "_write", counted)
    trainer.save = counted_save
    trainer.train()
    monkeypatch.undo()
    return sizes


def test_what_a_checkpoint_writes_does_not_grow_with_the_run(
    tmp_path, monkeypatch
) -> None:
    settings = {"steps": 300, "updates_per_step": 1, "imagination_interval": 15}
    settings = {**MBPO, **settings, "evaluation_interval": 0, "real_share": 1.0}
    trainer = start_run("mbpo", tmp_path / "run", **settings)
    sizes = written_by_checkpoints(trainer, monkeypatch)
    assert len(sizes) == 20
    assert max(sizes[3:]) < 1.02 * min(sizes[3:])
    assert trainer.run.size > sum(sizes[-2:])
    assert len(trainer.run.saved()) == 2
