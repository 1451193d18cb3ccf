"""One training run: a model, the blocks it sees in order, and the curve of its held-out loss."""

import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from base.aids import Aid
from base.setting import Training
from base.text import OfDomains, Ordered
from growlib import GrowError, GrowthSchedule, KIConfig, KITrainer

STOPPED = "ki/stopped"  # what KITrainer logs of `stop_at="auto"`


@dataclass(frozen=True)
class Run:
    """What a training leaves: the held-out loss at its steps, and the time it took (evaluations included)."""

    model: PreTrainedModel  # the one that was given, or what it grew into
    curve: list[tuple[int, float]]  # (step, held-out loss)
    seconds: float
    stopped: int | None  # the step from which the teacher was gone, where it left by itself


class CurveCallback(TrainerCallback):
    """Evaluates at evenly spaced steps, the last included; keeps the losses; shows the progress."""

    def __init__(self, name: str, steps: int, evaluations: int) -> None:
        self.points = {round(i * steps / evaluations) for i in range(1, evaluations + 1)}
        self.curve: list[tuple[int, float]] = []
        # Into a file or a CI log, only few lines.
        self.bar = tqdm(
            total=steps,
            desc=f"{name:<10}",
            unit="step",
            disable=not PartialState().is_main_process,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = state.global_step in self.points
        self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        loss = of_trainer["metrics"]["eval_loss"]
        self.curve.append((state.global_step, loss))
        self.bar.set_postfix_str(f"held-out loss {loss:.3f}", refresh=False)


def train(
    name: str,
    model: PreTrainedModel,
    train_blocks: OfDomains,
    held_out_blocks: Ordered,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    *,
    learning_rate: float,
    seed: int,
    ki: KIConfig | None = None,
    growths: GrowthSchedule | None = None,
    aid: Aid | None = None,
) -> Run:
    """Train a model in place for as many steps as its blocks last, in the blocks' own order.

    Args:
        ki: the teacher's part; None is the stock HF Trainer.
        growths: of the model inside the training. Its loss is evaluated before and after each.
        aid: what new entries need, where they do not train as the others do.
    """
    steps = len(train_blocks) // training.batch_size
    curve = CurveCallback(name, steps, training.evaluations)
    with tempfile.TemporaryDirectory() as own:  # for what is grown; without a growth nothing is written there
        folder = [own]
        broadcast_object_list(folder)

        def make_trainer(model: PreTrainedModel) -> Trainer:
            arguments = arguments_of(training, steps, learning_rate, seed, folder[0])
            callbacks, optimizer = aid.prepare(model, training, learning_rate) if aid else ([], None)
            trainer = _trainer(model, arguments, train_blocks, held_out_blocks, tokenizer, ki, optimizer)
            for callback in (*callbacks, curve):
                trainer.add_callback(callback)
            return trainer

        start = time.perf_counter()
        try:
            if growths:
                trainer = growths.train(make_trainer, model)
            else:
                trainer = make_trainer(model)
                trainer.train()
        finally:
            curve.bar.close()
        seconds = time.perf_counter() - start
        left = [int(log[STOPPED]) for log in trainer.state.log_history if STOPPED in log]
    assert isinstance(trainer.model, PreTrainedModel)
    return Run(trainer.model, curve.curve, seconds, left[0] if left else None)


def evaluate(
    model: PreTrainedModel, held_out_blocks: Ordered, tokenizer: PreTrainedTokenizerBase, training: Training
) -> float:
    """The held-out loss of a model as it is."""
    with tempfile.TemporaryDirectory() as unused:
        trainer = _trainer(model, arguments_of(training, 1, 0.0, 0, unused), None, held_out_blocks, tokenizer, None)
        return trainer.evaluate()["eval_loss"]


def _trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train_blocks: OfDomains | None,
    held_out_blocks: Ordered,
    tokenizer: PreTrainedTokenizerBase,
    ki: KIConfig | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trainer:
    trainer = KITrainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        ki=ki,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments_of(training: Training, steps: int, learning_rate: float, seed: int, folder: str) -> TrainingArguments:
    """The Trainer's arguments for sequences in their own order.

    Raises:
        GrowError: the machine cannot train so.
    """
    devices = PartialState().num_processes
    at_once = min(training.device_batch_size, training.batch_size // devices)
    if at_once == 0 or training.batch_size % (devices * at_once):
        raise GrowError(
            f"{training.batch_size} sequences per step on {devices} processes, {at_once} at once",
            "they do not divide evenly",
            "a number of processes, and a device_batch_size, that divide batch_size",
        )
    if training.precision not in {"float32", "bf16"}:
        raise GrowError(f"precision {training.precision!r}", "there is no such choice", "float32 or bf16")
    if training.precision == "bf16" and not torch.cuda.is_available():
        raise GrowError("precision bf16", "there is no CUDA device", "a GPU, or a preset in float32 such as demo")
    if devices == 1 and torch.cuda.device_count() > 1:  # the Trainer would split each batch over them by itself
        raise GrowError(
            f"one process with {torch.cuda.device_count()} GPUs",
            "each of them needs a process of its own",
            "torchrun --nproc-per-node, or CUDA_VISIBLE_DEVICES=0",
        )
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=4 * at_once,
        gradient_accumulation_steps=training.batch_size // (devices * at_once),
        learning_rate=learning_rate,
        lr_scheduler_type=training.schedule,
        lr_scheduler_kwargs=dict(training.schedule_options),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=training.precision == "bf16",
        tf32=training.precision == "bf16" or None,
        torch_compile=training.compile,
        seed=seed,
        train_sampling_strategy="sequential",
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
