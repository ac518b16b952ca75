"""Link code marks to the reference: a page says `WorldModelEnv`, and no role.

Pages are read on a code host, too, which shows a role such as ``{func}`` as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

#: The kinds of what a code mark may name. A method's class stands before it.
KINDS = ("module", "class", "exception", "function", "method", "property", "attribute")


def by_ending(objects: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the full names by each ending that names one thing only.

    Args:
        objects: full names with their kinds.

    >>> names = [("pkg.modules.Head", "class"), ("pkg.modules.Head.step", "method")]
    >>> names += [("pkg.watch", "function"), ("pkg.load_model", "function")]
    >>> found = by_ending(names)
    >>> found["Head"], found["Head.step"], found["load_model"]
    ('pkg.modules.Head', 'pkg.modules.Head.step', 'pkg.load_model')
    >>> "step" in found, "watch" in found, "pkg.watch" in found
    (False, False, True)
    """
    found: dict[str, set[str]] = {}
    for full, kind in objects:
        if kind not in KINDS:
            continue
        parts = full.split(".")
        # A module by its full name only; a member with its class.
        least = {"module": len(parts), "class": 1, "exception": 1, "function": 1}
        for number in range(least.get(kind, 2), len(parts) + 1):
            ending = parts[-number:]
            # A small word by itself is more often a key, a setting or a method of any class.
            if number > 1 or not re.fullmatch(r"[a-z0-9]+", ending[0]):
                found.setdefault(".".join(ending), set()).add(full)
    return {ending: min(full) for ending, full in found.items() if len(full) == 1}


class CodeLinks(SphinxPostTransform):
    """Turn code marks that name something of the reference into links to it."""

    default_priority = 20
    formats = ("html",)

    def run(self, **kwargs) -> None:
        """Link the code marks of one page."""
        objects = self.env.get_domain("py").objects
        # Aliases are the modules that classes are defined in, which are nobody's to import.
        names = by_ending(
            (name, entry.objtype)
            for name, entry in objects.items()
            if not entry.aliased
        )
        for mark in list(self.document.findall(nodes.literal)):
            name = names.get(mark.astext().removesuffix("()"))
            if name is None or not is_ours(mark):
                continue
            target = objects[name]
            link = make_refnode(
                self.app.builder,
                self.env.docname,
                target.docname,
                target.node_id,
                mark.deepcopy(),
                name,
            )
            mark.replace_self(link)


def is_ours(mark: nodes.literal) -> bool:
    """Return whether a code mark may be linked.

    Not within a link, nor in a heading, which has a link of its own, and not TorchRL's class
    of the same name: "TorchRL's `WorldModel`", "TorchRL's own `WorldModel`".
    """
    if any(isinstance(node, (nodes.reference, nodes.title)) for node in above(mark)):
        return False
    place = mark.parent.index(mark)
    before = mark.parent[place - 1].astext() if place else ""
    return re.search(r"TorchRL.s( own)?\s+$", before) is None


def above(node: nodes.Node) -> Iterator[nodes.Node]:
    """Give the nodes that a node stands in."""
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app) -> dict[str, bool]:
    """Register the transform with Sphinx."""
    app.add_post_transform(CodeLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
