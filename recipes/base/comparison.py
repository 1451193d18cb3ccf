"""The arms of a comparison: what they share is prepared once, and each arm is a job."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

import growlib
from base import job, text
from base.command import environment
from base.job import Job
from base.known import Known, check_teacher, given, is_masked, trained
from base.lab import Lab, fresh
from base.library import class_like, load_checkpoint
from base.models import MODELS, size_fields
from base.setting import Setting, Sizes
from base.start import Fresh, Grown, sizes_of
from growlib import GrowError, GrowthPlan

Target = str | Mapping[str, Any] | None
TEXT = "text"  # the one domain of a comparison


@dataclass(frozen=True)
class Arm:
    """What a training inherits."""

    weights: bool
    knowledge: bool


ARMS = {
    "scratch": Arm(weights=False, knowledge=False),
    "weights": Arm(weights=True, knowledge=False),
    "knowledge": Arm(weights=False, knowledge=True),
    "both": Arm(weights=True, knowledge=True),
}


@dataclass(frozen=True)
class Prepared:
    """Everything that the arms share.

    Attributes:
        blocks: what the arms train on, [number, L].
        model_class: of the arms.
        teachers: of the arms with knowledge; none where the setting's teacher is not trained yet.
    """

    lab: Lab
    corpus: text.Corpus
    blocks: np.ndarray
    plan: GrowthPlan
    model_class: type[PreTrainedModel]
    small: Known
    teachers: tuple[Known, ...]

    @property
    def setting(self) -> Setting:
        return self.lab.setting

    def under(self, plan: GrowthPlan | None = None, **fields: Any) -> "Prepared":
        """The same under a setting with other fields, or with another plan."""
        lab = dataclasses.replace(self.lab, setting=dataclasses.replace(self.setting, **fields))
        return dataclasses.replace(self, lab=lab, plan=plan or self.plan)


def prepare(
    setting: Setting,
    folder: Path,
    small: Path | None,
    target: Target,
    teachers: tuple[Path, ...] = (),
    *,
    teaches: bool = False,
) -> Prepared:
    """Tokens, small model, teachers and plan: made, or found in the folder. What can be refused is refused first.

    Args:
        small: the folder of a checkpoint with its tokenizer; None trains the preset's small model.
        target: a folder or config.json, or overrides of the small model's config; None: the preset's sizes.
        teachers: folders of checkpoints with the same tokenizer; none: the preset's teacher, or the small model.
        teaches: whether a teacher is needed; the preset's is trained only then.

    Raises:
        GrowError: the text, the small model, a teacher or the target cannot be used.
    """
    start = fresh(setting, setting.initial)
    model = load_checkpoint(small) if small else start.model()
    sizes = _fields(setting.target, model, "--target") if target is None else target
    plan = growlib.plan(model, sizes, setting.method, seed=setting.seed)
    with PartialState().main_process_first():
        corpus = text.prepare(setting.text, small, folder)
    blocks, _ = text.share_text(corpus, setting.text.train_tokens, setting.small.text)
    masking = text.masking_of(corpus.tokenizer, is_masked(model), setting.text.masked_share)
    lab = Lab(setting, folder, corpus.tokenizer, {TEXT: corpus.held_out}, masking)
    known = [_given_teacher(path, model, lab) for path in teachers]
    if small:
        of_small = given("--small", small, model, lab)
    else:
        of_small = trained("small", job.run(_small_job(lab, corpus, start), folder))
    if setting.teacher and not teachers:
        of_teacher = _teacher_job(lab, corpus, model, of_small)
        if teaches or job.finished(of_teacher, folder):
            known = [trained("teacher", job.run(of_teacher, folder))]
    else:
        known = known or [of_small]
    model_class = class_like(type(model), model.config.model_type, plan.config)
    return Prepared(lab, corpus, blocks, plan, model_class, of_small, tuple(known))


def _fields(sizes: Sizes, model: PreTrainedModel, option: str) -> Mapping[str, int]:
    """A preset's sizes under the names of a model's config."""
    if model.config.model_type not in MODELS:
        wrong = f"the preset's sizes have no names for a {model.config.model_type} model"
        raise GrowError(f"a run without {option}", wrong, f"{option} with a folder; or a small model of the preset's")
    return size_fields(MODELS[model.config.model_type], sizes)


def _small_job(lab: Lab, corpus: text.Corpus, start: Fresh) -> Job:
    setting = lab.setting
    _, blocks = text.share_text(corpus, setting.text.train_tokens, setting.small.text)
    # Another order than the arms': a given checkpoint would not have seen their text in their order.
    rate, order = setting.small.learning_rate, setting.seed + 1
    return lab.job("small", start, {TEXT: blocks}, learning_rate=rate, steps=setting.small.steps, order=order)


def _given_teacher(path: Path, small: PreTrainedModel, lab: Lab) -> Known:
    model = load_checkpoint(path)
    check_teacher(path, model, small, lab)
    return given("--teacher", path, model, lab)


def _teacher_job(lab: Lab, corpus: text.Corpus, small: PreTrainedModel, of_small: Known) -> Job:
    setting, wanted = lab.setting, lab.setting.teacher
    assert wanted is not None
    config = copy.deepcopy(small.config)
    config.update(dict(_fields(wanted.sizes, small, "--teacher")))
    _, blocks = text.share_text(corpus, setting.text.train_tokens, wanted.text)
    # Other initial values too: an arm of the same sizes must not start where its teacher did.
    seed = setting.seed + 3
    start: Fresh | Grown = Fresh(type(small), config)
    if wanted.start == "grown":
        start = Grown(of_small.checkpoint, config, setting.method, setting.learned)
    rate = wanted.learning_rate
    return lab.job("teacher", start, {TEXT: blocks}, learning_rate=rate, steps=wanted.steps, seed=seed, order=seed)


def arm_job(prepared: Prepared, name: str, shown: str | None = None) -> Job:
    """The training of an arm; `shown` is its name on the screen and on disk."""
    setting, arm = prepared.setting, ARMS[name]
    config = prepared.plan.config
    start: Fresh | Grown = Fresh(prepared.model_class, config)
    if arm.weights:
        start = Grown(prepared.small.checkpoint, config, setting.method, setting.learned)
    return prepared.lab.job(
        shown or name,
        start,
        {TEXT: prepared.blocks},
        learning_rate=setting.learning_rate[name],
        evaluations=setting.training.evaluations,
        teachers=tuple(teacher.checkpoint for teacher in prepared.teachers) if arm.knowledge else (),
        knowledge=setting.knowledge.options(),
        keeps_model=False,
    )


def finished(prepared: Prepared, name: str) -> Mapping[str, Any] | None:
    """The result of an arm that was trained before under the same setting."""
    if ARMS[name].knowledge and not prepared.teachers:
        return None
    done = job.finished(arm_job(prepared, name), prepared.lab.folder)
    return done.result if done else None


def run_arm(prepared: Prepared, name: str, shown: str | None = None) -> Mapping[str, Any]:
    """Train one arm, or take its result from an earlier run. What is returned is its part of results.json."""
    return job.run(arm_job(prepared, name, shown), prepared.lab.folder).result


def exactness(plan: GrowthPlan) -> str:
    """Whether a growth is exact, and why not."""
    return "exact" if plan.exact else "not exact: " + "; ".join(plan.reasons)


def text_used(corpus: text.Corpus, blocks: np.ndarray) -> dict[str, Any]:
    """What was read, and how much of it was trained on and held out."""
    return {
        "key": corpus.key,
        "files": corpus.files,
        "distinct_training_tokens": int(blocks.size),
        "held_out_tokens": int(corpus.held_out.size),
    }


def describe(prepared: Prepared) -> dict[str, Any]:
    """The `setting` of results.json: the preset with its overrides, what was grown, and what it ran on."""
    setting, plan = prepared.setting, prepared.plan
    return {
        **dataclasses.asdict(setting),
        "tokens_per_step": setting.tokens_per_step,
        "small_model": prepared.small.facts(),
        "teachers": [{"name": one.name, **one.facts()} for one in prepared.teachers],
        "growth": exactness(plan),
        "target_config": sizes_of(plan.config),
        "text_used": text_used(prepared.corpus, prepared.blocks),
        "environment": environment(),
    }
