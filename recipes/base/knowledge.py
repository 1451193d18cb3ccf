"""Trainings that differ in their teacher: models of any size on blocks of any text, each kept once it is done."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

import growlib
from base import store, text
from base.models import build_config, model_row
from base.setting import Setting, Sizes, Training
from base.training import evaluate, train
from growlib import KIConfig

DOMAIN = "domain"


@dataclass(frozen=True)
class Learned:
    """A finished training."""

    path: Path  # of the model with its tokenizer
    losses: Mapping[str, float]  # held-out, by domain
    seconds: float


class OfDomains(Dataset):
    """Blocks in their order, each with the domain it is from."""

    def __init__(self, parts: Mapping[str, np.ndarray], number: int, seed: int) -> None:
        blocks = np.concatenate(list(parts.values()))
        self.names = [name for name, rows in parts.items() for _ in range(len(rows))]
        self.ordered = text.Ordered(blocks, number, seed, None)

    def __len__(self) -> int:
        return len(self.ordered)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.ordered[position], DOMAIN: self.names[self.ordered.order[position]]}


@dataclass(frozen=True)
class Lab:
    """What the trainings of a recipe share.

    Attributes:
        held_out: blocks by domain.
    """

    setting: Setting
    folder: Path
    tokenizer: Any
    held_out: Mapping[str, np.ndarray]

    def new_model(self, sizes: Sizes, seed: int) -> PreTrainedModel:
        """A model of random values."""
        row, setting = model_row(self.setting.model), self.setting
        config = build_config(
            row,
            sizes,
            vocab_size=setting.text.vocab_size,
            length=setting.text.sequence_length,
            initializer_range=setting.training.initializer_range,
            separator=0,
        )
        set_seed(seed)
        return row.language_model._from_config(config).train()

    def learn(
        self,
        name: str,
        start: Sizes | Path,
        blocks: Mapping[str, np.ndarray],
        teacher: Path | Mapping[str, Path] | None = None,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        evaluations: int = 1,
        **knowledge: Any,
    ) -> Learned:
        """Train a new model of some sizes, or one that is there, or take what an earlier run left.

        Args:
            blocks: training blocks by domain, shuffled together.
            teacher: a model or a cache, or one for each domain.
            steps, learning_rate: other than the setting's.
            evaluations: after the start, evenly spread; the last is at the end.
            knowledge: fields of `KIConfig`, other than the setting's.
        """
        setting = self.setting
        training = dataclasses.replace(setting.training, steps=steps or setting.training.steps, evaluations=evaluations)
        rate = learning_rate or setting.learning_rate["knowledge" if teacher else "scratch"]
        taught = {**dataclasses.asdict(setting.knowledge), **knowledge} if teacher else None
        of_domain = teacher if isinstance(teacher, Mapping) else {"": teacher} if teacher else {}
        key = store.key_of(
            dataclasses.asdict(start) if isinstance(start, Sizes) else start.name,
            [[(domain, text_key(rows)) for domain, rows in parts.items()] for parts in (blocks, self.held_out)],
            {domain: path.name for domain, path in of_domain.items()},
            [setting.model, setting.text.vocab_size, self.tokenizer.get_vocab()],
            [dataclasses.asdict(training), rate, setting.seed, taught],
        )
        path = self.folder / "models" / f"{name}-{key}"
        if not path.exists():
            column = DOMAIN if isinstance(teacher, Mapping) else None
            ki = KIConfig(teacher=teacher, domain=column, **taught) if teacher and taught else None
            self._train(path, name, start, blocks, training, rate, ki)
        facts = store.read_json(path / "facts.json")
        return Learned(path, facts["losses"], facts["seconds"])

    def cached(self, teacher: Learned, blocks: Mapping[str, np.ndarray], *, top_k: int, samples: int) -> Path:
        """A teacher's targets on the text that a training of the setting's steps sees."""
        seed, number = self.setting.seed, self.setting.training.steps * self.setting.training.batch_size
        seen = OfDomains(blocks, number, seed)
        path = self.folder / "caches" / f"{teacher.path.name}-{top_k}-{samples}"
        return growlib.cache_teacher(teacher.path, seen, path, top_k=top_k, samples=samples, batch_size=32).path

    def _train(
        self, path: Path, name: str, start: Any, blocks: Any, training: Training, rate: float, ki: KIConfig | None
    ) -> None:
        seed = self.setting.seed
        if isinstance(start, Sizes):
            model = self.new_model(start, seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(start).train()
        ordered: Any = OfDomains(blocks, training.steps * training.batch_size, seed)
        domain, rows = next(iter(self.held_out.items()))
        held_out = text.Ordered(rows, len(rows), 0, None)
        run = train(name, model, ordered, held_out, self.tokenizer, training, learning_rate=rate, seed=seed, ki=ki)
        losses = {domain: run.curve[-1][1]}
        for other, rows in list(self.held_out.items())[1:]:
            losses[other] = evaluate(model, text.Ordered(rows, len(rows), 0, None), self.tokenizer, training)

        def fill(empty: Path) -> None:
            model.save_pretrained(empty)
            self.tokenizer.save_pretrained(empty)
            store.write_json(empty / "facts.json", {"losses": losses, "seconds": run.seconds})

        if PartialState().is_main_process:
            store.write_folder(path, fill)
        PartialState().wait_for_everyone()


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


def text_key(blocks: np.ndarray) -> str:
    """A short hash of token blocks."""
    return store.key_of(blocks.shape, hashlib.sha256(blocks.tobytes()).hexdigest())
