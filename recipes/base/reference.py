"""The reference of a comparison: the small model itself, trained on for the FLOPs of the arms."""

from collections.abc import Mapping
from typing import Any

from base import flops, job
from base.comparison import TEXT, Prepared
from base.library import load_checkpoint
from base.start import Continued

NAME = "small, trained on"


def run_reference(prepared: Prepared, arms: Mapping[str, Any]) -> Mapping[str, Any]:
    """Train the small model on for the FLOPs of the arm that gets most, its teacher's included, or take what is kept.

    It starts where the small model ended, with a warm-up and a schedule of its own, on the text of the arms. So what
    an arm that uses the small model gets in all, this gets too.

    Args:
        arms: the results of the arms.

    Returns:
        A result as an arm's.
    """
    setting, small = prepared.setting, prepared.small.checkpoint
    forward = flops.forward_flops(load_checkpoint(small.path), setting.text.sequence_length)
    budget = max(sum(result["flops"].values()) for result in arms.values())
    steps = max(budget // flops.training_flops(forward, setting.training.batch_size), 1)
    training = prepared.lab.job(
        "reference",
        Continued(small),
        {TEXT: prepared.blocks},
        learning_rate=setting.reference.learning_rate,
        steps=steps,
        evaluations=min(setting.training.evaluations, steps),
        order=setting.seed + 4,  # not that of the small model's own training
        keeps_model=False,
    )
    return job.run(training, prepared.lab.folder).result


def against_the_better(arms: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Which of arm scratch and the reference ends lower, and what each arm saves against that one."""
    both = (("scratch", arms["scratch"]), (NAME, reference))
    better, other = min(both, key=lambda pair: pair[1]["final_eval_loss"])
    saved = {name: flops.saved_against(other, result) for name, result in arms.items()}
    return {"better": better, "flops_saved": saved | ({"scratch": 0.0} if better == "scratch" else {})}
