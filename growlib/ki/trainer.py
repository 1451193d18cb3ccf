"""Knowledge Inheritance inside the Hugging Face Trainer."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.guide import DOMAIN, Guide, WithDomain, resolve_guide
from growlib.ki.heads import IGNORE_INDEX, aligned_labels, decoder_inputs, head_of
from growlib.ki.hidden import Reach, Unreachable, reach
from growlib.ki.metrics import KIMetrics
from growlib.ki.step import Step, held_out_ce, linear_step, logits_of, plain_step
from growlib.ki.stop import StopWhenPassed

logger = logging.getLogger("growlib")

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
    step), and in nats per position `ki/ce` (L), `ki/kd` (with τ²) and `ki/teacher_ce` (the teacher's own CE).

    Args:
        ki: the settings; None: no teacher, exactly the trainer behind the mixin.

    Attributes:
        loss_is_plain: set it to True in a subclass whose trainer overrides `compute_loss` and still minimises the plain
            cross-entropy (trl's SFTTrainer): the loss is then computed from the states before the head, once one
            batch has shown that it is the same.

    Raises:
        GrowError: the teacher cannot teach this student, or the run splits the student in an unsupported way.
    """

    loss_is_plain = False

    def __init__(self, *args: Any, ki: KIConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(ki, KIConfig | None):
            raise GrowError(f"ki={type(ki).__name__} object", "these are no settings", "a growlib.KIConfig, or None")
        super().__init__(*args, **kwargs)
        self.ki = ki
        self._ki_metrics = KIMetrics()
        self._ki_guide: Guide | None = None
        self._ki_path: _Path | None = None
        self._ki_stop = StopWhenPassed()
        if ki is not None:
            self._ki_refuse_split_students()
            self._ki_head = head_of(self._ki_student())
            self._ki_guide = self._ki_resolve_guide(ki)
            if ki.stop_at == "auto":
                self._ki_stop.check(self._ki_guide, self)
            self.add_callback(_EpochOfData(self))
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
        """Mix the teacher into the trainer's loss; arguments, return, scale as in `Trainer.compute_loss`.

        Raises:
            GrowError: the outputs lack logits, or the model's loss has a part that is no cross-entropy.
        """
        batch, inputs = inputs, {name: value for name, value in inputs.items() if name != DOMAIN}
        if self.ki is None or not model.training:
            if self._ki_stop.measures:
                self._ki_measure(model, batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        alpha = self._ki_alpha(self.ki)
        self._ki_metrics.alpha = alpha
        if alpha == 0:
            self._ki_guide = None
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        if self._ki_guide is None:  # released by an earlier train() of this trainer
            self._ki_guide = self._ki_resolve_guide(self.ki)
        if self._ki_path is None:
            self._ki_path = self._ki_find_path(model, inputs)
        batch = self._ki_aligned(batch, self._ki_path)
        with self.accelerator.autocast():
            parts = self._ki_guide.parts(batch)
        labels = aligned_labels(batch, self._ki_head).reshape(-1)
        counted = labels != IGNORE_INDEX
        step = Step(parts, labels[counted], counted, alpha, self.ki)
        divides = num_items_in_batch is not None and self._ki_path.divides
        denominator: Any = num_items_in_batch if divides else max(step.labels.numel(), 1)
        # Of one position; of none, a micro-batch may be the whole denominator, which is then 0.
        weight = self._ki_loss_scale(num_items_in_batch) / denominator if step.labels.numel() else 0.0
        if self._ki_path.reach is not None and not return_outputs:
            loss, sums = linear_step(step, self._ki_path.reach, model, self._ki_without_labels(inputs), weight)
        else:
            ce, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss, sums = plain_step(step, ce, outputs, weight)
        self._ki_metrics.add(*sums, step.labels.numel())
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer.evaluate`; with `stop_at="auto"`, in training, the teacher is left once it is passed."""
        hears = self.ki is not None and self.ki.stop_at == "auto" and self.is_in_train and self._ki_guide is not None
        if eval_dataset is not None or not hears:
            return super().evaluate(eval_dataset, *args, **kwargs)
        with self._ki_stop.measuring():
            metrics = super().evaluate(None, *args, **kwargs)
        self.log(self._ki_stop.compare(self))
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in `Trainer.prediction_step`, of which the domains are none of the business."""
        return super().prediction_step(model, {n: x for n, x in inputs.items() if n != DOMAIN}, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer.train`, whose `model_init` makes a new student."""
        self._ki_path = None
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the `ki/` values to the training logs, which are those that hold `loss`."""
        if self.ki is not None and "loss" in logs:
            logs |= self._ki_metrics.drain(self.accelerator)
        super().log(logs, start_time)

    def _ki_loss_scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """The factor by which `Trainer.compute_loss` undoes the gradient mean over processes."""
        undone = (
            self.args.average_tokens_across_devices
            and (self.model_accepts_loss_kwargs or self.compute_loss_func)
            and num_items_in_batch is not None
        )
        return self.accelerator.num_processes if undone else 1

    def _ki_alpha(self, ki: KIConfig) -> float:
        if ki.stop_at == "auto" and self._ki_stop.stopped(self.state):
            return 0.0
        return ki.alpha_at(self.state.global_step / max(self.state.max_steps, 1))

    def _ki_find_path(self, model: nn.Module, inputs: dict[str, Any]) -> "_Path":
        """How the trainer's loss is normalised, and whether it can be computed from the head's hidden states.

        Models that compute their loss inline (BERT, T5) accept `num_items_in_batch` and ignore it, and nothing
        declares it. Forward passes at the first step show it: a sum over the items halves over twice as many. They
        also show whether the loss is the plain cross-entropy of logits that the head alone makes.
        """
        labels = aligned_labels(inputs, self._ki_head)
        if not (labels != IGNORE_INDEX).any():  # its loss would be NaN
            inputs = {name: x.clamp(min=0) if name in ("labels", "shift_labels") else x for name, x in inputs.items()}
            labels = aligned_labels(inputs, self._ki_head)
        items = (labels != IGNORE_INDEX).sum()
        model = getattr(model, "_orig_mod", model)  # no graph of torch.compile for what runs once
        trains = model.training
        model.eval()  # no dropout differs
        found: Reach | None = None
        shifts = True
        with torch.no_grad():
            once: Any = super().compute_loss(model, dict(inputs), False, items)
            divides = bool(once != super().compute_loss(model, dict(inputs), False, 2 * items))
            try:
                self._ki_require_stock_loss()
                unlabelled = self._ki_without_labels(inputs)
                found = reach(self._ki_student(), model, unlabelled)
                once = once / self._ki_loss_scale(items)
                shifts = self._ki_loss_shifts(once, model(**unlabelled).logits, inputs)
            except Unreachable as reason:
                found = None
                logger.warning("The loss is computed from whole logits: %s.", reason)
        model.train(trains)
        return _Path(divides, found, shifts)

    def _ki_loss_shifts(self, loss: Tensor, logits: Tensor, inputs: dict[str, Any]) -> bool:
        """Whether a loss is the CE of the labels as they are aligned, or (False) of each position's own label.

        Raises:
            Unreachable: it is neither.
        """
        exact = logits.dtype.itemsize >= 4 and not torch.is_autocast_enabled(logits.device.type)

        def is_ce_of(labels: Tensor) -> bool:
            if logits.shape[:-1] != labels.shape:
                raise Unreachable("its logits are not one per label")
            ce = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
            return bool(abs(loss - ce) <= (1e-4 if exact else 1e-2) * ce)

        if is_ce_of(aligned_labels(inputs, self._ki_head)):
            return True
        if "shift_labels" not in inputs and is_ce_of(inputs["labels"]):
            return False
        raise Unreachable("the student's own loss is not the plain cross-entropy")

    def _ki_require_stock_loss(self) -> None:
        classes = type(self).__mro__
        behind = classes[classes.index(KIMixin) + 1 :]
        owner = next(cls for cls in behind if "compute_loss" in vars(cls))
        reasons = {
            f"{owner.__name__} computes a loss of its own": owner is not Trainer and not self.loss_is_plain,
            "labels are smoothed": self.label_smoother is not None,
            "the trainer was given a compute_loss_func": self.compute_loss_func is not None,
        }
        for reason, present in reasons.items():
            if present:
                raise Unreachable(reason)

    def _ki_without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch as a forward pass without a loss takes it; raises Unreachable where it does not without labels."""
        kept = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        if self._ki_head == "seq2seq":
            of_decoder = decoder_inputs(self._ki_student(), inputs)
            if not of_decoder:
                raise Unreachable("it makes its decoder's inputs of the labels by itself")
            kept |= of_decoder
        return kept

    def _ki_student(self) -> PreTrainedModel:
        """The student without the wrappers of accelerate and PEFT."""
        student = self.accelerator.unwrap_model(self.model)
        return student.get_base_model() if hasattr(student, "get_base_model") else student

    def _ki_resolve_guide(self, ki: KIConfig) -> Guide:
        tokenizer = self.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a multimodal processor, or None
            tokenizer = getattr(tokenizer, "tokenizer", None)
        with _outside_zero3(getattr(self.args, "hf_deepspeed_config", None)):
            return resolve_guide(ki, self._ki_student(), tokenizer, self._ki_head, self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.ki is not None and self.ki.domain is not None and self.ki.domain not in columns:
            columns.append(self.ki.domain)

    def _ki_measure(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Add a held-out batch to what says whether the student has passed its teacher."""
        inputs = {name: value for name, value in batch.items() if name != DOMAIN}
        if self._ki_path is None:
            self._ki_path = self._ki_find_path(model, inputs)
        batch = self._ki_aligned(inputs, self._ki_path)
        labels = aligned_labels(batch, self._ki_head).reshape(-1)
        counted = labels != IGNORE_INDEX
        if self._ki_path.reach is not None:
            ce = held_out_ce(self._ki_path.reach, model, self._ki_without_labels(inputs), labels, counted)
        else:
            _, outputs = super().compute_loss(model, dict(inputs), True)
            ce = F.cross_entropy(logits_of(outputs, labels).float()[counted], labels[counted], reduction="none")
        assert self._ki_guide is not None
        self._ki_stop.add(self._ki_guide, batch, ce, labels[counted])

    @staticmethod
    def _ki_aligned(batch: dict[str, Any], path: "_Path") -> dict[str, Any]:
        return dict(batch) if path.shifts else {**batch, "shift_labels": batch["labels"]}

    def _ki_refuse_split_students(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        splits = {
            "nn.DataParallel over several GPUs in one process": self.args.n_gpu > 1,
            "tensor, context or sequence parallelism": (
                (parallelism is not None and parallelism.non_data_parallel_size > 1)
                or (getattr(self.model, "tp_size", None) or 1) > 1
            ),
        }
        for split, present in splits.items():
            if present:
                raise GrowError(
                    f"Knowledge Inheritance with {split}",
                    "the teacher and its loss do not follow this split",
                    "one process per GPU (torchrun) with data parallelism",
                )


class KITrainer(KIMixin, Trainer):
    """The Hugging Face `Trainer` with a teacher: `KITrainer(model=..., args=..., ki=KIConfig(...), ...)`."""


class _EpochOfData(TrainerCallback):
    """Tells the training data its epoch, which accelerate does not where it wraps the batch sampler."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        data: Any = self.trainer.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))


class _Path(NamedTuple):
    """How a step computes its loss.

    Attributes:
        divides: the loss is a sum over `num_items_in_batch`, not a mean over the micro-batch.
        reach: the student's head; None: the loss needs whole logits.
        shifts: the labels are aligned as those of its kind; False: each is its own position's (BartForCausalLM).
    """

    divides: bool
    reach: Reach | None
    shifts: bool


@contextmanager
def _outside_zero3(deepspeed: Any) -> Iterator[None]:
    """Models that are loaded now stay whole: ZeRO-3 would split a teacher, which no engine would join again."""
    if deepspeed is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(deepspeed)
