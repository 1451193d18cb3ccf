"""What the trainings of a recipe share, and the jobs that are made of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

import growlib
from base import job, store, text
from base.job import Finished, Job, key_of_blocks
from base.models import build_config, model_row
from base.setting import Setting, Sizes
from base.start import Checkpoint, Continued, Fresh


@dataclass(frozen=True)
class Lab:
    """A setting, where its trainings are kept, and what they are measured on.

    Attributes:
        held_out: blocks by domain, [number, L].
        masking: of a masked language model; None for a causal one.
    """

    setting: Setting
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    held_out: Mapping[str, np.ndarray]
    masking: text.Masking | None = None

    def job(
        self,
        name: str,
        start: Any,
        blocks: Mapping[str, np.ndarray],
        *,
        learning_rate: float,
        steps: int | None = None,
        evaluations: int = 1,
        seed: int | None = None,
        order: int | None = None,
        teachers: tuple[Checkpoint, ...] | Mapping[str, Checkpoint] = (),
        knowledge: Mapping[str, Any] | None = None,
        keeps_model: bool = True,
    ) -> Job:
        """A training under the setting, but for what is given; `seed` and `order` are the setting's seed.

        Args:
            start: a `Fresh`, `Continued` or `Grown` model.
            blocks: training blocks by domain, shuffled together.
            evaluations: after the start, evenly spread; the last is at the end.
            knowledge: fields of `KIConfig`.
        """
        setting = self.setting
        training = dataclasses.replace(setting.training, steps=steps or setting.training.steps, evaluations=evaluations)
        return Job(
            name=name,
            start=start,
            blocks=blocks,
            held_out=self.held_out,
            tokenizer=self.tokenizer,
            training=training,
            learning_rate=learning_rate,
            seed=setting.seed if seed is None else seed,
            order=setting.seed if order is None else order,
            masking=self.masking,
            teachers=teachers,
            knowledge=knowledge or {},
            keeps_model=keeps_model,
        )

    def learn(
        self,
        name: str,
        start: Sizes | Checkpoint,
        blocks: Mapping[str, np.ndarray],
        teacher: Checkpoint | Mapping[str, Checkpoint] | None = None,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        evaluations: int = 1,
        **knowledge: Any,
    ) -> Finished:
        """Train a new model of some sizes, or one that is there, or take what an earlier run left.

        Args:
            teacher: a model or a cache, or one for each domain.
            steps, learning_rate: other than the setting's.
            knowledge: fields of `KIConfig`, other than the setting's.
        """
        setting = self.setting
        return job.run(
            self.job(
                name,
                fresh(setting, start) if isinstance(start, Sizes) else Continued(start),
                blocks,
                learning_rate=learning_rate or setting.learning_rate["knowledge" if teacher else "scratch"],
                steps=steps,
                evaluations=evaluations,
                teachers=(teacher,) if isinstance(teacher, Checkpoint) else teacher or (),
                knowledge={**setting.knowledge.options(), **knowledge},
            ),
            self.folder,
        )

    def cached(self, teacher: Checkpoint, blocks: Mapping[str, np.ndarray], *, top_k: int, samples: int) -> Checkpoint:
        """A teacher's targets on the text that a training of the setting's steps sees."""
        seed, number = self.setting.seed, self.setting.training.steps * self.setting.training.batch_size
        seen = text.OfDomains(blocks, number, seed, self.masking, named=False)
        text_key = store.key_of({name: key_of_blocks(rows) for name, rows in blocks.items()}, number, seed)
        path = self.folder / "caches" / f"{teacher.key}-{top_k}-{samples}-{text_key}"
        growlib.cache_teacher(teacher.path, seen, path, top_k=top_k, samples=samples, batch_size=32)
        return Checkpoint(path, path.name, is_cache=True)


def fresh(setting: Setting, sizes: Sizes) -> Fresh:
    """A model of the setting's architecture, of random values."""
    row = model_row(setting.model)
    config = build_config(
        row,
        sizes,
        vocab_size=setting.text.vocab_size,
        length=setting.text.sequence_length,
        initializer_range=setting.training.initializer_range,
        separator=0,  # the first special token of a tokenizer that `text` trains
    )
    return Fresh(row.language_model, config)


def wider(sizes: Sizes, factor: float) -> Sizes:
    """The sizes with as many heads, and an FFN as much wider or narrower; head_dim changes."""
    return dataclasses.replace(sizes, hidden=round(factor * sizes.hidden), ffn=round(factor * sizes.ffn))


def between(one: Sizes, other: Sizes) -> Sizes:
    """The sizes half way, heads of the first one's head_dim."""
    heads = (one.heads + other.heads) // 2
    return Sizes(
        hidden=heads * one.head_dim,
        layers=(one.layers + other.layers + 1) // 2,
        heads=heads,
        kv_heads=heads,
        ffn=(one.ffn + other.ffn) // 2,
    )
