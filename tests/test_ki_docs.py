"""The code in the guides runs and asserts what it says."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = [(DOCS / name).read_text(encoding="utf-8") for name in ("ki.md", "ki-cache.md")]
BLOCKS = [block for guide in GUIDES for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)]


def test_the_guides_have_four_blocks():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(block):
    exec(compile(block, "docs/ki.md", "exec"), {"__name__": "guide"})
