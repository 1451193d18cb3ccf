"""Knowledge Inheritance inside the Hugging Face Trainer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.heads import IGNORE_INDEX, aligned_labels, head_of
from growlib.ki.loss import at_least_float32, kl_per_position, mix
from growlib.ki.metrics import KIMetrics
from growlib.ki.targets import Targets
from growlib.ki.teacher import Teacher, resolve_teacher

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

    Raises:
        GrowError: the teacher cannot teach this student, or the run splits the student in an unsupported way.
    """

    def __init__(self, *args: Any, ki: KIConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ki = ki
        self._ki_metrics = KIMetrics()
        self._ki_teacher: Teacher | None = None
        self._ki_divides: bool | None = None
        if ki is not None:
            self._ki_refuse_split_students()
            self._ki_head = head_of(self._ki_student())
            self._ki_teacher = self._ki_resolve_teacher(ki)

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
        if self.ki is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        alpha = self.ki.alpha_at(self.state.global_step / max(self.state.max_steps, 1))
        self._ki_metrics.alpha = alpha
        if alpha == 0:
            self._ki_teacher = None
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        if self._ki_teacher is None:  # released by an earlier train() of this trainer
            self._ki_teacher = self._ki_resolve_teacher(self.ki)
        divides = num_items_in_batch is not None and self._ki_num_items_divides(model, inputs)
        batch = dict(inputs)  # label smoothing pops the labels from `inputs`
        ce, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = _logits_of(outputs)
        with self.accelerator.autocast():
            teacher_logits = self._ki_teacher.logits(batch).to(logits.device)

        labels = aligned_labels(batch, self._ki_head).reshape(-1)
        counted = labels != IGNORE_INDEX
        labels_N = labels[counted]
        student_NV, teacher_NV = (x.reshape(-1, x.shape[-1])[counted] for x in (logits, teacher_logits))
        targets = Targets.dense(teacher_NV, temperature=self.ki.temperature).over(student_NV.shape[-1])
        kd_sum = kl_per_position(at_least_float32(student_NV), targets).sum()
        denominator: Any = num_items_in_batch if divides else max(labels_N.numel(), 1)
        weight = self._ki_loss_scale(num_items_in_batch) / denominator  # of one position
        # The mean over no position is NaN; its gradient is 0, as the KL's.
        ce_sum = ce / weight if labels_N.numel() else torch.zeros_like(ce)
        self._ki_metrics.add(ce_sum, kd_sum, teacher_NV, labels_N)
        loss = mix(ce, kd_sum * weight, alpha)
        return (loss, outputs) if return_outputs else loss

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

    def _ki_num_items_divides(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the trainer's loss is a sum over `num_items_in_batch`, and not a mean over the micro-batch.

        Models that compute their loss inline (BERT, T5) accept `num_items_in_batch` and ignore it, and
        nothing declares it. Two forward passes, at the first step only, show it: the sum halves from 1 item
        to 2.
        """
        if self._ki_divides is None:
            # With every label counted the loss is not 0 and not NaN; in eval mode no dropout differs.
            zeros: dict[str, Any] = {
                name: torch.zeros_like(inputs[name]) for name in ("labels", "shift_labels") if name in inputs
            }
            one, two = (torch.tensor(n, device=self.args.device) for n in (1.0, 2.0))
            model.eval()
            with torch.no_grad():
                over_one = super().compute_loss(model, {**inputs, **zeros}, False, one)
                over_two = super().compute_loss(model, {**inputs, **zeros}, False, two)
            model.train()
            self._ki_divides = bool(over_one != over_two)
        return self._ki_divides

    def _ki_student(self) -> PreTrainedModel:
        """The student without the wrappers of accelerate and PEFT."""
        student = self.accelerator.unwrap_model(self.model)
        return student.get_base_model() if hasattr(student, "get_base_model") else student

    def _ki_resolve_teacher(self, ki: KIConfig) -> Teacher:
        tokenizer = self.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a multimodal processor, or None
            tokenizer = getattr(tokenizer, "tokenizer", None)
        return resolve_teacher(ki, self._ki_student(), tokenizer, self.args.device)

    def _ki_refuse_split_students(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        splits = {
            "nn.DataParallel over several GPUs in one process": self.args.n_gpu > 1,
            "tensor, context or sequence parallelism": (
                (parallelism is not None and parallelism.non_data_parallel_size > 1)
                or (getattr(self.model, "tp_size", None) or 1) > 1
            ),
            "DeepSpeed ZeRO stage 3": is_deepspeed_zero3_enabled(),
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


def _logits_of(outputs: Any) -> Tensor:
    """The student's logits, [batch, length, V]."""
    if not isinstance(outputs, dict) or outputs.get("logits") is None:
        raise GrowError(
            "Knowledge Inheritance",
            "the student returned no logits beside its loss",
            "return_dict=True and a loss that keeps the logits (no fused, chunked or Liger loss)",
        )
    if outputs.get("aux_loss") is not None:
        raise GrowError(
            "Knowledge Inheritance",
            "the student adds an auxiliary loss (aux_loss), which the weight 1 - α would switch off",
            "output_router_logits=False",
        )
    return outputs["logits"]
