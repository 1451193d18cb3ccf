"""The docs say what there is: a card for each method, a line for each public name, code that runs, pages as written."""

import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
import yaml
from tiny import tiny

import architectures as verdicts
import cards
import figure
import growlib
import map as file_map
from full_size import not_planned
from growlib import architectures, cli, inference, operators
from growlib.architectures import schema
from growlib.architectures.schema import Growth
from growlib.inference.tiny import tiny_model
from growlib.maps import FILLINGS, AxisMap, LayerMap

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(path), re.DOTALL)


@pytest.fixture
def tables(monkeypatch):
    """The table of methods, and the tables of architectures, as they were before the test."""
    monkeypatch.setattr(operators, "_table", dict(operators._table))
    monkeypatch.setattr(architectures, "_tables", dict(architectures._tables))


# Methods


@pytest.mark.parametrize("row", growlib.methods(), ids=lambda row: row.name)
def test_each_method_has_its_card(row):
    path = DOCS / "methods" / f"{row.name}.md"
    command = f"run: python docs/ext/cards.py --only {row.name}"
    assert path.exists(), f"docs/methods/{row.name}.md is missing; {command}"
    sections = re.split(r"^## (.+)\n", path.read_text(), flags=re.MULTILINE)[1:]
    assert tuple(sections[::2]) == cards.HEADINGS
    empty = [name for name, body in zip(sections[::2], sections[1::2], strict=True) if not body.strip()]
    assert not empty, f"{path.name} says nothing under {', '.join(empty)}"
    if not (row.reset or row.learned):  # these draw a figure of their own, and need text or experts to be measured
        drawn = cards.figure(row, cards.sources()["llama"][1])
        assert f"<!-- figure -->\n```text\n{drawn}\n```\n<!-- end -->" in path.read_text(), command
        assert re.search(r"<!-- measured -->\n(.*\n)+\| BERT, trained encoder \| ", path.read_text()), command


def test_no_card_is_of_a_method_that_is_gone():
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index"} == {m.name for m in growlib.methods()}


def test_the_table_and_the_menu_of_methods_are_as_written():
    index, menu = cards.INDEX.read_text(), cards.MENU.read_text()
    assert cards.block("methods", cards.table(), index) == index, "run: python docs/ext/cards.py --only"
    assert cards.menu(menu) == menu, "run: python docs/ext/cards.py --only"
    for row in growlib.methods():
        assert f"| [{row.name}]({row.name}.md) |" in index
        assert f"- {row.name}: methods/{row.name}.md\n" in menu


@pytest.mark.parametrize("row", growlib.methods(), ids=lambda row: row.name)
def test_the_use_of_each_card_runs(row):
    """Each `growlib.expand(...)` under "Use" names a method that grows a tiny Llama."""
    use = text_of(f"docs/methods/{row.name}.md").partition("\n## Use\n")[2].partition("\n## ")[0]
    calls = re.findall(r"`(growlib\.expand\(.*?\))`", use)
    assert calls or row.learned
    small, grown = cards.sources()["llama"][1], []

    def expand(source, target, method="lossless", exact=None):
        chosen = operators.method(method)
        deeper = {"num_hidden_layers": 6 if re.search(r"\b6\b", str(target)) else 8}
        wider = {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
        mixture = {"model_type": "mixtral", "num_local_experts": 4}
        target = mixture if chosen.reset else deeper if "num_hidden_layers" in str(target) else wider
        plan = growlib.plan(small, target, chosen)
        assert plan.exact or exact is False, f"{method} is not exact here: {plan.reasons}"
        grown.append(plan)

    names = {**{m.name.replace("-", "_"): importlib.import_module(f"growlib.operators.{m.name.replace('-', '_')}")
                for m in growlib.methods()}, "Method": growlib.Method, "functools": functools}  # fmt: skip
    for call in calls:
        eval(call, {**names, "small": None, "target": None, "growlib": SimpleNamespace(expand=expand)})
    assert len(grown) == len(calls)


def test_another_ratio_of_drop_upcycling():
    (code,) = re.findall(r"`(dataclasses\.replace\(.*?\))`", text_of("docs/methods/drop-upcycling.md"))
    assert eval(code, {"dataclasses": dataclasses, "method": operators.method}).reset == 0.25


def test_each_method_has_its_file():
    folder = ROOT / "growlib" / "operators"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {row.name.replace("-", "_") for row in growlib.methods()}
    for path in folder.glob("*.py"):
        lines = path.read_text().splitlines()
        assert path.stem in ("copies", "__init__") or len(lines) < 150
        assert path.stem in ("__init__", "random") or any(line.startswith("Source: ") for line in lines), path.name


def test_each_row_says_when_it_is_exact():
    for row in growlib.methods():
        assert row.exact.startswith(tuple(cards.EXACT))
        assert row.source
        assert row.width or row.depth


# Pages that are written by commands


def test_the_figure_is_drawn_from_its_plan():
    plan = figure.growth()
    assert plan.exact
    assert figure.drawing(plan) == text_of("docs/figures/growth.svg"), "run: python docs/ext/figure.py " \
        "docs/figures/growth.svg"  # fmt: skip
    small = cards.sources()["llama"][1]
    big = growlib.expand(small, plan).state_dict()
    drawn = [made for made in plan.tensors if made.name.endswith(tuple(f"0.{n}.weight" for n in figure.DRAWN))]
    assert len(drawn) == len(figure.DRAWN)
    for made in drawn:
        held, values = figure.kinds(made, plan), big[made.name]
        assert torch.equal(held == figure.ZERO, values == 0)
        scaled = values / plan.maps["hidden"].write if "down" in made.name or "o_proj" in made.name else values
        copied = scaled[held == figure.COPIED].unsqueeze(1)
        old = small.state_dict()[made.name].flatten().unique()
        assert ((copied - old[torch.searchsorted(old, copied - 1e-5).clip(max=len(old) - 1)]).abs() < 2e-5).all()
        area = sum(width * height for _, _, width, height, _ in figure.blocks(held))
        assert area == held.numel()


def test_the_map_lists_every_file():
    written = text_of("docs/map.md")
    assert written == file_map.page(), "run: python docs/ext/map.py docs/map.md"
    for folder in file_map.FOLDERS:
        for path in (path for path in (ROOT / folder).rglob("*") if path.suffix in file_map.KINDS):
            if path.name != "__init__.py":
                assert re.search(rf"^ +- `{re.escape(path.name)}` \S", written, re.MULTILINE), f"{path}: no first line"
    for name in re.findall(r"[\w/]+(?:\.py\b|/(?=[ ,\n]))", file_map.HEAD.partition("```text")[2]):
        assert (ROOT / "growlib" / name).exists(), name


def test_a_file_stands_below_those_that_it_uses(tmp_path):
    (tmp_path / "a.py").write_text("from pack.c import x\n")
    (tmp_path / "b.py").write_text("'''No import.'''\n")
    (tmp_path / "c.py").write_text("def f():\n    import pack.b\n")
    order = [path.stem for path in file_map.in_order(sorted(tmp_path.glob("*.py")), "pack.")]
    assert order == ["b", "c", "a"]


def test_every_command_in_the_docs_exists():
    found = []
    for path in PAGES:
        for name in re.findall(r"python ((?:recipes|docs)/[\w/]+\.py)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
            found.append(name)
        for module in re.findall(r"python -m (growlib[\w.]*)", path.read_text(encoding="utf-8")):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (ROOT / module / "__main__.py").exists(), (
                module
            )
    assert len(set(found)) > 8


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_line_for_the_command_line_is_understood(path):
    for line in re.findall(r"^\$ growlib (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        _, unknown = cli._parser().parse_known_args(shlex.split(line, comments=True))
        assert not unknown, line


# Code in the pages

FOLDERS = ("small", "qwen3-small", "llama-small", "mixtral-small", "a-folder")
SMALLER = {"1536": "96", "2048": "96", '_layers": 28': '_layers": 6', '_layers": 36': '_layers": 6'}


def saved(tmp_path, layers):
    """Tiny checkpoints under the names that the pages use."""
    import transformers as T

    kinds = {
        "qwen3-small": (T.Qwen3ForCausalLM, T.Qwen3Config),
        "mixtral-small": (T.MixtralForCausalLM, T.MixtralConfig),
    }
    for folder in FOLDERS:
        model_class, config_class = kinds.get(folder, (T.LlamaForCausalLM, T.LlamaConfig))
        sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 112, "num_key_value_heads": 2}
        config = config_class(**sizes, head_dim=12, num_hidden_layers=layers, **cards.SIZES)
        tiny_model(model_class, config, spread=0.3).save_pretrained(tmp_path / folder)


@pytest.mark.parametrize("page", ["after", "growth", "inference", "mixtures", "own-method", "own-table", "ship"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, tables):
    """From top to bottom, at tiny sizes; console lines too. Files that a page shows stand in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    saved(tmp_path, 4 if page == "growth" else 2)
    code = blocks(f"docs/{page}.md", "python")
    if page == "own-method":
        (tmp_path / "my_growth.py").write_text(code.pop(0))
    if page == "own-table":
        (tmp_path / "mistral.toml").write_text(blocks("docs/own-table.md", "toml")[0])
    names = {"small": tiny("llama"), "growlib": growlib}
    assert code
    for block in code:
        for big, small in SMALLER.items():
            block = block.replace(big, small) if page in ("growth", "inference", "mixtures") else block
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    if page.startswith("own"):
        if page == "own-table":
            names["small"].save_pretrained(tmp_path / "small")
        for line in re.findall(r"^\$ growlib (.+)$", text_of(f"docs/{page}.md"), re.MULTILINE):
            assert cli.main(shlex.split(line)) == 0, line
    sys.modules.pop("my_growth", None)


def test_the_page_of_own_methods_names_every_field_and_role():
    page = text_of("docs/own-method.md")
    for kind in (AxisMap, LayerMap):
        rows = page.partition(f"| `{kind.__name__}` |")[2].partition("\n\n")[0]
        assert re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE) == [f.name for f in dataclasses.fields(kind)]
        for field in dataclasses.fields(kind):
            shown = re.search(rf"^\| `{field.name}` \|([^|]*)\|", rows, re.MULTILINE).group(1).strip(" `")
            default = "" if field.default is dataclasses.MISSING else field.default
            assert eval(shown) == default if shown else default == "", field.name
    roles = page.partition("| role |")[2].partition("\n\n")[0]
    assert all(f"`{role}`" in roles for role in schema.ROLES)
    assert all(f'`"{fill}"`' in page for fill in FILLINGS)


def test_the_page_of_own_tables_names_every_key():
    page = text_of("docs/own-table.md").partition("## The keys")[2].partition("\n## ")[0]
    keys = {f.name for kind in (schema.Axis, schema.Stack, schema.Condition) for f in dataclasses.fields(kind)} - {
        "shared_by"
    }
    keys |= {"stacks", "axes", "tensors", "ties", "head_norm", "embedding_power", "head_power", "conditions", "free"}
    assert not [key for key in sorted(keys | {"follows"}) if not re.search(rf"`\[*{key}\]*`", page)]


# The front door


def test_the_reference_is_of_the_public_objects():
    entries = re.findall(r"^::: ([\w.]+)$", text_of("docs/reference.md"), re.MULTILINE)
    public = {f"growlib.ki.{n}" if n in growlib.ki.__all__ else f"growlib.{n}": getattr(growlib, n)
              for n in growlib.__all__ if n != "ki"}  # fmt: skip
    public |= {f"growlib.ki.{name}": getattr(growlib.ki, name) for name in growlib.ki.__all__ if name != "SCHEDULES"}
    assert len(set(entries)) == len(entries)
    assert set(entries) == {*public, "growlib.ki.schedules"}, "docs/reference.md has a line `::: NAME` for each name"
    for name, value in public.items():
        parent, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(parent), last) is value
        assert not inspect.ismodule(value)
        assert value.__doc__ or not callable(value), f"{name} has no docstring"


def test_the_readme_is_short_and_its_example_runs(capsys):
    assert len(text_of("README.md").splitlines()) <= 100
    (example,) = blocks("README.md", "python")
    names = {}
    exec(example, names)
    assert "exact: max" in capsys.readouterr().out
    assert names["ki"].teacher is not names["small"]


def test_the_readme_says_what_the_results_say():
    """Every measured number of the README is in a page of results; its table of exactness is the guide's."""
    results = [row.split("|") for path in (DOCS / "results").glob("*.md") for row in path.read_text().splitlines()]
    measured = re.findall(r"^\|(.*\d\.\d{3}.*)\|$", text_of("README.md"), re.MULTILINE)
    assert len(measured) >= 4
    for row in measured:
        arm, *cells = row.split("|")
        there = [found for found in results if len(found) > 2 and found[1] == arm]
        assert any(set(cells) - {" "} <= set(found) for found in there), row
    rows = re.findall(r"^\| ((?:hidden|FFN|heads|KV heads|head_dim|vocabulary|layers)\b[^|]*) \|(.*)\|$",
                      text_of("README.md"), re.MULTILINE)  # fmt: skip
    guide = text_of("docs/growth.md")
    assert len(rows) == 7
    for name, cells in rows:
        (there,) = re.findall(rf"^\| {re.escape(name)}[^|]* \|(.*)\|$", guide, re.MULTILINE)
        for short, long in zip(cells.split("|"), there.split("|"), strict=True):
            assert long.strip().startswith(short.strip()), name


def test_links_of_the_front_door_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", path.read_text())
        assert not [link for link in links if not (ROOT / link).exists()]
    assert len(re.findall(r"\]\(", text_of("README.md"))) > 15


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load(text_of("CITATION.cff"))
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert all(cited[key] for key in ("title", "message", "authors", "abstract"))
    assert f"## [{cited['version']}] - {cited['date-released']}" in text_of("CHANGELOG.md")


def test_the_package_has_its_data():
    patterns = tomllib.loads(text_of("pyproject.toml"))["tool"]["setuptools"]["package-data"]["growlib"]
    package = ROOT / "growlib"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(data) > 4
    assert data == packed


@pytest.mark.parametrize("name", ["constraints.txt", ".pre-commit-config.yaml"])
def test_the_tool_versions_agree(name):
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", text_of("constraints.txt"), re.MULTILINE))
    found = re.findall(r"ruff==([\d.]+)", text_of(name))
    assert found
    assert set(found) == {pinned["ruff"]}


def test_the_page_of_verdicts_has_the_words_of_its_command():
    head = next(verdicts.Page().lines())
    words = [re.sub(r"\d[\w.+]*", "N", text) for text in (head, text_of("docs/architectures.md").partition("\n|")[0])]
    assert words[0].strip() == words[1].strip()


def test_a_config_of_full_size_is_planned_or_the_reason_is_told():
    config = T.Qwen2MoeConfig()
    table = inference.verified(config)
    assert not_planned(table, config) == {}
    config.__dict__["num_experts_per_tok"] = None  # as some types leave it
    assert set(not_planned(table, config).values()) == {"the default config does not say num_experts_per_tok"}
    told = not_planned(table, T.Qwen2MoeConfig(num_attention_heads=12))
    assert all("hidden_size / num_attention_heads" in why for why in told.values())
    assert Growth("num_hidden_layers", "deeper") in told
