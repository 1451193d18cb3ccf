"""Students and batches that are not the usual ones: what is taught is what was asked, or refused."""

import logging

import pytest
import torch
from ki_tiny import (
    VOCAB,
    arguments,
    bert,
    collate,
    examples,
    gpt2,
    half,
    llama,
    parameters,
    sgd_step,
    shifted,
    train,
)
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
)

from growlib import GrowError, KIConfig, KITrainer
from growlib.ki import ki_loss
from growlib.ki.head_access import NoHeadAccess, access_head

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_step_in_which_no_label_counts(tmp_path, make, alpha):
    """As with the stock Trainer, nothing moves."""
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in examples(4)]
    student = make(0)
    train(tmp_path, student, KIConfig(teacher=make(1), alpha=alpha), rows, per_device_train_batch_size=1, max_steps=2)
    assert torch.equal(parameters(student), parameters(make(0)))


def test_a_batch_without_labels_among_others(tmp_path):
    rows, teacher = examples(8), llama(1, hidden=8)
    rows[3]["labels"] = torch.full_like(rows[3]["labels"], -100)
    student = llama(0)
    expected = sgd_step(student, teacher, rows, shifted, alpha=0.5)
    train(tmp_path, student, half(teacher), rows, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


def test_a_new_student_for_each_training(tmp_path):
    trainer = KITrainer(
        model_init=lambda: llama(0),
        args=arguments(tmp_path),
        train_dataset=examples(8),
        data_collator=collate,
        ki=half(llama(1)),
    )
    trained = []
    for _ in range(2):
        trainer.train()
        trained.append(parameters(trainer.model))
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], parameters(llama(0)))


class WithSmallTerm(LlamaForCausalLM):
    """A loss with a term that is no cross-entropy, 0.2 % of it."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            outputs.loss = outputs.loss + 0.0005 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


def test_a_small_term_of_the_loss_is_not_lost(tmp_path, caplog):
    rows, teacher = examples(8), llama(1, hidden=8)
    student = WithSmallTerm(llama(0).config)
    student.load_state_dict(llama(0).state_dict())
    batch = collate(rows)
    outputs = student(**batch)
    kd = ki_loss(outputs.logits, shifted(batch["labels"]), teacher(**batch).logits.detach(), alpha=1.0).loss
    gradients = torch.autograd.grad(0.5 * outputs.loss + 0.5 * kd, list(student.parameters()))
    expected = parameters(student) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    with caplog.at_level(logging.WARNING, "growlib"):
        train(tmp_path, student, half(teacher), rows)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)
    assert "not the plain cross-entropy" in caplog.text


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_a_teacher_whose_states_are_of_another_dtype_under_autocast(tmp_path, name):
    def opt(seed, hidden=16):
        torch.manual_seed(seed)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": VOCAB}
        return OPTForCausalLM(
            OPTConfig(hidden_size=hidden, word_embed_proj_dim=8, do_layer_norm_before=False, dropout=0.0, **sizes)
        )

    make = {"bert": bert, "opt": opt}[name]
    student, exact = make(0), make(0)
    rows, teacher = examples(8), make(1, hidden=8)
    train(tmp_path, student, half(teacher), rows, bf16=True)
    train(tmp_path, exact, half(teacher), rows)
    moved, expected = (parameters(model) - parameters(make(0)) for model in (student, exact))
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_a_soft_cap_under_autocast_needs_no_whole_logits(tmp_path, caplog):
    def gemma(seed):
        torch.manual_seed(seed)
        fields = {"vocab_size": VOCAB, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 5.0}
        return Gemma2ForCausalLM(Gemma2Config(initializer_range=0.3, **SIZES, **fields))

    with caplog.at_level(logging.WARNING, "growlib"):
        train(tmp_path, gemma(0), half(gemma(1)), examples(8), bf16=True)
    assert "whole logits" not in caplog.text


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
def test_a_composite_encoder_decoder_keeps_the_mask_that_it_makes_of_the_labels(tmp_path):
    def composite(seed):
        torch.manual_seed(seed)
        part = BertConfig(vocab_size=VOCAB, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(part, part)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return EncoderDecoderModel(config=config)

    rows, teacher, student = examples(8), composite(1), composite(0)
    for row in rows:
        row["labels"][5:7] = -100
    batch = collate(rows)
    outputs = student(**batch)
    kd = ki_loss(outputs.logits, batch["labels"], teacher(**batch).logits.detach(), alpha=1.0).loss
    log = train(tmp_path, student, half(teacher), rows, logging_strategy="steps", logging_steps=1).state.log_history[0]
    assert log["ki/ce"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert log["ki/kd"] == pytest.approx(kd.item(), rel=1e-5)


def bart(model_class, seed=0):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=VOCAB, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, **sizes)
    return model_class(config)


def test_a_causal_model_whose_loss_does_not_shift(tmp_path):
    student, teacher, rows = bart(BartForCausalLM), bart(BartForCausalLM, 1), examples(8)
    expected = sgd_step(student, teacher, rows, lambda labels: labels, alpha=0.5)
    train(tmp_path, student, half(teacher), rows)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda seed: bart(BartForSequenceClassification, seed), "labels that are none of its 3"),
        (lambda _: torch.nn.Linear(2, 2), "not a model of transformers"),
    ],
)
def test_models_without_a_language_models_loss_are_refused(tmp_path, make, says):
    with pytest.raises(GrowError, match=says):
        train(tmp_path, make(0), half(llama(1)) if says.startswith("no") else half(make(1)), examples(8))


def test_a_model_that_excludes_tokens_after_its_head_gives_no_access():
    class Excluding(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, **kwargs)
            outputs.logits = outputs.logits.clone()
            outputs.logits[..., 20:] = -torch.inf
            return outputs

    model = Excluding(llama(0).config)
    with pytest.raises(NoHeadAccess, match="not finite"):
        access_head(model, model, {"input_ids": collate(examples(2))["input_ids"]})


def test_logits_in_other_places_than_the_labels_are_named(tmp_path):
    class Virtual(LlamaForCausalLM):
        """Two positions more than tokens, as prompt tuning has."""

        def forward(self, input_ids=None, labels=None, **kwargs):
            ids, labels = (None if x is None else torch.cat([x[:, :2], x], 1) for x in (input_ids, labels))
            return super().forward(input_ids=ids, labels=labels, **kwargs)

    with pytest.raises(GrowError, match="are at 96 positions and the labels at 80"):
        train(tmp_path, Virtual(llama(0).config), half(llama(1)), examples(8))


def test_a_batch_without_labels_is_named(tmp_path):
    class Labelled(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {"labels": inputs["input_ids"], **inputs}, *args, **kwargs)

    class Taught(KITrainer.__mro__[1], Labelled):
        pass

    rows = [{"input_ids": row["input_ids"]} for row in examples(8)]
    with pytest.raises(GrowError, match="a batch of input_ids"):
        train(tmp_path, llama(0), half(llama(1)), rows, trainer_class=Taught, label_names=["targets"])
