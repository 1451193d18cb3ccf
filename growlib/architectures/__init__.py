"""What the tensors of an architecture are: one table (data) per model type. `growlib.inference` finds the others."""

from functools import cache
from pathlib import Path

from growlib.architectures.schema import Architecture, read_table
from growlib.errors import GrowError

_OWN = {path.stem: path for path in Path(__file__).parent.glob("*.toml")}
_tables = dict(_OWN)  # with those that `families` was given


def families(path: str | Path | None = None) -> list[str]:
    """The model types with a table, in alphabetical order. Others are inferred: `growlib.infer(config)`.

    Args:
        path: a table of your own, `MODEL_TYPE.toml`, or a folder of them. It is read and checked, and used from now on
            in this process, before one of the same type that comes with growlib. A growth by it counts as exact
            only where a tiny model of the class has proven it. The format: docs/own-table.md.

    Raises:
        GrowError: there is no such file, or it is no table.
    """
    if path is not None:
        path = Path(path)
        files = sorted(path.glob("*.toml")) if path.is_dir() else [path] if path.suffix == ".toml" else []
        if not files or not all(file.is_file() for file in files):
            valid = "a file MODEL_TYPE.toml, or a folder of them"
            raise GrowError(f"reading tables from {str(path)!r}", "there is no .toml file", valid)
        for file in files:
            read_table(file)
        _tables.update({file.stem: file for file in files})
    return sorted(_tables)


def table_of(model_type: str) -> Architecture:
    """The table of one model type. Raises GrowError where there is none."""
    if model_type not in _tables:
        raise GrowError(f"reading the table of {model_type!r}", "there is none", ", ".join(families()))
    return _read(_tables[model_type])


def is_tested(model_type: str) -> bool:
    """Whether the table is one that comes with growlib, whose claims its tests hold."""
    return _tables.get(model_type) == _OWN.get(model_type, Path())


_read = cache(read_table)
