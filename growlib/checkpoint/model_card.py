"""The model card of a grown checkpoint: where it comes from, what was done and measured, how to go on."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from growlib.growth_plan import GrowthPlan
from growlib.training import starting_rate

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the source's own card
LIBRARIES = ("growlib", "transformers", "torch")
LINES = 10  # of the plan

TRAINING = """\
It is an ordinary model for further training. `growlib.json` is its plan: `growlib.GrowthPlan.load(folder)` reads it,
and `growlib.freeze_old`, `growlib.EntryRates` and `growlib.mup_groups` take it, to give new and old entries their
rates."""


def model_card(source: str | Path, folder: Path, plan: GrowthPlan, measured: str = "") -> str:
    """The text of a README.md.

    Args:
        source: as it was asked for; a hub id becomes `base_model`, of a folder the name alone is told.
        folder: where the source's files are.
        measured: what a verification says; empty where none was made.
    """
    is_local = Path(source).exists()
    name = folder.resolve().name if is_local else str(source)
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["growlib"], **_inherited(folder)}
    if not is_local:
        head = {"base_model": name, **head}
    sizes = str(plan).split("\n\n")[0].splitlines()
    sizes = sizes if len(sizes) <= LINES else [*sizes[: LINES - 1], "  ..."]
    exact = (
        "It computes what the source computes." if plan.exact else "It does not compute exactly what the source does."
    )
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    parts = (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# Grown from {name}",
        f"A {plan.config.model_type} model, grown from `{name}` with growlib. {exact}",
        "## The growth",
        f"Method `{plan.method}`, seed {plan.seed}.\n\n```text\n" + "\n".join(sizes) + "\n```",
        f"Measured against the source: {measured}" if measured else "It was not measured against the source.",
        "## Going on with training",
        f"{TRAINING} To choose a learning rate, {starting_rate(folder)}.",
        "## Versions",
        versions,
    )
    return "\n\n".join(parts) + "\n"


def _inherited(folder: Path) -> dict[str, Any]:
    """What the source's own card says that holds for the grown model too."""
    try:
        known = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: known[key] for key in INHERITED if key in known}
