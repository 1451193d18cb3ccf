"""What the tensors of an architecture are: one table (data) per model type."""

from functools import cache
from pathlib import Path

from growlib.errors import GrowError
from growlib.families.schema import Family, read_family

_TABLES = Path(__file__).parent


def families() -> list[str]:
    """The model types with a table, in alphabetical order."""
    return sorted(path.stem for path in _TABLES.glob("*.toml"))


@cache
def family(model_type: str) -> Family:
    """The table of one model type. Raises GrowError where there is none."""
    path = _TABLES / f"{model_type}.toml"
    if model_type not in families():
        raise GrowError(f"growing a {model_type!r} model", "no family table describes it", ", ".join(families()))
    return read_family(path)
