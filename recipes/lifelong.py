"""A stream of domains: a model grows and learns one after the other. What does it forget, and what keeps it?

    python recipes/lifelong.py --seeds 3             # one CPU core, 2 minutes a seed
    python recipes/lifelong.py --preset miniature    # seconds, for CI; its numbers mean nothing

The domains: Python code without docstrings, the prose of docstrings, the C++ headers of torch. The model learns the
first from random values. At each next one it grows (the preset's sizes and method) and trains on it: alone; taught by
the model as it was before (arXiv 2105.13880, Tables 2 to 4; without old text this is arXiv 1606.09282); with replay,
where a share of the blocks is old text; or with both. Controls: replay in a model that never grows; the last sizes from
scratch on all text at once, and on the last domain alone.

All ways see as many blocks in a stage; those without replay see the same ones in the same order, and so do those with.
Rows are the ways after each domain, columns the held-out losses. Forgetting: the loss at the end less the loss right
after the domain was learned, mean over the domains but the last. Each way is at its best learning rate for the domains
after the first, by the mean of the losses at the end. Expected result: docs/results/lifelong.md.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from base import job, study
from base.domains import code_prose_and_headers
from base.job import Finished
from base.lab import Lab, fresh
from base.setting import Lifelong, Setting, Sizes
from base.start import Continued, Fresh, Grown
from growlib import GrowError

TO_THE_END = {"schedule": "constant", "stop_at": None, "alpha": 0.5}


@dataclass(frozen=True)
class Way:
    """From domain to domain.

    Attributes:
        replay: whether a share of the text is old.
        taught: settings of `KIConfig`, where the model as it was before the domain is the teacher.
        grows: at each domain after the first; or it keeps the first sizes.
    """

    replay: bool = False
    taught: Mapping[str, Any] | None = None
    grows: bool = True


WAYS = {
    "alone": Way(),
    "taught": Way(taught=TO_THE_END),
    "replay": Way(replay=True),
    "replay, taught": Way(replay=True, taught=TO_THE_END),
    "replay, never grown": Way(replay=True, grows=False),
}
Blocks = Mapping[str, np.ndarray]  # by domain, [number, L]


def of_stage(domains: Blocks, stage: int, number: int, share: float) -> Blocks:
    """Blocks of a stage: of its domain, and a share of those that the domains before it began with, alike of each."""
    names = list(domains)
    each = round(share * number / stage) if stage else 0
    old = {name: domains[name][:each] for name in names[:stage] if each}
    return {names[stage]: domains[names[stage]][: number - each * len(old)], **old}


def forgetting(after: Sequence[Mapping[str, float]]) -> float:
    """Mean over the domains but the last: the loss at the end less the loss after its stage.

    Args:
        after: each stage's losses of all domains, which stand in the order of the stages.
    """
    learned = list(after[-1])[: len(after) - 1]
    return fmean(after[-1][domain] - after[stage][domain] for stage, domain in enumerate(learned))


@dataclass(frozen=True)
class Stream:
    """The domains, and the lab whose held-out text is theirs."""

    lab: Lab
    domains: Blocks

    @property
    def lifelong(self) -> Lifelong:
        assert self.lab.setting.lifelong is not None
        return self.lab.setting.lifelong

    @property
    def number(self) -> int:
        """Of the blocks of a stage."""
        return self.lab.setting.training.steps * self.lab.setting.training.batch_size

    def learn(self, name: str, way: Way, rate: float) -> list[Finished]:
        """Train stage after stage, or take what is kept."""
        setting, sizes = self.lab.setting, self.lifelong.sizes
        if not way.grows:
            sizes = sizes[:1] * len(sizes)
        done: list[Finished] = []
        for stage in range(len(sizes)):
            before = done[-1].model if done else None
            wanted = self.lab.job(
                f"{name}-{stage + 1}" if done else "first",  # the same training for all that begin with its sizes
                self._start(sizes, stage, done),
                of_stage(self.domains, stage, self.number, self.lifelong.replay if way.replay else 0.0),
                learning_rate=rate if done else setting.learning_rate["scratch"],
                teachers=(before,) if before and way.taught is not None else (),
                knowledge={**setting.knowledge.options(), **(way.taught or {})},
            )
            done.append(job.run(wanted, self.lab.folder))
        return done

    def _start(self, sizes: Sequence[Sizes], stage: int, done: Sequence[Finished]) -> Fresh | Continued | Grown:
        setting, start = self.lab.setting, fresh(self.lab.setting, sizes[stage])
        if not done:
            return start
        if sizes[stage] == sizes[stage - 1]:
            return Continued(done[-1].model)
        return Grown(done[-1].model, start.config, setting.method, setting.learned)

    def best(self, train: Callable[[float], list[Finished]], domains: Sequence[str]) -> tuple[float, list[Finished]]:
        """The rate with the lowest mean loss on some domains at the end."""
        tried = {rate: train(rate) for rate in self.lifelong.learning_rates}
        return min(tried.items(), key=lambda one: fmean(one[1][-1].losses[domain] for domain in domains))

    def row(self, rate: float, done: Sequence[Finished]) -> dict[str, float]:
        """The end of some trainings."""
        flops = sum(sum(one.result["flops"].values()) for one in done)
        losses = {domain: done[-1].losses[domain] for domain in self.domains}
        return {**losses, "mean": fmean(losses.values()), "GFLOPs": round(flops / 1e9), "rate": rate}


def one_seed(setting: Setting, folder: Path) -> study.Rows:
    """Held-out losses after each stage of each way."""
    if setting.lifelong is None:
        asked = f"preset {setting.preset!r}"
        raise GrowError(asked, "it has no section lifelong", "lifelong, miniature, or a .toml file")
    corpora = code_prose_and_headers(setting.text, folder)
    if len(setting.lifelong.sizes) != len(corpora):
        wrong = f"there are {len(setting.lifelong.sizes)} of them"
        raise GrowError(f"preset {setting.preset!r}, lifelong, sizes", wrong, f"{len(corpora)}, one for each domain")
    held_out = {name: corpus.held_out for name, corpus in corpora.items()}
    lab = Lab(setting, folder, next(iter(corpora.values())).tokenizer, held_out)
    stream = Stream(lab, {name: corpus.train for name, corpus in corpora.items()})
    names, rows = list(corpora), {}
    for way_name, way in WAYS.items():
        rate, done = stream.best(partial(stream.learn, way_name, way), names)
        for name, one in zip(names[:-1], done, strict=False):
            rows[f"{way_name}: after {name}"] = dict(one.losses)
        end = stream.row(rate, done)
        rows[f"{way_name}: after {names[-1]}"] = {**end, "forgetting": forgetting([one.losses for one in done])}
    pieces = {name: blocks[: stream.number] for name, blocks in stream.domains.items()}
    for title, learned in {"all text at once": names, f"{names[-1]} alone": names[-1:]}.items():
        blocks = {name: pieces[name] for name in learned}
        steps, sizes = setting.training.steps * len(learned), setting.lifelong.sizes[-1]

        def train(rate: float, blocks: Blocks = blocks, steps: int = steps, sizes: Sizes = sizes) -> list[Finished]:
            return [lab.learn("from-scratch", sizes, blocks, steps=steps, learning_rate=rate)]

        rows[f"from scratch: {title}"] = stream.row(*stream.best(train, learned))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Lifelong", one_seed, arguments, preset="lifelong")


if __name__ == "__main__":
    sys.exit(main())
