"""Which sparse targets point where the whole distribution points? Angles of the head's gradient, on a real small model.

    python recipes/estimators.py --seeds 3              # 2 CPU cores: the demo preset's models, 4 busy minutes a seed
    python recipes/estimators.py --preset miniature     # seconds, for CI; its numbers mean nothing

The preset's small model is trained as the teacher, its target for a tenth of the steps as the student. The gradient of
the KL with respect to the student's head, over so many held-out positions, is compared with that of the whole
distribution. Bytes are those of a cache's record. Expected: draws beat a top-K of no fewer bytes, the more so the more
positions: the table of docs/ki-cache.md.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from base import study, text
from base.lab import Lab
from base.setting import Setting
from growlib import GrowError
from growlib.ki import Targets, linear_ki_loss
from growlib.ki.cache.records import RecordFormat

ESTIMATORS = {  # (exact tokens, draws, tail)
    "top-28, renormalised": (28, 0, "renorm_teacher"),
    "top-28, truncated": (28, 0, "none"),
    "top-28, bucket": (28, 0, "bucket"),
    "16 exact, 12 draws": (16, 12, "sampled"),
    "top-10, bucket": (10, 0, "bucket"),
    "4 exact, 6 draws": (4, 6, "sampled"),
}
COUNTS = (1024, 4096, 16384)  # of positions


@torch.no_grad()
def states(model: torch.nn.Module, blocks: Tensor) -> Tensor:
    """What the head reads, [positions, hidden]."""
    return torch.cat([model.base_model(rows).last_hidden_state.flatten(0, 1) for rows in blocks.split(8)])  # type: ignore[operator]


def gradient(hidden: Tensor, weight: Tensor, targets: Targets) -> Tensor:
    """Of the KL, summed, with respect to the head."""
    weight = weight.detach().clone().requires_grad_()
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    linear_ki_loss(hidden, weight, labels, targets, alpha=1.0, num_items=1).loss.backward()
    assert weight.grad is not None
    return weight.grad


def angle(one: Tensor, other: Tensor) -> float:
    """In degrees."""
    cosine = torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0)
    return float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))))


def angles(setting: Setting, folder: Path) -> study.Rows:
    """Of each kind of targets, over more and more positions."""
    corpus = text.prepare(setting.text, None, folder)
    counts = [count for count in COUNTS if count <= corpus.held_out.size]
    if not counts:
        wrong = f"{corpus.held_out.size} tokens are held out (held_out_tokens {setting.text.held_out_tokens})"
        raise GrowError("angles over held-out positions", wrong, f"{COUNTS[0]} or more, and text for them")
    lab = Lab(setting, folder, corpus.tokenizer, {"text": corpus.held_out})
    blocks = {"text": corpus.train}
    steps = max(setting.training.steps // 10, setting.training.warmup_steps + 1)
    paths = [
        lab.learn("teacher", setting.initial, blocks).model.path,
        lab.learn("student", setting.target, blocks, steps=steps).model.path,
    ]
    teacher, student = (AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval() for path in paths)
    held_out = torch.from_numpy(corpus.held_out).long()
    logits = states(teacher, held_out) @ teacher.get_output_embeddings().weight.detach().T
    hidden, weight = states(student, held_out), student.get_output_embeddings().weight
    full = {count: gradient(hidden[:count], weight, Targets.dense(logits[:count])) for count in counts}
    rows: dict[str, dict[str, float]] = {}
    for name, (top_k, samples, tail) in ESTIMATORS.items():
        if samples:
            targets = Targets.sample(logits, top_k, samples, seed=setting.seed)
        else:
            targets = Targets.top_k(logits, top_k, tail=tail)
        rows[name] = {"bytes": RecordFormat(logits.shape[1], top_k, samples, 1.0).bytes_per_position}
        for count in counts:
            rows[name][f"{count}"] = angle(gradient(hidden[:count], weight, targets[:count]), full[count])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Estimators", angles, arguments)


if __name__ == "__main__":
    sys.exit(main())
