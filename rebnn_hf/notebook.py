"""Tables as HTML: what the reports of this package look like in a notebook."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int], notes: Sequence[str] = ()
) -> str:
    """A table, and paragraphs under it.

    Args:
        header: names of the columns.
        rows: cells as text, as many in each as there are columns.
        words: columns of words, which go to the left; numbers go to the right.
        notes: plain text.
    """
    lines = [_line("th", header, words), *(_line("td", row, words) for row in rows)]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>{paragraphs}"


def _line(tag: str, cells: Sequence[str], words: Collection[int]) -> str:
    sides = ("left" if column in words else "right" for column in range(len(cells)))
    parts = (
        f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(parts)}</tr>"
