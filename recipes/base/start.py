"""What a model is at the first step of a training: random values, a checkpoint, or a checkpoint that grows."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedConfig, PreTrainedModel, default_data_collator

import growlib
from base import flops, setting, store, text
from base.library import load_checkpoint, method_named


class Training(Protocol):
    """What a start needs to know of a training."""

    @property
    def seed(self) -> int: ...

    @property
    def training(self) -> setting.Training: ...

    @property
    def length(self) -> int: ...

    def ordered(self, number: int, seed: int) -> text.OfDomains: ...


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model and its tokenizer, or with the targets of a teacher, and what tells it from others."""

    path: Path
    key: str
    is_cache: bool = False

    @staticmethod
    def given(path: Path) -> "Checkpoint":
        """One that no job made: known by its content."""
        return Checkpoint(path, store.key_of_folder(path))


@dataclass(frozen=True)
class Fresh:
    """A model of random values."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig

    def decided_by(self) -> dict[str, Any]:
        return {"fresh": self.model_class.__name__, "config": sizes_of(self.config)}

    def model(self) -> PreTrainedModel:
        return self.model_class._from_config(copy.deepcopy(self.config))  # the Trainer writes into the config

    def build(self, job: Training) -> tuple[PreTrainedModel, int]:
        set_seed(job.seed)
        return self.model().train(), 0


@dataclass(frozen=True)
class Continued:
    """A checkpoint as it is."""

    source: Checkpoint

    def decided_by(self) -> dict[str, Any]:
        return {"continued": self.source.key}

    def build(self, job: Training) -> tuple[PreTrainedModel, int]:
        return load_checkpoint(self.source.path).train(), 0


@dataclass(frozen=True)
class Grown:
    """A checkpoint that grows into a config; `learned` says how, where the method learns its map on the job's text."""

    source: Checkpoint
    config: PreTrainedConfig
    method: str
    learned: setting.Learned

    @property
    def _is_learned(self) -> bool:
        return method_named(self.method).learned

    def decided_by(self) -> dict[str, Any]:
        learned = {"learned": dataclasses.asdict(self.learned)} if self._is_learned else {}
        return {"grown": self.source.key, "method": self.method, "config": sizes_of(self.config), **learned}

    def build(self, job: Training) -> tuple[PreTrainedModel, int]:
        path, config = self.source.path, copy.deepcopy(self.config)
        if not self._is_learned:
            return growlib.expand(path, config, self.method, seed=job.seed, exact=False).train(), 0
        small, steps = load_checkpoint(path).to(PartialState().device), self.learned.steps
        size = job.training.device_batch_size
        ordered = job.ordered(steps * size, job.seed + 2)  # another order than the training's
        batches = ([ordered[i] for i in range(at, at + size)] for at in range(0, len(ordered), size))
        model = growlib.learn(
            small,
            config,
            map(default_data_collator, batches),
            self.method,
            steps=steps,
            learning_rate=self.learned.learning_rate,
            seed=job.seed,
        )
        forward = flops.forward_flops(model, job.length)
        return model.train(), flops.learning_flops(small, config, self.method, forward, steps, size)


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config without what only says where it came from."""
    origin = {"_name_or_path", "architectures", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name not in origin}
