"""What does Knowledge Inheritance cost? Ratios within one run, of time and of memory, and how fast a cache is read.

    python recipes/bench_ki.py                   # one CPU core, 4 minutes
    python recipes/bench_ki.py --sizes 300m      # one GPU; 1b too; 8b-head has the loss alone

    loss     forward and backward of the loss alone, with gradients of hidden states and head, against the chunked
             cross-entropy of the same code path (alpha 0 of `linear_ki_loss`). Beside it: transformers' way (whole
             logits), TRL's chunked divergence and Liger's fused cross-entropy where they are installed and run, and on
             a GPU the first two forms without growlib's Triton kernel.
    step     a whole step of training against the stock Trainer's: switched off, from a cache, with the teacher beside
             it. Two students that take turns, so that a machine that slows down slows both.
    reading  positions per second from a cache of random logits, one process, files in the page cache.

Times are medians over rounds, and a form that is measured twice says how large the noise is. --limit makes fewer rounds
where they take long. Memory is the peak above what was there before; on a CPU, of the tensors that PyTorch's dispatcher
sees. --out writes all of it as JSON.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from base.command import environment, guarded, say
from base.measure import DEVICE, Row, StepTimes, peak_bytes, ratios, synchronize, without_triton
from base.options import parser_of
from base.report import as_text
from base.store import open_folder, write_json
from growlib import GrowError, KIConfig, KITrainer, cache_teacher
from growlib.ki import Projection, Targets, TeacherCache, fused, ki_loss, linear_ki_loss
from growlib.ki.cache.data import Blocks
from growlib.ki.cache.examples import examples_of
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.shards import FORMAT, Header, StoredExample, shard_path, write_header, write_shard
from growlib.ki.tasks import Positions

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Sizes:
    """Of the loss, of the step, and of the cache."""

    positions: int  # of the loss alone
    vocab: int
    hidden: int  # of the student
    layers: int
    ffn: int
    teacher_hidden: int
    teacher_layers: int
    teacher_ffn: int
    batch: int
    length: int
    steps: int  # of each training that is timed; 0: the loss alone
    rounds: int
    examples: int  # of 512 tokens, in the cache that is read


SIZES = {
    "cpu": Sizes(1024, 16384, 256, 4, 704, 128, 2, 352, 8, 128, 6, 5, 400),
    "cpu-300m": Sizes(1024, 32768, 1024, 20, 2816, 512, 10, 1408, 2, 256, 6, 4, 400),
    "300m": Sizes(8192, 32768, 1024, 20, 2816, 512, 10, 1408, 16, 1024, 8, 3, 400),
    "1b": Sizes(8192, 32768, 2048, 18, 5632, 1024, 9, 2816, 4, 2048, 8, 3, 400),
    "8b-head": Sizes(8192, 151936, 4096, 0, 0, 1024, 0, 0, 0, 0, 0, 3, 0),  # Qwen3-8B's; no step, no reading
    "tiny": Sizes(32, 64, 16, 1, 24, 8, 1, 16, 2, 16, 4, 1, 20),  # for CI
}
TOP_K, SAMPLES = 16, 12


def loss_forms(sizes: Sizes) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Every form of the loss on the same student, and what has a gradient."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
    hidden = torch.randn(sizes.positions, sizes.hidden, **like).requires_grad_()
    weight = (torch.randn(sizes.vocab, sizes.hidden, **like) / sizes.hidden**0.5).requires_grad_()
    labels = torch.randint(sizes.vocab, (sizes.positions,), device=DEVICE)
    states = torch.randn(sizes.positions, sizes.teacher_hidden, **like)
    head = 2 * torch.randn(sizes.vocab, sizes.teacher_hidden, **like) / sizes.teacher_hidden**0.5
    teacher = Projection(states, head)
    logits = states @ head.T
    bucket, draws = Targets.top_k(logits, TOP_K), Targets.sample(logits, TOP_K, SAMPLES)

    def linear(targets: Any, alpha: float) -> Callable[[], Tensor]:
        return lambda: linear_ki_loss(hidden, weight, labels, targets, alpha=alpha).loss

    forms = {
        "chunked CE": linear(bucket.treated("none"), 0.0),
        "chunked CE, again": linear(bucket.treated("none"), 0.0),
        "CE + cached top-16, bucket": linear(bucket, 0.5),
        "CE + cached 16 and 12 draws": linear(draws, 0.5),
        "CE + teacher's states and head": linear(teacher, 0.5),
        "CE + teacher's logits": linear(logits, 0.5),
        "whole logits: CE": lambda: F.cross_entropy((hidden @ weight.T).float(), labels),
        "whole logits: CE + full KL": lambda: ki_loss(hidden @ weight.T, labels, logits, alpha=0.5).loss,
    }
    if fused.usable(Projection(hidden, weight)):
        for name in ("chunked CE", "CE + cached top-16, bucket"):
            forms[f"{name}, without Triton"] = partial(without_triton, forms[name])
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        say("TRL is not installed: its chunked divergence is left out.")
    else:
        apply = ChunkedDivergenceFunction.apply
        forms["TRL's chunked KL (no CE)"] = lambda: apply(hidden, weight, None, states, head, None, 0.0)[0].mean()
    if DEVICE.type == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            say("Liger is not installed: its fused cross-entropy is left out.")
        else:
            liger = LigerFusedLinearCrossEntropyLoss()
            forms["Liger's fused CE"] = lambda: liger(weight, hidden, labels)
    return forms, [hidden, weight]


def bench_loss(sizes: Sizes, stop: float) -> dict[str, Row]:
    """Each form once a round, until a time of `time.perf_counter`."""
    forms, inputs = loss_forms(sizes)

    def run(form: Callable[[], Tensor]) -> None:
        form().backward()
        synchronize()
        for tensor in inputs:
            tensor.grad = None  # else the next form's memory would not count its gradients

    peaks = {name: peak_bytes(lambda form=form: run(form)) for name, form in forms.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(3 * sizes.rounds):
        if number and time.perf_counter() > stop:
            break
        for name, form in forms.items():
            start = time.perf_counter()
            run(form)
            seconds[name].append(time.perf_counter() - start)
    return {name: {**row, "peak_bytes": peaks[name]} for name, row in ratios(seconds).items()}


def model(sizes: Sizes, hidden: int, layers: int, ffn: int, seed: int) -> PreTrainedModel:
    """A Llama of random values, heads of 64."""
    torch.manual_seed(seed)
    heads = max(hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=ffn,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=sizes.length,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class ChunkedTrainer(Trainer):
    """The stock Trainer with the cross-entropy in chunks, as a fused loss has it: alpha is 0, and nobody is heard."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        with self.accelerator.autocast():  # as the forward pass of the other arms
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1]
            ids, logprobs = labels.reshape(-1, 1) * 0, hidden.new_zeros(labels.numel(), 1)
            nobody = Targets(logprobs, model.config.vocab_size, ids, treatment="none")
            head = model.lm_head.weight
            return linear_ki_loss(hidden, head, labels, nobody, alpha=0.0, num_items=num_items_in_batch).loss


def bench_step(sizes: Sizes, folder: Path, stop: float) -> dict[str, Row]:
    """A few steps of each arm a round, from the same student on the same text, until a time of `time.perf_counter`."""
    teacher = model(sizes, sizes.teacher_hidden, sizes.teacher_layers, sizes.teacher_ffn, 1).to(dtype=DTYPE)  # type: ignore[call-arg]
    rows = np.random.default_rng(0).integers(0, sizes.vocab, (sizes.steps * sizes.batch, sizes.length))
    text = Blocks(rows)
    cache_teacher(teacher, text, folder / "cache", top_k=TOP_K, samples=SAMPLES, batch_size=sizes.batch)
    constant: dict[str, Any] = {"schedule": "constant", "stop_at": None}
    arms: dict[str, Callable[..., Trainer]] = {
        "stock Trainer": Trainer,
        "stock Trainer, again": Trainer,
        "switched off": partial(KITrainer, ki=KIConfig(teacher=folder / "cache", alpha=0.0, **constant)),
        "CE in chunks": ChunkedTrainer,
        "from a cache": partial(KITrainer, ki=KIConfig(teacher=folder / "cache", alpha=0.5, **constant)),
        "teacher beside it": partial(KITrainer, ki=KIConfig(teacher=teacher, alpha=0.5, **constant)),
    }
    arguments = TrainingArguments(
        str(folder), max_steps=sizes.steps, per_device_train_batch_size=sizes.batch, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=DEVICE.type == "cuda",
    )  # fmt: skip
    student = model(sizes, sizes.hidden, sizes.layers, sizes.ffn, 0)

    def train(arm: Callable[..., Trainer]) -> float:
        times = StepTimes()
        trainer = arm(model=student, args=arguments, train_dataset=text, callbacks=[times])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return times.median

    # A first round for the memory: on a CPU it is watched, which takes time, and on a GPU it compiles what is compiled.
    peaks = {name: peak_bytes(lambda arm=arm: train(arm)) for name, arm in arms.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(sizes.rounds):
        if number and time.perf_counter() > stop:
            break
        for name, arm in arms.items():
            seconds[name].append(train(arm))
    size = sum(parameter.numel() for parameter in student.parameters())
    of_teacher = sum(parameter.numel() for parameter in teacher.parameters())
    say(f"step: student {size:,} parameters, teacher {of_teacher:,}")
    return {name: {**row, "peak_bytes": peaks[name]} for name, row in ratios(seconds).items()}


def bench_reading(sizes: Sizes, folder: Path) -> Row:
    """A cache of what random logits say, read in shuffled batches of 16."""
    length, random = 512, np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, sizes.vocab, (sizes.examples, length)))
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    header = Header(
        FORMAT, None, "random", None, "causal", sizes.vocab, TOP_K, SAMPLES, temperature=1.0, seed=0,
        examples=len(rows), dataset="random", shard_examples=len(rows), batch_size=1, held_out_ce=None,
    )  # fmt: skip
    logits = torch.from_numpy(random.standard_normal((length, sizes.vocab), np.float32))
    record_format = RecordFormat(sizes.vocab, TOP_K, SAMPLES, 1.0)
    said, width = record_format.encode(Targets.sample(logits, TOP_K, SAMPLES)), record_format.bytes_per_position
    folder.mkdir()
    write_header(folder, header)
    found = [examples_of(row, "causal", Positions.of(row, "causal"))[0] for row in rows]
    shard = [StoredExample(x.digest, 0.0, x.counted, np.roll(said, n, 0)[: x.counted]) for n, x in enumerate(found)]
    write_shard(shard_path(folder, 0), header.key, shard)
    cache = TeacherCache(folder)
    batches = [ids[torch.from_numpy(random.permutation(sizes.examples)[:16])] for _ in range(20)]
    seconds = []
    for _ in range(sizes.rounds + 1):
        start = time.perf_counter()
        for batch in batches:
            cache.read({"input_ids": batch, "labels": batch})
        seconds.append(time.perf_counter() - start)
    positions = sum(batch.numel() for batch in batches)
    return {"positions_per_second": positions / statistics.median(seconds[1:]), "bytes_per_position": width}


def show(title: str, rows: Mapping[str, Row]) -> None:
    """Print a table."""
    table: list[tuple[str, ...]] = [(title, "ms", "ratio", "peak MiB")]
    for name, row in rows.items():
        table.append((name, f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.3f}", f"{row['peak_bytes'] / 2**20:.0f}"))
    say("\n" + as_text(table))


def run(options: argparse.Namespace) -> None:
    """All three."""
    sizes = SIZES[options.sizes]
    if options.out:
        open_folder(options.out.parent)
        if options.out.exists() and not options.out.is_file():
            raise GrowError(f"--out {options.out}", "it is no file", "a file, or a path where nothing stands")
    report: dict[str, Any] = {"sizes": dataclasses.asdict(sizes), "environment": environment()}
    stop = time.perf_counter() + options.limit
    with tempfile.TemporaryDirectory() as folder:
        if sizes.steps:
            reading = report["reading"] = bench_reading(sizes, Path(folder) / "reading")
            say("reading: {positions_per_second:,.0f} positions/s of {bytes_per_position} bytes".format(**reading))
        report["loss"] = bench_loss(sizes, stop)
        show(f"loss: {sizes.positions} positions, hidden {sizes.hidden}, vocabulary {sizes.vocab}", report["loss"])
        if sizes.steps:
            report["step"] = bench_step(sizes, Path(folder), stop)
            show(f"step: {sizes.batch} x {sizes.length} tokens", report["step"])
    if options.out:
        write_json(options.out, report)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", choices=SIZES, default="cpu", help="a row of SIZES in this file (default: cpu)")
    parser.add_argument("--limit", type=float, default=math.inf, help="no new round after so many seconds")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options), "Nothing is kept.")


if __name__ == "__main__":
    sys.exit(main())
