"""The Triton kernels against its twin in PyTorch: on the CPU in Triton's interpreter, with `-m gpu` on CUDA."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from growlib.ki import TREATMENTS, Projection, Targets, linear_ki_loss, mixture
from growlib.ki import linear as plain
from growlib.ki.loss import NO_LABEL
from growlib.ki.predictions import Mixture, as_predictions

pytest.importorskip("triton")
from growlib.ki import fused

KINDS = ("logits", "dense", "projection", "mixture", "drawn mixture", *TREATMENTS)
HALF = (torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.parametrize(
        "device",
        [
            pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled")),
            pytest.param("cuda", marks=pytest.mark.gpu),
        ],
    ),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow).*:RuntimeWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch, device):
    """The kernel is used on the CPU too, in blocks so small that a row has several."""
    monkeypatch.setattr(fused, "usable", lambda student: student.hidden.dtype in fused.DTYPES)
    monkeypatch.setattr(fused, "BLOCK", 32)
    if device == "cpu":
        monkeypatch.setattr(fused, "_memory", lambda _: 1 << 20)


def normal(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def teacher_of(kind, positions, vocab, temperature, k, generator, dtype=torch.float32):
    """What a teacher says, and what kind that is."""
    hidden, head = normal(positions, 3, generator=generator), normal(vocab, 3, generator=generator)
    logits = hidden @ head.T
    draws = [Targets.sample(logits, k, 5, seed=seed, temperature=temperature) for seed in range(2)]
    return {
        "logits": lambda: as_predictions(logits.to(dtype), positions),
        "dense": lambda: Targets.dense(logits, temperature=1.7),
        "projection": lambda: Projection(hidden.to(dtype), head.to(dtype), None, 0.8, 3.0),
        "mixture": lambda: Mixture((as_predictions(logits, positions), Projection(hidden, 0.5 * head)), (0.3, 0.7)),
        "drawn mixture": lambda: mixture(draws, (0.4, 0.6)),
        "sampled": lambda: draws[0],
    }.get(kind, lambda: Targets.top_k(logits, k, tail=kind, temperature=temperature))()


def to(teacher, device):
    if isinstance(teacher, Mixture):
        return Mixture(tuple(to(part, device) for part in teacher.parts), teacher.weights)
    if isinstance(teacher, Targets):
        return teacher.to(device)
    if isinstance(teacher, Projection):
        return Projection(teacher.hidden.to(device), teacher.weight.to(device), None, teacher.scale, teacher.softcap)
    return as_predictions(teacher.tensor.to(device), len(teacher))


def both(student, labels, teacher, temperature, gate=False, numbers_only=True, alpha=0.3):
    """(sums, gradient) of the kernel, and of its twin in float64 from the same logits."""
    number = student.hidden.new_tensor(alpha, dtype=torch.float32)
    mine = fused.FusedChunks(student, number, labels, teacher, temperature, gate, numbers_only)
    raw, same = student.raw().double(), torch.eye(student.vocab, dtype=torch.float64, device=student.device)
    excluded = (raw[0] == -torch.inf).double().masked_fill(raw[0] == -torch.inf, -torch.inf)  # -inf · 0 is no number
    exact = Projection(raw.nan_to_num(neginf=0.0), same, excluded, student.scale, student.softcap)
    twin = plain.PlainChunks(exact, number.double(), labels, teacher, temperature, gate, numbers_only)
    found = []
    for chunks in (mine, twin):
        gradients = [chunks.gradient(slice(start, start + 3), True) for start in range(0, len(labels), 3)]
        found.append((chunks.sums.double(), torch.cat(gradients)))
    return found


def assert_same(mine, twin):
    (sums, gradient), (exact, slope) = mine, twin
    torch.testing.assert_close(sums, exact, rtol=2e-5, atol=2e-5)
    tolerance = 2e-5 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
    largest = slope.abs().max().item()
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * 1e-2 * largest + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vocab=st.integers(2, 70),
    padding=st.sampled_from([0, 0, -1, 3]),
    k=st.integers(1, 40),
    temperature=st.sampled_from([1.0, 1.0, 2.0]),
    scale=st.sampled_from([1.0, 0.6]),
    cap=st.sampled_from([None, 5.0]),
    biased=st.booleans(),
    gate=st.booleans(),
    dtype=st.sampled_from([torch.float32, *HALF]),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_its_twin(device, kind, vocab, padding, k, temperature, scale, cap, biased, gate, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    of_teacher = max(vocab + (min(padding, 0) if kind in (*TREATMENTS, "drawn mixture") else padding), 1)
    teacher = to(teacher_of(kind, 4, of_teacher, temperature, min(k, of_teacher), generator, dtype), device)
    hidden, head = normal(4, 3, generator=generator, dtype=dtype), normal(vocab, 3, generator=generator, dtype=dtype)
    bias = normal(vocab, generator=generator, dtype=dtype).to(device) if biased else None
    student = Projection(hidden.to(device), head.to(device), bias, scale, cap)
    labels = torch.randint(vocab, (4,), generator=generator)
    labels[seed % 4] = NO_LABEL
    assert_same(*both(student, labels.to(device), teacher, temperature, gate))


def small(kind, device, *, vocab=40, dtype=torch.float32, positions=5):
    generator = torch.Generator().manual_seed(1)
    teacher = to(teacher_of(kind, positions, vocab, 1.0, 6, generator), device)
    hidden, head = (normal(*s, generator=generator, dtype=dtype).to(device) for s in ((positions, 3), (vocab, 3)))
    labels = torch.randint(vocab, (positions,), generator=generator).to(device)
    return hidden.requires_grad_(), head.requires_grad_(), labels, teacher


@pytest.mark.parametrize("kind", ["logits", "bucket", "sampled"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_at_its_ends(device, kind, alpha):
    hidden, head, labels, teacher = small(kind, device)
    assert_same(*both(Projection(hidden.detach(), head.detach()), labels, teacher, 1.0, alpha=alpha))


@pytest.mark.parametrize("numbers_only", [True, False])
@pytest.mark.parametrize("kind", ["logits", "bucket", "sampled"])
def test_where_the_teacher_says_no_numbers(device, kind, numbers_only):
    hidden, head, labels, teacher = small(kind, device)
    (teacher.tensor if kind == "logits" else teacher.logprobs)[1, 3] = torch.nan
    (teacher.tensor if kind == "logits" else teacher.tail)[2] = torch.inf
    student = Projection(hidden.detach(), head.detach())
    (sums, gradient), (exact, slope) = both(student, labels, teacher, 1.0, numbers_only=numbers_only)
    assert sums[6] == exact[6] == 2
    rows = gradient.isfinite().all(1)
    assert rows.tolist() == slope.isfinite().all(1).tolist()
    assert rows.all() == numbers_only
    torch.testing.assert_close(gradient[rows].double(), slope[rows], rtol=1e-5, atol=1e-6)
    assert sums.isfinite().tolist() == exact.isfinite().tolist()
    finite = exact.isfinite()
    torch.testing.assert_close(sums[finite], exact[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["logits", "bucket", "none"])
def test_tokens_that_nobody_can_say(device, kind):
    """-inf as a logit is legal, on either side; with a bias of -inf a listed token has one."""
    hidden, head, labels, teacher = small(kind, device)
    bias = torch.zeros(40, device=device)
    bias[[5, 39]] = -torch.inf
    labels.fill_(3)
    if kind == "logits":
        teacher.tensor[:, [5, 7, 39]] = -torch.inf
    else:
        teacher.ids[:, 5] = torch.where((teacher.ids == 5).any(1), teacher.ids[:, 5], 5)
        teacher.logprobs.masked_fill_(teacher.ids == 5, -torch.inf)
        teacher.logprobs.masked_fill_(teacher.ids == 39, -torch.inf)
    assert_same(*both(Projection(hidden.detach(), head.detach(), bias), labels, teacher, 1.0))


@pytest.mark.parametrize("rest", [0, 2])
def test_no_token_is_left_for_the_bucket(device, rest):
    """All are listed, or nobody can say the rest."""
    generator = torch.Generator().manual_seed(0)
    teacher = to(teacher_of("bucket", 3, 9, 1.0, 9, generator), device)
    bias = torch.zeros(9 + rest, device=device)
    bias[9:] = -torch.inf
    student = Projection(torch.eye(3, device=device), normal(9 + rest, 3, generator=generator).to(device), bias)
    teacher = replace(teacher, vocab=9 + rest)
    assert_same(*both(student, torch.tensor([0, 4, 8], device=device), teacher, 1.0))


@pytest.mark.parametrize("kind", ["projection", "bucket"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_whole_loss_is_the_same(device, kind, recompute, monkeypatch):
    """Value and gradients of `linear_ki_loss`, α's among them, over chunks of which the last is shorter."""
    hidden, head, labels, teacher = small(kind, device)
    labels[1] = -100
    alpha = torch.tensor(0.4, device=device, requires_grad=True)
    results = []
    for usable in (fused.usable, lambda _: False):
        monkeypatch.setattr(fused, "usable", usable)
        loss = linear_ki_loss(hidden, head, labels, teacher, alpha=alpha, chunk=2, recompute=recompute, num_items=7)
        results.append((*loss, *torch.autograd.grad(1.7 * loss.loss, (hidden, head, alpha))))
    assert results[0][0].dtype == torch.float32
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_gradient_writes_none(device):
    hidden, head, labels, teacher = small("bucket", device)
    number = torch.tensor(0.5, device=device)
    chunks = fused.FusedChunks(Projection(hidden.detach(), head.detach()), number, labels, teacher, 1.0, False, True)
    assert chunks.gradient(slice(None), False) is None
    assert chunks.sums[1] > 0


def test_no_position_at_all(device):
    hidden, head, labels, teacher = small("bucket", device)
    loss = linear_ki_loss(hidden, head, labels * 0 - 100, teacher, alpha=0.5).loss
    assert loss == 0
    assert not torch.autograd.grad(loss, head)[0].any()


@pytest.mark.parametrize("label", [-1, 40])
def test_a_label_out_of_bounds_is_not_ignored(device, label):
    if device == "cuda":
        pytest.skip("it ends the process's use of the device")
    hidden, head, labels, teacher = small("bucket", device)
    labels[2] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_ki_loss(hidden, head, labels, teacher, alpha=0.5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("kind", ["projection", "bucket"])
def test_compiled_it_is_one_graph(device, kind):
    hidden, head, labels, teacher = small(kind, device)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def loss(alpha, labels):
        return linear_ki_loss(hidden, head, labels, teacher, alpha=alpha, chunk=3)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for alpha, ignored in ((1.0, 4), (0.4, 2)):
        labels = labels.clone()
        labels[ignored] = -100
        alpha = torch.tensor(alpha, device=device)
        results = [
            (*r, *torch.autograd.grad(r.loss, (hidden, head))) for r in (f(alpha, labels) for f in (compiled, loss))
        ]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    assert "ki_epilogue" in str(graphs[0].graph) or any(
        "ki_epilogue" in str(m.graph) for m in graphs[0].modules() if hasattr(m, "graph")
    )


def test_the_size_of_a_chunk_follows_memory_vocabulary_and_head(device, monkeypatch):
    gibi = 1 << 30

    def rows(vocab, width, memory=80 * gibi, teacher=None, dtype=torch.bfloat16):
        monkeypatch.setattr(fused, "_memory", lambda _: memory)
        return fused.chunk_size(
            Projection(*(torch.empty(n, width, dtype=dtype, device="meta") for n in (1, vocab))), teacher
        )

    assert rows(32768, 1024) == 80 * gibi // 128 // (2 * 32768)  # 640 MiB of logits
    assert rows(32768, 1024, dtype=torch.float32) == rows(32768, 1024) // 2
    assert rows(32768, 1024, 24 * gibi) < rows(32768, 1024)
    assert rows(151936, 4096) * 151936 * 2 <= 4 * 151936 * 4096 < (rows(151936, 4096) + 1) * 151936 * 2
    assert rows(151936, 4096, 24 * gibi) * 151936 * 2 <= 24 * gibi // 32
    assert rows(1 << 18, 8, gibi) == 16
    beside = Projection(*(torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (1, 32768)))
    assert rows(32768, 1024, teacher=beside) == rows(32768, 1024) // 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("kind", ["projection", "bucket", "sampled"])
def test_the_host_waits_for_nothing(device, kind):
    if device == "cpu":
        pytest.skip("there is one host")
    hidden, head, labels, teacher = small(kind, device, dtype=torch.bfloat16)

    def step():
        sums = plain.linear_ki_sums(Projection(hidden, head), labels, teacher, 0.5, 1.0, True, 2)
        torch.autograd.grad(sums.loss, (hidden, head))

    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")  # stays on for all that follows, whatever happens here
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_the_kernels_compile_where_there_is_no_gpu(device):
    """For sm_80 and sm_90: loads, types and barriers that the interpreter does not mind."""
    if device == "cuda":
        pytest.skip("the other tests compile them")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        str(Path(__file__).parent / "ki_compiled.py"),
        str(Path(fused.__file__).with_name("epilogue.py")),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
