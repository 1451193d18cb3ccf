"""FLOPs of a training, and the share of them that an arm saves.

One forward pass is measured; the rest is arithmetic:

    a training step's FLOPs = 3 x forward of the student  (forward 1, backward 2: by inputs and by weights)
                            + 1 x forward of the teacher  (only in steps with alpha > 0)

The forward includes the head and all of attention's L x L products, masked or not. Evaluations, the optimizer
and the growth itself are left out: the same for every arm, or less than one step. A growth whose map is learned counts:

    a learning step's FLOPs = 3 x forward of the student
                            + 4 x its weights from the map  (once to read the batch; again, forward and backward)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

import growlib


def forward_flops(model: PreTrainedModel, length: int) -> int:
    """FLOPs of one forward pass over one sequence, measured on a copy that is not initialised.

    The copy runs eager attention and eager experts, whose products the counter sees on every device.
    """
    with no_init_weights():
        copy = type(model)._from_config(model.config, attn_implementation="eager", experts_implementation="eager")
    copy.eval()
    ids = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(input_ids=ids)
    return counter.get_total_flops()


def training_flops(forward: int, sequences: int) -> int:
    """The student's part: 3 forward passes per sequence."""
    return 3 * forward * sequences


def learning_flops(
    small: PreTrainedModel, config: PreTrainedConfig, method: str, forward: int, steps: int, sequences: int
) -> int:
    """FLOPs of `growlib.learn` with so many sequences per step; the map's are measured on a growth without a step."""
    with FlopCounterMode(display=False) as counter:
        growlib.learn(small, config, [], method, steps=0)
    folding = counter.get_total_flops()
    return steps * (training_flops(forward, sequences) + 4 * folding) + folding


def flops_to_reach(curve: list[Mapping[str, Any]], loss: float) -> float | None:
    """FLOPs at which a curve first reaches a loss, linear between two evaluations; None: it never does."""
    before = None
    for point in curve:
        if point["eval_loss"] <= loss:
            if before is None:
                return float(point["flops"])
            share = (before["eval_loss"] - loss) / (before["eval_loss"] - point["eval_loss"])
            return before["flops"] + share * (point["flops"] - before["flops"])
        before = point
    return None


def flops_saved(arms: Mapping[str, Any], small_flops: float = 0.0) -> dict[str, float | None]:
    """Per arm, 1 - (FLOPs to reach scratch's final loss) / (scratch's FLOPs); None where it never does.

    Args:
        arms: results per arm, as in results.json.
        small_flops: what training the small model cost, charged to every arm but scratch.
    """
    if "scratch" not in arms:
        return dict.fromkeys(arms)
    return {name: saved_against(arms["scratch"], arm, small_flops) for name, arm in arms.items()} | {"scratch": 0.0}


def saved_against(other: Mapping[str, Any], result: Mapping[str, Any], charged: float = 0.0) -> float | None:
    """1 - (FLOPs of a result to reach the other's final loss, and what it is charged with) / (the other's FLOPs)."""
    needed = flops_to_reach(result["curve"], other["final_eval_loss"])
    return None if needed is None else 1.0 - (needed + charged) / sum(other["flops"].values())
