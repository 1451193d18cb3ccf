"""Several teachers, teachers of domains, the gate, and where the loss is computed."""

import logging

import pytest
import torch
from ki_tiny import (
    MAKERS,
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
    t5,
    train,
)
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from growlib import GrowError, KIConfig, KIMixin, KITrainer, cache_teacher
from growlib.ki import Targets, ki_loss, mixture
from growlib.ki.head_access import NoHeadAccess, access_head, final_logits
from growlib.ki.tasks import Positions

CONSTANT = {"schedule": "constant", "stop_at": None, "alpha": 0.5}


def special(config_class, model_class, seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = config_class(
        vocab_size=VOCAB, intermediate_size=24, initializer_range=0.3, pad_token_id=0, **sizes, **fields
    )
    return model_class(config)


SPECIAL = {
    "cohere": lambda seed=0: special(CohereConfig, CohereForCausalLM, seed, logit_scale=0.25),
    "granite": lambda seed=0: special(GraniteConfig, GraniteForCausalLM, seed, logits_scaling=3.0),
    "gemma2": lambda seed=0: special(
        Gemma2Config, Gemma2ForCausalLM, seed, final_logit_softcapping=1.5, head_dim=8, query_pre_attn_scalar=8
    ),
}


@pytest.mark.parametrize("name", [*MAKERS, *SPECIAL])
def test_the_loss_from_hidden_states_takes_the_step_of_whole_logits(tmp_path, name, caplog):
    """Scaled, soft-capped, biased and shifted heads; the teacher's too."""
    caplog.set_level(logging.WARNING, "growlib")  # the recipes make it quieter
    make = MAKERS.get(name) or SPECIAL[name]
    rows = examples(8)
    stepped = {}
    for linear in (True, False):

        class Whole(KITrainer):
            def _ki_needs_logits(self):
                return "the test wants whole logits"

        student = make(0)
        options = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 0.05}
        trainer = train(tmp_path, student, half(make(1)), rows, KITrainer if linear else Whole, **options)
        assert (trainer._ki_loss_form.access is not None) is linear
        stepped[linear] = (parameters(student), trainer.state.log_history[0])
    torch.testing.assert_close(stepped[True][0], stepped[False][0], rtol=1e-5, atol=1e-6)
    assert (stepped[True][0] - parameters(make(0))).abs().max() > 1e-3
    for value in ("loss", "ki/ce", "ki/kd", "ki/teacher_ce", "grad_norm"):
        assert stepped[True][1][value] == pytest.approx(stepped[False][1][value], rel=1e-5)
    assert [record.message for record in caplog.records if "whole logits" in record.message] == [
        "The loss is computed from whole logits: the test wants whole logits."
    ]


def test_no_logits_are_computed_for_student_or_teacher(tmp_path):
    student, teacher = llama(0), llama(1, hidden=8)
    trainer = train(tmp_path, student, half(teacher), examples(8))
    widths = []
    for model in (student, teacher):
        model.register_forward_hook(lambda _m, _a, outputs: widths.append(outputs.logits.shape[-1]))
    trainer.model.train()
    trainer.compute_loss(trainer.model, collate(examples(4)), num_items_in_batch=torch.tensor(20.0))
    assert widths == [1, 1]


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gradient_checkpointing_and_accumulation(tmp_path, micro_batches):
    rows, expected, student = examples(8), llama(0), llama(0)
    train(tmp_path, expected, half(llama(1, hidden=8)), rows)
    options = {"per_device_train_batch_size": 8 // micro_batches, "gradient_accumulation_steps": micro_batches}
    # before transformers 5.23 it had the second name alone
    getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
    train(tmp_path, student, half(llama(1, hidden=8)), rows, **options)
    torch.testing.assert_close(parameters(student), parameters(expected), rtol=1e-5, atol=1e-6)


class Adds(type(llama())):
    """Changes its logits in a way that no config names."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits = outputs.logits * 1.5
        return outputs


def test_a_head_that_cannot_be_proven_is_not_used():
    batch = {"input_ids": examples(2)[0]["input_ids"][None]}
    for model, reason in (
        (Adds(llama().config), "does not name"),
        (llama().model, "missing"),
    ):
        bare = model.eval()
        bare.get_output_embeddings = getattr(bare, "get_output_embeddings", lambda: None)
        with pytest.raises(NoHeadAccess, match=reason):
            access_head(bare, bare, batch)
    wrapped = llama()
    wrapped.lm_head.forward = wrapped.lm_head.forward
    with pytest.raises(NoHeadAccess, match="offloaded or wrapped"):
        access_head(wrapped, wrapped, batch)
    assert final_logits(SPECIAL["gemma2"]().config) == (1.0, 1.5)


def test_a_fallback_is_said_once_and_taught_all_the_same(tmp_path, caplog):
    student, rows = Adds(llama(0).config), examples(8)
    start = parameters(student)
    with caplog.at_level(logging.WARNING, "growlib"):
        trainer = train(tmp_path, student, half(llama(1)), rows, max_steps=3, remove_unused_columns=False)
    assert trainer._ki_loss_form.access is None
    assert sum("whole logits" in record.message for record in caplog.records) == 1
    assert (parameters(student) - start).abs().max() > 1e-3


def test_an_encoder_decoder_that_shifts_its_labels_by_itself(tmp_path, caplog):
    """It has no method that others could call: the labels are its decoder's inputs, and whole logits are used."""

    def m2m(seed, width):
        torch.manual_seed(seed)
        sizes = {"d_model": width, "vocab_size": VOCAB, "max_position_embeddings": 32, "init_std": 0.3, "dropout": 0.0}
        layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "attention_dropout": 0.0, "encoder_layerdrop": 0.0}
        return M2M100ForConditionalGeneration(M2M100Config(**sizes, **layers, decoder_layerdrop=0.0))

    rows, student = examples(8), m2m(0, 16)
    by_hand = sgd_step(m2m(0, 16).eval(), m2m(1, 8), rows, lambda labels: labels, alpha=0.5)
    with caplog.at_level(logging.WARNING, "growlib"):
        train(tmp_path, student, half(m2m(1, 8)), rows)
    assert "makes its decoder's inputs from the labels by itself" in caplog.text
    torch.testing.assert_close(parameters(student), by_hand, rtol=1e-5, atol=1e-6)
    cache = cache_teacher(m2m(1, 8), rows, tmp_path / "cache", data_collator=collate, top_k=VOCAB, samples=0)
    cached = m2m(0, 16)
    train(tmp_path, cached, half(cache.path), rows)
    torch.testing.assert_close(parameters(cached), by_hand, rtol=1e-3, atol=1e-3)


def test_weighted_teachers_teach_their_mean_distribution(tmp_path):
    rows, student = examples(8), llama(0)
    teachers = (llama(1, hidden=8), llama(2))
    batch = collate(rows)
    with torch.no_grad():
        dense = [Targets.dense(teacher(**batch).logits.flatten(0, 1)) for teacher in teachers]
    loss = ki_loss(student(**batch).logits, shifted(batch["labels"]), mixture(dense, (0.2, 0.8)), alpha=0.5).loss
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    expected = parameters(student) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    train(tmp_path, student, KIConfig(teacher=teachers, weights=(0.2, 0.8), **CONSTANT), rows)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_of_sampled_caches(tmp_path):
    rows = examples(8)
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / f"cache-{seed}")
        cache_teacher(llama(seed, hidden=8), rows, folders[-1], top_k=8, samples=20, data_collator=collate)
    mixed, online = llama(0), llama(0)
    for student, teachers in ((mixed, folders), (online, [llama(seed, hidden=8) for seed in (1, 2)])):
        train(tmp_path, student, KIConfig(teacher=tuple(teachers), schedule="constant", stop_at=None), rows)
    updates = [parameters(student) - parameters(llama(0)) for student in (mixed, online)]
    assert torch.nn.functional.cosine_similarity(*updates, dim=0) > 0.97


def with_domains(rows):
    return [{**row, "source": "code" if i % 3 else "prose"} for i, row in enumerate(rows)]


@pytest.mark.parametrize("cached", [False, True])
def test_each_domain_has_its_teacher(tmp_path, cached):
    """The step is that of each row's own teacher, whole logits, written by hand."""
    rows = examples(8)
    teachers = {"code": llama(1, hidden=8), "prose": llama(2)}
    student, batch = llama(0), collate(rows)
    with torch.no_grad():
        logits = {name: teacher(**batch).logits for name, teacher in teachers.items()}
    own = torch.stack([logits["code" if i % 3 else "prose"][i] for i in range(8)])
    if cached:  # one from a cache, one online
        cache_teacher(teachers["code"], rows, tmp_path / "c", top_k=VOCAB, samples=0, data_collator=collate)
    loss = ki_loss(student(**batch).logits, shifted(batch["labels"]), own, alpha=0.5).loss
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    expected = parameters(student) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    ki = KIConfig(teacher={**teachers, **({"code": tmp_path / "c"} if cached else {})}, domain="source", **CONSTANT)
    options = {"remove_unused_columns": True, "logging_strategy": "steps", "logging_steps": 1}
    trainer = train(tmp_path, student, ki, with_domains(rows), **options)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if cached else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(parameters(student), expected, **tolerance)
    of_labels = torch.nn.functional.cross_entropy(own.flatten(0, 1), shifted(batch["labels"]).flatten())
    assert trainer.state.log_history[0]["ki/teacher_ce"] == pytest.approx(of_labels.item(), rel=1e-4)


@pytest.mark.parametrize(("kind", "times"), [("online", 1), ("top_k", 1), ("cache", 1), ("average", 1), ("domains", 3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_positions_that_count_are_found_once_per_batch(tmp_path, monkeypatch, kind, times, smoothing):
    """Not by teacher, cache and loss each; of each domain its own once more."""
    rows, path = with_domains(examples(8)), tmp_path / "cache"
    if kind == "cache":
        cache_teacher(llama(1, hidden=8), examples(8), path, data_collator=collate)
    ki = {
        "online": {"teacher": llama(1)},
        "top_k": {"teacher": llama(1), "top_k": 4},
        "cache": {"teacher": path},
        "average": {"teacher": (llama(1), llama(2))},
        "domains": {"teacher": {"code": llama(1), "prose": llama(2)}, "domain": "source"},
    }[kind]
    options = {"label_smoothing_factor": smoothing, "remove_unused_columns": True}
    trainer = train(tmp_path, llama(0), KIConfig(**ki, **CONSTANT), rows, **options)
    trainer.model.train()
    calls, at = [], Positions.at.__func__
    monkeypatch.setattr(Positions, "at", classmethod(lambda cls, aligned: calls.append(aligned) or at(cls, aligned)))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(20.0))
    assert len(calls) == times


def test_a_domain_without_a_teacher_is_named(tmp_path):
    ki = KIConfig(teacher={"code": llama(1)}, domain="source", **CONSTANT)
    with pytest.raises(GrowError, match=r"a domain that has no teacher\. Valid: 'code'"):
        train(tmp_path, llama(0), ki, with_domains(examples(8)), remove_unused_columns=True)


def test_examples_without_a_domain_are_named(tmp_path):
    ki = KIConfig(teacher={"code": llama(1)}, domain="source", **CONSTANT)
    with pytest.raises(GrowError, match="have no domain"):
        train(tmp_path, llama(0), ki, examples(8))


def test_a_tensor_that_has_no_row_per_example_is_named(tmp_path):
    ki = KIConfig(teacher={"code": llama(1), "prose": llama(2)}, domain="source", **CONSTANT)

    def with_patches(rows):
        return {**collate([{k: row[k] for k in ("input_ids", "labels")} for row in rows]), "pixels": torch.zeros(30, 2)}

    trainer = KITrainer(
        model=llama(0),
        args=arguments(tmp_path),
        train_dataset=with_domains(examples(8)),
        data_collator=with_patches,
        ki=ki,
    )
    with pytest.raises(GrowError, match=r"pixels of shape \[30, 2\]"):
        trainer.train()


def test_generation_and_evaluation_know_no_domains(tmp_path):
    """Also of a domain without a teacher."""

    class Taught(KIMixin, Seq2SeqTrainer):
        pass

    trainer = Taught(
        model=t5(0),
        args=Seq2SeqTrainingArguments(
            str(tmp_path), use_cpu=True, predict_with_generate=True, generation_max_length=4, report_to="none"
        ),
        train_dataset=with_domains(examples(8)),
        data_collator=collate,
        compute_metrics=lambda predicted: {"rows": len(predicted.predictions)},
        ki=KIConfig(teacher={"code": t5(1)}, domain="source"),
    )
    assert trainer.evaluate(with_domains(examples(8)))["eval_rows"] == 8


@pytest.mark.parametrize("with_column", [True, False])
def test_evaluation_is_not_disturbed_by_domains(tmp_path, with_column):
    rows = with_domains(examples(8)) if with_column else examples(8)
    trainer = KITrainer(
        model=llama(0),
        args=arguments(tmp_path, remove_unused_columns=True),
        eval_dataset=rows,
        data_collator=collate,
        ki=KIConfig(teacher={"code": llama(1), "prose": llama(2)}, domain="source"),
    )
    with torch.no_grad():
        plain = llama(0)(**collate(examples(8))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_the_gate_in_training(tmp_path):
    rows, teacher = examples(8), gpt2(1, hidden=8)
    expected = sgd_step(gpt2(0), teacher, rows, shifted, alpha=0.5, gate=True)
    ungated = sgd_step(gpt2(0), teacher, rows, shifted, alpha=0.5)
    assert (expected - ungated).abs().max() > 1e-3
    student = gpt2(0)
    train(tmp_path, student, half(teacher, gate=True), rows)
    step, by_hand = parameters(student) - parameters(gpt2(0)), expected - parameters(gpt2(0))
    # GPT-2 declares no loss type: the Trainer's count of items scales the step.
    torch.testing.assert_close(step / step.norm(), by_hand / by_hand.norm(), rtol=1e-4, atol=1e-5)


def test_the_gate_needs_a_loss_by_position(tmp_path):
    with pytest.raises(GrowError, match="gate"):
        train(tmp_path, llama(0), half(llama(1), gate=True), examples(8), label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": ()},
        {"teacher": ("a", 3)},
        {"teacher": {"code": "a"}},
        {"teacher": "a", "domain": "source"},
        {"teacher": "a", "weights": (1.0,)},
        {"teacher": ("a", "b"), "weights": (0.5, 0.6)},
        {"teacher": ("a", "b"), "weights": (1.0,)},
        {"teacher": "a", "top_k": 0},
        {"teacher": "a", "tail": "ghost"},
        {"teacher": "a", "stop_at": "later"},
        {"teacher": "a", "stop_at": True},
        {"teacher": "a", "schedule": ["linear"]},
        {"teacher": "a", "teacher_dtype": "bfloat16"},
        {"teacher": "a", "tail": ["bucket"]},
        {"teacher": "a", "gate": "yes"},
        {"teacher": "a", "top_k": True},
        {"teacher": "a", "top_k": 4, "tail": "sampled"},
        {"teacher": ("a", "b"), "top_k": 4},
        {"teacher": ("a", "b"), "weights": 0.5},
        {"teacher": ("a", "b"), "weights": ("x", "y")},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(GrowError):
        KIConfig(**options)


@pytest.mark.parametrize("tail", ["bucket", "renorm_teacher", "none"])
def test_an_online_top_k_is_the_hand_written_step(tmp_path, tail):
    rows, teacher, student = examples(8), bert(1, hidden=8), bert(0)
    batch = collate(rows)
    with torch.no_grad():
        targets = Targets.top_k(teacher(**batch).logits.flatten(0, 1), 5, tail=tail)
    loss = ki_loss(student(**batch).logits, batch["labels"], targets, alpha=0.5).loss
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    expected = parameters(student) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    train(tmp_path, student, KIConfig(teacher=teacher, top_k=5, tail=tail, **CONSTANT), rows)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-5, atol=1e-6)


def test_a_mixin_over_a_trainer_without_a_loss_of_its_own_is_as_fast(tmp_path):
    class Plain(KITrainer.__mro__[2]):
        """A user's subclass that leaves compute_loss alone."""

    class Taught(KIMixin, Plain):
        pass

    trainer = train(tmp_path, llama(0), half(llama(1)), examples(8), trainer_class=Taught)
    assert trainer._ki_loss_form.access is not None
