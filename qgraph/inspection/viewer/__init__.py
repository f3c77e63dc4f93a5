"""A graph, or a plan with all its steps, as one HTML page that needs no network.

The page is `viewer.html`, built from `web/` (see `docs/dev-html.md`); the data is put into it,
compressed.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from importlib.resources import files
from pathlib import Path

from ...errors import InputError, writing
from ...ir.graph import Graph
from ...origin import NOWHERE
from ...rewrite.history import History
from ..profile import Profile

_DATA = "<!--data-->"
_TITLE = "<!--title-->"


def to_html(shown: Graph | History, profile: Profile | None = None) -> str:
    """The page; the same graph gives the same page.

    Args:
        shown: a graph, or a plan, whose page has every pass with the graph before and after.
        profile: colours nodes by the time they take; of a program whose plan is shown.

    Raises:
        InputError: the profile is of another graph.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)), name="f")
    >>> to_html(graph)[:15]
    '<!doctype html>'
    """
    from .page import graph_page, plan_page

    graph = shown.graph if isinstance(shown, History) else shown
    if profile is not None and profile.graph is not graph:
        raise InputError(
            "the profile is of another graph than the page",
            hint="program.plan.save(path, profile=program.profile(*inputs))",
            origin=NOWHERE,
        )
    content = (
        plan_page(shown, profile) if isinstance(shown, History) else graph_page(shown, profile)
    )
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    data = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    page = files(__package__).joinpath("viewer.html").read_text(encoding="utf-8")
    page = page.replace(_TITLE, html.escape(f"{graph.name} \u00b7 qgraph"), 1)
    return page.replace(_DATA, f'<script type="text/plain" id="data">{data}</script>', 1)


def save_html(shown: Graph | History, path: str | Path, profile: Profile | None = None) -> Path:
    """Write the page to a file; see `to_html`."""
    place = Path(path)
    text = to_html(shown, profile)
    with writing(place):
        place.write_text(text, encoding="utf-8")
    return place
