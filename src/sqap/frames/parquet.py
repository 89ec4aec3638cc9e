"""The few rows that are wanted out of large parquet files, with PyArrow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqap.errors import InputError
from sqap.frames.extra import import_extra

# A row may hold a picture of each camera, and LeRobot's converter writes one row group per file: portions
# this small keep memory at some megabytes whatever the file's size.
_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20


def column_names(path: Path) -> list[str]:
    """The columns of a parquet file.

    Raises:
        InputError: PyArrow is missing, or the file cannot be read.
    """
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def read_rows(
    path: Path, columns: Sequence[str], key: str | None = None, wanted: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Rows of a parquet file, in its order: all, or those whose ``key`` (one of ``columns``) is ``wanted``.

    Row groups that hold none of them are not read, and the others a few rows at a time.

    Raises:
        InputError: PyArrow is missing, the file cannot be read, or it lacks a column.
    """
    pa, compute = import_extra("pyarrow"), import_extra("pyarrow.compute")
    rows: list[dict[str, Any]] = []
    with _opened(path) as file:
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise InputError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}"
            )
        groups = None if key is None else _row_groups(path, key, wanted)
        batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(columns), use_threads=False)
        for batch in batches:
            if key is not None:
                batch = batch.filter(compute.is_in(batch[key], pa.array(wanted)))
            rows += batch.select(list(columns)).to_pylist()
    return rows


def _row_groups(path: Path, key: str, wanted: Collection[int]) -> list[int]:
    """Those that may hold a wanted row, by the file's own statistics."""
    dataset = import_extra("pyarrow.dataset")
    holds = dataset.field(key).isin(list(wanted))
    (fragment,) = dataset.dataset(str(path), format="parquet").get_fragments()
    return [group.id for group in fragment.subset(holds).row_groups]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    pa, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing")
        with parquet.ParquetFile(str(path), buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot read {path}, which should be parquet: {reason}") from error
