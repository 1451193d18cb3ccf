"""What a teacher says, dense or sparse, against sums over the whole vocabulary in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlib import GrowError, KIConfig
from growlib.ki import TREATMENTS, Projection, Targets, ki_loss, mixture

TAILS = tuple(name for name, treatment in TREATMENTS.items() if not treatment.drawn)


def teacher(positions=5, vocab=23, seed=0, dtype=torch.float64):
    return 2 * torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(targets):
    """The sparse weights as a dense [N, V]."""
    dense = torch.zeros(len(targets), targets.vocab, dtype=targets.logprobs.dtype)
    return dense.scatter_add_(1, targets.ids, targets.logprobs.exp())


def divergence(student, targets):
    """The KL by its definition, row by row, from dense probabilities: what each treatment promises."""
    assert targets.treatment in {"bucket", "sampled", "renorm_teacher", "none"}, "a new treatment: define its KL here"
    total = 0.0
    for row in range(len(targets)):
        q = (student[row, : targets.vocab] / targets.temperature).softmax(0)
        ids, p = targets.ids[row], targets.logprobs[row].exp()
        if targets.treatment == "sampled":
            total += sum(-w * q[i].log() for i, w in zip(ids, p, strict=True)) - targets.entropy[row]
            continue
        if targets.treatment == "renorm_teacher":
            p = p / p.sum()
        total += sum(a * (a / q[i]).log() for i, a in zip(ids, p, strict=True))
        if targets.treatment == "bucket":
            unlisted = [i for i in range(targets.vocab) if i not in ids.tolist()]
            t = 1 - p.sum()
            total += t * (t / q[unlisted].sum()).log()
    return targets.temperature**2 * total


sizes = {"k": st.integers(1, 22), "tile": st.integers(1, 30), "temperature": st.sampled_from([0.7, 1.0, 3.0])}


@given(**sizes, seed=st.integers(0, 999))
def test_top_k_is_the_head_and_the_mass_of_the_rest_at_any_tiling(k, tile, temperature, seed):
    logits = teacher(seed=seed)
    targets = Targets.top_k(logits, k, temperature=temperature, tile=tile)
    p, ids = (logits / temperature).softmax(-1).topk(k)
    torch.testing.assert_close(targets.logprobs.exp(), p)
    assert torch.equal(targets.ids, ids)
    torch.testing.assert_close(targets.tail.exp(), 1 - p.sum(1))


def test_the_tail_of_a_sure_teacher_is_no_rounding_noise():
    """1 - Σ p in float32 is 0 or noise here; the truth is 22 exp(-30)."""
    logits = torch.zeros(1, 23, dtype=torch.float32)
    logits[0, 4] = 30.0
    tail = Targets.top_k(logits, 1, tile=5).tail.item()
    assert tail == pytest.approx(math.log(22) - 30, rel=1e-6)


@given(
    tile=st.integers(1, 30), k=st.integers(0, 10), scale=st.sampled_from([1.0, 0.5]), cap=st.sampled_from([None, 4.0])
)
def test_hidden_states_and_a_head_give_the_targets_of_their_logits(tile, k, scale, cap):
    hidden, weight, bias = teacher(5, 7, 1), teacher(23, 7, 2), teacher(1, 23, 3)[0]
    projection = Projection(hidden, weight, bias, scale, cap)
    raw = scale * (hidden @ weight.T + bias)
    logits = raw if cap is None else cap * torch.tanh(raw / cap)
    for made in (
        lambda source: Targets.sample(source, k, 6, tile=tile),
        lambda source: Targets.top_k(source, k + 1, tile=tile),
    ):
        one, other = made(projection), made(logits)
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.logprobs, other.logprobs)
        torch.testing.assert_close(one.tail, other.tail)


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    projection = Projection(teacher(64, 4), teacher(1000, 4, 1))
    largest = []
    whole = Projection.logits
    monkeypatch.setattr(Projection, "logits", lambda self: largest.append(self.vocab) or whole(self))
    Targets.sample(projection, 4, 4, tile=100)
    assert largest == [100] * 10


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased(k, temperature):
    """The mean weight over many draws is the teacher's probability, within 5 standard errors of each token."""
    logits, repeats, samples = teacher(1, 23), 40_000, 4
    targets = Targets.sample(logits.expand(repeats, -1), k, samples, seed=5, temperature=temperature, tile=6)
    p = (logits[0] / temperature).softmax(0)
    tail = targets.tail[0].exp()
    head = p.topk(k).indices
    variance = p / tail * (1 - p / tail) * tail**2 / samples / repeats
    error = (weights(targets).mean(0) - p).abs()
    error[head] -= 1e-9  # exact but for rounding
    variance[head] = 0
    assert (error <= 5 * variance.clamp(min=0).sqrt()).all()
    assert torch.equal(targets.ids[0, :k], head)
    torch.testing.assert_close(targets.entropy, -(p * p.log()).sum().expand(repeats))
    torch.testing.assert_close(weights(targets).sum(1), torch.ones(repeats, dtype=torch.float64))


def test_a_draw_depends_on_seed_and_key_alone():
    logits = teacher(6, 200)
    keys = torch.tensor([5, -3, 8, 2**62, 0, 11])
    whole = Targets.sample(logits, 2, 8, seed=1, keys=keys)
    order = torch.tensor([3, 0, 5])
    some = Targets.sample(logits[order], 2, 8, seed=1, keys=keys[order])
    assert torch.equal(some.ids, whole.ids[order])
    assert not torch.equal(Targets.sample(logits, 2, 8, seed=2, keys=keys).ids, whole.ids)
    same = Targets.sample(logits[:1].expand(6, -1), 2, 8, seed=1, keys=keys).ids
    assert len({tuple(row) for row in same.tolist()}) == 6


@pytest.mark.parametrize("tail", TREATMENTS)
@given(k=st.integers(1, 12), temperature=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 99), extra=st.integers(0, 3))
def test_the_loss_is_the_divergence_that_the_treatment_names(tail, k, temperature, seed, extra):
    logits, student = teacher(seed=seed), teacher(5, 23 + extra, seed=seed + 100)
    if tail == "sampled":
        targets = Targets.sample(logits, k, 5, seed=seed, temperature=temperature)
    else:
        targets = Targets.top_k(logits, k, tail=tail, temperature=temperature)
    labels = torch.arange(5)
    kd = ki_loss(student, labels, targets, alpha=1.0, temperature=temperature, num_items=1).loss
    torch.testing.assert_close(kd, divergence(student, targets))


@given(k=st.integers(1, 23), seed=st.integers(0, 99))
def test_a_bucket_is_a_lower_bound_of_the_full_divergence_and_ends_there(k, seed):
    logits, student, labels = teacher(seed=seed), teacher(seed=seed + 1), torch.arange(5)
    full = ki_loss(student, labels, logits, alpha=1.0).loss
    bucket = ki_loss(student, labels, Targets.top_k(logits, k), alpha=1.0).loss
    assert 0 <= bucket <= full + 1e-12
    if k >= 22:  # the bucket holds one token, or none
        torch.testing.assert_close(bucket, full)


def test_sampled_targets_give_the_gradient_of_the_full_divergence_on_average():
    logits, student = teacher(1), teacher(1, seed=1)
    repeats = 20_000
    many = student.expand(repeats, -1).clone().requires_grad_()
    targets = Targets.sample(logits.expand(repeats, -1), 4, 4)
    loss = ki_loss(many, torch.zeros(repeats, dtype=torch.int64), targets, alpha=1.0, num_items=1).loss
    (gradient,) = torch.autograd.grad(loss, many)
    torch.testing.assert_close(gradient.mean(0), student.softmax(-1)[0] - logits.softmax(-1)[0], rtol=0, atol=2e-3)
    full = ki_loss(student, torch.tensor([0]), logits, alpha=1.0).loss
    assert loss.item() / repeats == pytest.approx(full.item(), abs=2e-2)


def test_dense_targets_change_their_temperature_and_sparse_ones_say_why_not():
    logits = teacher()
    dense = Targets.dense(logits).at(2.5)
    torch.testing.assert_close(dense.logprobs, (logits / 2.5).log_softmax(-1))
    with pytest.raises(GrowError, match="unlisted tokens at another temperature"):
        ki_loss(logits, torch.arange(5), Targets.top_k(logits, 4), alpha=0.5, temperature=2.0)


def test_a_narrower_student_takes_dense_targets_and_refuses_sparse_ones():
    logits, student, labels = teacher(vocab=23), teacher(vocab=20, seed=1), torch.arange(5)
    dense = ki_loss(student, labels, Targets.dense(logits), alpha=0.5).loss
    torch.testing.assert_close(dense, ki_loss(student, labels, logits, alpha=0.5).loss)
    with pytest.raises(GrowError, match="23 token ids for a student with 20"):
        ki_loss(student, labels, Targets.top_k(logits, 4), alpha=0.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda z: Targets.top_k(z, 0), "1 to 23"),
        (lambda z: Targets.top_k(z, 24), "1 to 23"),
        (lambda z: Targets.top_k(z, 3, tail="sampled"), "no such treatment"),
        (lambda z: Targets.top_k(z, 3, tail="ghost"), "bucket"),
        (lambda z: Targets.top_k(z[None], 3), r"\[N, V\]"),
        (lambda z: Targets.sample(z, 3, 0), "at least 1"),
        (lambda z: ki_loss(z, torch.arange(5.0), z, alpha=0.5), "integers"),
        (lambda z: ki_loss(z, torch.arange(5), z, alpha=1.5), "0 to 1"),
        (lambda z: ki_loss(z, torch.arange(5), z, alpha=0.5, temperature=0.0), "not positive"),
        (lambda z: ki_loss(z, torch.arange(5), "teacher", alpha=0.5), "logits, Targets, or a Projection"),
        (lambda z: Targets.sample(z, 3, 2).treated("bucket"), "draws"),
        (lambda z: Targets.top_k(z, 3).treated("sampled"), "draws"),
        (lambda z: ki_loss(z, torch.arange(5), Targets.top_k(z[:4], 3), alpha=0.5), "5 labels"),
        (lambda z: mixture([Targets.top_k(z, 3), Targets.top_k(z, 3)], [0.5, 0.5]), "all dense or all sampled"),
        (lambda z: mixture([Targets.dense(z), Targets.dense(z[:, :9])], [0.5, 0.5]), "same vocabulary"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(GrowError, match=says):
        make(teacher())


@pytest.mark.parametrize(
    "make",
    [
        lambda z, tail: Targets(z, 23, treatment=tail),
        lambda z, tail: Targets(z[:, :3], 23, torch.arange(3).expand(5, 3), z[:, 0], treatment=tail),
        lambda z, tail: dataclasses.replace(Targets.top_k(z, 3), treatment=tail),
        lambda z, tail: Targets.top_k(z, 3, tail=tail),
        lambda z, tail: Targets.top_k(z, 3).treated(tail),
        lambda z, tail: KIConfig(teacher="x", tail=tail),
    ],
)
@pytest.mark.parametrize("tail", ["typo", "Bucket", "", "bucket "])
def test_an_unknown_treatment_is_refused_everywhere(make, tail):
    with pytest.raises(GrowError, match=r"bucket|dense") as refused:
        make(teacher(), tail)
    assert repr(tail) in str(refused.value)


def test_targets_have_what_their_treatment_reads():
    logprobs, ids = teacher()[:, :3], torch.arange(3).expand(5, 3)
    for treatment, lacks in (("bucket", "tail"), ("sampled", "entropy"), ("dense", "'dense'")):
        with pytest.raises(GrowError, match=lacks):
            Targets(logprobs, 23, ids, treatment=treatment)
    with pytest.raises(GrowError, match="'bucket'"):  # nothing is unlisted
        Targets(logprobs, 3, treatment="bucket")


def test_treatments_are_readings_of_the_same_tokens():
    targets = Targets.top_k(teacher(), 4)
    student = teacher(seed=1)
    for tail in TAILS:
        made = Targets.top_k(teacher(), 4, tail=tail)
        losses = [ki_loss(student, torch.arange(5), t, alpha=1.0).loss for t in (targets.treated(tail), made)]
        assert torch.equal(*losses)


def test_a_mixture_of_dense_teachers_is_the_mean_distribution():
    logits = [teacher(seed=seed) for seed in (0, 1)]
    mixed = mixture([Targets.dense(z) for z in logits], [0.25, 0.75])
    expected = 0.25 * logits[0].softmax(-1) + 0.75 * logits[1].softmax(-1)
    torch.testing.assert_close(mixed.logprobs.exp(), expected)


def test_a_mixture_of_sampled_teachers_weighs_their_divergences():
    logits, student, labels = [teacher(seed=seed) for seed in (0, 1)], teacher(seed=2), torch.arange(5)
    parts = [Targets.sample(z, 3, 4) for z in logits]
    mixed = mixture(parts, [0.25, 0.75])
    one, other = (ki_loss(student, labels, part, alpha=1.0).loss for part in parts)
    torch.testing.assert_close(ki_loss(student, labels, mixed, alpha=1.0).loss, 0.25 * one + 0.75 * other)
    torch.testing.assert_close(weights(mixed), 0.25 * weights(parts[0]) + 0.75 * weights(parts[1]))
    assert torch.equal(mixed[1:3].ids, mixed.ids[1:3])
    token = parts[0].ids[0, 0].item()
    knowing = [(w, z) for w, z, part in zip([0.25, 0.75], logits, parts, strict=True) if token in part.ids[0, :3]]
    expected = sum(w * z.softmax(-1)[0, token] for w, z in knowing)
    torch.testing.assert_close(mixed.label_logprobs(torch.full((5,), token))[0].exp(), expected)


@pytest.mark.parametrize("kind", ["dense", "bucket", "sampled"])
def test_the_gate_is_open_where_the_teacher_is_surer_of_the_label(kind):
    logits, student = teacher(200), teacher(200, seed=1)
    labels = logits.argmax(-1)
    labels[::3] = 0
    targets = {
        "dense": Targets.dense(logits),
        "bucket": Targets.top_k(logits, 5),
        "sampled": Targets.sample(logits, 5, 3),
    }[kind]
    known = torch.ones(200, dtype=torch.bool) if kind == "dense" else (targets.ids[:, :5] == labels[:, None]).any(1)
    p, q = (z.softmax(-1).gather(1, labels[:, None])[:, 0] for z in (logits, student))
    is_open = known & (p > q)
    assert 20 < is_open.sum() < 180
    gated = ki_loss(student, labels, targets, alpha=0.7, gate=True)
    rows = [
        ki_loss(student[i : i + 1], labels[i : i + 1], targets[i : i + 1], alpha=0.7 * is_open[i]) for i in range(200)
    ]
    torch.testing.assert_close(gated.loss, torch.stack([row.loss for row in rows]).mean())
