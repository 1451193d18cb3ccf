"""What the tensors of an architecture are: one table (data) per model type, inferred where there is none."""

from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from growlib.errors import GrowError
from growlib.families.schema import Family, read_family

_TABLES = Path(__file__).parent


def families() -> list[str]:
    """The model types with a table, in alphabetical order. Others are inferred: `growlib.families.infer(config)`."""
    return sorted(path.stem for path in _TABLES.glob("*.toml"))


@cache
def family(model_type: str) -> Family:
    """The table of one model type. Raises GrowError where there is none."""
    path = _TABLES / f"{model_type}.toml"
    if model_type not in families():
        raise GrowError(f"reading the table of {model_type!r}", "there is none", ", ".join(families()))
    return read_family(path)


def family_of(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Family:
    """The table of a config's type, or the one that is inferred for the class. Raises GrowError where neither is."""
    return family(config.model_type) if config.model_type in families() else infer(config, model_class)


def infer(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> Family:
    """Find the table of any class of transformers, and prove it on a tiny randomised model.

    Args:
        config: its switches and per-layer lists decide what the table holds; its sizes do not matter.
        model_class: by default the class that the config names, or the first one for its model type.

    Returns:
        The table. `proven` says for each axis whether the tiny model grew exactly ("") or why not.

    Raises:
        GrowError: no tiny model of the class can be built, or its tensors cannot be told apart.
    """
    from growlib.families.inference import cached

    return cached(config, model_class)


families.infer = infer  # type: ignore[attr-defined]  # `growlib.families` is the function above
