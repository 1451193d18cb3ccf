"""Trainings that differ in their teacher: models of any size on blocks of any text, each kept once it is done."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from base import store, text
from base.models import build_config, model_row
from base.report import as_markdown
from base.setting import Setting, Sizes
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
        seed: int | None = None,
    ) -> Learned:
        """Train a new model of some sizes, or one that is there, or take what an earlier run left.

        Args:
            blocks: training blocks by domain, shuffled together.
            teacher: a model, or one for each domain.
            steps, learning_rate, seed: other than the setting's.
        """
        setting = self.setting
        steps, seed = steps or setting.training.steps, setting.seed if seed is None else seed
        rate = learning_rate or setting.learning_rate["knowledge" if teacher else "scratch"]
        origin = dataclasses.asdict(start) if isinstance(start, Sizes) else start.name
        taught: Any = {k: p.name for k, p in teacher.items()} if isinstance(teacher, Mapping) else teacher
        decided = [origin, {k: text_key(rows) for k, rows in blocks.items()}, steps, rate, seed]
        recipe = [dataclasses.asdict(setting.training), dataclasses.asdict(setting.knowledge)]
        key = store.key_of(decided, getattr(taught, "name", taught), recipe)
        path = self.folder / "models" / f"{name}-{key}"
        if not path.exists():
            self._train(path, name, start, blocks, teacher, steps, rate, seed)
        facts = store.read_json(path / "facts.json")
        return Learned(path, facts["losses"], facts["seconds"])

    def _train(
        self, path: Path, name: str, start: Any, blocks: Any, teacher: Any, steps: int, rate: float, seed: int
    ) -> None:
        setting = self.setting
        training = dataclasses.replace(setting.training, steps=steps, evaluations=1)
        if isinstance(start, Sizes):
            model = self.new_model(start, seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(start).train()
        ki = None
        if teacher is not None:
            column = DOMAIN if isinstance(teacher, Mapping) else None
            ki = KIConfig(teacher=teacher, domain=column, **dataclasses.asdict(setting.knowledge))
        number = steps * training.batch_size
        ordered: Any = OfDomains(blocks, number, seed)
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

    def report(self, title: str, rows: list[tuple[str, ...]], results: Any) -> None:
        """Write OUT/results.json and OUT/report.md, and print the table."""
        if not PartialState().is_main_process:
            return
        table = as_markdown(rows)
        setting = {**dataclasses.asdict(self.setting), "torch": torch.__version__}
        store.write_json(self.folder / "results.json", {"setting": setting, "results": results})
        store.write_text(self.folder / "report.md", f"# {title}\n\n{table}\n")
        print("\n" + table)


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
    return store.key_of([int(blocks.size), int(blocks.sum()), blocks[:2].tolist(), blocks[-2:].tolist()])
