"""One of the processes of `test_a_split_vocabulary_gives_the_same_loss_and_gradients`: it asserts by itself."""

import itertools
import os
import random
import sys

import pytest
import torch
import torch.distributed
from test_ki_linear import KINDS, Case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from growlib import GrowError
from growlib.ki import Projection, fused, linear_ki_loss

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def spread(tensor, placement):
    return distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_()


def both(case, scale, softcap, alpha, **options):
    """(loss, ce, kd, gradients ...) of a head that is split, and of the same head in this process."""
    options |= {"temperature": case.temperature, "alpha": alpha, "logit_scale": scale, "softcap": softcap}
    inputs = (case.hidden, case.weight, case.bias)
    split = (spread(case.hidden, Replicate()), spread(case.weight, Shard(0)), spread(case.bias, Shard(0)))
    for hidden, weight, bias in (split, inputs):
        result = linear_ki_loss(hidden, weight, case.labels, case.teacher, bias=bias, **options)
        wanted = (hidden, weight, bias, *([alpha] if isinstance(alpha, torch.Tensor) else []))
        gradients = torch.autograd.grad(1.7 * result.loss, wanted)
        yield (*result, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients))


def assert_same(case, *settings, **options):
    for of_parts, whole in zip(*both(case, *settings, **options), strict=True):
        torch.testing.assert_close(of_parts, whole, rtol=1e-11, atol=1e-12)


settings = list(itertools.product([1.0, 0.6], [None, 5.0], [False, True], [False, True], [6, 100]))
chosen = random.Random(0)
for kind, temperature in itertools.product(KINDS, (1.0, 2.0)):
    # A sparse teacher's targets are over the common ids; without tokens 26 to 50 it has none of the second process.
    for teacher_vocab in (20, 44, 51, 55) if kind in ("logits", "dense", "projection") else (20, 44, 51):
        case = Case(kind, vocab=51, teacher_vocab=teacher_vocab, temperature=temperature, dtype=torch.float64)
        scale, softcap, gate, recompute, chunk = chosen.choice(settings)
        assert_same(case, scale, softcap, case.alpha, gate=gate, recompute=recompute, chunk=chunk)
for kind, alpha in itertools.product(("dense", "bucket"), (0.0, 1.0)):
    assert_same(Case(kind, dtype=torch.float64), 1.0, None, alpha)
assert_same(Case("logits", vocab=1, teacher_vocab=1, dtype=torch.float64), 1.0, None, 0.5)  # the second has none

# A teacher whose head is split, too, gives the logits of all tokens.
case = Case("projection", dtype=torch.float64)
whole = linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5)
case.teacher = Projection(spread(case.teacher.hidden, Replicate()), spread(case.teacher.weight, Shard(0)))
torch.testing.assert_close(case.teacher.logits(), case.twin, rtol=1e-12, atol=1e-12)
torch.testing.assert_close(case.teacher.tokens(20, 40).logits(), case.twin[:, 20:40], rtol=1e-12, atol=1e-12)
head = (spread(case.hidden, Replicate()), spread(case.weight, Shard(0)))
parts = linear_ki_loss(*head, case.labels, case.teacher, alpha=0.5)
torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=1e-12)

# Nobody has the whole head or the logits of all tokens.
case = Case("bucket", positions=64, vocab=300, teacher_vocab=300)
case.hidden, case.weight = spread(case.hidden, Replicate()), spread(case.weight, Shard(0))


class Largest(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if type(tensor) is torch.Tensor:
                self.seen = max(self.seen, tensor.numel())
        return result


with Largest() as largest:
    linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5, chunk=10).loss.backward()
assert largest.seen == 10 * 150

# The kernel, which talks to nobody, is not for it, wherever it may run.
projection = Projection(case.hidden, case.weight)
fused.HAS_TRITON, Projection.device = True, torch.device("cuda")
assert not fused.usable(projection)
assert fused.usable(Projection(projection.hidden, projection.weight))
del Projection.device

outside = case.labels.clone()
outside[0], outside[1] = 300, 3
with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
    linear_ki_loss(case.hidden, case.weight, outside, case.teacher, alpha=0.5)
with pytest.raises(GrowError, match="each process has as a whole"):
    linear_ki_loss(spread(torch.zeros(64, 8), Shard(0)), case.weight, case.labels, case.teacher, alpha=0.5)
with pytest.raises(GrowError, match="its bias is not split"):
    linear_ki_loss(case.hidden, case.weight, case.labels, case.teacher, alpha=0.5, bias=torch.zeros(300))

torch.distributed.barrier()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
