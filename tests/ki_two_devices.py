"""A student on one device and its teacher on another, with tensors that have a device but no values.

The second device exists in this process alone. Whoever mixes the two is told so, as on two GPUs.
"""

import torch
from ki_tiny import VOCAB, llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from growlib.ki import KIConfig, Projection, Targets
from growlib.ki.head_access import HeadAccess
from growlib.ki.linear import linear_ki_sums
from growlib.ki.predictions import Mixture
from growlib.ki.providers import OnlineProvider
from growlib.ki.tasks import Positions
from growlib.ki.teacher import Teacher

_setup_privateuseone_for_python_backend("second")
cpu, teacher = torch.device("cpu"), llama(1)
with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
    far = Projection(torch.randn(10, 3, device="second"), torch.randn(20, 3, device="second"))
    near = Targets.dense(torch.randn(10, 20))
    student = Projection(torch.randn(10, 4).requires_grad_(), torch.randn(20, 4).requires_grad_())
    labels = torch.zeros(10, dtype=torch.int64)
    for source in (far, Targets.dense(far.logits()), Targets.top_k(far, 4), Mixture((far, near), (0.5, 0.5))):
        assert source.rows(slice(0, 2)).targets(1.0, cpu).logprobs.device == cpu
        linear_ki_sums(student, labels, source, 0.5, temperature=1.0).loss.backward()

    for module in teacher.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="second"))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, device="second")
    placed = Teacher(teacher, VOCAB)
    placed._access_known = True  # without values nothing can be proven
    batch = dict.fromkeys(("input_ids", "labels"), torch.ones(2, 5, dtype=torch.int64))
    positions = Positions.of(batch, "causal")
    for placed._access in (None, HeadAccess(teacher.lm_head, 1.0, None)):
        (part,) = OnlineProvider(placed, KIConfig(teacher=teacher)).parts(batch, positions)
        assert part.predictions.rows(slice(0, 2)).targets(1.0, cpu).logprobs.device == cpu
    assert placed.predict(batch, positions).device == torch.device("second", 0)
print("both devices kept apart")
