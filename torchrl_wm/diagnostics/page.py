"""One HTML file with everything in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Picture = Union[Figure, bytes]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
       max-width: 62rem; padding: 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
td, th { border: 1px solid #ddd; padding: 0.15rem 0.6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
p.verdict { border-left: 4px solid #999; padding: 0.3rem 0.8rem; background: #f6f6f6; }
p.good { border-color: #2a8f4e; } p.bad { border-color: #c0392b; }
p.how, p.note { color: #555; } li { margin: 0.2rem 0; }
"""

_SIGNATURES = {b"\x89PNG": "image/png", b"GIF8": "image/gif", b"\xff\xd8": "image/jpeg"}


@dataclass(frozen=True)
class ReportSection:
    """One section of a report.

    All text is plain: what looks like HTML in it is shown as it is.

    Args:
        title: its heading.
        how: how to read it.
        verdict: what the numbers say, in a sentence.
        good: whether that is good; None if it is neither, or both.
        pictures: matplotlib figures, or the bytes of PNG, GIF or JPEG files.
        numbers: what was measured, by name.
        note: what the verdict does not speak of.

    Examples:
        >>> from torchrl_wm.diagnostics import ReportSection
        >>> section = ReportSection(
        ...     "Learning curve", verdict="solved after 2,000 steps", numbers={"best return": -120.0}
        ... )
    """

    title: str
    how: str = ""
    verdict: str = ""
    good: bool | None = None
    pictures: Sequence[Picture] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def page(
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[ReportSection],
    left_out: Mapping[str, str],
) -> str:
    """Return the whole document.

    Args:
        title: its heading.
        facts: what it is about, by name.
        sections: in their order.
        left_out: titles of sections that do not apply, and why.
    """
    heading = escape(title)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{heading}</h1>",
        _table([(escape(name), escape(value)) for name, value in facts.items()]),
        "<h2>In short</h2><ul>",
    ]
    for number, section in enumerate(sections):
        if section.verdict:
            link = f'<a href="#section-{number}">{escape(section.title)}</a>'
            parts.append(f"<li>{link}: {escape(section.verdict)}</li>")
    parts.append("</ul>")
    for number, section in enumerate(sections):
        parts += _section(section, f"section-{number}")
    if left_out:
        parts.append("<h2>Left out</h2><ul>")
        for name, why in left_out.items():
            parts.append(f"<li>{escape(name)}: {escape(why)}</li>")
        parts.append("</ul>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _section(section: ReportSection, anchor: str) -> list[str]:
    parts = [f'<h2 id="{anchor}">{escape(section.title)}</h2>']
    if section.how:
        parts.append(f'<p class="how">{escape(section.how)}</p>')
    if section.verdict:
        kind = {True: " good", False: " bad", None: ""}[section.good]
        parts.append(f'<p class="verdict{kind}">{escape(section.verdict)}</p>')
    if section.note:
        parts.append(f'<p class="note">{escape(section.note)}</p>')
    for picture in section.pictures:
        parts.append(_image(picture, section.title))
    if section.numbers:
        rows = [
            (escape(name), f"{value:.4g}") for name, value in section.numbers.items()
        ]
        parts.append(_table(rows))
    return parts


def _table(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table with rows of a name and a value, both escaped."""
    body = "".join(
        f'<tr><td>{name}</td><td class="number">{value}</td></tr>'
        for name, value in rows
    )
    return f"<table>{body}</table>"


def _image(picture: Picture, name: str) -> str:
    content = picture if isinstance(picture, bytes) else png(picture)
    kinds = [kind for sign, kind in _SIGNATURES.items() if content.startswith(sign)]
    if not kinds:
        raise ValueError(
            f"A picture of {name!r} is neither a figure nor the bytes of a PNG, GIF or JPEG file: "
            f"{content[:8]!r}..."
        )
    data = base64.b64encode(content).decode("ascii")
    return f'<img src="data:{kinds[0]};base64,{data}" alt="{escape(name)}">'


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"Pictures are matplotlib figures or the bytes of image files, got "
            f"{type(figure).__name__}."
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
