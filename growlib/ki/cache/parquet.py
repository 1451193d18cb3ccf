"""Rows of a Parquet file as JSON would give them. pyarrow reads them, where it is installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from growlib.errors import GrowError
from growlib.ki.sources import first_line

AT_ONCE = 64  # rows in memory


def has_pyarrow() -> bool:
    """Whether Parquet can be read."""
    return find_spec("pyarrow") is not None


def parquet_rows(asked: str, path: Path) -> Iterator[dict[str, Any]]:
    """Each row as a dict, with maps as dicts and without what is null. Raises GrowError for what is no Parquet file."""
    import pyarrow.parquet  # optional

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(AT_ONCE):
                yield from map(_without_null, batch.to_pylist(maps_as_pydicts="strict"))
    except (OSError, pyarrow.ArrowException) as error:
        raise GrowError(asked, f"it is no whole Parquet file ({first_line(error)})", "a .parquet file") from error


def _without_null(value: Any) -> Any:
    """A struct has every key that some row has: the token ids of all positions, where a position lists a few."""
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value
