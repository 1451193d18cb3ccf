"""docs/figures/tracked.png: the `ki/` values of a training, as TensorBoard's file has them.

    pip install tensorboard
    python docs/ext/tracked.py docs/figures/tracked.png

A minute on one core. The text is that of the docs, byte by byte.
"""

import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from growlib import KIConfig, KITrainer

LENGTH, BATCH = 128, 8
VALUES = {
    "losses, nats per byte": ("train/ki/ce", "train/ki/teacher_ce", "train/loss"),
    "the teacher's part": ("train/ki/kd", "train/ki/alpha"),
}


def rows() -> list[dict[str, torch.Tensor]]:
    """The docs in pieces."""
    text = b"".join(path.read_bytes() for path in sorted(Path("docs").glob("*.md")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": piece, "labels": piece} for piece in ids.split(LENGTH) if len(piece) == LENGTH]


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    """A byte-level model."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def arguments(folder: str, steps: int, tracker: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        logging_steps=10,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        report_to=tracker,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def tracked(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Train a teacher, then a student with it; the student's scalars by name, as (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.manual_seed(0)
    examples, teacher, student = rows(), llama(96, 4), llama(64, 2)
    Trainer(teacher, arguments(f"{folder}/teacher", 300, "none"), train_dataset=examples).train()
    ki = KIConfig(teacher=teacher, schedule="linear", stop_at=0.6)
    KITrainer(model=student, args=arguments(folder, 200, "tensorboard"), train_dataset=examples, ki=ki).train()
    (events,) = Path(folder).rglob("events.out.*")
    read = EventAccumulator(str(events)).Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = tracked(folder)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2), VALUES.items(), strict=True):
        for name in names:
            axes.plot(*zip(*curves[name], strict=True), label=name)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
