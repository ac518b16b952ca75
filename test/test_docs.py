"""README and the docs: links lead somewhere, tables and pictures are made by code, commands exist."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import pytest
from benchmarks.learning import EXPERIMENTS, rows_of
from benchmarks.results import README, results_table, table_in

from torchrl_wm._registry import find_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [
    path
    for ending in ("md", "ipynb")
    for path in sorted(DOCS.rglob(f"*.{ending}"))
    if "_build" not in path.parts
]

FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r"\{[a-z:]+\}`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def text_of(path: Path) -> str:
    """The text of a page; of a notebook, that of its cells of text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join(
            "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
        )
    return text


def prose_of(path: Path) -> str:
    """The text without blocks of code."""
    return FENCE.sub("", text_of(path))


@cache
def anchors_of(path: Path) -> set[str]:
    """What headings can be linked to as, on a code host and by MyST alike."""
    headings = re.findall(r"^#{1,3} (.+)$", prose_of(path), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_roles(path: Path) -> None:
    # A code host shows {func} as it is written. docs/code_links.py links plain code marks.
    found = ROLE.findall(prose_of(path))
    assert not found, "write `name`: docs/code_links.py links it"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose_of(path)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: there is no {file}"
        if anchor:
            assert anchor in anchors_of(
                target
            ), f"{link}: no such heading in {target.name}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_full_names_exist(path: Path) -> None:
    for code in CODE.findall(prose_of(path)):
        if re.fullmatch(r"torchrl_wm(\.\w+)+", code):
            resolve_name(code)


def listed_in(index: Path) -> Iterator[Path]:
    """The pages in the toctrees of a page."""
    for block in TOCTREE.findall(text_of(index)):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                found = [index.parent / f"{line}{end}" for end in (".md", ".ipynb")]
                yield next((path for path in found if path.exists()), found[0])


@pytest.mark.parametrize("index", sorted(DOCS.rglob("index.md")), ids=name_of)
def test_a_section_shows_its_pages(index: Path) -> None:
    # A code host does not show toctrees: the page has links of its own.
    links = {
        (index.parent / link.partition("#")[0])
        for link in LINK.findall(prose_of(index))
    }
    links = {Path(os.path.normpath(link)) for link in links}
    pages = list(listed_in(index))
    assert pages and all(page.exists() for page in pages)
    assert {Path(os.path.normpath(page)) for page in pages} <= links
    # And no page beside it is forgotten; those that others include have no heading.
    beside = {p for p in PAGES if p.parent == index.parent and p != index}
    assert {p for p in beside if re.search(r"^# ", text_of(p), re.M)} <= set(pages)


def test_the_results_are_what_the_runs_wrote() -> None:
    table = table_in(README.read_text(encoding="utf-8"))
    assert table == results_table(), "python -m benchmarks.results --write"


def test_pictures_are_small() -> None:
    pictures = [*(DOCS / "pictures").iterdir(), *DOCS.glob("benchmarks/learning/*.png")]
    assert pictures and all(p.stat().st_size < 600_000 for p in pictures)
    assert "docs/pictures/real_beside_imagined.gif" in LINK.findall(text_of(README))


def recipes() -> list[str]:
    """The recipes of the package, without those that other tests register."""
    return [n for n in recipe_names() if find_recipe(n).path.startswith("torchrl_wm.")]


@pytest.mark.parametrize("recipe", recipes())
def test_the_gallery_shows_each_algorithm(recipe: str) -> None:
    sections = text_of(DOCS / "start" / "gallery.md").split("\n## ")
    command = f"\ntorchrl-wm train {recipe} "
    (section,) = (section for section in sections if command in section)
    box = section.partition("```text\n")[2].partition("```")[0]
    # What looks like a setting in a box is one. Data and latents have one letter first: D_env.
    config = find_recipe(recipe).load().config_class
    settings = {field.name for field in fields(config)}
    words = set(re.findall(r"\b[a-z]{2,}_[a-z_]+\b", box)) | set(
        re.findall(r"`(\w+)`", box)
    )
    assert words and words <= settings, words - settings
    # A curve, once an experiment of the recipe has been run.
    names = [name for name, e in EXPERIMENTS.items() if e.recipe == recipe]
    if recipe == "model" or any(rows_of(name) for name in names):
        assert ".png)" in section


def commands_of(path: Path) -> list[str]:
    """The command lines of a page, without comments."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text_of(path), re.M | re.S)
    lines = (
        line.partition("#")[0].strip() for block in blocks for line in block.split("\n")
    )
    return [line for line in lines if line.startswith("torchrl-wm ")]


def test_commands_are_understood() -> None:
    pytest.importorskip("tyro")
    from torchrl_wm.cli.main import parse

    commands = sorted({c for path in PAGES for c in commands_of(path)})
    assert any(c.startswith("torchrl-wm train") for c in commands)
    for command in commands:
        words = shlex.split(command)[1:]
        if "--help" in words or words[:2] == ["train", "my_module:Dyna"]:
            continue
        try:
            parse(words)
        except SystemExit as exit:
            pytest.fail(f"{command}: {exit}")


PAGE = """# A `Head` page

`Head`, `Head.step`, `pkg.watch()` and `deep`, TorchRL's own `Head`, `step`, `watch` and
[`Head`](https://example.org).

```{eval-rst}
.. py:class:: pkg.modules.Head

   .. py:method:: step()

.. py:function:: pkg.watch()
```
"""


def test_code_marks_become_links(tmp_path, monkeypatch) -> None:
    pytest.importorskip("myst_parser")
    application = pytest.importorskip("sphinx.application")
    monkeypatch.syspath_prepend(str(DOCS))
    (tmp_path / "index.md").write_text(PAGE)
    extensions = ["myst_parser", "code_links"]
    application.Sphinx(
        tmp_path,
        None,
        tmp_path / "out",
        tmp_path / "trees",
        "html",
        confoverrides={"extensions": extensions},
        status=None,
        warningiserror=True,
    ).build()
    page = (tmp_path / "out" / "index.html").read_text()
    linked = re.findall(r'href="#(pkg[^"]*)"[^>]*><code[^>]*>(.*?)</code>', page)
    shown = [(name, re.sub("<.*?>", "", mark)) for name, mark in linked]
    assert shown == [
        ("pkg.modules.Head", "Head"),
        ("pkg.modules.Head.step", "Head.step"),
        ("pkg.watch", "pkg.watch()"),
    ]
