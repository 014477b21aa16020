"""Tables in Markdown, and pages that are filled with them."""

from pathlib import Path

import pytest

from sae_lens_route.errors import UserError
from sae_lens_route.paper.markdown import fill_tables, markdown


def test_a_table() -> None:
    assert markdown(["a", "b"], [[1, "x"], [2, "y"]]).splitlines() == [
        "| a | b |", "|---|---|", "| 1 | x |", "| 2 | y |",
    ]  # fmt: skip


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- table: one -->old\nold<!-- /table -->\nb <!-- table: two --><!-- /table -->"
    )
    fill_tables(page, {"one": "| 1 |", "two": "| 2 |"})
    once = page.read_text()
    assert "old" not in once and "| 1 |" in once and once.startswith("a\n")
    fill_tables(page, {"one": "| 1 |", "two": "| 2 |"})
    assert page.read_text() == once
    fill_tables(page, {"one": "| 3 |"})
    assert page.read_text() == once.replace("| 1 |", "| 3 |")
    with pytest.raises(UserError, match="none of the tables three"):
        fill_tables(page, {"three": ""})
