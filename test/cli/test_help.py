"""The help of every command, as somebody reads it who has not seen the code."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from torchrl_wm.cli import main

pytest.importorskip("tyro")

COMMANDS = (
    "",
    "train",
    "train pets",
    "train mbpo",
    "train model",
    "train mopo",
    "evaluate",
    "report",
    "play",
    "export",
    "demo",
)


@pytest.fixture(params=COMMANDS)
def text(request, monkeypatch, capsys) -> str:
    """A help text, so wide that what it says of an option is one line."""
    monkeypatch.setenv("COLUMNS", "2000")
    assert main([*request.param.split(), "--help"]) == 0
    return capsys.readouterr().out


def descriptions(text: str) -> dict[str, str]:
    """What a help text says of each option and positional word."""
    found, name = {}, None
    for line in re.findall(r"^│ (.*?) *│$", text, re.M):
        if line.lstrip().startswith("•") or line == "(required)":
            name = None  # the commands, which are no options
        elif line[0] != " ":
            name, _, said = re.match(r"(.+?)(  +(.*))?$", line).group(1, 2, 3)
            found[name] = said or ""
        elif name is not None:
            found[name] += ("\n" if found[name] else "") + line.strip()
    return found


def test_it_has_no_marks_of_code(text) -> None:
    assert "`" not in text and ":class:" not in text
    assert "{None}" not in text and "default: None)" not in re.sub(
        r"None (for|to) [^│]*\(default: None\)", "", text
    )


def test_every_option_is_described_by_a_whole_phrase(text) -> None:
    for name, said in descriptions(text).items():
        if name == "-h, --help":
            continue
        assert "\n" not in said, (name, said)  # broken in the middle
        phrase = re.sub(r" *\((default: .*|required)\)$", "", said)
        assert phrase.endswith(".") and len(phrase.split()) >= 3, (name, said)
        first = phrase.split()[0]
        assert first not in ("of", "those", "that", "and", "in", "with"), (name, said)


def test_what_is_left_to_the_env_is_said_in_words(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    assert main(["train", "pets", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--max-episode-steps INT ", out)
    assert "(default: runs/pets-ENV-SEED)" in out


def test_numbers_may_still_be_none(tmp_path, monkeypatch, capsys) -> None:
    """All members are elites in MBPO if it is told so; its default is five."""
    from torchrl_wm.trainers import RunFolder

    monkeypatch.chdir(tmp_path)
    words = """train mbpo --env Pendulum-v1 --elites None --max-episode-steps 5 --random-steps 5
        --steps 5 --members 3 --hidden 8 --policy-hidden 8 --evaluation-interval 0 --real-share 1
        --run none --no-report --no-progress"""
    assert main(words.split()) == 0
    assert RunFolder.open("none").config["config"]["elites"] is None


def test_the_package_is_the_command() -> None:
    words = [sys.executable, "-m", "torchrl_wm", "train", "muzero"]
    outcome = subprocess.run(words, capture_output=True, text=True)
    assert outcome.returncode == 2
    assert "There is no recipe 'muzero'" in outcome.stderr


@pytest.mark.parametrize(
    "words",
    ["train muzero", "train muzero --trials 3", "train --report muzero"],
)
def test_unknown_recipes_are_told_those_that_there_are(words, capsys) -> None:
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert "There is no recipe 'muzero'" in err
    assert (
        "['dreamer', 'mbpo', 'model', 'mopo', 'pets', 'planet', 'tdmpc2']" in err
        and "None" not in err
    )
