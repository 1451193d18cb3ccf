"""Which teachers are taken, which are refused and why, and how labels are aligned with logits."""

import pytest
import torch
from ki_tiny import MAKERS, VOCAB, arguments, bert, collate, examples, gpt2, llama, t5
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaModel,
    PreTrainedTokenizerFast,
    XLMConfig,
    XLMWithLMHeadModel,
)

from growlib import GrowError, KIConfig, KITrainer
from growlib.ki.tasks import Positions, task_of


def tokenizer(words):
    table = {f"word{i}": i for i in range(words - 1)} | {"[UNK]": words - 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table, unk_token="[UNK]")))


def trainer(folder, student, ki, student_tokenizer=None):
    return KITrainer(
        model=student,
        args=arguments(folder),
        train_dataset=examples(8),
        data_collator=collate,
        processing_class=student_tokenizer,
        ki=ki,
    )


def predicted(taught, batch):
    """The logits [N, V] of a trainer's teacher at the positions that count."""
    return taught._ki_provider.teacher.predict(batch, Positions.of(batch, taught._ki_task)).logits()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", 3),
        ("schedule", "sigmoid"),
        ("stop_at", 0.0),
        ("stop_at", 1.5),
        ("stop_at", None),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("teacher_dtype", torch.int8),
        ("common_vocab", 0),
        ("temperature", "2"),
        ("alpha", None),
        ("top_k", 1.5),
    ],
)
def test_bad_settings_say_what_would_be_valid(name, value):
    with pytest.raises(GrowError, match=name) as refused:
        KIConfig(**{"teacher": "folder", name: value})
    assert refused.value.valid


def test_settings_are_frozen_and_scale_the_schedule():
    ki = KIConfig(teacher="folder", alpha=0.8, stop_at=0.5)
    assert [ki.alpha_at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.8, 0.4, 0.0, 0.0])
    with pytest.raises(AttributeError):
        ki.alpha = 0.5


def test_a_folder_of_safetensors_is_loaded_in_its_dtype(tmp_path):
    llama(1, hidden=8).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    loaded = trainer(tmp_path, llama(0), KIConfig(teacher=str(tmp_path / "teacher")))._ki_provider.teacher.model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    cast = KIConfig(teacher=str(tmp_path / "teacher"), teacher_dtype=torch.float64)
    assert trainer(tmp_path, llama(0), cast)._ki_provider.teacher.model.dtype == torch.float64


def test_pickled_weights_are_refused(tmp_path):
    teacher = llama(1, hidden=8)
    teacher.config.save_pretrained(tmp_path / "teacher")
    torch.save(teacher.state_dict(), tmp_path / "teacher" / "pytorch_model.bin")
    with pytest.raises(GrowError, match="safetensors"):
        trainer(tmp_path, llama(0), KIConfig(teacher=tmp_path / "teacher"))


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    LlamaModel(llama(1, hidden=8).config).save_pretrained(tmp_path / "teacher")
    with pytest.raises(GrowError, match=r"lm_head\.weight"):
        trainer(tmp_path, llama(0), KIConfig(teacher=tmp_path / "teacher"))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(GrowError, match="there is no such folder"):
        trainer(tmp_path, llama(0), KIConfig(teacher=tmp_path / "nowhere"))


def test_the_student_cannot_be_its_own_teacher(tmp_path):
    student = llama(0)
    with pytest.raises(GrowError, match="shares parameters"):
        trainer(tmp_path, student, KIConfig(teacher=student))
    assert all(p.requires_grad for p in student.parameters())


def test_another_kind_of_language_model_is_refused(tmp_path):
    with pytest.raises(GrowError, match="masked model cannot teach a causal one"):
        trainer(tmp_path, llama(0), KIConfig(teacher=bert(1)))


@pytest.mark.parametrize("teacher_vocab", [VOCAB - 4, VOCAB + 8])
def test_another_vocabulary_size_is_refused_without_proof(tmp_path, teacher_vocab):
    with pytest.raises(GrowError, match="common_vocab"):
        trainer(tmp_path, llama(0), KIConfig(teacher=llama(1, vocab=teacher_vocab)))


def test_two_paddings_of_one_tokenizer_are_compared_on_its_ids(tmp_path):
    llama(1, hidden=8, vocab=VOCAB + 8).save_pretrained(tmp_path / "teacher")
    tokenizer(VOCAB - 2).save_pretrained(tmp_path / "teacher")
    taught = trainer(tmp_path, llama(0), KIConfig(teacher=tmp_path / "teacher"), tokenizer(VOCAB - 2))
    assert predicted(taught, collate(examples(2))).shape == (9 + 8, VOCAB - 2)


def test_a_declared_common_vocabulary_is_used(tmp_path):
    """Labels beyond it count in the CE and leave the teacher's own CE alone."""
    ki = KIConfig(teacher=llama(1, hidden=8), common_vocab=VOCAB - 6, stop_at=1.0)
    taught = trainer(tmp_path, llama(0), ki)
    taught.train()
    logs = taught._ki_metrics.drain(taught.accelerator)
    batch = collate(examples(8))
    labels = Positions.of(batch, "causal").labels
    known = labels < VOCAB - 6
    assert not known.all()
    log_probs = predicted(taught, batch).log_softmax(-1)[known]
    expected = -log_probs.gather(-1, labels[known][:, None]).mean().item()
    assert logs["ki/teacher_ce"] == pytest.approx(expected, rel=1e-5)
    assert all(torch.tensor(value).isfinite() for value in logs.values())


def test_a_common_vocabulary_larger_than_either_is_refused(tmp_path):
    with pytest.raises(GrowError, match=f"at most {VOCAB}"):
        trainer(tmp_path, llama(0), KIConfig(teacher=llama(1), common_vocab=VOCAB + 1))


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    tokenizer(VOCAB - 1).save_pretrained(tmp_path / "teacher")
    with pytest.raises(GrowError, match="tokens or classes are not the student's: 3"):
        trainer(tmp_path, llama(0), KIConfig(teacher=tmp_path / "teacher"), tokenizer(VOCAB))
    agreed = KIConfig(teacher=tmp_path / "teacher", common_vocab=VOCAB - 2)
    assert trainer(tmp_path, llama(0), agreed, tokenizer(VOCAB))._ki_provider.teacher.common_vocab == VOCAB - 2


@pytest.mark.parametrize(("maker", "task"), [(llama, "causal"), (gpt2, "causal"), (bert, "masked"), (t5, "seq2seq")])
def test_tasks_are_read_from_the_tables_and_align_as_the_models_loss_does(maker, task):
    model, batch = maker(0).eval(), collate(examples(4))
    assert task_of(model) == task
    with torch.no_grad():
        outputs = model(**batch)
    cross_entropy = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1), Positions.of(batch, task).aligned.flatten()
    )
    torch.testing.assert_close(cross_entropy, outputs.loss)


def test_a_subclass_has_the_task_of_its_base_and_xlm_does_not_shift():
    class Mine(type(llama(0))):
        pass

    assert task_of(Mine(llama(0).config)) == "causal"
    sizes = {"emb_dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 16}
    assert task_of(XLMWithLMHeadModel(XLMConfig(**sizes))) == "masked"


@pytest.mark.parametrize("name", MAKERS)
def test_the_teacher_equal_to_the_student_gives_its_logits(tmp_path, name):
    teacher, batch = MAKERS[name](1).eval(), collate(examples(4, ignored=False))
    taught = trainer(tmp_path, MAKERS[name](0), KIConfig(teacher=teacher))
    with torch.no_grad():
        expected = teacher(**batch).logits[Positions.of(batch, taught._ki_task).mask]
    assert torch.equal(predicted(taught, batch), expected)
    assert not predicted(taught, batch).requires_grad


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize(("dtype", "computed"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_half_precision_teachers_compute_in_their_own_dtype(tmp_path, dtype, computed, top_k):
    """Under autocast in bfloat16, which casts what a float32 teacher multiplies and nothing of another."""
    ki = KIConfig(teacher=llama(1, hidden=8).to(dtype), top_k=top_k)
    taught, batch, found = trainer(tmp_path, llama(0), ki), collate(examples(2)), []
    positions = Positions.of(batch, taught._ki_task)

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket is torch.ops.aten.mm:
                found.append(result.dtype)
            return result

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Products():
        taught._ki_provider.parts(batch, positions)
    assert len(found) >= 8 + (top_k is not None)
    assert set(found) == {computed}


def test_inputs_that_the_teacher_does_not_name_are_left_out(tmp_path):
    class Narrow(type(llama(0))):
        def forward(self, input_ids):
            return super().forward(input_ids=input_ids)

    taught = trainer(tmp_path, llama(0), KIConfig(teacher=Narrow(llama(1).config)))
    batch = collate(examples(2)) | {"position_ids": torch.arange(10).repeat(2, 1)}
    assert predicted(taught, batch).shape == (9 + 8, VOCAB)


def test_settings_of_no_use_are_refused(tmp_path):
    with pytest.raises(GrowError, match="top_k beside it"):
        trainer(tmp_path, llama(0), KIConfig(teacher=llama(1), tail="bucket"))
    with pytest.raises(GrowError, match=r"a growlib.KIConfig, or None"):
        trainer(tmp_path, llama(0), {"teacher": llama(1)})


def test_unsupported_splits_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(GrowError, match=r"nn.DataParallel .* one process per GPU"):
        KITrainer(model=llama(0), args=args, ki=KIConfig(teacher=llama(1)))
    monkeypatch.setattr(KITrainer, "get_tp_size", lambda self: 2)  # as where DeepSpeed splits it
    with pytest.raises(GrowError, match="it was not transformers that split the student"):
        trainer(tmp_path, llama(0), KIConfig(teacher=llama(1)))


def test_a_teacher_that_zero3_has_split_is_refused(tmp_path):
    teacher = llama(1)
    next(teacher.parameters()).ds_id = 0
    with pytest.raises(GrowError, match="its folder or hub id, which is loaded whole"):
        trainer(tmp_path, llama(0), KIConfig(teacher=teacher))
