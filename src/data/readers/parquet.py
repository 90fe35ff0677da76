"""Parquet files, in batches of rows that fit into memory whatever they unpack to."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import compute, types

from src.data.readers import record as limits
from src.data.readers.record import NumberedRow, UnpackedSize, UnreadableFileError, repeated
from src.data.readers.text import describe_not_utf8, open_data
from src.errors import one_line

BATCH_ROWS = 100
BATCH_BYTES = 64 * 2**20  # the largest size that a batch of rows may unpack to
SLICE_BYTES = 4 * 2**20  # the part of a batch that is converted to Python values at once
BUFFER_BYTES = 2**20
MAX_INDEX_BYTES = 16  # the most bytes of a value that is stored as an index into the dictionary


def read_parquet(file: str) -> Iterator[NumberedRow]:
    """Yield rows in batches, each column of a row group through a small buffer."""
    with open_data(file):
        pass
    # pre_buffer, on by default, would hold a whole row group, which often is the whole file
    open_table = partial(
        pq.ParquetFile, file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )
    number, unpacked = 0, UnpackedSize(file)
    try:
        with open_table() as plain:
            schema = plain.schema_arrow
            if name := repeated(schema.names):
                raise UnreadableFileError(None, f"two columns are called {name}")
            for group in range(plain.metadata.num_row_groups):
                columns = _columns(file, plain.metadata, group)
                num_rows = _rows_per_batch(columns, number + 1)
                as_dictionary = [column.path for column in columns if column.repeats_in_a_row]
                with open_table(read_dictionary=as_dictionary) if as_dictionary else nullcontext(plain) as table:
                    for batch in table.iter_batches(batch_size=num_rows, row_groups=[group]):
                        sizes = _row_sizes(batch, schema)
                        kept = [min(size, limits.MAX_ROW_BYTES) for size in sizes or []]
                        unpacked.add(batch.nbytes if sizes is None else sum(kept), number + 1)
                        for row in _batch_rows(batch, number, schema, sizes):
                            number, _ = row
                            yield row
    except (pa.ArrowException, OSError, ValueError) as error:
        first = number + 1 if number else None
        raise UnreadableFileError(first, f"not Parquet, or damaged: {one_line(error)}") from error


@dataclass(frozen=True)
class _Column:
    """A column of a row group, from the file's metadata.

    `size` is its stored size, uncompressed, in bytes; `largest` an upper bound for one value; `values_per_row` a mean.
    Where it `repeats_in_a_row` a row may hold a large value very often that is stored once.
    """

    path: str
    num_values: int
    values_per_row: int
    size: int
    largest: int
    repeats_in_a_row: bool


def _columns(file: str, metadata: Any, group: int) -> list[_Column]:
    columns, rows = [], metadata.row_group(group)
    with open(file, "rb") as stream:
        for i in range(rows.num_columns):
            column, schema = rows.column(i), metadata.schema.column(i)
            size, num_values = column.total_uncompressed_size, max(1, column.num_values)
            dictionary = _dictionary_bytes(stream, column, size)
            largest = size if "DELTA_BYTE_ARRAY" in column.encodings else max(dictionary, size // num_values)
            columns.append(
                _Column(
                    column.path_in_schema,
                    num_values,
                    -(-num_values // max(1, rows.num_rows)),
                    size,
                    largest if column.physical_type.endswith("BYTE_ARRAY") else 16,
                    schema.max_repetition_level > 0
                    and column.physical_type == "BYTE_ARRAY"
                    and dictionary * num_values > BATCH_BYTES
                    and size - dictionary < MAX_INDEX_BYTES * num_values,
                )
            )
    return columns


def _dictionary_bytes(stream: BufferedReader, column: Any, maximum: int) -> int:
    """Return the size of a column's dictionary from its page header, which pyarrow does not expose; 0 without one.

    A value that is stored once, in the dictionary, may be in every row. `maximum` stands for an unreadable header.
    """
    if not any(encoding.endswith("_DICTIONARY") for encoding in column.encodings):
        return 0
    stream.seek(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)
    header = stream.read(16)
    # Thrift's compact protocol: field 1, the kind of page, and field 2, its size, as zigzag numbers of 7 bits a byte
    if header[:3] != b"\x15\x04\x15":
        return maximum
    size = 0
    for i, byte in enumerate(header[3:8]):
        size |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return size >> 1
    return maximum


def _rows_per_batch(columns: Sequence[_Column], first: int) -> int:
    """Return how many rows of a group fit into memory together; UnreadableFileError where not even one does."""
    largest = 1
    for column in columns:
        if column.size / column.num_values > limits.MAX_LINE_BYTES:
            raise UnreadableFileError(first, limits.LINE_TOO_LONG)
        largest = max(largest, (4 if column.repeats_in_a_row else column.largest) * column.values_per_row)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def _row_sizes(batch: Any, schema: Any) -> list[int] | None:
    """Estimate the memory of each row of a batch in bytes; None where all of them together are small."""
    is_plain = batch.schema.equals(schema) and not any(map(_has_dictionary, schema.types))
    is_small = is_plain and batch.nbytes <= limits.MAX_ROW_BYTES
    return None if is_small or not batch.num_columns else sum(map(_value_sizes, batch.columns)).tolist()


def _has_dictionary(kind: Any) -> bool:
    if types.is_dictionary(kind):
        return True
    return types.is_nested(kind) and any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _value_sizes(array: Any) -> Any:
    """Estimate the memory of each value of a column in bytes, [rows]."""
    kind = array.type
    sizes = np.full(len(array), limits.ENTRY_BYTES, dtype=np.int64)
    if types.is_dictionary(kind):
        entry_sizes = np.append(_value_sizes(array.dictionary), 0)  # the last one is that of null
        sizes += entry_sizes[array.indices.fill_null(len(array.dictionary)).to_numpy(zero_copy_only=False)]
    elif types.is_struct(kind):
        sizes += sum(map(_value_sizes, array.flatten()))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        inner = [array.keys, array.items] if types.is_map(kind) else [array.values]
        cumulated = np.append(0, np.cumsum(sum(map(_value_sizes, inner))))
        offsets = array.offsets.to_numpy()
        sizes += cumulated[offsets[1:]] - cumulated[offsets[:-1]]
    elif types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        sizes += _value_sizes(values).reshape(len(array), -1).sum(axis=1)
    elif str(kind) in ("string", "large_string", "binary", "large_binary"):
        sizes += compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return sizes


def _batch_rows(batch: Any, before: int, schema: Any, sizes: list[int] | None) -> Iterator[NumberedRow]:
    """Yield the rows of a batch, converted to Python values a slice at a time; far too long ones are not converted.

    `before` counts the rows before the batch; `schema` is that of the rows, without dictionaries that only this reader
    asked for; `sizes` are those of `_row_sizes`.
    """
    if sizes is None:
        yield from _slice_rows(batch, before, schema, is_small=True)
        return
    start = slice_size = 0
    for i, size in enumerate(sizes):
        if i > start and slice_size + size > SLICE_BYTES:
            yield from _slice_rows(batch.slice(start, i - start), before + start, schema)
            start, slice_size = i, 0
        slice_size += size
        if size > limits.MAX_LINE_BYTES:
            yield before + i + 1, limits.ROW_TOO_LONG
            start, slice_size = i + 1, 0
    if start < len(batch):
        yield from _slice_rows(batch.slice(start), before + start, schema)


def _slice_rows(batch: Any, before: int, schema: Any, *, is_small: bool = False) -> Iterator[NumberedRow]:
    try:
        rows = (batch if batch.schema.equals(schema) else batch.cast(schema)).to_pylist()
    except (ValueError, TypeError, OverflowError) as error:
        if len(batch) > 1:
            for i in range(len(batch)):
                yield from _slice_rows(batch.slice(i, 1), before + i, schema)
        else:
            yield before + 1, describe_not_utf8(error) if isinstance(error, UnicodeDecodeError) else one_line(error)
        return
    for number, fields in enumerate(rows, start=before + 1):
        is_short = is_small or limits.text_bytes(fields) <= limits.MAX_ROW_BYTES
        yield number, fields if is_short else limits.ROW_TOO_LONG
