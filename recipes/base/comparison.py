"""The arms of a comparison: text, small model, and one training per arm, each kept once it is done."""

import copy
import dataclasses
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedConfig, PreTrainedModel, default_data_collator

import growlib
from base import flops, store, text
from base.models import MODELS, build_config, model_row, size_fields
from base.setting import Setting
from base.training import evaluate, train
from growlib import GrowError, GrowthPlan, KIConfig, checkpoint
from growlib.operators import method

Target = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Arm:
    """What a training inherits from the small model."""

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
    """Everything that the arms share."""

    setting: Setting
    folder: Path
    corpus: text.Corpus
    blocks: Any  # [number, L], what the arms train on
    mask_token: int | None
    plan: GrowthPlan
    model_class: type[PreTrainedModel]
    small: Path
    small_key: str
    small_facts: Mapping[str, float | None]  # eval_loss, flops, seconds; the last two None where it was given

    @property
    def held_out(self) -> text.Ordered:
        return text.Ordered(self.corpus.held_out, len(self.corpus.held_out), 0, self.mask_token)


def prepare(setting: Setting, folder: Path, small: Path | None, target: Target) -> Prepared:
    """Tokens, small model and plan: made, or found in the folder. What can be refused is refused first.

    Args:
        small: the folder of a checkpoint with its tokenizer; None trains the preset's small model.
        target: a folder or config.json, or overrides of the small model's config; None: the preset's sizes.

    Raises:
        GrowError: the text, the small model or the target cannot be used.
    """
    model = checkpoint.load(small) if small else _new_small(setting)
    plan = growlib.plan(
        model, _preset_target(setting, model) if target is None else target, setting.method, seed=setting.seed
    )
    with PartialState().main_process_first():
        corpus = text.prepare(setting.text, small, folder)
    blocks, small_blocks = text.share_text(corpus, setting.text.train_tokens, setting.small.text)
    if len(corpus.tokenizer) > model.config.vocab_size:
        wrong = f"its tokenizer has {len(corpus.tokenizer)} tokens and its model {model.config.vocab_size}"
        raise GrowError(f"--small {small}", wrong, "a checkpoint beside the tokenizer that it was trained with")
    mask_token = text.mask_token_of(corpus.tokenizer, _is_masked(model))
    prepared = Prepared(setting, folder, corpus, blocks, mask_token, plan, type(model), small or folder, "", {})
    if small:
        loss = evaluate(model, prepared.held_out, corpus.tokenizer, setting.training)
        facts = {"eval_loss": loss, "flops": None, "seconds": None}
        return dataclasses.replace(prepared, small_key=store.key_of_folder(small), small_facts=facts)
    key = _small_key(setting, corpus)
    path = folder / f"small-{key}"
    if not path.exists():
        _train_small(prepared, model, small_blocks, path)
    facts = store.read_json(path / "facts.json")
    return dataclasses.replace(prepared, small=path, small_key=key, small_facts=facts)


def _new_small(setting: Setting) -> PreTrainedModel:
    row = model_row(setting.model)
    config = build_config(
        row,
        setting.initial,
        vocab_size=setting.text.vocab_size,
        length=setting.text.sequence_length,
        initializer_range=setting.training.initializer_range,
        separator=0,  # the first special token of a tokenizer that `text` trains
    )
    set_seed(setting.seed)
    return row.language_model._from_config(config)


def _preset_target(setting: Setting, model: PreTrainedModel) -> Mapping[str, int]:
    if model.config.model_type not in MODELS:
        wrong = f"the preset's sizes have no names for a {model.config.model_type} model"
        raise GrowError("a run without --target", wrong, "--target with a folder, a config.json, or KEY=VALUE,...")
    return size_fields(MODELS[model.config.model_type], setting.target)


def _is_masked(model: PreTrainedModel) -> bool:
    """Whether a masked language model; anything else is trained as a causal one."""
    return "MaskedLM" in type(model).__name__


def _small_key(setting: Setting, corpus: text.Corpus) -> str:
    training = dataclasses.asdict(setting.training) | {"steps": None, "evaluations": None}
    parts = (setting.model, dataclasses.asdict(setting.initial), dataclasses.asdict(setting.small), training)
    return store.key_of(*parts, corpus.key, dataclasses.asdict(setting.text) | {"source": None}, setting.seed)


def _train_small(prepared: Prepared, model: PreTrainedModel, blocks: Any, path: Path) -> None:
    setting, corpus = prepared.setting, prepared.corpus
    number = setting.small.steps * setting.training.batch_size
    # Another order than the arms': a given checkpoint would not have seen their text in their order.
    ordered = text.Ordered(blocks, number, setting.seed + 1, prepared.mask_token)
    rate = setting.small.learning_rate
    run = train(
        "small",
        model,
        ordered,
        prepared.held_out,
        corpus.tokenizer,
        setting.training,
        learning_rate=rate,
        seed=setting.seed,
    )
    forward = flops.forward_flops(model, setting.text.sequence_length)
    facts = {
        "eval_loss": run.curve[-1][1],
        "flops": flops.training_flops(forward, number),
        "seconds": run.seconds,
    }

    def fill(empty: Path) -> None:
        model.save_pretrained(empty)
        corpus.tokenizer.save_pretrained(empty)
        store.write_json(empty / "facts.json", facts)

    with PartialState().main_process_first():
        if PartialState().is_main_process:
            store.write_folder(path, fill)


def _decided_by(prepared: Prepared, name: str) -> dict[str, Any]:
    """Everything that an arm's result depends on, and nothing that it does not."""
    setting, arm = prepared.setting, ARMS[name]
    uses_small = arm.weights or arm.knowledge
    learned = {"learned": dataclasses.asdict(setting.learned)} if _is_learned(prepared, arm) else {}
    return learned | {
        "arm": name,
        "text": [
            prepared.corpus.key,
            setting.text.sequence_length,
            setting.text.train_tokens,
            setting.text.held_out_tokens,
        ],
        "target": _sizes(prepared.plan.config),
        "training": dataclasses.asdict(setting.training),
        "learning_rate": setting.learning_rate[name],
        "seed": setting.seed,
        "small": prepared.small_key if uses_small else None,
        "method": setting.method if arm.weights else None,
        "knowledge": dataclasses.asdict(setting.knowledge) if arm.knowledge else None,
    }


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """A config without what only says where it came from."""
    origin = {"_name_or_path", "architectures", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name not in origin}


def arm_file(prepared: Prepared, name: str) -> Path:
    """Where an arm's result is kept; another setting has another file."""
    return prepared.folder / "arms" / f"{name}-{store.key_of(_decided_by(prepared, name))}.json"


def finished(prepared: Prepared, name: str) -> dict[str, Any] | None:
    """The result of an arm that was trained before under the same setting."""
    kept = store.read_json(arm_file(prepared, name))
    return kept["result"] if kept else None


def run_arm(prepared: Prepared, name: str) -> dict[str, Any]:
    """Train one arm, or take its result from an earlier run. What is returned is its part of results.json."""
    kept = finished(prepared, name)
    if kept:
        return kept
    setting, arm = prepared.setting, ARMS[name]
    student, growth_flops = _student(prepared, arm)
    ki = KIConfig(teacher=prepared.small, **dataclasses.asdict(setting.knowledge)) if arm.knowledge else None
    number = setting.training.steps * setting.training.batch_size
    run = train(
        name,
        student,
        text.Ordered(prepared.blocks, number, setting.seed, prepared.mask_token),
        prepared.held_out,
        prepared.corpus.tokenizer,
        setting.training,
        learning_rate=setting.learning_rate[name],
        seed=setting.seed,
        ki=ki,
    )
    cost = _Cost(prepared, student, ki, growth_flops)
    curve = [
        {
            "step": step,
            "tokens": step * setting.tokens_per_step,
            "flops": sum(cost.at(step)),
            "eval_loss": loss,
        }
        for step, loss in run.curve
    ]
    student_flops, teacher_flops = cost.at(setting.training.steps)
    result = {
        "curve": curve,
        "final_eval_loss": curve[-1]["eval_loss"],
        "flops": {"student": student_flops, "teacher": teacher_flops},
        "seconds": run.seconds,
    }
    if PartialState().is_main_process:
        store.write_json(arm_file(prepared, name), {"decided_by": _decided_by(prepared, name), "result": result})
    PartialState().wait_for_everyone()
    return result


def _is_learned(prepared: Prepared, arm: Arm) -> bool:
    return arm.weights and method(prepared.setting.method).learned


def _student(prepared: Prepared, arm: Arm) -> tuple[PreTrainedModel, int]:
    """The model that an arm trains, and the FLOPs that its growth took where it is learned."""
    config = copy.deepcopy(prepared.plan.config)  # the Trainer writes into its model's config
    setting = prepared.setting
    if not arm.weights:
        set_seed(setting.seed)
        return prepared.model_class._from_config(config).train(), 0
    if not _is_learned(prepared, arm):
        return growlib.expand(prepared.small, config, setting.method, seed=setting.seed, exact=False).train(), 0
    small, learned = checkpoint.load(prepared.small).to(PartialState().device), setting.learned
    size = setting.training.device_batch_size
    # Another order than the training's.
    ordered = text.Ordered(prepared.blocks, learned.steps * size, setting.seed + 2, prepared.mask_token)
    batches = ([ordered[i] for i in range(at, at + size)] for at in range(0, len(ordered), size))
    student = growlib.learn(
        small,
        config,
        map(default_data_collator, batches),
        setting.method,
        steps=learned.steps,
        learning_rate=learned.learning_rate,
        seed=setting.seed,
    )
    forward = flops.forward_flops(student, setting.text.sequence_length)
    spent = flops.learning_flops(small, config, setting.method, forward, learned.steps, size)
    return student.train(), spent


class _Cost:
    """FLOPs of an arm after so many steps: (student, teacher)."""

    def __init__(self, prepared: Prepared, student: PreTrainedModel, ki: KIConfig | None, growth_flops: int) -> None:
        self.growth = growth_flops
        setting = prepared.setting
        length, self.batch, steps = (
            setting.text.sequence_length,
            setting.training.batch_size,
            setting.training.steps,
        )
        self.student = flops.forward_flops(student, length)
        self.teacher = flops.forward_flops(checkpoint.load(prepared.small), length) if ki else 0
        self.taught = [step for step in range(steps) if ki and ki.alpha_at(step / steps) > 0]

    def at(self, step: int) -> tuple[int, int]:
        taught = sum(before < step for before in self.taught)
        student = self.growth + flops.training_flops(self.student, step * self.batch)
        return student, self.teacher * taught * self.batch


def describe(prepared: Prepared) -> dict[str, Any]:
    """The `setting` of results.json: the preset with its overrides, what was grown, and what it ran on."""
    setting, plan = prepared.setting, prepared.plan
    return {
        **dataclasses.asdict(setting),
        "tokens_per_step": setting.tokens_per_step,
        "small_model": {"key": prepared.small_key, **prepared.small_facts},
        "growth": "exact" if plan.exact else "not exact: " + "; ".join(plan.reasons),
        "target_config": _sizes(plan.config),
        "text_used": {
            "key": prepared.corpus.key,
            "files": prepared.corpus.files,
            "distinct_training_tokens": int(prepared.blocks.size),
            "held_out_tokens": int(prepared.corpus.held_out.size),
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
            "processes": PartialState().num_processes,
        },
    }
