"""Knowledge Inheritance inside the Hugging Face Trainer."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import is_torch_xla_available

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.guard import Finding, Guard
from growlib.ki.head_access import tensor_parallel
from growlib.ki.loss_form import LossForm, find_loss_form, is_plain, without_labels
from growlib.ki.providers import DOMAIN, TeacherProvider, WithDomain, load_provider
from growlib.ki.step import ASKED, KIMetrics, Step, held_out_ce, linear_step, logits_of, plain_step
from growlib.ki.stop import StopWhenPassed
from growlib.ki.tasks import WITHOUT_HEAD, Positions, Task, outcomes, task_of

SETTINGS = "ki.json"  # beside what is saved: the teacher's settings

if TYPE_CHECKING:  # a mixin's super() calls are typed by the class that it is mixed into
    _Base = Trainer
else:
    _Base = object


class KIMixin(_Base):
    """Adds a teacher to any subclass of `Trainer`: `class MySFT(KIMixin, SFTTrainer)`.

    While α > 0 a training step minimises `(1 - α) L + α τ² KL(P_teacher(τ) ‖ P_student(τ))` (arXiv
    2105.13880, Eq. 1 and 2), where L is whatever the trainer behind the mixin minimises by itself, and the KL
    runs over the positions that L counts, with L's denominator. When α is 0, and in evaluation, the trainer
    behind the mixin works alone.

    Logged at the logging steps, over the steps since the last one and all processes: `ki/alpha` (of the last
    step), and in nats per position `ki/ce` (L), `ki/kd` (with τ²) and `ki/teacher_ce` (the teacher's own CE). The
    auxiliary loss of a mixture of experts is added as the student adds it, whatever α is; `ki/aux` is its mean.

    Args:
        ki: the settings; None: no teacher, exactly the trainer behind the mixin.

    Attributes:
        loss_is_plain: set it to True in a subclass whose trainer overrides `compute_loss` and still minimises the plain
            cross-entropy (trl's SFTTrainer). The loss is then computed from the states before the head, if the first
            batch shows that it is the same.

    Raises:
        GrowError: the teacher cannot teach this student, or the run splits the student in an unsupported way.
    """

    loss_is_plain = False

    def __init__(self, *args: Any, ki: KIConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(ki, KIConfig | None):
            raise GrowError(f"ki={type(ki).__name__} object", "it is not a KIConfig", "a growlib.KIConfig, or None")
        super().__init__(*args, **kwargs)
        self.ki = ki
        self._ki_metrics, self._ki_guard = KIMetrics(), Guard()
        self._ki_provider: TeacherProvider | None = None
        self._ki_loss_form: LossForm | None = None
        self._ki_stop = StopWhenPassed()
        if ki is not None:
            _refuse_split_students(self)
            self._ki_task = task_of(_bare_student(self))
            self._ki_provider = self._ki_load_provider(ki)
            if ki.stop_at == "auto":
                self._ki_stop.check(self._ki_provider, self)
            self.add_callback(_EpochOfData(self))
            self.add_callback(_ReadsGuard(self))
            if ki.domain is not None:
                assert isinstance(ki.teacher, Mapping)
                self.data_collator = WithDomain(self.data_collator, ki.domain, tuple(ki.teacher))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Mix the teacher into the trainer's loss; arguments, return, scale as in `Trainer.compute_loss`."""
        batch, inputs = inputs, _without_domain(inputs)
        if self.ki is None or not model.training:
            if self._ki_stop.measures:
                self._ki_measure(model, inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        alpha = self._ki_alpha(self.ki)
        self._ki_metrics.alpha = alpha
        if alpha == 0:
            self._ki_give_back()
            self._ki_provider = None
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        if self._ki_provider is None:  # an earlier train() of this trainer let it go
            self._ki_provider = self._ki_load_provider(self.ki)
        self._ki_guard.step = self.state.global_step + 1
        form = self._ki_form(model, inputs)
        positions = self._ki_positions(inputs, form.shifts)
        with self.accelerator.autocast():
            parts = self._ki_provider.parts(batch, positions)
        scale = _loss_scale(self, num_items_in_batch)
        step = Step(parts, positions, alpha, self.ki, self._ki_guard, form.auxiliary, scale)
        divides = num_items_in_batch is not None and form.divides
        denominator: Any = num_items_in_batch if divides else max(positions.count, 1)
        # Of one position; of none, a micro-batch may be the whole denominator, which is then 0.
        weight = scale / denominator if positions.count else 0.0
        if form.access is not None and not return_outputs:
            unlabelled = without_labels(inputs, _bare_student(self), self._ki_task)
            loss, sums = linear_step(step, form.access, model, unlabelled, weight)
        else:
            ce, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss, sums = plain_step(
                step, ce, outputs, weight, self._ki_task, lambda: is_plain(model, *self._ki_behind(inputs))
            )
        self._ki_metrics.add(*sums, positions.count)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer.evaluate`; with `stop_at="auto"`, in training, the teacher leaves once it is passed."""
        compares = self.ki is not None and self.ki.stop_at == "auto" and self.is_in_train
        if eval_dataset is not None or not compares or self._ki_provider is None:
            return super().evaluate(eval_dataset, *args, **kwargs)
        with self._ki_stop.measuring():
            metrics = super().evaluate(None, *args, **kwargs)
        self._ki_guard.check()
        self.log(self._ki_stop.compare(self))
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in `Trainer.prediction_step`, without the domains."""
        return super().prediction_step(model, _without_domain(inputs), *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer.train`, whose `model_init` makes a new student."""
        self._ki_loss_form, self._ki_guard.step = None, 0
        try:
            return super().train(*args, **kwargs)
        finally:
            self._ki_give_back()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer.training_step`; what the guard found is raised here, before the optimizer moves."""
        loss = super().training_step(*args, **kwargs)
        if self.args.logging_nan_inf_filter and not is_torch_xla_available():  # the Trainer reads the loss now, too
            self._ki_guard.check()
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.ki is not None and self.args.should_save:
            path = Path(output_dir or str(self.args.output_dir)) / SETTINGS
            path.write_text(json.dumps(self.ki.described(), indent=2) + "\n", encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the `ki/` values to the training logs, which are those that hold `loss`."""
        if self.ki is not None and "loss" in logs:
            logs |= self._ki_metrics.drain(self.accelerator)
        super().log(logs, start_time)

    def _ki_alpha(self, ki: KIConfig) -> float:
        if ki.stop_at == "auto" and self._ki_stop.stopped(self.state):
            return 0.0
        return ki.alpha_at(self.state.global_step / max(self.state.max_steps, 1))

    def _ki_positions(self, inputs: dict[str, Any], shifts: bool = True) -> Positions:
        """The batch's positions; GrowError where a label is none of the student's."""
        positions = Positions.of(inputs, self._ki_task, shifts)
        wrong = f"the batch has labels that are none of its {self._ki_outcomes}"
        finding = Finding("the student", wrong, f"0 to {self._ki_outcomes - 1}, or -100 where there is no label")
        return replace(positions, labels=self._ki_guard.within(positions.labels, self._ki_outcomes, finding))

    def _ki_form(self, model: nn.Module, inputs: dict[str, Any]) -> LossForm:
        """How the loss of the trainer behind the mixin is computed, found on the first batch."""
        if self._ki_loss_form is None:
            student = _bare_student(self)
            head = None if self._ki_task in WITHOUT_HEAD else student.get_output_embeddings()
            self._ki_outcomes = max(outcomes(student), getattr(head, "out_features", 0))
            self._ki_positions(inputs)
            self._ki_guard.check()
            self._ki_loss_form = find_loss_form(model, *self._ki_behind(inputs), self._ki_needs_logits())
        return self._ki_loss_form

    def _ki_behind(self, inputs: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any], Task, Any]:
        """The student, a batch, its task, and the loss of the trainer behind the mixin, of one process."""
        behind: Any = super().compute_loss
        scale = _loss_scale(self, 1)

        def loss_behind(bare: nn.Module, batch: dict[str, Any], items: Tensor) -> Any:
            return behind(bare, batch, False, items) / scale

        return _bare_student(self), inputs, self._ki_task, loss_behind

    def _ki_needs_logits(self) -> str | None:
        """Why the loss needs whole logits, as far as the trainer's own settings say."""
        classes = type(self).__mro__
        behind = classes[classes.index(KIMixin) + 1 :]
        owner = next(cls for cls in behind if "compute_loss" in vars(cls))
        if owner is not Trainer and not self.loss_is_plain:
            return f"{owner.__name__} computes a loss of its own"
        if self.label_smoother is not None:
            return "labels are smoothed"
        return None if self.compute_loss_func is None else "the trainer was given a compute_loss_func"

    def _ki_load_provider(self, ki: KIConfig) -> TeacherProvider:
        with _outside_zero3(self):
            return load_provider(ki, _bare_student(self), _tokenizer_of(self), self.args.device, self._ki_guard)

    def _ki_give_back(self) -> None:
        if self._ki_provider is not None:
            self._ki_provider.give_back()

    def _ki_measure(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Add a held-out batch to the comparison of student and teacher."""
        form = self._ki_form(model, inputs)
        positions = Positions.of(inputs, self._ki_task, form.shifts)
        if form.access is not None:
            unlabelled = without_labels(inputs, _bare_student(self), self._ki_task)
            ce = held_out_ce(form.access, model, unlabelled, positions)
        else:
            _, outputs = super().compute_loss(model, dict(inputs), True)
            logits = logits_of(outputs, positions, self._ki_task).float()[positions.flat]
            ce = F.cross_entropy(logits, positions.labels, reduction="none")
        assert self._ki_provider is not None
        assert self._ki_provider.held_out is not None  # checked when the trainer was made
        self._ki_stop.add(self._ki_provider.held_out, inputs, positions, ce)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.ki is not None and self.ki.domain is not None and self.ki.domain not in columns:
            columns.append(self.ki.domain)


def _without_domain(inputs: dict[str, Any]) -> dict[str, Any]:
    """What student and trainer take of a batch."""
    return {name: value for name, value in inputs.items() if name != DOMAIN}


class KITrainer(KIMixin, Trainer):
    """The Hugging Face `Trainer` with a teacher: `KITrainer(model=..., args=..., ki=KIConfig(...), ...)`."""


def _bare_student(trainer: Trainer) -> PreTrainedModel:
    """The student without the wrappers of accelerate and PEFT."""
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    return student.get_base_model() if hasattr(student, "get_base_model") else student


def _tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase | None:
    """The student's tokenizer, where the trainer has one, also inside a multimodal processor."""
    given: Any = trainer.processing_class
    return given if isinstance(given, PreTrainedTokenizerBase) else getattr(given, "tokenizer", None)


def _loss_scale(trainer: Trainer, num_items_in_batch: Any) -> int:
    """The factor by which `Trainer.compute_loss` undoes the gradient mean over processes."""
    undone = (
        trainer.args.average_tokens_across_devices
        and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)
        and num_items_in_batch is not None
    )
    return trainer.accelerator.num_processes // trainer.get_tp_size() if undone else 1


def _refuse_split_students(trainer: Trainer) -> None:
    """Raise GrowError where the run splits the student in a way that the teacher's loss does not follow."""
    parallelism: Any = getattr(trainer.accelerator, "parallelism_config", None)
    if trainer.args.n_gpu > 1:
        wrong = "the teacher and its loss are not split in this way"
        valid = "one process per GPU (torchrun) with data parallelism"
        raise GrowError(f"{ASKED} with nn.DataParallel over several GPUs in one process", wrong, valid)
    if parallelism is not None and max(parallelism.cp_size, parallelism.sp_size) > 1:
        wrong = "only the student's attention reaches the other parts of an example, and a cache has whole examples"
        valid = "tensor parallelism or FSDP; or rows that your collator splits (docs/ki-integration.md)"
        raise GrowError(f"{ASKED} with the Trainer's context or sequence parallelism", wrong, valid)
    if trainer.get_tp_size() != tensor_parallel(_bare_student(trainer)):
        valid = "from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))"
        raise GrowError(f"{ASKED} with tensor parallelism", "it was not transformers that split the student", valid)


@contextmanager
def _outside_zero3(trainer: Trainer) -> Iterator[None]:
    """While this lasts, models are loaded whole: ZeRO-3 would split a teacher, and no engine would join it again."""
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    if deepspeed is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(deepspeed)


class _ReadsGuard(TrainerCallback):
    """Raises what the guard found where something is logged, evaluated or saved: there the host reads anyway."""

    def __init__(self, trainer: KIMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.trainer._ki_guard.check()


class _EpochOfData(TrainerCallback):
    """Tells the training data its epoch, which accelerate does not where it wraps the batch sampler."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        data: Any = self.trainer.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))
