"""Any CSV or Parquet file with a column of picture paths; its other columns are attributes."""

import csv
import hashlib
import io
import os
import re
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline.data.datasets.columns import INDEX, choose, finished, is_unknown, text_of
from pipeline.data.datasets.index import Index
from pipeline.data.datasets.record import Dataset, key_from_name
from pipeline.data.datasets.source import Place, describe_missing, read_in
from pipeline.data.datasets.splits import Shares

INDEX_NAME = "Unnamed: 0"
_OTHER_KINDS = (".json", ".jsonl", ".ndjson", ".xls", ".xlsx", ".ods", ".feather", ".arrow", ".gz", ".zip", ".xz", ".bz2", ".zst")
_LONGEST_LINE = 1 << 20
_DELIMITER = re.compile(r'"?sep=(.)"?\s*')

Row = tuple[int, Sequence[Any]]
"""(line or row number as a person counts it, cells)"""


def read_table(
    source: os.PathLike[str] | str, *, images: str | None = None, path: str = "path", key: str | None = None,
    split: str | None = None, group: str | None = None, attributes: Sequence[str] = (), kinds: Sequence[str] = (),
    shares: Shares | None = None, skip_bad: bool = False, name: str = "table",
) -> Dataset:
    """The index of a CSV (`.csv`, `.tsv`, `.txt`) or Parquet (`.parquet`) file.

    images: folder or address that paths are relative to, by default the file's own. path, key, split, group: names of
    columns; without `key` it is made from the path. attributes: columns to take, by default all others. kinds: see
    `columns.Kind`. Raises ValueError: not readable, a column is missing, a row is wrong; the message names file and line.
    """
    source = Place(os.fspath(source))
    header, rows = _open(source)
    split = split or next((column for column in header if column.lower() == "split"), None)
    others = [column for column in (path, key, split, group) if column]
    for column in others:
        if column not in header:
            hint = "; name the column of picture paths with --path" if column == path else ""
            raise ValueError(f"{source.name} has no column {column!r}{hint}; it has: {', '.join(header)[:400]}")
    columns = choose(header, attributes, kinds, others)
    index = Index(skip_bad, grouped=bool(group))
    at = {column: number for number, column in enumerate(header)}
    file, path_at, numbered = source.name, at[path], [(column, at[column.name]) for column in columns]
    for number, cells in rows:
        place = f"{file} line {number}"
        if len(cells) != len(header):
            index.fault(None, place, f"{len(cells)} cells for {len(header)} columns")
            continue
        location = text_of(cells[path_at])
        if is_unknown(location) or "\0" in location:
            index.fault(None, place, f"no picture path in column {path}")
            continue
        name_of = text_of(cells[at[key]]) if key else key_from_name(location)
        if key and is_unknown(name_of):
            index.fault(None, place, f"no key in column {key}, which holds {name_of!r}")
            continue
        given = text_of(cells[at[split]]) if split and not shares else None
        if index.add(name_of, location, place, given, text_of(cells[at[group]]) if group else ""):
            for column, cell_at in numbered:
                column.add(cells[cell_at])
    read = partial(read_in, Place(images) if images else source.parent)
    entries, labels, bad = finished(columns, len(index.keys))
    return index.dataset(name, {file: _sha256(source)}, entries, labels, read, shares, bad)


def read_header(source: Place) -> list[str]:
    """Names of the columns of a table. Raises ValueError: not readable, or a name is missing or stands twice."""
    header, rows = _open(source)
    rows.close()
    return header


def _sha256(place: Place) -> str:
    with place.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(source: Place) -> tuple[list[str], Generator[Row]]:
    if not source.is_file():
        raise describe_missing(source, "table: a CSV or Parquet file is needed")
    if source.name.lower().endswith(_OTHER_KINDS):
        raise ValueError(f"{source.name} is no CSV or Parquet file; pandas reads it and writes one: to_parquet('table.parquet')")
    if source.name.lower().endswith((".parquet", ".pq")):
        header, rows = _parquet(source)
    else:
        header, rows = _csv(source)
    while not header[0] or header[0] in header[1:] and INDEX.fullmatch(header[0]):
        header[0] = f"{header[0]}.1" if header[0] else INDEX_NAME
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or not all(header):
        raise ValueError(f"{source.name}: {f'column {twice[0]!r} stands twice' if twice else 'a column has no name'}")
    return header, rows


def _csv(source: Place) -> tuple[list[str], Generator[Row]]:
    rows = _csv_rows(source)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source.name} is empty; a header with the names of the columns is needed")
    return [cell.strip() for cell in first[1]], rows


def _csv_rows(source: Place) -> Generator[Row]:
    with source.open() as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:

        def lines() -> Iterator[str]:
            while line := text.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
                yield line

        number = 0
        try:
            first = text.readline(_LONGEST_LINE)
            said = _DELIMITER.fullmatch(first)  # a line of Excel's own, before the header
            if not said:
                text.seek(0)
            reader = csv.reader(lines(), delimiter=said[1] if said else max(",;\t", key=first.count), strict=True)
            for cells in reader:
                number = reader.line_num + bool(said)
                if cells:
                    yield number, cells
        except (csv.Error, UnicodeDecodeError, ValueError) as error:
            what = "a byte is not UTF-8 (which the file must be saved as)" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{source.name}, after line {number}: {what}; is it a CSV file?") from error


def _parquet(source: Place) -> tuple[list[str], Generator[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = source.open()
    try:
        table = pq.ParquetFile(file)
        header = list(table.schema_arrow.names)
    except (pa.ArrowException, OSError) as error:
        file.close()
        raise ValueError(f"{source.name} is not readable as Parquet: {error}") from error

    def rows() -> Generator[Row]:
        number = 0
        try:
            with file:
                for batch in table.iter_batches(4096):
                    for cells in zip(*(column.to_pylist() for column in batch.columns)):
                        number += 1
                        yield number, cells
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{source.name}, after row {number}: not readable as Parquet: {error}") from error

    return header, rows()
