"""What Knowledge Inheritance asks of the Trainer that it is mixed into, and tells it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from growlib.errors import GrowError


def bare_student(trainer: Trainer) -> PreTrainedModel:
    """The student without the wrappers of accelerate and PEFT."""
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    return student.get_base_model() if hasattr(student, "get_base_model") else student


def tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase | None:
    """The student's tokenizer, where the trainer has one, also inside a multimodal processor."""
    given: Any = trainer.processing_class
    return given if isinstance(given, PreTrainedTokenizerBase) else getattr(given, "tokenizer", None)


def loss_scale(trainer: Trainer, num_items_in_batch: Any) -> int:
    """The factor by which `Trainer.compute_loss` undoes the gradient mean over processes."""
    undone = (
        trainer.args.average_tokens_across_devices
        and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)
        and num_items_in_batch is not None
    )
    return trainer.accelerator.num_processes if undone else 1


def refuse_split_students(trainer: Trainer) -> None:
    """Raise GrowError where the run splits the student in a way that the teacher's loss does not follow."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    splits = {
        "nn.DataParallel over several GPUs in one process": trainer.args.n_gpu > 1,
        "tensor, context or sequence parallelism": (
            (parallelism is not None and parallelism.non_data_parallel_size > 1)
            or (getattr(trainer.model, "tp_size", None) or 1) > 1
        ),
    }
    for split, present in splits.items():
        if present:
            raise GrowError(
                f"Knowledge Inheritance with {split}",
                "the teacher and its loss do not follow this split",
                "one process per GPU (torchrun) with data parallelism",
            )


@contextmanager
def outside_zero3(trainer: Trainer) -> Iterator[None]:
    """Models that are loaded now stay whole: ZeRO-3 would split a teacher, which no engine would join again."""
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    if deepspeed is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(deepspeed)


class EpochOfData(TrainerCallback):
    """Tells the training data its epoch, which accelerate does not where it wraps the batch sampler."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        data: Any = self.trainer.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))
