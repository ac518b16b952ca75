"""The notebooks of the documentation run from top to bottom, as `make docs` runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# Not what building the documentation left there.
NOTEBOOKS = [p for p in sorted(DOCS.rglob("*.ipynb")) if "_build" not in p.parts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    namespace: dict = {"__name__": "__notebook__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are made when the docs are built"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
