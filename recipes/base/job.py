"""A training as data: what decides it gives it a key, and what it leaves is kept under that key.

Every training of every recipe is a `Job`: a small model, a teacher, an arm, the models of a study.
Shapes: L sequence length; blocks are int32 arrays [number, L].
"""

import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from base import flops, store, text
from base.aids import Aid
from base.library import load_checkpoint
from base.setting import Training
from base.start import Checkpoint, Continued, Fresh, Grown
from base.training import Run, evaluate, train
from growlib import GrowError, GrowthSchedule, KIConfig

FACTS = "facts.json"


@dataclass(frozen=True)
class Job:
    """A training, and everything that decides its result.

    Attributes:
        name: how it is called on the screen and on disk; decides nothing.
        blocks: of the text, by domain, shuffled together.
        held_out: blocks by domain; the first one's loss is the curve.
        seed: of the initial values and of the training.
        order: the seed of the order of the blocks.
        masking: of a masked language model; None for a causal one.
        teachers: several are averaged; in a mapping, each teaches the examples of its domain.
        knowledge: the fields of `KIConfig` beside the teachers.
        keeps_model: whether the trained model is kept, or its curve alone.
        growths: of the model inside the training.
        aid: what new entries need, where they do not train as the others do.
    """

    name: str
    start: Fresh | Continued | Grown
    blocks: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    tokenizer: PreTrainedTokenizerBase
    training: Training
    learning_rate: float
    seed: int
    order: int
    masking: text.Masking | None = None
    teachers: tuple[Checkpoint, ...] | Mapping[str, Checkpoint] = ()
    knowledge: Mapping[str, Any] = field(default_factory=dict)
    keeps_model: bool = False
    growths: GrowthSchedule | None = None
    aid: Aid | None = None

    @property
    def sequences(self) -> int:
        return self.training.steps * self.training.batch_size

    @property
    def length(self) -> int:
        return next(iter(self.blocks.values())).shape[1]

    def ordered(self, number: int, seed: int) -> text.OfDomains:
        """Blocks in an order of training."""
        return text.OfDomains(self.blocks, number, seed, self.masking, isinstance(self.teachers, Mapping))

    def ki(self) -> KIConfig | None:
        """The teacher's part; None without one."""
        if not self.teachers:
            return None
        if isinstance(self.teachers, Mapping):
            by_domain = {domain: teacher.path for domain, teacher in self.teachers.items()}
            return KIConfig(teacher=by_domain, domain=text.DOMAIN, **self.knowledge)
        paths = tuple(teacher.path for teacher in self.teachers)
        return KIConfig(teacher=paths if len(paths) > 1 else paths[0], **self.knowledge)

    def decided_by(self) -> dict[str, Any]:
        """Everything that the result depends on, and nothing that it does not."""
        by_domain = isinstance(self.teachers, Mapping)
        named = self.teachers.items() if isinstance(self.teachers, Mapping) else enumerate(self.teachers)
        return {
            "start": self.start.decided_by(),
            "text": [[domain, key_of_blocks(rows)] for domain, rows in self.blocks.items()],  # their order decides, too
            "held_out": [[domain, key_of_blocks(rows)] for domain, rows in self.held_out.items()],
            "tokenizer": [store.key_of(self.tokenizer.get_vocab()), self.masking],
            "training": dataclasses.asdict(self.training),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "order": self.order,
            "teachers": [by_domain, [[name, one.key] for name, one in named]],
            "knowledge": dict(self.knowledge) if self.teachers else None,
            "keeps_model": self.keeps_model,
            **({"growths": _told(self.growths)} if self.growths else {}),
            **({"aid": self.aid.decided_by()} if self.aid else {}),
        }


@dataclass(frozen=True)
class Finished:
    """What a job left.

    Attributes:
        result: the curve and the costs, as those of an arm in results.json.
        losses: at the end, on the held-out text of each domain.
        model: where it lies, where the job keeps its model.
    """

    result: Mapping[str, Any]
    losses: Mapping[str, float]
    model: Checkpoint


def place(job: Job, folder: Path) -> Path:
    """Where a job's result is kept; a job that something else decides has another place."""
    name = re.sub(r"[^\w.+-]+", "-", job.name)  # a method's may be a path
    return folder / "trainings" / f"{name}-{store.key_of(job.decided_by())}"


def finished(job: Job, folder: Path) -> Finished | None:
    """What an earlier run of the same job left; None where there is nothing."""
    path = place(job, folder)
    facts = store.read_json(path / FACTS)
    return Finished(facts["result"], facts["losses"], Checkpoint(path, path.name)) if facts else None


def run(job: Job, folder: Path) -> Finished:
    """Train, or take what an earlier run left.

    Raises:
        GrowError: the model cannot be built or taught so, or its loss is not finite.
    """
    kept = finished(job, folder)
    if kept:
        return kept
    model, growth_flops = job.start.build(job)
    held_out = {name: text.Ordered(rows, len(rows), 0, job.masking) for name, rows in job.held_out.items()}
    (domain, blocks), *others = held_out.items()
    ordered, ki = job.ordered(job.sequences, job.order), job.ki()
    done = train(
        job.name,
        model,
        ordered,
        blocks,
        job.tokenizer,
        job.training,
        learning_rate=job.learning_rate,
        seed=job.seed,
        ki=ki,
        growths=job.growths,
        aid=job.aid,
    )
    forwards, model = _forwards(job, model), done.model
    losses = {domain: done.curve[-1][1]}
    losses |= {name: evaluate(model, rows, job.tokenizer, job.training) for name, rows in others}
    if not all(math.isfinite(loss) for loss in (*losses.values(), *(loss for _, loss in done.curve))):
        asked = f"training {job.name} at a learning rate of {job.learning_rate:g}"
        raise GrowError(asked, "the loss is not finite", "a lower learning rate")
    facts = {"decided_by": job.decided_by(), "result": _result(job, done, forwards, ki, growth_flops), "losses": losses}

    def fill(empty: Path) -> None:
        if job.keeps_model:
            model.save_pretrained(empty)
            job.tokenizer.save_pretrained(empty)
        store.write_json(empty / FACTS, facts)

    path = place(job, folder)
    if PartialState().is_main_process:
        store.write_folder(path, fill)
    PartialState().wait_for_everyone()
    return Finished(facts["result"], losses, Checkpoint(path, path.name))


def _forwards(job: Job, first: PreTrainedModel) -> dict[int, int]:
    """FLOPs of a forward pass over one sequence, by the step from which the model has that size."""
    models = {0: first}
    if job.growths:
        with torch.device("meta"):
            for step, plan in zip(job.growths.steps, job.growths.plans(first), strict=True):
                models[step] = type(first)(plan.config)
    return {begin: flops.forward_flops(model, job.length) for begin, model in models.items()}


def _result(job: Job, done: Run, forwards: Mapping[int, int], ki: KIConfig | None, growth_flops: int) -> dict[str, Any]:
    """The curve with its costs: the student's FLOPs, and one forward pass of the teacher where it teaches.

    Args:
        forwards: as `_forwards` gives them.
    """
    batch, steps = job.training.batch_size, job.training.steps
    domains = job.ordered(job.sequences, job.order).domains
    of_domain = {domain: _teachers_forward(job, domain) for domain in job.blocks}
    last = steps if done.stopped is None else done.stopped
    taught = [step for step in range(last) if ki and ki.alpha_at(step / steps) > 0]

    def cost(end: int) -> tuple[int, int]:
        heard = Counter(domain for s in taught if s < end for domain in domains[s * batch : (s + 1) * batch])
        spans = pairwise([*(min(begin, end) for begin in forwards), end])
        trained = [
            flops.training_flops(one, (b - a) * batch) for one, (a, b) in zip(forwards.values(), spans, strict=True)
        ]
        return growth_flops + sum(trained), sum(of_domain[domain] * count for domain, count in heard.items())

    points = [
        {"step": step, "tokens": step * batch * job.length, "flops": sum(cost(step)), "eval_loss": loss}
        for step, loss in done.curve
    ]
    student, teacher = cost(steps)
    return {
        "curve": points,
        "final_eval_loss": points[-1]["eval_loss"],
        "flops": {"student": student, "teacher": teacher},
        "seconds": done.seconds,
    }


def _teachers_forward(job: Job, domain: str) -> int:
    """FLOPs of one forward pass, over one sequence, of those that teach a domain; what is cached costs none."""
    teachers = (job.teachers[domain],) if isinstance(job.teachers, Mapping) else job.teachers
    online = [teacher.path for teacher in teachers if not teacher.is_cache]
    return sum(flops.forward_flops(load_checkpoint(path), job.length) for path in online)


def _told(growths: GrowthSchedule) -> dict[str, Any]:
    """What of a schedule decides a result."""
    rewarm = growths.rewarm and dataclasses.asdict(growths.rewarm)
    at = {str(step): growths.growths[step] for step in growths.steps}
    return {"at": at, "method": growths.method, "moments": growths.moments, "rewarm": rewarm, "seed": growths.seed}


def key_of_blocks(blocks: np.ndarray) -> str:
    """A short hash of token blocks."""
    return store.key_of(blocks.shape, hashlib.sha256(np.ascontiguousarray(blocks).data).hexdigest())
