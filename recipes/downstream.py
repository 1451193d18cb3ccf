"""Does a lower held-out loss become a higher accuracy? Four pre-trainings, fine-tuned on two tasks.

    python recipes/downstream.py --seeds 3             # one CPU core, 3 minutes a seed
    python recipes/downstream.py --preset miniature    # seconds, for CI; its numbers mean nothing

The arms of ki_plus_growth.py (from scratch, grown, taught, both; as many steps each) and the same sizes never
pre-trained get a head that reads a class at the last token. All parameters are trained on snippets of the standard
library: of which package a snippet is, and whether it is of a docstring or of code (arXiv 2105.13880 fine-tunes on
public tasks). The files of those packages are no text of the pre-training; a half of them is trained on, a quarter
chooses each model's learning rate, a quarter gives the accuracy. Expected result: docs/results/downstream.md.
"""

import dataclasses
import sys
from pathlib import Path

import transformers

from base import classify, job, study, text
from base.classify import FineTuning
from base.comparison import ARMS, Prepared, arm_job, prepare
from base.setting import Setting
from base.snippets import Task, packages, tasks, write_files
from base.start import Checkpoint, Fresh
from base.training import evaluate
from growlib import GrowError

NEVER = "never pre-trained"


def fine_tuned(prepared: Prepared, start: Checkpoint | Fresh, task: Task) -> dict[str, float]:
    """The accuracy at the rate that is best on other files, and that rate."""
    setting = prepared.setting
    assert setting.downstream is not None
    wanted = FineTuning(start, task, prepared.corpus.tokenizer, setting.downstream, setting.training, 0.0, setting.seed)
    rates = setting.downstream.learning_rates
    tried = {rate: classify.run(dataclasses.replace(wanted, learning_rate=rate), prepared.lab.folder) for rate in rates}
    best = max(tried, key=lambda rate: tried[rate]["choice"])
    return {task.name: tried[best]["test"], f"{task.name}, rate": best}


def untrained_loss(prepared: Prepared, start: Fresh) -> float:
    """The held-out loss of random values."""
    held_out = prepared.corpus.held_out
    model, _ = start.build(arm_job(prepared, "scratch"))
    blocks = text.Ordered(held_out, len(held_out), 0, None)
    return evaluate(model, blocks, prepared.corpus.tokenizer, prepared.setting.training)


def one_seed(setting: Setting, folder: Path) -> study.Rows:
    """Held-out loss and accuracies of each model."""
    if setting.downstream is None:
        asked = f"preset {setting.preset!r}"
        raise GrowError(asked, "it has no section downstream", "downstream, miniature, or a .toml file")
    if setting.text.source != "stdlib":
        raise GrowError(f"the text {setting.text.source}", "the tasks are of the standard library", "stdlib")
    transformers.utils.logging.set_verbosity_error()  # a new head is meant
    files, others = packages(setting.downstream.packages)
    source = dataclasses.replace(setting.text, source=str(write_files(others, folder)))
    prepared = prepare(dataclasses.replace(setting, text=source), folder, None, None, teaches=True)
    starts: dict[str, tuple[Checkpoint | Fresh, float]] = {}
    fresh = Fresh(prepared.model_class, prepared.plan.config)
    starts[NEVER] = fresh, untrained_loss(prepared, fresh)
    for name in ARMS:
        done = job.run(dataclasses.replace(arm_job(prepared, name), keeps_model=True), folder)
        starts[name] = done.model, done.result["final_eval_loss"]
    both = tasks(files, setting.downstream, prepared.corpus.tokenizer)
    rows: dict[str, dict[str, float]] = {}
    for name, (start, loss) in starts.items():
        rows[name] = {"held-out loss": loss}
        for task in both:
            rows[name] |= fine_tuned(prepared, start, task)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Downstream", one_seed, arguments, preset="downstream")


if __name__ == "__main__":
    sys.exit(main())
