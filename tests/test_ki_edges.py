"""The losses at the edge of what floats and requests allow, both against each other and against float64.

Shapes: N positions, V tokens.
"""

import pytest
import torch
from torch.nn.functional import log_softmax

from growlib import GrowError
from growlib.ki import Projection, Targets, ki_loss, linear_ki_loss, mixture

INF = torch.inf
N, V = 6, 7


def case(seed=0):
    """Student logits, teacher logits [N, V] and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, N, V, generator=generator)
    return student, teacher, torch.randint(V, (N,), generator=generator)


def both(student, labels, teacher, **options):
    """(KILoss, gradient of the logits) of the plain and of the linear form: identity as head, -inf as bias."""
    results = []
    head, bias = torch.eye(student.shape[1]).to(student), torch.where(student == -INF, -INF, 0.0).to(student).amin(0)
    for linear in (False, True):
        logits = (student.masked_fill(student == -INF, 0.0) if linear else student.clone()).requires_grad_()
        if linear:
            result = linear_ki_loss(logits, head, labels, teacher, bias=bias, **options)
        else:
            result = ki_loss(logits, labels, teacher, **options)
        results.append((result, torch.autograd.grad(result.loss, logits)[0]))
    return results


def assert_equal_forms(student, labels, teacher, **options):
    """Both forms agree, and are finite."""
    (plain, expected), (linear, gradient) = both(student, labels, teacher, **options)
    torch.testing.assert_close(linear.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()
    return plain


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integers(dtype):
    student, teacher, labels = case()
    labels[0] = 0
    for (result, gradient), (small, of_small) in zip(
        both(student, labels, teacher, alpha=0.5), both(student, labels.to(dtype), teacher, alpha=0.5), strict=True
    ):
        assert result == small
        assert torch.equal(gradient, of_small)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("tail", ["bucket", "renorm_teacher", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_very_sure_student(scale, tail, temperature):
    """Where the tokens that are not listed have no weight left in float32."""
    student, teacher, labels = case()
    targets = Targets.top_k(teacher, 2, tail=tail, temperature=temperature)
    for alpha in (0.0, 0.5):
        assert_equal_forms(scale * student, labels, targets, alpha=alpha, temperature=temperature)


@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("tile", [1, 3, 100])
def test_a_teacher_that_excludes_tokens(k, tile):
    student, teacher, labels = case()
    teacher[:, [0, 2, 3, 6]] = -INF
    targets = Targets.top_k(teacher, k, tile=tile)
    assert all(len(set(row)) == k for row in targets.ids.tolist())
    p = log_softmax(teacher.double(), 1)
    expected = torch.where(p == -INF, 0, p.exp() * (p - log_softmax(student.double(), 1))).sum(1).mean()
    dense = assert_equal_forms(student, labels, teacher, alpha=0.5)
    torch.testing.assert_close(dense.kd.double(), expected, rtol=1e-5, atol=1e-6)
    sparse = assert_equal_forms(student, labels, targets, alpha=0.5)
    if k >= 3:
        torch.testing.assert_close(sparse.kd.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_student_that_excludes_what_the_teacher_excludes():
    student, teacher, labels = case()
    student[:, 6] = teacher[:, 6] = -INF
    labels = labels.clamp(max=5)
    for source in (teacher, Targets.top_k(teacher, V), Targets.top_k(teacher, 3)):
        loss = assert_equal_forms(student, labels, source, alpha=0.5)
        torch.testing.assert_close(loss.ce, assert_equal_forms(student[:, :6], labels, teacher[:, :6], alpha=0.5).ce)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_teacher_of_nan_where_the_gate_is_closed(sparse):
    student, teacher, labels = case()
    expected = assert_equal_forms(student, labels, teacher, alpha=0.0)
    teacher[2] = torch.nan
    source = Targets.top_k(teacher, 2) if sparse else teacher
    assert assert_equal_forms(student, labels, source, alpha=0.0).loss == expected.loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gate_compares_like_with_like(temperature):
    """At the same temperature, over the same tokens: a teacher that is hardly worse than the student closes it."""
    student, teacher, labels = case()
    options = {"alpha": 0.5, "temperature": temperature, "gate": True}
    for vocab in (V, 5):
        of_few = labels.clamp(max=vocab - 1)
        worse = student.scatter_add(1, of_few[:, None], torch.full((N, 1), -0.01))[:, :vocab]
        same = assert_equal_forms(student, of_few, worse, **options)
        assert same.loss == same.ce
    log_p, log_q = (log_softmax(z.double() / temperature, 1) for z in (teacher, student))
    ce = -log_softmax(student.double(), 1).gather(1, labels[:, None])[:, 0]
    kd = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)
    opened = log_p.gather(1, labels[:, None]) > log_q.gather(1, labels[:, None])
    assert 0 < opened.sum() < N
    expected = torch.where(opened[:, 0], (ce + kd) / 2, ce).mean()
    torch.testing.assert_close(
        assert_equal_forms(student, labels, teacher, **options).loss.double(), expected, rtol=1e-5, atol=1e-6
    )


def test_a_shut_gate_keeps_an_infinite_kl_out():
    student, teacher = torch.tensor([[5.0, 0.0, -INF]]), torch.tensor([[0.0, 0.0, 1.0]])
    result = assert_equal_forms(student, torch.tensor([0]), teacher, alpha=0.5, gate=True)
    assert result.loss == result.ce


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_alpha(gate, start, dtype):
    student, teacher, labels = case()
    slopes = []
    for linear in (False, True):
        alpha = torch.tensor(start, dtype=dtype, requires_grad=True)
        if linear:
            result = linear_ki_loss(student, torch.eye(V), labels, teacher, alpha=alpha, gate=gate)
        else:
            result = ki_loss(student, labels, teacher, alpha=alpha, gate=gate)
        slopes.append(torch.autograd.grad(result.loss, alpha)[0])
    assert slopes[0] != 0
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of_student", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [lambda z: z, lambda z: Targets.top_k(z, 2), lambda z: Targets.sample(z, 2, 3)])
def test_targets_of_another_precision(of_student, make):
    student, teacher, labels = case()
    other = torch.float64 if of_student == torch.float32 else torch.float32
    assert_equal_forms(student.to(of_student), labels, make(teacher.to(other)), alpha=0.5)


def test_another_ignore_index_makes_minus_100_no_label():
    student, teacher, labels = case()
    labels[0], labels[1] = -1, -100
    for loss in (ki_loss, lambda z, *rest, **options: linear_ki_loss(z, torch.eye(V), *rest, **options)):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            loss(student, labels, teacher, alpha=0.5, ignore_index=-1)


def test_no_second_derivative_is_said():
    student, teacher, labels = case()
    student.requires_grad_()
    loss = linear_ki_loss(student, torch.eye(V), labels, teacher, alpha=0.5).loss
    (gradient,) = torch.autograd.grad(loss.square(), student, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), student)


def test_recomputed_gradients_under_autocast():
    student, teacher, labels = case()
    projection = Projection(teacher, torch.eye(V))
    gradients = []
    for recompute in (False, True):
        hidden = student.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_ki_loss(hidden, torch.eye(V), labels, projection, alpha=0.5, recompute=recompute).loss
            gradients += torch.autograd.grad(loss, hidden)
    assert torch.equal(*gradients)


def test_autocast_leaves_float64_alone():
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in case())
    head, options = torch.eye(V).double() / 3, {"alpha": 0.5}
    expected = linear_ki_loss(student, head, labels, teacher, **options).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_ki_loss(student, head, labels, teacher, **options).loss == expected


def test_no_gradient_reaches_targets():
    student, teacher, labels = case()
    targets = Targets.dense(teacher)
    targets.logprobs.requires_grad_()
    with pytest.raises(RuntimeError, match="does not require grad"):
        ki_loss(student, labels, targets, alpha=0.5).loss.backward()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": torch.full((N,), 0.5)}, "no dimensions"),
        ({"alpha": 0.5, "num_items": torch.ones(2)}, "no dimensions"),
        ({"alpha": 0.5, "num_items": 0}, "1 or more"),
        ({"alpha": 0.5, "temperature": 0.0}, "not positive"),
        ({"alpha": 1.5}, "alpha=1.5: it is out of range"),
        ({"alpha": 0.5, "teacher": "gpt2"}, "a teacher that is a str"),
        ({"alpha": 0.5, "student": torch.randn(N - 1, V)}, f"at {N - 1} positions"),
        ({"alpha": 0.5, "teacher": torch.randn(N + 1, V)}, f"at {N + 1} positions"),
    ],
)
def test_requests_that_neither_form_takes(options, says):
    student, teacher, labels = case()
    options = {"student": student, "teacher": teacher, **options}
    student, teacher = options.pop("student"), options.pop("teacher")
    with pytest.raises(GrowError, match=says):
        ki_loss(student, labels, teacher, **options)
    with pytest.raises(GrowError, match=says):
        linear_ki_loss(student, torch.eye(V), labels, teacher, **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda z: linear_ki_loss(z, torch.eye(V), torch.zeros(N).long(), z, alpha=0.5, chunk=0), "chunk=0"),
        (lambda z: linear_ki_loss(z, torch.eye(V), torch.zeros(N).long(), z, alpha=0.5, softcap=0), "softcap=0"),
        (lambda z: Targets.top_k(z, 2, temperature=-1.0), "not positive"),
        (lambda z: Targets.top_k(z, 2, tile=0), "tile=0"),
        (lambda z: Targets.dense(z, temperature=0.0), "not positive"),
        (lambda z: Targets.dense(z).at(-1.0), "not positive"),
        (lambda z: Targets.sample(z, 2, 2, keys=torch.arange(N - 1)), rf"int64 \[{N}\]"),
        (lambda z: Targets.sample(z, 2, 2, keys=torch.arange(N).float()), "float32"),
        (lambda z: mixture([Targets.dense(z)] * 2, [1.0, 1.0]), "summing to 1"),
        (lambda z: mixture([Targets.dense(z)] * 2, [1.0]), "one positive weight"),
        (lambda z: mixture([], []), "one positive weight"),
    ],
)
def test_requests_that_say_nothing(make, says):
    with pytest.raises(GrowError, match=says):
        make(case()[1])
