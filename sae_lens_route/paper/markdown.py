"""Tables in Markdown, and a page whose marked tables are rewritten from data.

A page marks a table by `<!-- table: NAME -->` before it and `<!-- /table -->` after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens_route.errors import UserError


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def fill_tables(page: Path, by_name: Mapping[str, str]) -> None:
    """Write tables between their markers in a Markdown file; the rest is unchanged.

    Tables with other names are left as they are: they are filled from other data.

    Raises:
        UserError: the page marks none of these tables.
    """
    text = page.read_text(encoding="utf-8")
    marked = set(re.findall(r"<!-- table: ([\w-]+) -->", text))
    if not marked & by_name.keys():
        raise UserError(
            f"{page}: marks none of the tables {', '.join(by_name)}; put <!-- table: NAME --> "
            "before the place of one and <!-- /table --> after it"
        )

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{by_name[match[2]]}\n{match[3]}" if match[2] in by_name else match[0]

    pattern = r"(<!-- table: ([\w-]+) -->).*?(<!-- /table -->)"
    page.write_text(re.sub(pattern, filled, text, flags=re.S), encoding="utf-8")
