"""What does Knowledge Inheritance cost? Ratios within one run, and how fast a cache is read.

    python recipes/bench_ki.py                            # 1 core, about a minute
    python recipes/bench_ki.py --vocab 151936 --hidden 2048 --positions 8192      # a GPU

    loss     forward and backward of the loss alone, against the chunked cross-entropy of the same code path
             (alpha 0 of `linear_ki_loss`), and against transformers' way, whole logits and F.cross_entropy
    reading  positions per second from a cache of random records, one process, files in the page cache

Prints a table; --out writes it as JSON. Times are the median of --repeats; memory is the peak on a GPU only.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from growlib.ki import Targets, TeacherCache, ki_loss, linear_ki_loss
from growlib.ki.cache.examples import examples_of
from growlib.ki.cache.shards import FORMAT, Header, shard_path, write_header, write_shard


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--chunk", type=int, help="positions at once (default: the library's)")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=400, help="of 512 tokens, in the cache that is read")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def measure(work: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, int]:
    """(median seconds, peak bytes above what was there; 0 on a CPU)."""
    cuda = device.type == "cuda"
    work()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - before if cuda else 0


def bench_loss(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Every form of the loss on the same student, with gradients of hidden states and head."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    hidden = torch.randn(options.positions, options.hidden, **like).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, **like) / options.hidden**0.5).requires_grad_()
    labels = torch.randint(options.vocab, (options.positions,), device=device)
    teacher = 2 * torch.randn(options.positions, options.vocab, **like)
    top_k = Targets.top_k(teacher, options.top_k)
    sampled = Targets.sample(teacher, options.top_k, options.samples)

    def linear(targets: Any, alpha: float) -> Callable[[], Tensor]:
        return lambda: linear_ki_loss(hidden, weight, labels, targets, alpha=alpha, chunk=options.chunk).loss

    forms: dict[str, Callable[[], Tensor]] = {
        "chunked CE": linear(top_k.treated("none"), 0.0),
        "chunked CE + cached top-K, bucket": linear(top_k, 0.5),
        "chunked CE + cached head and draws": linear(sampled, 0.5),
        "chunked CE + dense teacher logits": linear(teacher, 0.5),
        "whole logits, CE": lambda: F.cross_entropy((hidden @ weight.T).float(), labels),
        "whole logits, CE + full KL": lambda: ki_loss(hidden @ weight.T, labels, teacher, alpha=0.5).loss,
    }
    rows: dict[str, dict[str, float]] = {}
    for name, form in forms.items():

        def step(form: Callable[[], Tensor] = form) -> None:
            hidden.grad = weight.grad = None
            form().backward()

        seconds, peak = measure(step, options.repeats, device)
        first = next(iter(rows.values()), {"seconds": seconds})
        rows[name] = {"seconds": seconds, "ratio": seconds / first["seconds"], "peak_bytes": peak}
    return rows


def bench_reading(options: argparse.Namespace) -> dict[str, float]:
    """A cache of random records, read in shuffled batches of 16."""
    length, random = 512, np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, options.vocab, (options.examples, length)))
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    sizes: dict[str, Any] = {"vocab": options.vocab, "top_k": options.top_k, "samples": options.samples}
    header = Header(
        FORMAT, "random", None, "causal", **sizes, temperature=1.0, seed=0, examples=len(rows), dataset="random",
        shard_examples=len(rows), batch_size=1, held_out_ce=None,
    )  # fmt: skip
    width = header.layout.bytes_per_position
    with tempfile.TemporaryDirectory() as folder:
        write_header(Path(folder), header)
        found = [examples_of(row, "causal")[0] for row in rows]
        records = [random.integers(0, 100, (example.counted, width), np.uint8) for example in found]
        shard = [(example.digest, 0.0, part) for example, part in zip(found, records, strict=True)]
        write_shard(shard_path(Path(folder), 0), header.key, shard)
        cache = TeacherCache(folder)
        batches = [ids[torch.from_numpy(random.permutation(options.examples)[:16])] for _ in range(20)]

        def read_all() -> None:
            for batch in batches:
                cache.read({"input_ids": batch, "labels": batch})

        seconds, _ = measure(read_all, options.repeats, torch.device("cpu"))
    positions = sum(batch.numel() for batch in batches)
    return {"positions_per_second": positions / seconds, "bytes_per_position": width}


def main(arguments: list[str] | None = None) -> int:
    """Run both and print."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reading = bench_reading(options)
    print(f"reading: {reading['positions_per_second']:,.0f} positions/s, {reading['bytes_per_position']} bytes each")
    loss = bench_loss(options, device)
    print(f"loss: {options.positions} positions, hidden {options.hidden}, vocabulary {options.vocab}, {device.type}")
    for name, row in loss.items():
        memory = f"  {row['peak_bytes'] / 2**20:8.0f} MiB" if device.type == "cuda" else ""
        print(f"  {name:36} {1e3 * row['seconds']:9.1f} ms  {row['ratio']:5.2f}{memory}")
    if options.out:
        setting = {name: value for name, value in vars(options).items() if name != "out"}
        environment = {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
        report = {"setting": setting, "environment": environment, "reading": reading, "loss": loss}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
