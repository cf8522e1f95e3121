"""The tab-separated files that gluebenchmark.com hands out: no quoting, and not every row is whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path


def read_tsv(path: Path, columns: Sequence[str | int], has_header: bool) -> tuple[list[list[str]], list[int]]:
    """Reads columns of a GLUE file: UTF-8, perhaps with a byte-order mark, tabs between fields, no quoting.

    Quote characters are ordinary text here, "null" and "NA" are words: no CSV reader is involved.

    Args:
        path: The file.
        columns: Header names, or column numbers from 0.
        has_header: Whether the first line names the columns.

    Returns:
        One list per column, and the line number (from 1) of each row. Rows with fewer fields than the file
        has columns (QQP has them where a question contains a line break) are left out; a warning counts them.

    Raises:
        ValueError: If a column is missing, or no row is complete.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    header = lines[0] if has_header and lines else []
    missing = [column for column in columns if isinstance(column, str) and column not in header]
    if missing:
        raise ValueError(f"{path} has the columns {header} but not {missing}: is it the file of another task?")
    positions = [header.index(column) if isinstance(column, str) else column for column in columns]
    width = len(header) if has_header else max(positions) + 1

    table: list[list[str]] = [[] for _ in columns]
    complete, short = [], []
    for number, fields in enumerate(lines[has_header:], start=1 + has_header):
        if len(fields) < width:
            short.append(number)
            continue
        complete.append(number)
        for column, position in zip(table, positions, strict=True):
            column.append(fields[position])
    if not complete:
        raise ValueError(f"{path} has no row of {width} tab-separated fields: is it the file of another task?")
    if short:
        warnings.warn(
            f"{path}: left out {len(short)} of {len(short) + len(complete)} rows, which have fewer than "
            f"{width} fields (the first is line {short[0]})",
            stacklevel=2,
        )
    return table, complete
