"""The notebooks and tutorials run from top to bottom, as `make docs` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# Not what building the documentation left there.
PAGES = [
    path
    for ending in ("ipynb", "md")
    for path in sorted(DOCS.rglob(f"*.{ending}"))
    if "_build" not in path.parts
]
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAGIC = re.compile(r"^%.*$", re.MULTILINE)  # what is for notebooks alone


def cells_of(path: Path) -> list[str]:
    """The code of a notebook, or of a page in MyST's own notation; none of other pages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        cells = CELL.findall(text) if "\nfile_format: mystnb\n" in text else []
        return [MAGIC.sub("", cell) for cell in cells]
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] for c in cells), "made when the docs are built"
    return ["".join(cell["source"]) for cell in cells]


NOTEBOOKS = [path for path in PAGES if cells_of(path)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path) -> None:
    cells = cells_of(path)
    if any("stable_baselines3" in cell for cell in cells):
        pytest.importorskip("stable_baselines3")
    namespace: dict = {"__name__": "__notebook__"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), namespace)


def test_there_are_notebooks() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert {"gymnasium_notebook", "your_own_model", "is_my_model_any_good"} <= names


def test_every_cell_of_a_page_is_found() -> None:
    for path in NOTEBOOKS:
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            assert text.count("```{code-cell}") == len(cells_of(path))
