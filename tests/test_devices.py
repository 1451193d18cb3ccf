"""What must hold on any device. On the CPU by default; `pytest -m gpu` runs the same on CUDA."""

import pytest
import torch
from ki_tiny import collate, examples, half, llama, parameters, train
from transformers import AutoModelForCausalLM

import growlib
from growlib import KIConfig, cache_teacher
from growlib.ki import Targets, ki_loss, linear_ki_loss

pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def teachers(logits):
    return {
        "dense": logits,
        "bucket": Targets.top_k(logits, 8),
        "sampled": Targets.sample(logits, 8, 6),
    }


@pytest.mark.parametrize("kind", ["dense", "bucket", "sampled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_linear_loss_against_its_twin_in_float64(device, dtype, tolerance, kind):
    """Relative distance of the gradients; several chunks; the float64 twin reads the same rounded inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((300, 64), (1000, 64)))
    labels = torch.randint(1000, (300,), generator=generator).to(device)
    labels[::7] = -100
    teacher = teachers(2 * torch.randn(300, 1000, generator=generator).to(device))[kind]
    found = [tensor.requires_grad_() for tensor in (hidden, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in found]
    one = linear_ki_loss(*found, labels, teacher, alpha=0.4, chunk=64)
    two = ki_loss(exact[0] @ exact[1].T, labels, teacher, alpha=0.4)
    assert one.loss.item() == pytest.approx(two.loss.item(), rel=tolerance)
    for mine, theirs in zip(torch.autograd.grad(one.loss, found), torch.autograd.grad(two.loss, exact), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_targets_are_the_same_on_every_device(device):
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0))
    for make in (lambda z: Targets.top_k(z, 8), lambda z: Targets.sample(z, 8, 64)):
        here, there = make(logits), make(logits.to(device))
        assert there.ids.device.type == device
        assert (here.ids == there.ids.cpu()).float().mean() > 0.99  # a draw at an edge may fall to either side
        torch.testing.assert_close(there.logprobs.cpu(), here.logprobs)
        torch.testing.assert_close(there.tail.cpu(), here.tail)


@pytest.mark.parametrize("source", ["online", "top-k", "cache", "hidden", "on the CPU"])
def test_a_few_steps_are_those_of_the_cpu(tmp_path, device, source):
    rows = examples(16)
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    if source == "cache":
        path = tmp_path / "cache"
        cache_teacher(tmp_path / "teacher", rows, path, data_collator=collate, top_k=8, samples=4)
        ki = KIConfig(teacher=path, stop_at=0.7)
    elif source == "hidden":
        cache_teacher(tmp_path / "teacher", rows, tmp_path / "cache", data_collator=collate, store="hidden")
        ki = half(tmp_path / "cache", temperature=2.0)
    elif source == "on the CPU":
        placed = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", device_map={"": "cpu"})
        ki = half(placed)
    else:
        ki = half(tmp_path / "teacher", top_k=8 if source == "top-k" else None)
    trained = {}
    for place in ("cpu", device):
        student = llama(0)
        train(tmp_path / place, student, ki, rows, max_steps=3, use_cpu=place == "cpu")
        trained[place] = parameters(student).cpu()
    torch.testing.assert_close(trained[device], trained["cpu"], rtol=1e-3, atol=1e-5)


def test_a_grown_model_is_the_same_function(device):
    small = llama(0)
    big = growlib.expand(small, {"hidden_size": 24, "num_attention_heads": 3, "head_dim": 8, "num_hidden_layers": 2})
    assert growlib.verify(small.to(device), big.to(device)).exact
