"""Fine-tuning a checkpoint into a classifier of snippets, and its accuracy."""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    default_data_collator,
)

from base import store
from base.setting import Downstream, Training
from base.snippets import Labelled, Task
from base.start import Checkpoint, Fresh
from base.training import arguments_of


@dataclass(frozen=True)
class Rows(Dataset):
    """Snippets in the order of a seed, again and again until there are `number`."""

    snippets: Labelled
    number: int
    seed: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        ids, labels = self.snippets
        turn, place = divmod(position, len(ids))
        row = np.random.default_rng([self.seed, turn]).permutation(len(ids))[place]
        return {"input_ids": torch.from_numpy(ids[row]), "labels": torch.tensor(labels[row])}


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning, and everything that decides its accuracies.

    Attributes:
        start: a trained language model, or one of random values; its head is new.
        training: precision, weight decay and schedule; steps and batch are of `downstream`.
    """

    start: Checkpoint | Fresh
    task: Task
    tokenizer: PreTrainedTokenizerBase
    downstream: Downstream
    training: Training
    learning_rate: float
    seed: int

    def decided_by(self) -> dict[str, Any]:
        start = self.start.key if isinstance(self.start, Checkpoint) else self.start.decided_by()
        parts = {part: [ids.tolist(), labels.tolist()] for part, (ids, labels) in self.task.parts.items()}
        settings = [dataclasses.asdict(self.downstream), dataclasses.asdict(self.training)]
        rate = {"learning_rate": self.learning_rate, "seed": self.seed}
        return {"start": start, "task": store.key_of(parts), "settings": settings, **rate}

    def model(self) -> PreTrainedModel:
        """It reads a snippet's class at its last token."""
        set_seed(self.seed)
        # The mask is in no text: no token of a snippet counts as padding.
        fields = {"num_labels": len(self.task.classes), "pad_token_id": self.tokenizer.mask_token_id}
        kind = AutoModelForSequenceClassification
        if isinstance(self.start, Checkpoint):
            return kind.from_pretrained(self.start.path, trust_remote_code=False, **fields)
        config = self.start.model().config
        config.update(fields)
        set_seed(self.seed)
        return kind.from_config(config)


def run(wanted: FineTuning, folder: Path) -> Mapping[str, float]:
    """Fine-tune, or take what an earlier run left: the accuracy on the parts that no training saw."""
    path = folder / "fine-tunings" / f"{store.key_of(wanted.decided_by())}.json"
    kept = store.read_json(path)
    if kept is None:
        model = _trained(wanted)
        kept = {part: accuracy(model, wanted.task.parts[part]) for part in ("choice", "test")}
        store.write_json(path, kept)
    return kept


def _trained(wanted: FineTuning) -> PreTrainedModel:
    down, model = wanted.downstream, wanted.model().train()
    training = dataclasses.replace(
        wanted.training,
        batch_size=down.batch_size,
        device_batch_size=down.batch_size,
        warmup_steps=max(down.steps // 10, 1),
    )
    rows = Rows(wanted.task.parts["train"], down.steps * down.batch_size, wanted.seed)
    with tempfile.TemporaryDirectory() as unused:
        arguments = arguments_of(training, down.steps, wanted.learning_rate, wanted.seed, unused)
        arguments.eval_on_start = False
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


@torch.no_grad()
def accuracy(model: PreTrainedModel, snippets: Labelled) -> float:
    """The share of snippets whose class has the highest score."""
    ids, labels = (torch.from_numpy(part).to(model.device) for part in snippets)
    model.eval()
    found = torch.cat([model(input_ids=some).logits.argmax(-1) for some in ids.split(256)])
    return (found == labels).double().mean().item()
