"""The tables against the classes that they describe, both ways."""

from dataclasses import replace

import pytest
import torch
import transformers as T

import growlib
from growlib.architectures import _OWN, table_of
from growlib.architectures.schema import ROLES, read_table
from growlib.checkpoint.loading import skeleton
from growlib.errors import GrowError
from growlib.layouts import parse_layout
from growlib.operators.copies import RULES

CLASSES = {
    "llama": [
        (T.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        (T.LlamaForSequenceClassification, {}),
        (T.LlamaForQuestionAnswering, {}),
    ],
    "gpt2": [
        (T.GPT2LMHeadModel, {"tie_word_embeddings": False}),
        (T.GPT2ForSequenceClassification, {}),
        (T.GPT2ForTokenClassification, {}),
        (T.GPT2ForQuestionAnswering, {}),
    ],
    "bert": [
        (T.BertForPreTraining, {"tie_word_embeddings": False}),
        (T.BertForTokenClassification, {}),
        (T.BertForQuestionAnswering, {}),
    ],
    "helium": [
        (T.HeliumForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        (T.HeliumForSequenceClassification, {}),
    ],
}


def test_every_table_is_listed_and_tested():
    assert growlib.families() == sorted(CLASSES)


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_table_has_the_tensors_of_its_classes_and_no_others(model_type):
    table, rows = table_of(model_type), set()
    for model_class, options in CLASSES[model_type]:
        with torch.device("meta"):
            model = skeleton(model_class(model_class.config_class(**options)))
        sizes = table.sizes(model.config)
        for name, shape in model.shapes.items():
            row, _, _ = table.template(model.base(name))
            rows.add(row)
            layout = table.tensors[row]
            assert len(layout) == len(shape), name
            for dim, length in zip(layout, shape, strict=True):
                if dim.parts[0][0] in sizes:
                    products = [torch.tensor([sizes[axis] for axis in part]).prod().item() for part in dim.parts]
                    assert sum(products) == length, name
    assert rows == set(table.tensors)


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_table_names_only_what_exists(model_type):
    table = table_of(model_type)
    modules = {row.rpartition(".")[0] for row in table.tensors}
    for stack in table.stacks:
        assert {stack.block + name for name in (*stack.writers, *stack.inner_norms)} <= modules
    assert table.head_norm in modules
    assert set(table.ties) | set(table.ties.values()) <= set(table.tensors)
    assert {condition.grows for condition in table.conditions} <= set(table.axes) | {
        stack.layers for stack in table.stacks
    }
    used = {axis for layout in table.tensors.values() for dim in layout for part in dim.parts for axis in part}
    assert set(table.axes) <= used


def test_there_is_a_rule_for_everything_that_an_axis_meets():
    assert set(RULES) | {"layers"} == set(ROLES)  # the plan takes that one from its layer maps


@pytest.mark.parametrize(
    ("text", "sides", "parts"),
    [
        ("vocab -> hidden", ["read", "write"], [(("vocab",),), (("hidden",),)]),
        ("hidden <- (heads value)", ["write", "read"], [(("hidden",),), (("heads", "value"),)]),
        ("-> (a b + c)", ["write"], [(("a", "b"), ("c",))]),
        ("ffn <-", ["write"], [(("ffn",),)]),
        ("shift hidden", ["shift"], [(("hidden",),)]),
    ],
)
def test_layouts(text, sides, parts):
    layout = parse_layout(text)
    assert [dim.side for dim in layout] == sides
    assert [dim.parts for dim in layout] == parts


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('layers = "', 'lairs = "'),
        ('role = "lookup"', 'rule = "lookup"'),
        ('role = "lookup"', 'role = "looking"'),
        ('"vocab -> hidden"', '"vocab, hidden"'),
    ],
)
def test_a_typo_in_a_table_is_an_error(tmp_path, before, after):
    text = (_OWN["gpt2"]).read_text()
    assert before in text
    (tmp_path / "gpt2.toml").write_text(text.replace(before, after, 1))
    with pytest.raises(GrowError, match=r"gpt2\.toml"):
        read_table(tmp_path / "gpt2.toml")


def test_a_row_that_is_not_there_is_as_the_nearest_of_its_kind():
    """Experts and adapters beyond those of the tiny model: of one name but for numbers, the one with most in common."""
    table = table_of("llama")
    rows = ("adapters.5.0.weight", "adapters.5.1.weight", "experts.0.w1.weight")
    table = replace(table, tensors=dict.fromkeys(rows, ()))
    assert table.template("adapters.9.1.weight")[0] == "adapters.5.1.weight"
    assert table.template("adapters.9.0.weight")[0] == "adapters.5.0.weight"
    assert table.template("experts.7.w1.weight")[0] == "experts.0.w1.weight"
    assert table.template("experts.7.w2.weight")[0] == "experts.7.w2.weight"
