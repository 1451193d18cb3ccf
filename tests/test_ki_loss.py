"""The KI loss against the paper's sums written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlib.ki import ki_loss

IGNORED = -100


def oracle(student, labels, teacher, alpha, temperature, num_items=None):
    """L = (1 - α) CE + α τ² KL(P_teacher(τ) ‖ P_student(τ)), position by position, with softmax sums."""
    cross_entropy = divergence = count = 0.0
    for z, y, t in zip(student.double(), labels.tolist(), teacher.double(), strict=True):
        if y == IGNORED:
            continue
        count += 1
        cross_entropy -= math.log(math.exp(z[y]) / sum(math.exp(x) for x in z))
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in z]
        divergence += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    denominator = num_items or count or 1
    ce, kd = cross_entropy / denominator, temperature**2 * divergence / denominator
    return (1 - alpha) * ce + alpha * kd, ce, kd


def example(positions=6, vocab=7, seed=0, ignored=(1, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        2 * torch.randn(positions, vocab, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    labels = torch.randint(vocab, (positions,), generator=generator)
    labels[[i for i in ignored if i < positions]] = IGNORED
    return student, labels, teacher


@settings(max_examples=60, deadline=None)
@given(
    positions=st.integers(1, 6),
    vocab=st.integers(2, 9),
    temperature=st.floats(0.3, 5.0),
    alpha=st.floats(0.0, 1.0),
    ignored=st.sets(st.integers(0, 5)),
    num_items=st.none() | st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_matches_the_float64_oracle(positions, vocab, temperature, alpha, ignored, num_items, seed):
    student, labels, teacher = example(positions, vocab, seed, ignored)
    result = ki_loss(student, labels, teacher, alpha=alpha, temperature=temperature, num_items=num_items)
    expected = torch.tensor(oracle(student, labels, teacher, alpha, temperature, num_items))
    # float32 log-softmax of |logits / τ| < 40 errs by a few 1e-6 per term, and τ² scales it
    torch.testing.assert_close(torch.stack(result), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradient_matches_finite_differences_of_the_oracle(temperature, alpha):
    student, labels, teacher = example(dtype=torch.float64)
    student.requires_grad_()
    ki_loss(student, labels, teacher, alpha=alpha, temperature=temperature).loss.backward()
    step = 1e-5
    numeric = torch.zeros_like(student)
    for i in range(student.numel()):
        shift = torch.zeros(student.numel(), dtype=torch.float64)
        shift[i] = step
        up, down = (
            oracle(student.detach() + sign * shift.view_as(student), labels, teacher, alpha, temperature)[0]
            for sign in (1, -1)
        )
        numeric.view(-1)[i] = (up - down) / (2 * step)
    torch.testing.assert_close(student.grad, numeric, rtol=1e-6, atol=1e-8)


def test_divergence_is_zero_with_zero_gradient_where_student_equals_teacher():
    _, labels, teacher = example()
    student = teacher.clone().requires_grad_()
    result = ki_loss(student, labels, teacher, alpha=1.0, temperature=2.0)
    result.loss.backward()
    torch.testing.assert_close(result.kd, torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_tau_squared_keeps_the_gradient_scale_at_high_temperature():
    """For τ → ∞ the gradient of τ² KL tends to (z - mean z - t + mean t) / V (Hinton et al. 2015, Eq. 4)."""
    student, labels, teacher = example(ignored=(), dtype=torch.float64)
    student.requires_grad_()
    ki_loss(student, labels, teacher, alpha=1.0, temperature=1e4, num_items=1).loss.backward()
    centred = [z - z.mean(-1, keepdim=True) for z in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / student.shape[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, torch.tensor(0.5)])
def test_all_labels_ignored_gives_zero_loss_and_gradient(alpha):
    student, labels, teacher = example(ignored=range(6))
    student.requires_grad_()
    result = ki_loss(student, labels, teacher, alpha=alpha)
    result.loss.backward()
    assert [x.item() for x in result] == [0.0, 0.0, 0.0]
    assert not student.grad.any()


def test_alpha_zero_keeps_a_broken_teacher_out():
    student, labels, teacher = example()
    assert ki_loss(student, labels, teacher * math.nan, alpha=0.0).loss.isfinite()


def test_tensor_alpha_equals_float_alpha():
    student, labels, teacher = example()
    from_float = ki_loss(student, labels, teacher, alpha=0.3).loss
    torch.testing.assert_close(ki_loss(student, labels, teacher, alpha=torch.tensor(0.3)).loss, from_float)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student, labels, teacher = example(dtype=dtype)
    result = ki_loss(student, labels, teacher, alpha=0.5, temperature=2.0)
    assert result.loss.dtype == torch.float32
    upcast = ki_loss(student.float(), labels, teacher.float(), alpha=0.5, temperature=2.0)
    assert torch.equal(result.loss, upcast.loss)


def test_a_narrower_teacher_is_compared_on_the_common_vocabulary():
    student, labels, teacher = example(vocab=7)
    labels[labels >= 5] = 0
    result = ki_loss(student, labels, teacher[:, :5], alpha=0.5)
    divergence = oracle(student[:, :5], labels, teacher[:, :5], 1.0, 1.0)[2]
    cross_entropy = oracle(student, labels, teacher, 0.0, 1.0)[1]
    torch.testing.assert_close(torch.stack(result[1:]), torch.tensor([cross_entropy, divergence]))


def test_batched_shapes_are_flattened_position_by_position():
    student, labels, teacher = example()
    flat = ki_loss(student, labels, teacher, alpha=0.5)
    batched = ki_loss(student.view(2, 3, -1), labels.view(2, 3), teacher.view(2, 3, -1), alpha=0.5)
    assert torch.equal(flat.loss, batched.loss)
