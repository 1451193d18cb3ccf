"""Students that classify sequences and tokens or answer questions, taught by a teacher of the same labels."""

import pytest
import torch
import torch.nn.functional as F
from ki_tiny import VOCAB, arguments, collate, half, parameters, train
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from growlib import GrowError, KITrainer, cache_teacher
from growlib.ki import ki_loss, verify_cache
from growlib.ki.tasks import task_of

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "num_key_value_heads": 2}
CONFIGS = {
    "bert": lambda n, **x: BertConfig(
        hidden_size=n, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES, **x
    ),
    "llama": lambda n, **x: LlamaConfig(hidden_size=n, classifier_dropout=0.0, **SIZES, **x),
    "gpt2": lambda n, **x: GPT2Config(
        n_embd=n, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0, **x
    ),
}
TASKS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}


def model(name, task, seed, hidden=16, **options):
    torch.manual_seed(seed)
    options = {"vocab_size": VOCAB, "num_labels": 3, "initializer_range": 0.3, "pad_token_id": 0, **options}
    if task == "question-answering":
        options.pop("num_labels")
    return TASKS[task].from_config(CONFIGS[name](hidden, **options))


def rows(task, count=8, length=6):
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        row = {"input_ids": torch.randint(1, VOCAB, (length,), generator=generator)}
        if task == "question-answering":
            row |= {"start_positions": torch.tensor(i % length), "end_positions": torch.tensor(i % (length + 2))}
        elif task == "token-classification":
            row["labels"] = torch.tensor([-100 if (i + j) % 3 == 0 else (i * j) % 3 for j in range(length)])
        else:
            row["labels"] = torch.tensor(i % 3)
        made.append(row)
    return made


def expected_step(student, teacher, task, batch):
    """One step of SGD on the loss, written out."""
    with torch.no_grad():
        says = teacher.eval()(**batch)
    said = student(**batch)
    if task == "question-answering":
        length, losses = batch["input_ids"].shape[1], []
        for name in ("start", "end"):
            labels = batch[f"{name}_positions"].masked_fill(batch[f"{name}_positions"] >= length, -100)
            losses.append(ki_loss(said[f"{name}_logits"], labels, says[f"{name}_logits"], alpha=0.5).loss)
        loss = torch.stack(losses).mean()
    else:
        loss = ki_loss(
            said.logits.flatten(0, -2), batch["labels"].flatten(), says.logits.flatten(0, -2), alpha=0.5
        ).loss
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, materialize_grads=True)
    return parameters(student) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_on_the_loss_that_is_written_out(tmp_path, name, task):
    student, teacher = model(name, task, 0), model(name, task, 1, 8)
    assert task_of(student) == task
    data = rows(task)
    expected = expected_step(model(name, task, 0), model(name, task, 1, 8), task, collate(data))
    options = {"label_names": ["start_positions", "end_positions"]} if task == "question-answering" else {}
    train(tmp_path, student, half(teacher), data, **options)
    torch.testing.assert_close(parameters(student), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_a_cached_teacher_of_all_its_classes_is_the_online_one(tmp_path, name, task):
    teacher, data = model(name, task, 1, 8), rows(task)
    cache_teacher(teacher, data, tmp_path / "cache", data_collator=collate, top_k=3, samples=0)
    assert verify_cache(tmp_path / "cache", teacher, data, data_collator=collate).sound
    online, cached = model(name, task, 0), model(name, task, 0)
    train(tmp_path, online, half(teacher), data)
    train(tmp_path, cached, half(tmp_path / "cache"), data)
    torch.testing.assert_close(parameters(cached), parameters(online), rtol=1e-3, atol=1e-4)
    assert not torch.equal(parameters(cached), parameters(model(name, task, 0)))


def test_answers_cannot_be_cached(tmp_path):
    with pytest.raises(GrowError, match="its outcomes are the positions of each row"):
        cache_teacher(
            model("bert", "question-answering", 1), rows("question-answering"), tmp_path / "c", data_collator=collate
        )


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize(
    ("of_teacher", "says"),
    [
        ({"id2label": {0: "good", 1: "poor", 2: "bad"}}, "id 0 is 'good' for the teacher, 'bad' for the student"),
        ({"num_labels": 4}, "teacher and student have 4 and 3 ids"),
    ],
)
def test_a_teacher_of_other_labels_is_refused(tmp_path, task, of_teacher, says):
    named = {0: "bad", 1: "poor", 2: "good"}
    for config in ({"id2label": named, "label2id": {x: i for i, x in named.items()}},):
        if "id2label" in of_teacher:
            of_teacher = of_teacher | {"label2id": {x: i for i, x in of_teacher["id2label"].items()}}
        with pytest.raises(GrowError, match=says):
            KITrainer(
                model=model("bert", task, 0, **config),
                args=arguments(tmp_path),
                ki=half(model("bert", task, 1, 8, **of_teacher)),
            )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("other", TASKS)
def test_a_teacher_of_another_task_is_refused(tmp_path, task, other):
    if task == other:
        return
    with pytest.raises(GrowError, match=f"a {other} model cannot teach a {task} one"):
        KITrainer(model=model("bert", task, 0), args=arguments(tmp_path), ki=half(model("bert", other, 1)))


def test_the_mean_of_the_starts_weighs_as_much_as_that_of_the_ends():
    """As in transformers, where ends that are cut off do not count."""
    student, batch = model("bert", "question-answering", 0), collate(rows("question-answering"))
    said = student(**batch)
    ends = batch["end_positions"].masked_fill(batch["end_positions"] >= 6, -100)
    mean = (F.cross_entropy(said.start_logits, batch["start_positions"]) + F.cross_entropy(said.end_logits, ends)) / 2
    torch.testing.assert_close(said.loss, mean)
