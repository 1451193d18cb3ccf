"""The setting of a run: names and types of its numbers.

It holds no defaults, so that a preset (with those that it extends) says everything; presets.py reads them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """Where the text comes from and how it becomes tokens."""

    source: str  # "stdlib", "environment", or a path
    max_bytes: int  # of the text that is used, whole files; 0: all
    vocab_size: int
    tokenizer_bytes: int  # of training text that the tokenizer is trained on
    sequence_length: int
    train_tokens: int  # distinct tokens to train on, repeated as needed; 0: all there are
    held_out_tokens: int  # evaluated at each point of the curve
    masked_share: float  # of the tokens that a masked language model has to find


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, in words that hold for every architecture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Small:
    """How the small model, which is the given checkpoint and the teacher, is trained."""

    text: str  # "same" as the target's, or "other": text of the same kind that the target never sees
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Training:
    """What is the same for every model and arm."""

    steps: int  # of each arm
    batch_size: int  # sequences per step, over all devices
    device_batch_size: int  # sequences at once on one device; the rest is accumulated
    warmup_steps: int
    schedule: str  # an `lr_scheduler_type` of the HF Trainer
    schedule_options: Mapping[str, Any]
    weight_decay: float
    adam_beta2: float
    max_grad_norm: float
    initializer_range: float
    evaluations: int  # points of the curve after the start
    precision: str  # "float32", or "bf16" (autocast, needs a GPU)
    compile: bool


@dataclass(frozen=True)
class Teacher:
    """A teacher of the arms with knowledge that is trained for it."""

    sizes: Sizes
    start: str  # "fresh": from random values, or "grown": from the small model, with the setting's method
    text: str  # as in `Small`
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Reference:
    """What the small model reaches by itself: trained on for the FLOPs of the arms. Its schedule is the arms'."""

    trained: bool
    learning_rate: float


@dataclass(frozen=True)
class Knowledge:
    """`growlib.KIConfig` without its teacher."""

    schedule: str
    stop_at: float | str  # a share of training, "auto", or "none"
    temperature: float
    alpha: float

    def options(self) -> dict[str, Any]:
        """The arguments of `growlib.KIConfig`."""
        return asdict(self) | {"stop_at": None if self.stop_at == "none" else self.stop_at}


@dataclass(frozen=True)
class Learned:
    """How a method that learns its map does so: the arguments of `growlib.learn`, batches of `device_batch_size`."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Compare:
    """What compare_methods.py runs: each method with each seed."""

    methods: list[str]  # names of `growlib.methods()`; what lacks a width or a depth gets that of lossless
    seeds: int  # how many: the setting's seed and the next ones
    lag: int  # the step after which methods are ranked
    learning_rates: list[float]  # each method trains at its own best one


@dataclass(frozen=True)
class When:
    """What when_to_grow.py runs: each small model with each share of the budget and each seed."""

    shares: list[float]  # of the budget, on the small model; 1: it never grows
    seeds: int  # how many: the setting's seed and the next ones
    learning_rates: list[float]  # each model trains at its own best one
    small: list[Sizes]


@dataclass(frozen=True)
class Progressive:
    """What progressive_growth.py runs: each way to the target with each moment and each seed."""

    starts: Mapping[str, Sizes]  # of the models that grow into the target, by the name of the way
    moments: list[float]  # shares of the steps after which the model grows
    decay: float  # the share of the steps, the last ones, in which the learning rate falls
    rewarm: int  # steps of a second warm-up of the new entries; 0: none
    seeds: int  # how many: the setting's seed and the next ones
    learning_rates: list[float]  # each way trains at its own best one


@dataclass(frozen=True)
class Tokens:
    """What tokens_per_parameter.py runs: each arm with each number of tokens and each seed."""

    per_parameter: list[float]  # tokens that an arm sees, per parameter of the target
    small_share: float  # the small model's steps, as a share of an arm's
    seeds: int  # how many: the setting's seed and the next ones
    learning_rates: list[float]  # each arm trains at its own best one


@dataclass(frozen=True)
class Lifelong:
    """What lifelong.py runs: a model that learns domain after domain, in several ways."""

    sizes: list[Sizes]  # of the model while it learns each domain
    replay: float  # the share of a stage's blocks that are of earlier domains
    learning_rates: list[float]  # of the domains after the first; each way trains at its own best one


@dataclass(frozen=True)
class Downstream:
    """What downstream.py runs: fine-tunings of each arm's model."""

    packages: int  # of the standard library: the classes
    length: int  # of a snippet, in tokens
    train: int  # snippets to fine-tune on
    judged: int  # snippets that choose the rate, and as many for the accuracy; fewer where there are not so many
    steps: int
    batch_size: int
    learning_rates: list[float]  # each model is fine-tuned at its own best one


@dataclass(frozen=True)
class Setting:
    """Everything that decides the result of a run."""

    preset: str
    model: str  # a key of `base.models.MODELS`
    method: str  # a method of `growlib.methods()`
    seed: int
    text: Text
    initial: Sizes  # of the small model
    target: Sizes
    small: Small
    training: Training
    reference: Reference
    knowledge: Knowledge
    learned: Learned
    compare: Compare
    learning_rate: Mapping[str, float]  # per arm, each the winner of a sweep of its own
    teacher: Teacher | None = None  # None: the small model teaches
    when: When | None = None  # None: nothing for when_to_grow.py
    progressive: Progressive | None = None  # None: nothing for progressive_growth.py
    tokens: Tokens | None = None  # None: nothing for tokens_per_parameter.py
    lifelong: Lifelong | None = None  # None: nothing for lifelong.py
    downstream: Downstream | None = None  # None: nothing for downstream.py

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.text.sequence_length
