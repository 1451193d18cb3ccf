"""How fast a checkpoint on disk grows, against `cp` of the result on the same disk, and in how much memory.

    python recipes/bench_streaming.py                  # 0.1 GB to 0.3 GB, a few seconds
    python recipes/bench_streaming.py --gigabytes 4    # a sharded Llama of 4 GB to one of 12 GB; needs 30 GB of disk

The source is random, in bfloat16. Growing and `cp` take turns, and what was made is removed after each turn of both:
on a virtual machine a page that no file had for a while can cost several times one that was just given back. The
memory is the anonymous memory of the process at its highest, less what it was before: mapped files do not count.
"""

import argparse
import json
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import growlib
from growlib.checkpoint.loading import skeleton_of
from growlib.checkpoint.shards import shards_of, write_index, write_shards

# Of a Llama of 1 GB or more, and of a smaller one: the widths, and the parameters of a layer and of both embeddings.
LARGE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
                         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
SMALL: dict[str, Any] = {**LARGE, "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1408}
DEEPER = 1.35  # together with half as much of each width, three times the size
EVERY = 0.02  # seconds between two looks at the memory


def write_source(folder: Path, gigabytes: float, shard: int) -> dict[str, int]:
    """A random Llama of about that size, in shards. Returns the target: about three times as large."""
    sizes = LARGE if gigabytes >= 1 else SMALL
    hidden, heads, groups = sizes["hidden_size"], 128 * sizes["num_attention_heads"], 128 * sizes["num_key_value_heads"]
    layer = hidden * (2 * heads + 2 * groups + 3 * sizes["intermediate_size"])
    layers = max(round((gigabytes * 1e9 / 2 - 2 * sizes["vocab_size"] * hidden) / layer), 1)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.dtype, config.tie_word_embeddings = torch.bfloat16, False
    shapes = skeleton_of(LlamaForCausalLM, config).shapes
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    noise = torch.randn(1 << 24, dtype=torch.float32).mul_(0.02).bfloat16()

    def make(group: tuple[str, ...]) -> dict[str, torch.Tensor]:
        count = tensors[group[0]].numel()
        return {group[0]: noise.repeat(-(-count // len(noise)))[:count].view(tensors[group[0]].shape)}

    folder.mkdir(parents=True)
    shards = shards_of(tensors, shard)
    write_shards(folder, shards, [(name,) for name in tensors], make)
    write_index(folder, shards)
    config.save_pretrained(folder)
    wider = {name: sizes[name] * 3 // 2 for name in LARGE if name not in ("vocab_size", "head_dim")}
    return wider | {"num_hidden_layers": round(layers * DEEPER)}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and the highest anonymous memory beyond that at the beginning, in GB."""
    found, stop = {"memory": 0.0}, threading.Event()
    before = anonymous()

    def look() -> None:
        while not stop.wait(EVERY):
            found["memory"] = max(found["memory"], anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    start, of_processor = time.perf_counter(), processor()
    try:
        yield found
    finally:
        found["seconds"], found["processor"] = time.perf_counter() - start, processor() - of_processor
        stop.set()
        thread.join()


def processor() -> float:
    """Seconds of processor time, of this process and of the ones that it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def anonymous() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e9


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.1, help="of the source (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out/bench_streaming"), help="on the disk to measure")
    parser.add_argument("--method", default="lossless", help="(default: %(default)s)")
    parser.add_argument("--depth", action="store_true", help="three times the layers, and no wider")
    parser.add_argument("--turns", type=int, default=2, help="of growing and cp (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=10**9, help="bytes of a file (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns {options.turns}: at least one is needed")
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        target = write_source(folder / "small", options.gigabytes, options.shard)
        if options.depth:
            layers = LlamaConfig.from_pretrained(folder / "small", trust_remote_code=False).num_hidden_layers
            target = {"num_hidden_layers": 3 * layers}
        plan = growlib.plan(folder / "small", target, options.method)
        turns = [one_turn(folder, plan, options.shard) for _ in range(options.turns)]
        source = size_of(folder / "small")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sums = {name: sum(turn[name] for turn in turns) for name in turns[0]}
    measured = {
        "source, GB": source,
        "grown, GB": turns[0]["grown, GB"],
        "throughput against cp": sums["cp, s"] / sums["growing, s"],
        "memory, GB": max(turn["memory, GB"] for turn in turns),
    }
    rounded = [{name: round(value, 3) for name, value in part.items()} for part in (measured, *turns)]
    print(json.dumps(rounded[0] | {"turns": rounded[1:]}, indent=2))
    return measured


def one_turn(folder: Path, plan: growlib.GrowthPlan, shard: int) -> dict[str, float]:
    """Grow `small`, copy the result, and remove both."""
    try:
        with watched() as grown:
            growlib.expand_checkpoint(folder / "small", folder / "big", plan, max_shard_size=shard)
        gigabytes = size_of(folder / "big")
        with watched() as copied:
            subprocess.run(["cp", "-r", folder / "big", folder / "copy"], check=True)
    finally:
        for made in ("big", "copy"):
            shutil.rmtree(folder / made, ignore_errors=True)
    return {
        "grown, GB": gigabytes,
        "growing, s": grown["seconds"],
        "cp, s": copied["seconds"],
        "growing, s of processor": grown["processor"],
        "cp, s of processor": copied["processor"],
        "memory, GB": grown["memory"],
    }


if __name__ == "__main__":
    main()
