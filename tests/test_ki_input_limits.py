"""Rows that a teacher cannot read: named before anything is learnt from them, online and in a cache."""

import logging

import pytest
import torch
from ki_tiny import collate, examples, half, llama, parameters, t5, train
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    GPT2Config,
    GPTNeoConfig,
    OPTConfig,
    RobertaConfig,
    ViTConfig,
    ViTForImageClassification,
    XLMConfig,
)

from growlib import GrowError, cache_teacher
from growlib.ki.input_limits import InputLimits

V = 32
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BART = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip
OPT = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
NEO = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
# How many tokens it has positions for -> a model of it.
MAKERS = {
    "gpt2": (AutoModelForCausalLM, lambda n: GPT2Config(vocab_size=V, n_positions=n, n_embd=8, n_layer=1, n_head=2)),
    "gpt_neo": (AutoModelForCausalLM, lambda n: GPTNeoConfig(vocab_size=V, max_position_embeddings=n, **NEO)),
    "opt": (AutoModelForCausalLM, lambda n: OPTConfig(vocab_size=V, max_position_embeddings=n, **OPT)),
    "bert": (AutoModelForMaskedLM, lambda n: BertConfig(vocab_size=V, max_position_embeddings=n, **SIZES)),
    "roberta": (AutoModelForMaskedLM, lambda n: RobertaConfig(vocab_size=V, max_position_embeddings=n + 2, **SIZES)),
    "xlm": (
        AutoModelForMaskedLM,
        lambda n: XLMConfig(vocab_size=V, emb_dim=8, n_layers=1, n_heads=2, max_position_embeddings=n),
    ),
    "bart": (AutoModelForSeq2SeqLM, lambda n: BartConfig(vocab_size=V, max_position_embeddings=n, **BART)),
}


def model(name, positions, seed=0):
    auto, config = MAKERS[name]
    torch.manual_seed(seed)
    return auto.from_config(config(positions))


@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_are_longer_than_a_teachers_positions(tmp_path, name):
    """Both lengths are named, and nothing moves; rows of exactly as many tokens are read."""
    rows, student, teacher = examples(8, 12), model(name, 16), model(name, 8, 1)
    before = parameters(student).clone()
    says = r"it has 8 positions, and the rows of this batch have 12 tokens"
    with pytest.raises(GrowError, match=says):
        train(tmp_path, student, half(teacher), rows)
    assert torch.equal(parameters(student), before)
    with pytest.raises(GrowError, match=says):
        cache_teacher(teacher, rows, tmp_path / "cache", data_collator=collate, top_k=4)
    assert not (tmp_path / "cache").exists()
    train(tmp_path, student, half(teacher), examples(8, 8), max_steps=1)


def test_a_later_batch_is_the_first_that_is_too_long(tmp_path):
    rows = [*examples(8, 6), *examples(8, 12)]
    with pytest.raises(GrowError, match="it has 8 positions, and the rows of this batch have 12"):
        train(
            tmp_path, model("gpt2", 16), half(model("gpt2", 8, 1)), rows, max_steps=2,
            train_sampling_strategy="sequential",
        )  # fmt: skip


def test_one_long_example_among_many_is_found_before_the_first_is_cached(tmp_path):
    rows = [*examples(40, 6), *examples(1, 12), *examples(40, 6)]
    with pytest.raises(GrowError, match="8 positions, and the rows of this batch have 12"):
        cache_teacher(model("gpt2", 8), rows, tmp_path / "cache", data_collator=collate, top_k=4, batch_size=1)
    assert not (tmp_path / "cache").exists()


def test_positions_of_a_packed_row_count_from_each_start(tmp_path):
    """Twelve tokens in two examples of six need six positions."""
    places = torch.arange(6).repeat(2)
    rows = [row | {"position_ids": places} for row in examples(8, 12)]
    train(tmp_path, model("gpt2", 16), half(model("gpt2", 8, 1)), rows)
    rows = [row | {"position_ids": torch.arange(12)} for row in examples(8, 12)]
    with pytest.raises(GrowError, match="it has 8 positions, and rows of 12 tokens have position_ids beyond them"):
        train(tmp_path, model("gpt2", 16), half(model("gpt2", 8, 1)), rows)


@pytest.mark.parametrize(("rope", "warned"), [(8, True), (12, False)])
def test_a_rotary_teacher_past_its_context_is_a_warning(tmp_path, caplog, rope, warned):
    with caplog.at_level(logging.WARNING, "growlib"):
        teacher = llama(1, hidden=8, max_position_embeddings=rope)
        train(tmp_path, llama(0), half(teacher), examples(16, 12), max_steps=2)
    told = [record.getMessage() for record in caplog.records if "was made for" in record.getMessage()]
    assert len(told) == warned  # once
    assert not warned or "was made for 8 positions, and the rows of this batch have 12" in told[0]


@pytest.mark.parametrize("maker", [llama, t5])
def test_a_teacher_without_a_table_of_positions_has_no_limit(tmp_path, maker):
    student, teacher = maker(0), maker(1, hidden=8)
    trainer = train(tmp_path, student, half(teacher), examples(8, 40))
    assert trainer._ki_provider.teacher.limits.lengths == {}


@pytest.mark.parametrize("sort", [2, -1])
def test_segments_that_a_teacher_has_not(tmp_path, sort):
    rows = [row | {"token_type_ids": torch.full((12,), sort)} for row in examples(8, 12)]
    student = model("bert", 16)
    student.bert.embeddings.token_type_embeddings.forward = lambda ids: torch.zeros(*ids.shape, 8)
    with pytest.raises(GrowError, match="its table for token_type_ids has 2 rows"):
        train(tmp_path, student, half(model("bert", 16, 1)), rows)


@pytest.mark.parametrize(
    ("of_teacher", "says"),
    [({"image_size": 16}, r"does not run on this batch \(pixel_values"), ({"num_channels": 1}, "does not run")],
)
def test_images_that_a_teacher_does_not_take(tmp_path, of_teacher, says):
    def vit(**sizes):
        return ViTForImageClassification(ViTConfig(**{**SIZES, "image_size": 8, "patch_size": 4, **sizes}))

    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 2)} for i in range(8)]
    with pytest.raises(GrowError, match=says):
        train(tmp_path, vit(), half(vit(**of_teacher)), rows)


@pytest.mark.parametrize("rows", [[{"input_ids": torch.zeros(0).long(), "labels": torch.zeros(0).long()}] * 8])
@pytest.mark.parametrize("name", ["gpt2", "bert", "bart"])
def test_rows_without_tokens(tmp_path, rows, name):
    for attempt in (
        lambda: train(tmp_path, model(name, 16), half(model(name, 16, 1)), rows),
        lambda: cache_teacher(model(name, 16), rows, tmp_path / "cache", data_collator=collate, top_k=4),
    ):
        with pytest.raises(GrowError, match="one or more tokens"):
            attempt()


def test_limits_are_read_off_one_forward_pass():
    teacher = model("gpt2", 8)
    limits = InputLimits("it", teacher)
    batch = {"input_ids": torch.zeros(2, 4).long()}
    with limits.learning(batch):
        teacher(**batch)
    assert limits.ids == {"input_ids": V}
    assert limits.lengths == {"input_ids": 8}
