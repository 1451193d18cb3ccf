"""What no step may take: a teacher that says no numbers, labels and ids that are out of range."""

from contextlib import suppress

import pytest
import torch
from ki_tiny import MAKERS, VOCAB, bert, examples, half, llama, parameters, t5, train
from transformers import TrainerCallback

from growlib import GrowError
from growlib.ki import guard
from growlib.ki.guard import Finding, Guard

PLACES = ["head row", "layer", "embedding", "all"]
FORMS = {
    "states": {},
    "top_k": {"top_k": 4},
    "smoothed": {"label_smoothing_factor": 0.1},  # whole logits
    "bf16": {"bf16": True},
}
TEACHERS = {
    "one": lambda bad: bad,
    "averaged": lambda bad: (llama(2, hidden=8), bad),
    "of a domain": lambda bad: {"a": bad, "b": llama(2, hidden=8)},
}
BAD = "what it says is no numbers"


@pytest.fixture(params=[True, False], ids=["cpu", "another device"])
def reads_at_once(request, monkeypatch):
    """Findings stay on another device until the host reads; here the CPU stands for it."""
    if not request.param:
        monkeypatch.setattr(guard, "costs_nothing", lambda _: False)
    return request.param


@torch.no_grad()
def spoil(model, place, value):
    head = model.get_output_embeddings().weight
    # The last of a layer: on some CPUs torch's attention makes zeros of queries that are no numbers.
    layer = [p for name, p in model.named_parameters() if "layer" in name or ".h." in name][-1]
    for tensor in {"head row": [head[3:4]], "layer": [layer], "all": list(model.parameters())}.get(
        place, [model.get_input_embeddings().weight]
    ):
        tensor.fill_(value)
    return model


class Spoils(TrainerCallback):
    """Somebody writes to the teacher's weights after a step."""

    def __init__(self, model, step):
        self.model, self.step = model, step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            spoil(self.model, "head row", torch.nan)


def start(student):
    """The student, and its parameters now."""
    return student, parameters(student).clone()


@pytest.mark.parametrize(
    ("place", "value", "form"),
    [("head row", torch.nan, form) for form in FORMS] + [(place, torch.inf, "states") for place in PLACES],
)
def test_a_teacher_that_says_no_numbers_is_named_before_a_step(tmp_path, value, place, form, reads_at_once):
    options = dict(FORMS[form])
    ki = half(
        spoil(llama(1, hidden=8), place, value), **({"top_k": options.pop("top_k")} if "top_k" in options else {})
    )
    student, before = start(llama(0))
    with pytest.raises(GrowError, match=f"the teacher LlamaForCausalLM in step 1: {BAD}"):
        train(tmp_path, student, ki, examples(8), max_steps=2, **options)
    assert torch.equal(parameters(student), before)


@pytest.mark.parametrize("maker", MAKERS)
def test_so_is_one_of_any_class(tmp_path, maker):
    student, before = start(MAKERS[maker](0))
    with pytest.raises(GrowError, match=rf"the teacher \w+ in step 1: {BAD}"):
        train(tmp_path, student, half(spoil(MAKERS[maker](1, hidden=8), "layer", torch.nan)), examples(8))
    assert torch.equal(parameters(student), before)


@pytest.mark.parametrize("kind", TEACHERS)
def test_so_is_one_of_several(tmp_path, kind, reads_at_once):
    bad = spoil(llama(1, hidden=8), "layer", torch.nan)
    bad.config.name_or_path = "the-bad-one"
    options = {"domain": "domain"} if kind == "of a domain" else {}
    rows = [row | {"domain": "ab"[i % 2]} for i, row in enumerate(examples(8))] if options else examples(8)
    student, before = start(llama(0))
    with pytest.raises(GrowError, match=rf"the teacher .*the-bad-one.* in step 1: {BAD}"):
        train(tmp_path, student, half(TEACHERS[kind](bad), **options), rows)
    assert torch.equal(parameters(student), before)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_step_is_named_and_the_ones_before_count(tmp_path, accumulated, reads_at_once):
    rows, options = examples(16 * 3), {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 4}
    plain = llama(0)
    train(tmp_path, plain, half(llama(1, hidden=8)), rows, max_steps=2, **options)
    student, teacher = llama(0), llama(1, hidden=8)
    with pytest.raises(GrowError, match="in step 3"):
        train(
            tmp_path, student, half(teacher), rows, max_steps=4, trainer_options={"callbacks": [Spoils(teacher, 2)]},
            **options,
        )  # fmt: skip
    assert torch.equal(parameters(student), parameters(plain))


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_is_read_in_a_step_the_teacher_is_not_heard(tmp_path, monkeypatch, form):
    """The Trainer reads the loss of each step unless it is told not to; then the next log raises."""
    monkeypatch.setattr(guard, "costs_nothing", lambda _: False)
    options, student, seen = dict(FORMS[form]), llama(0), []
    ki = half(
        spoil(llama(1, hidden=8), "layer", torch.nan), **({"top_k": options.pop("top_k")} if form == "top_k" else {})
    )

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            seen.append(all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()))

    with pytest.raises(GrowError, match="in step 1"):
        train(
            tmp_path, student, ki, examples(32), max_steps=4, logging_nan_inf_filter=False, logging_strategy="steps",
            logging_steps=3, trainer_options={"callbacks": [Watch()]}, **options,
        )  # fmt: skip
    assert seen == [True] * 3
    assert parameters(student).isfinite().all()


@pytest.mark.parametrize(
    ("place", "value", "form"),
    [("head row", 1e38, form) for form in FORMS] + [(place, 3e20, "states") for place in PLACES],
)
def test_numbers_that_overflow_are_refused_or_do_no_harm(tmp_path, place, value, form):
    options, student = dict(FORMS[form]), llama(0)
    ki = half(spoil(llama(1, hidden=8), place, value), **({"top_k": options.pop("top_k")} if form == "top_k" else {}))
    with suppress(GrowError):
        train(tmp_path, student, ki, examples(8), max_steps=2, **options)
    assert parameters(student).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_k": VOCAB}])
@pytest.mark.parametrize("form", ["states", "smoothed"])
def test_a_teacher_may_exclude_ids(tmp_path, options, form):
    """Logits of -inf are numbers: a probability of 0."""
    teacher, student = bert(1, hidden=8), bert(0)
    with torch.no_grad():
        teacher.get_output_embeddings().bias[5:9] = -torch.inf
    train(tmp_path, student, half(teacher, **options), examples(8), **FORMS[form])
    assert parameters(student).isfinite().all()


@pytest.mark.parametrize(("maker", "label"), [*zip(MAKERS, [VOCAB, -1, -99, 1 << 40], strict=True)])
def test_a_label_that_is_none_of_the_students_is_named(tmp_path, maker, label):
    rows = examples(16)
    rows[11]["labels"][6] = label
    student, options = MAKERS[maker](0), {"per_device_train_batch_size": 16}
    with pytest.raises(GrowError, match=rf"the student in step 1: .* labels that are none of its {VOCAB}"):
        train(tmp_path, student, half(MAKERS[maker](1, hidden=8)), rows, **options)


@pytest.mark.parametrize(("maker", "token"), [*zip(MAKERS, [VOCAB, -1, 1 << 40, VOCAB], strict=True)])
def test_an_id_that_the_teacher_has_not_is_named(tmp_path, maker, token, reads_at_once):
    """The student has a larger table: the first batch, or a later one."""
    for place, step in ((0, ""), (11, " in step 2")):
        rows = examples(16)
        rows[place]["input_ids"][6] = token
        student = widened(MAKERS[maker](0))
        says = rf"the teacher \w+{step}: its table for input_ids has {VOCAB} rows"
        with pytest.raises(GrowError, match=says):
            train(
                tmp_path, student, half(MAKERS[maker](1, hidden=8)), rows, per_device_train_batch_size=8, max_steps=2,
                train_sampling_strategy="sequential",
            )  # fmt: skip


def widened(student):
    """A student that reads every id."""

    def clamp(_module, args, inputs):
        ids = ("input_ids", "decoder_input_ids")
        return args, {name: x.clamp(0, VOCAB - 1) if name in ids else x for name, x in inputs.items()}

    student.register_forward_pre_hook(clamp, with_kwargs=True)
    return student


def test_seq2seq_ids_of_the_decoder_too(tmp_path):
    rows = [row | {"decoder_input_ids": row["labels"].clamp(0) + VOCAB * (i == 7)} for i, row in enumerate(examples(8))]
    with pytest.raises(GrowError, match="its table for decoder_input_ids"):
        train(tmp_path, widened(t5(0)), half(t5(1, hidden=8)), rows)


def test_the_first_finding_is_the_one_that_is_told(monkeypatch):
    monkeypatch.setattr(guard, "costs_nothing", lambda _: False)
    found = Guard()
    for step, bad in ((1, 0), (2, 1), (3, 1)):
        found.step = step
        found.add(torch.tensor(step == 3), Finding("b", "worse", "better"))
        found.add(torch.tensor(bad), Finding("a", "wrong", "right"))
    with pytest.raises(GrowError, match="a in step 2: wrong"):
        found.check()
    found.check()  # it starts again
