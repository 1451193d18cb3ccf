"""A method of one's own is one among the others, and what it returns is checked; so is a table of one's own."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import relative_error
from tiny import tiny, token_ids
from unknown import LoomConfig, LoomForCausalLM

import growlib
from growlib import AxisMap, GrowError, LayerMap, Method, architectures, contract, operators
from growlib.cli import main
from growlib.inference import architecture_of
from growlib.operators import composable, copies, lossless

WIDER = {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 4}


def of_ffn(change):
    """A width that is `copies` save for the FFN units."""

    def width(name, axis, old, new, seed):
        made = copies.width(name, axis, old, new, seed)
        return change(made) if name == "ffn" and not made.is_identity else made

    return Method("mine", width=width)


@pytest.fixture
def table():
    """The method table, and the tables of architectures, as they were before the test."""
    methods, tables = dict(operators._table), dict(architectures._tables)
    yield
    operators._table.clear()
    operators._table.update(methods)
    architectures._tables.clear()
    architectures._tables.update(tables)


def test_a_registered_method_works_by_name_everywhere(table, tmp_path, capsys):
    mine = growlib.register(Method("mine", width=composable.width, depth=lossless.depth, exact="always"))
    assert growlib.register(mine) is mine  # twice the same is no conflict
    assert mine in growlib.methods()
    small = tiny("llama")
    for name, like in (("mine", "composable"), ("mine+stack", "composable+stack"), ("lemon+mine", "lemon+lossless")):
        growth = {**WIDER, "num_hidden_layers": 4}
        assert growlib.plan(small, growth, name).maps == growlib.plan(small, growth, like).maps
    small.save_pretrained(tmp_path / "small")
    assert main(["plan", str(tmp_path / "small"), "--set", "hidden_size=96", "--method", "mine+stack"]) == 0
    assert main(["methods"]) == 0
    assert "\nmine " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method("lossless", width=composable.width), "another method has this name"),
        (Method("a+b", width=composable.width), "the name is no word"),
        (Method("", width=composable.width), "the name is no word"),
        (Method("empty"), "neither a width nor a depth"),
        (Method("odd", width=3), "neither a width nor a depth"),
        (composable.width, "it is a function"),
    ],
)
def test_what_cannot_be_registered(method, words, table):
    before = growlib.methods()
    with pytest.raises(GrowError, match=words):
        growlib.register(method)
    assert growlib.methods() == before


def test_a_method_is_imported_by_its_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_growth.py").write_text(
        "from growlib import Method\n"
        "from growlib.operators import lossless, stack\n"
        "mine = Method('mine', width=lossless.width, depth=stack.depth)\n"
        "number = 3\n"
    )
    (tmp_path / "broken_growth.py").write_text("this is no Python\n")
    tiny("llama").save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    for name in ("my_growth:mine", "my_growth:mine+llama-pro", "lemon+my_growth:mine"):
        assert main(["plan", "small", "--set", "num_hidden_layers=4", "--set", "hidden_size=72", "--method", name]) == 0
    wrong = {
        "my_growth:nothing": "cannot be imported",
        "my_growth:number": "is a int",
        "nowhere_at_all:mine": "cannot be imported",
        "broken_growth:mine": "cannot be imported",
        "my_growth:": "cannot be imported",
    }
    for name, words in wrong.items():
        capsys.readouterr()
        assert main(["plan", "small", "--set", "hidden_size=72", "--method", name]) == 2
        assert words in capsys.readouterr().err
    assert sys.path == path


RETURNS = {  # what an operator returns -> what the error says
    "nothing": (lambda m: None, "returned a NoneType"),
    "a number": (lambda m: 3, "returned a int"),
    "the source alone": (lambda m: m.source, "returned a ndarray"),
    "too short": (lambda m: replace(m, source=m.source[:-1], read=m.read[:-1]), r"source is int64 of shape \(223,\)"),
    "no readers": (lambda m: replace(m, read=m.read[:3]), r"read is float64 of shape \(3,\)"),
    "floats": (lambda m: replace(m, source=m.source.astype(float)), "source is float64"),
    "out of range": (lambda m: replace(m, source=m.source + 1), "sources from 1 to 112"),
    "below": (lambda m: replace(m, source=m.source - 2), "sources from -2"),
    "of another size": (lambda m: replace(m, old=7), "it maps 7 entries"),
    "not finite": (lambda m: replace(m, read=m.read * np.inf), "not finite"),
    "an infinite write": (lambda m: replace(m, write=np.nan), "not finite"),
    "reads of new entries": (lambda m: replace(m, source=np.where(np.arange(224) < 112, m.source, -1)), "of its own"),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_what_is_no_map_is_refused_before_anything_runs(kind):
    change, words = RETURNS[kind]
    with pytest.raises(GrowError, match=rf"axis ffn \(intermediate_size 112 -> 224\) by method 'mine'.*{words}"):
        growlib.plan(tiny("llama"), {"intermediate_size": 224}, of_ffn(change))


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (lambda old, new: None, "returned a NoneType"),
        (lambda old, new: LayerMap(old, (0, 1), (False, False)), "source has 2 layers; identity has 2 layers"),
        (lambda old, new: LayerMap(old, (0, 1, 2), (False,) * 3), "its sources are"),
        (lambda old, new: LayerMap(9, (0, 1, 1), (False,) * 3), "it maps 9 layers"),
        (lambda old, new: LayerMap(old, (0, 1, 1), (False,) * 3, share=(0.5,)), "share has 1 layers"),
    ],
)
def test_what_is_no_map_of_layers_is_refused(depth, words):
    with pytest.raises(GrowError, match=rf"2 layers to 3 by method 'mine'.*{words}"):
        growlib.plan(tiny("llama"), {"num_hidden_layers": 3}, Method("mine", depth=depth))


def append_only(**fields):
    """The source in one corner; new entries hold what the fields say."""

    def width(name, axis, old, new, seed):
        source = np.where(np.arange(new[name]) < old[name], np.arange(new[name]), -1)
        return AxisMap(old[name], source, (source >= 0).astype(float), **fields)

    return width


def copied(read):
    """Copies whose readers take `read` of each."""

    def width(name, axis, old, new, seed):
        source = np.arange(new[name]) % old[name]
        return AxisMap(old[name], source, np.full(new[name], read))

    return width


GROWN = {
    "hidden": {"hidden_size": 96},
    "ffn": {"intermediate_size": 224},
    "kv_heads": {"num_key_value_heads": 4},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "head_dim": {"head_dim": 24},
}
WIDTHS = {
    "copies, readers not split": copied(1.0),
    "copies, readers split": copied(0.5),
    "new and silent": append_only(),
    "new, written and read": append_only(new_reads="free"),
    "new, zero and read": append_only(new_writes="zero", new_reads="free"),
    "new, zero": append_only(new_writes="zero"),
    "new, mean": append_only(new_writes="mean"),
    "reversed": lambda name, axis, old, new, seed: AxisMap(
        old[name], np.arange(new[name])[::-1] % old[name], np.full(new[name], 0.5)
    ),
}


FIELDS = {
    "llama": GROWN,
    "gpt2": {"hidden": {"n_embd": 96, "n_head": 4}, "ffn": {"n_inner": 224}},
    "bert": {"hidden": {"hidden_size": 96, "num_attention_heads": 4}, "ffn": GROWN["ffn"]},
}


@pytest.mark.parametrize(("family", "growth"), [(family, growth) for family in FIELDS for growth in FIELDS[family]])
@pytest.mark.parametrize("kind", WIDTHS)
def test_no_map_is_called_exact_that_is_not(kind, family, growth):
    """The same careless map on every axis: what the plan calls exact, a forward pass must confirm."""
    fields = FIELDS[family]
    small = tiny(family, **({"n_inner": 112} if family == "gpt2" else {}))
    method = Method("mine", width=WIDTHS[kind])
    plan = growlib.plan(small, fields[growth], method)
    big = growlib.expand(small, fields[growth], method, exact=False)
    error = relative_error(small, big, input_ids=token_ids(small))
    if plan.exact:
        assert error <= 1e-5
    else:
        assert any("not exact" in reason for reason in plan.reasons)


def test_a_reason_says_what_is_wrong():
    small = tiny("llama")
    plan = growlib.plan(small, {"intermediate_size": 224}, of_ffn(lambda m: replace(m, read=np.ones(224))))
    assert plan.reasons == (
        "the map of axis ffn (intermediate_size 112 -> 224) is not exact: "
        "write · gain · Σ read of old entry 0 is 2, not 1",
    )


@given(st.integers(1, 12), st.integers(0, 30), st.data())
@settings(max_examples=60)
def test_the_contract_is_the_algebra(old, more, data):
    """C E = I of the dense matrices, for any index list and any readers, is what the check finds."""
    new = old + more
    source = np.array(data.draw(st.lists(st.integers(-1, old - 1), min_size=new, max_size=new)))
    read = np.where(source >= 0, data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=new, max_size=new)), 0.0)
    axis_map = AxisMap(old, source, read)
    axis = growlib.architectures.schema.Axis("size", "elementwise")
    table = replace(architectures.table_of("llama"), axes={"ffn": axis})
    writes = (source[:, None] == np.arange(old)).astype(float)
    reasons = contract.broken(table, {"ffn": axis_map}, {"ffn": old}, {"ffn": new})
    assert (not reasons) == np.allclose((read[:, None] * writes).T @ writes, np.eye(old))


def test_the_built_in_methods_keep_the_contract():
    """Each of them says by itself why it is not exact."""
    for family, growth in (
        ("llama", {**WIDER, "head_dim": 24}),
        ("gpt2", {"n_embd": 96}),
        ("bert", {"hidden_size": 96}),
    ):
        for method in growlib.methods():
            if method.width and not method.reset:
                assert "is not exact: " not in "".join(growlib.plan(tiny(family), growth, method).reasons)


LOOM = """
head_norm = "calm"
[[stacks]]
layers = "storeys"
block = "tower.*."
writers = ["weft", "ascend"]
[axes]
vocab   = { size = "lexicon", role = "lookup" }
hidden  = { size = "breadth", role = "rms_norm" }
pit     = { size = "pit", role = "elementwise" }
heads   = { size = "strands", role = "query_heads" }
query   = { size = "breadth / strands", role = "query" }
key     = { size = "breadth / strands", role = "key" }
value   = { size = "breadth / strands", role = "linear" }
[tensors]
"words.weight" = "vocab -> hidden"
"tower.*.calm_a.tilt" = "1 + scale hidden"
"tower.*.calm_b.tilt" = "1 + scale hidden"
"tower.*.warp.weight" = "(heads value + heads key + heads query by heads) <- hidden"
"tower.*.warp.bias" = "(heads value + heads key + heads query by heads) <-"
"tower.*.weft.weight" = "hidden <- (heads value)"
"tower.*.weft.bias" = "hidden <-"
"tower.*.descend.weight" = "(pit + pit) <- hidden"
"tower.*.descend.bias" = "(pit + pit) <-"
"tower.*.ascend.weight" = "hidden <- pit"
"tower.*.ascend.bias" = "hidden <-"
"calm.tilt" = "1 + scale hidden"
"speak.weight" = "vocab <- hidden"
[ties]
[config]
follows = { strands = "breadth" }
"""


def test_a_table_of_ones_own_is_used_and_proven(table, tmp_path):
    (tmp_path / "loom.toml").write_text(LOOM)
    assert "loom" in growlib.families(tmp_path)
    small = LoomForCausalLM(LoomConfig()).eval()
    torch.manual_seed(0)
    for parameter in small.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    growth = {"breadth": 72, "pit": 100, "storeys": 3, "lexicon": 60}
    plan = growlib.plan(small, growth)
    assert plan.exact
    ids = torch.randint(53, (2, 11), generator=torch.Generator().manual_seed(1))
    assert relative_error(small, growlib.expand(small, growth, exact=True), input_ids=ids) <= 1e-5


def test_a_wrong_table_of_ones_own_proves_nothing(table, tmp_path):
    wrong = LOOM.replace('"(pit + pit) <- hidden"', '"(pit + pit by pit) <- hidden"')
    (tmp_path / "loom.toml").write_text(wrong.replace('"(pit + pit) <-"', '"(pit + pit by pit) <-"'))
    growlib.families(tmp_path / "loom.toml")
    small = LoomForCausalLM(LoomConfig())
    assert "not proven for loom: a tiny model differs" in growlib.plan(small, {"pit": 144}).reasons[0]
    assert not architecture_of(small.config, LoomForCausalLM).proven["pit", "x2"].exact


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("loom.toml", LOOM.replace("writers", "rwiters"), r"reading the table loom\.toml"),
        ("loom.toml", LOOM.replace('"rms_norm"', '"rms"'), "axis hidden has the role 'rms'"),
        ("loom.toml", LOOM.replace('"rms_norm"', '"rms_norm", shared_by = "pit"'), "shared_by follows from groups"),
        ("loom.toml", "= 3", r"reading the table loom\.toml"),
        ("loom.txt", LOOM, r"there is no \.toml file"),
    ],
)
def test_what_is_no_table_is_refused_and_nothing_is_kept(path, text, words, table, tmp_path):
    (tmp_path / path).write_text(text)
    before = growlib.families()
    with pytest.raises(GrowError, match=words):
        growlib.families(tmp_path / path)
    with pytest.raises(GrowError, match=r"no \.toml file"):
        growlib.families(tmp_path / "nowhere.toml")
    assert growlib.families() == before


def test_the_command_line_takes_a_table(table, tmp_path, capsys):
    text = (architectures._OWN["llama"]).read_text()
    (tmp_path / "llama.toml").write_text(text.replace('role = "elementwise"', 'role = "linear"'))
    tiny("llama").save_pretrained(tmp_path / "small")
    arguments = ["plan", str(tmp_path / "small"), "--set", "intermediate_size=224", "--table", str(tmp_path)]
    assert main(arguments) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["families", "--table", str(tmp_path / "llama.toml")]) == 0
    assert "\nllama " in capsys.readouterr().out
