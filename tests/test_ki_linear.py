"""The loss from hidden states against its plain twin, which has all logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlib import GrowError
from growlib.ki import TREATMENTS, Projection, Targets, ki_loss, linear_ki_loss

KINDS = ("logits", "dense", "projection", *TREATMENTS)


def normal(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Case:
    """A student's hidden states and head, labels of which some are ignored, and a teacher of each kind."""

    def __init__(self, kind, *, positions=23, vocab=50, teacher_vocab=50, temperature=1.0, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = normal(positions, 8, generator=generator, dtype=dtype).requires_grad_()
        self.weight = normal(vocab, 8, generator=generator, dtype=dtype).requires_grad_()
        self.bias = normal(vocab, generator=generator, dtype=dtype).requires_grad_()
        self.alpha = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        self.labels = torch.randint(min(vocab, teacher_vocab), (positions,), generator=generator)
        self.labels[::4] = -100
        hidden = normal(positions, 5, generator=generator, dtype=dtype)
        projection = Projection(hidden, normal(teacher_vocab, 5, generator=generator, dtype=dtype))
        logits = projection.logits()
        self.teacher = self.twin = {
            "logits": lambda: logits,
            "dense": lambda: Targets.dense(logits, temperature=temperature),
            "projection": lambda: projection,
            "sampled": lambda: Targets.sample(logits, 4, 5, temperature=temperature),
        }.get(kind, lambda: Targets.top_k(logits, 7, tail=kind, temperature=temperature))()
        if kind == "projection":
            self.twin = logits
        self.temperature = temperature

    def gradients(self, loss, alpha):
        inputs = (self.hidden, self.weight, self.bias, *([self.alpha] if alpha is self.alpha else []))
        return torch.autograd.grad(1.7 * loss, inputs)  # an upstream gradient that is not 1

    def both(self, *, scale=1.0, softcap=None, chunk=6, recompute=False, **options):
        """(loss, ce, kd, gradients ...) of the linear loss and of its twin."""
        options = {"alpha": self.alpha, "temperature": self.temperature, **options}
        linear = linear_ki_loss(
            self.hidden, self.weight, self.labels, self.teacher, bias=self.bias, logit_scale=scale, softcap=softcap,
            chunk=chunk, recompute=recompute, **options,
        )  # fmt: skip
        logits = scale * (self.hidden @ self.weight.T + self.bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        plain = ki_loss(logits, self.labels, self.twin, **options)
        return [(*result, *self.gradients(result.loss, options["alpha"])) for result in (linear, plain)]


@pytest.mark.parametrize("kind", KINDS)
@given(
    teacher_vocab=st.sampled_from([44, 50, 55]),
    temperature=st.sampled_from([1.0, 2.0]),
    scale=st.sampled_from([1.0, 0.6]),
    softcap=st.sampled_from([None, 5.0]),
    gate=st.booleans(),
    recompute=st.booleans(),
    chunk=st.sampled_from([1, 6, 100]),
    num_items=st.sampled_from([None, 11]),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_the_twins(kind, teacher_vocab, temperature, seed, **options):
    """Over padded vocabularies on either side, at both temperatures, in every chunking, to 1e-5 in float32."""
    if kind in TREATMENTS:
        teacher_vocab = min(teacher_vocab, 50)  # sparse targets are taken over the common ids
    case = Case(kind, teacher_vocab=teacher_vocab, temperature=temperature, seed=seed)
    for one, other in zip(*case.both(**options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(other.abs().max().item(), 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_they_agree_to_1e10(kind):
    for one, other in zip(*Case(kind, dtype=torch.float64, temperature=2.0).both(softcap=5.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 1.0, torch.tensor(0.0), torch.tensor(1.0)])
def test_alpha_at_its_ends_keeps_the_other_term_out(alpha):
    case = Case("dense")
    loss, ce, kd, *_ = case.both(alpha=alpha)[0]
    assert torch.equal(loss, kd if float(alpha) else ce)
    broken = linear_ki_loss(case.hidden, case.weight, case.labels, case.twin[:].logprobs * torch.nan, alpha=0.0)
    assert broken.loss.isfinite()


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tensor_of_all_logits_is_made_or_kept(recompute):
    """With chunks of 8 of 512 positions the largest tensor that autograd or the loss makes is one of 8 x V."""
    generator = torch.Generator().manual_seed(0)
    hidden = normal(512, 4, generator=generator).requires_grad_()
    weight = normal(300, 4, generator=generator).requires_grad_()
    targets = Targets.top_k(normal(512, 300, generator=generator), 5)
    labels = torch.zeros(512, dtype=torch.int64)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.seen = max(self.seen, tensor.numel())
            return result

    with Largest() as largest:
        linear_ki_loss(hidden, weight, labels, targets, alpha=0.5, chunk=8, recompute=recompute).loss.backward()
    assert largest.seen == max(8 * 300, 512 * 5)  # a chunk of logits, or the targets


def test_gradients_that_nobody_wants_are_not_computed():
    """A frozen head (PEFT) costs no product for its gradient; no gradient at all costs one product."""
    products = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                products.append(function)
            return function(*args, **(kwargs or {}))

    counts = []
    for head, states in ((True, True), (False, True), (False, False)):
        case = Case("bucket")
        products.clear()
        with Products():
            loss = linear_ki_loss(
                case.hidden.detach().requires_grad_(states), case.weight.detach().requires_grad_(head), case.labels,
                case.teacher, alpha=0.5,
            ).loss  # fmt: skip
            if states:
                loss.backward()
        counts.append(len(products))
    assert counts == [3, 2, 1]


def test_all_labels_ignored_gives_zero_loss_and_gradient():
    case = Case("bucket")
    case.labels[:] = -100
    loss, ce, kd, *gradients = case.both()[0]
    assert [loss.item(), ce.item(), kd.item()] == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_summed_in_float32(dtype):
    case = Case("bucket", dtype=dtype)
    linear, plain = case.both(alpha=0.5)
    assert linear[0].dtype == torch.float32
    for one, other in zip(linear, plain, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.02)


def test_autocast_projects_in_its_dtype():
    case = Case("bucket")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5, bias=case.bias)
        logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    assert logits.dtype == torch.bfloat16
    full = linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5, bias=case.bias)
    assert linear.loss != full.loss
    torch.testing.assert_close(linear.loss, full.loss, rtol=0.02, atol=0.0)
    (gradient,) = torch.autograd.grad(linear.loss, case.weight)
    assert gradient.dtype == torch.float32


def test_batched_shapes_are_flattened():
    case = Case("logits", positions=24)
    flat = linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5)
    batched = linear_ki_loss(
        case.hidden.view(4, 6, -1), case.weight, case.labels.view(4, 6), case.teacher.view(4, 6, -1), alpha=0.5
    )
    assert torch.equal(flat.loss, batched.loss)


def test_whole_logits_take_a_projection_as_its_logits():
    case = Case("projection")
    logits = case.hidden @ case.weight.T
    losses = [ki_loss(logits, case.labels, teacher, alpha=0.5).loss for teacher in (case.teacher, case.twin)]
    assert torch.equal(*losses)


def test_a_mismatch_of_positions_is_named():
    case = Case("bucket")
    with pytest.raises(GrowError, match="22 labels"):
        linear_ki_loss(case.hidden, case.weight, case.labels[1:], case.teacher, alpha=0.5)
    with pytest.raises(GrowError, match="the teacher's predictions at 22 positions"):
        linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher[1:], alpha=0.5)
    teacher = Case("projection").teacher.rows(slice(1, None))
    with pytest.raises(GrowError, match="the teacher's predictions at 22 positions"):
        linear_ki_loss(case.hidden, case.weight, case.labels, teacher, alpha=0.5)
    with pytest.raises(GrowError, match=r"a head \(50, 7\).* a weight \[vocabulary, 8\]"):
        linear_ki_loss(case.hidden, case.weight[:, 1:], case.labels, case.teacher, alpha=0.5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize(
    "kind", [k if k in ("bucket", "projection") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_compiled_it_is_one_graph_for_a_whole_schedule(kind):
    """No graph break (`fullgraph`), no second graph when α or the number of labels that count changes."""
    case = Case(kind)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def loss(alpha, labels):
        return linear_ki_loss(
            case.hidden, case.weight, labels, case.teacher, alpha=alpha, bias=case.bias, chunk=6, gate=kind == "sampled"
        )

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for alpha, ignored in ((1.0, 4), (0.6, 3), (0.0, 2), (0.5, 1)):
        labels = case.labels.clone()
        labels[::ignored] = -100  # all of them in the last round
        alpha = torch.tensor(alpha, requires_grad=True)
        one, other = compiled(alpha, labels), loss(alpha, labels)
        inputs = (case.hidden, case.weight, case.bias, alpha)
        gradients = [torch.autograd.grad(result.loss, inputs) for result in (one, other)]
        for a, b in zip((*one, *gradients[0]), (*other, *gradients[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("label", [-1, 50])
def test_a_label_out_of_bounds_is_not_ignored(label):
    case = Case("bucket")
    case.labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5)
