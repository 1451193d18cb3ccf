"""The code in the guides runs and asserts what it says."""

import re
import warnings
from pathlib import Path

import pytest

from growlib.ki import SCHEDULES, TREATMENTS

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = {"ki.md": 3, "ki-cache.md": 2, "ki-integration.md": 9}


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_runs_from_top_to_bottom(name):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == GUIDES[name]
    guide = {"__name__": "guide"}
    with warnings.catch_warnings():
        if name == "ki-integration.md":  # of trl, peft and Dynamo
            warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, f"docs/{name}", "exec"), guide)


def test_the_guides_name_every_schedule_and_treatment():
    schedules, treatments = ((DOCS / name).read_text(encoding="utf-8") for name in ("ki.md", "ki-cache.md"))
    assert not [name for name in SCHEDULES if f"`{name}`" not in schedules]
    assert not [name for name in TREATMENTS if f"| `{name}` |" not in treatments]
