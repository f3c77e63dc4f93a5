"""An MkDocs hook: decisions, and pages that `mkdocs.yml` does not place, join the navigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
GUIDE = ("import.md", "fusion.md")
"""Pages about using qgraph; what is not placed at all is about how it works inside."""


def on_config(config: Any) -> Any:
    """Add to the nav what is in the folder and not yet in the nav."""
    config["nav"] = complete(config["nav"])
    return config


def complete(nav: list[Any]) -> list[Any]:
    """The nav with every page of the folder in it."""
    placed = set(_paths(nav))
    left = [str(p.relative_to(DOCS)) for p in sorted(DOCS.rglob("*.md"))]
    left = [path for path in left if path not in placed]
    decisions = [path for path in left if path.startswith("decisions/")]
    inside = [path for path in left if path not in decisions and path not in GUIDE]
    result = []
    for item in nav:
        (title,) = item
        if title == "Guide":
            item = {title: [*item[title], *(path for path in left if path in GUIDE)]}
        result.append(item)
    for title, pages in (("Inside", inside), ("Decisions", decisions)):
        if pages:
            result.append({title: pages})
    return result


def _paths(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    parts = item.values() if isinstance(item, dict) else item
    return [path for part in parts for path in _paths(part)]
