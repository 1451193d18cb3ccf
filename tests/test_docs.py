"""The docs say what there is: a card for each method, a line for each public name, code that runs."""

import re
import subprocess
from pathlib import Path

import pytest

import growlib
from growlib.cards import figure, sources

ROOT = Path(__file__).parent.parent
HEADINGS = [
    *("What it does", "Exactness", "Use", "Settings", "Training afterwards", "When it hurts"),
    *("What it composes with", "Measured here", "Citation"),
]


def test_each_method_has_its_card():
    cards = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    index, llama = cards.pop("index"), sources()["llama"][1]
    assert set(cards) == {row.name for row in growlib.methods()}
    for row in growlib.methods():
        text = cards[row.name]
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
        assert all(body.strip() for body in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:])
        assert f"[{row.name}]({row.name}.md)" in index
        assert f"methods/{row.name}.md" in (ROOT / "mkdocs.yml").read_text()
        if not (row.reset or row.learned):  # these draw a figure of their own
            assert f"```text\n{figure(row, llama)}\n```" in text, "python -m growlib.cards docs/methods"
            assert re.search(r"BERT, trained encoder \| \d", text)


def test_each_method_has_its_file():
    folder = ROOT / "growlib" / "operators"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {row.name.replace("-", "_") for row in growlib.methods()}
    for path in folder.glob("*.py"):
        lines = path.read_text().splitlines()
        assert path.stem in ("lossless", "__init__") or len(lines) < 150
        assert path.stem in ("__init__", "random") or any(line.startswith("Source: ") for line in lines)


def test_each_row_says_when_it_is_exact():
    for row in growlib.methods():
        assert row.exact.startswith(("always", "under a condition", "never"))
        assert row.source
        assert row.width or row.depth


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs" / "reference.md").read_text()
    names = {f"growlib.{name}" for name in growlib.__all__ if name != "ki"}
    names -= {"growlib.KIConfig", "growlib.KIMixin", "growlib.KITrainer", "growlib.cache_teacher"}
    names |= {f"growlib.ki.{name}" for name in growlib.ki.__all__ if name != "SCHEDULES"}
    assert not [name for name in sorted(names) if f"::: {name}\n" not in reference]


def test_the_readme_lists_every_file():
    listed = (ROOT / "README.md").read_text()
    files = subprocess.run(
        ["git", "ls-files", "growlib", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {Path(line).name for line in files.stdout.split()} - {"__init__.py", "py.typed"}
    assert not [name for name in sorted(names) if name not in listed]


def test_the_readme_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(example.group(1), {})
    assert "exact: max" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["constraints.txt", ".pre-commit-config.yaml"])
def test_the_tool_versions_agree(name):
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    found = re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text())
    assert found
    assert set(found) == {pinned["ruff"]}
