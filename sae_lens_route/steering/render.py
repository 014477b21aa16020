"""A steering result as text for a terminal."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from sae_lens_route.steering.steer import SteeredToken, SteeringResult


def render(result: SteeringResult, *, width: int = 100, tokens: bool = True) -> str:
    """The two texts side by side and, if `tokens`, one line per token with its edits.

    Args:
        result: The result of one prompt.
        width: Width of the two texts side by side, in characters.
        tokens: Include the lines per token.
    """
    column = max(20, (width - 3) // 2)
    left, right = _wrapped(result.clean_text, column), _wrapped(result.text, column)
    lines = [
        f"prompt   {_quoted(result.prompt)}",
        f"edits    {'; '.join(map(str, result.edits))}",
        f"units    {result.units}",
        f"steered  {result.n_steered} of {len(result.tokens)} tokens ({result.where})",
        *([] if result.warning is None else [f"warning  {result.warning}"]),
        "",
        f"{'clean':{column}} | steered",
        f"{'-' * column}-+-{'-' * column}",
        *(f"{a:{column}} | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")),
    ]
    if tokens:
        names = [f"{f'feature {edit.feature}':16}" for edit in result.edits]
        lines += [
            "",
            "  ".join([f"{'token':20}", "     ", "block", "    p", "size", *names]).rstrip(),
        ]
        lines += [_token_line(token, names) for token in result.tokens]
    return "\n".join(lines)


def _token_line(token: SteeredToken, names: Sequence[str]) -> str:
    origin = "wrote" if token.generated else "read"
    cells = [f"{_quoted(token.token)[:20]:20}", f"{origin:5}"]
    if token.before is None or token.after is None:
        return "  ".join([*cells, "    -", "    -", "   -"])
    cells += [f"{token.block:5}", f"{token.weight:5.2f}", f"{token.relative_size:4.2f}"]
    for name, before, after in zip(names, token.before, token.after, strict=True):
        change = f"{before:.2f} -> {after:.2f}" if token.steered else f"{before:.2f}"
        cells.append(f"{change:{len(name)}}")
    return "  ".join(cells).rstrip()


def _quoted(text: str) -> str:
    """In quotation marks, with line breaks and the like escaped."""
    return json.dumps(text, ensure_ascii=False)


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.expandtabs(4).splitlines() or [""]:
        lines += textwrap.wrap(line, width, drop_whitespace=False, break_on_hyphens=False) or [""]
    return lines
