"""The plan of a growth: frozen, printable, saved and loaded. It says what is exact before anything runs."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from growlib.errors import GrowError
from growlib.layouts import Layout, layout_text, parse_layout
from growlib.maps import AxisMap, LayerMap
from growlib.origin import origins
from growlib.show import LEGEND, SIGNS, bar, layer_names, layer_ranges, shares_of, split_layer

COLUMNS, LAYERS = 100, 19  # of the printed table, and of what stands beside name, shapes and bar
SHORTEST, LONGEST = 6, 24  # columns of a bar
FILE = "growlib.json"  # where a plan lies beside the checkpoint that it made

Shape = tuple[int, ...]
Part = Literal["up", "down", "router", "zero", "one", "free"]  # of a mixture of experts


@dataclass(frozen=True)
class Skeleton:
    """A model without its values: the class, the config, and the names and shapes of its tensors, tied ones once."""

    model_class: str
    config: PreTrainedConfig
    shapes: Mapping[str, Shape]
    aliases: frozenset[str]  # names under which a tied tensor stands a second time
    prefix: str  # what stands before a base model's tensor names, such as `model.`

    def base(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def find(self, base: str) -> str | None:
        """The full name of a base-model name, where this model has the tensor."""
        return next((name for name in (self.prefix + base, base) if name in self.shapes), None)


@dataclass(frozen=True)
class TensorPlan:
    """Where one tensor of the grown model comes from."""

    name: str
    source: str | None  # None: the source has no such bias, which is a bias of zeros
    layout: Layout
    old_shape: Shape
    new_shape: Shape
    constant: float | None = None  # replaces the source's values
    factor: float = 1.0
    following: str | None = None  # the same tensor of the next layer, where values come from it
    share: float = 0.0  # of `following` in every value
    noise: float = 0.0  # in standard deviations of the source
    weigher: str | None = None  # the source's weights that scale what this tensor writes: for a mean entry, see apply
    weigher_gain: float = 1.0  # of the mean of these weights, on new entries
    added: bool = False  # it belongs to a block that starts as the identity

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "layout": layout_text(self.layout)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TensorPlan":
        shapes = {name: tuple(data[name]) for name in ("old_shape", "new_shape")}
        return cls(**{**data, **shapes, "layout": parse_layout(data["layout"])})


@dataclass(frozen=True)
class ExpertTensor:
    """Where a tensor of a mixture comes from that the dense model does not have."""

    name: str
    part: Part
    shape: Shape
    sources: tuple[str, ...] = ()  # of a dense layer: [units, hidden], the gate first; for `down` [hidden, units]


@dataclass(frozen=True)
class Mixture:
    """What becomes of the grown dense model: a mixture of experts."""

    experts: int
    per_token: int
    shards: int  # in how many experts one feed-forward layer is split
    units: int  # of one expert
    tensors: tuple[ExpertTensor, ...]
    seed: int
    deviation: float  # of the router's rows and of other new matrices
    reset: float = 0.0  # the share of each expert's units that starts anew
    reasons: tuple[str, ...] = ()  # why the mixture is not what the dense model was
    notes: tuple[str, ...] = ()  # what a training of it should know

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Mixture":
        made = (ExpertTensor(t["name"], t["part"], tuple(t["shape"]), tuple(t["sources"])) for t in data["tensors"])
        lists = {name: tuple(data[name]) for name in ("reasons", "notes")}
        return cls(**{**data, "tensors": tuple(made), **lists})

    def __str__(self) -> str:
        copies, shards = self.experts // self.shards, self.shards
        split = f"{copies} copies of {shards} shards of it" if shards > 1 else f"{copies} copies of it"
        then = f"then each feed-forward layer becomes {self.experts} experts, {split}, of which {self.per_token} act"
        return "\n  ".join((then, *(f"note: {note}" for note in self.notes)))


@dataclass(frozen=True, eq=False)
class GrowthPlan:
    """A growth, decided and not yet run. `exact` says whether it preserves the function, `reasons` why not."""

    method: str
    seed: int
    model_class: str  # of the source
    source: PreTrainedConfig
    config: PreTrainedConfig  # of the grown model
    old_sizes: Mapping[str, int]
    new_sizes: Mapping[str, int]
    roles: Mapping[str, str]  # of the axes: what each passes through
    maps: Mapping[str, AxisMap]
    layers: Mapping[str, LayerMap]  # by the config field that says how many
    tensors: tuple[TensorPlan, ...]
    reasons: tuple[str, ...]
    initializer_range: float  # the deviation of free values where the source's tensor is all zero
    mixture: Mixture | None = None  # what becomes of the grown dense model
    learned: bool = False  # the maps are where `growlib.learn` starts
    dtype: str | None = None  # of the grown model, such as "bfloat16"; None: the source's

    @property
    def exact(self) -> bool:
        return not self.reasons

    @property
    def grows(self) -> list[str]:
        """The axes and stacks that get longer."""
        return [name for name, size in self.new_sizes.items() if size != self.old_sizes[name]]

    def new_parameters(self) -> dict[str, Tensor]:
        """Where each entry of each grown tensor comes from: by the tensor's name a uint8 tensor of its new shape.

        Its values are those of `growlib.Origin`: OLD (a value of the source goes on here), COPIED (a further copy of
        such a value), NEW (zero, mean or constant by rule), FREE (drawn from the seed). `> Origin.OLD` is what a
        training calls the new parameters. Old and copied entries may be scaled, and share noise that cancels.

        Raises:
            GrowError: the plan makes a mixture of experts.
        """
        if self.mixture:
            wrong = "the experts of a mixture are copies of one layer"
            raise GrowError(
                "the new parameters of a mixture", wrong, "the plan of the dense growth: its routers are new"
            )
        heirs: dict[str | None, str] = {}  # source tensor -> the tensor that goes on with it: the first that acts
        for made in sorted(self.tensors, key=lambda made: (made.constant is not None, made.added)):
            heirs.setdefault(made.source, made.name)
        return {
            made.name: origins(
                made.layout,
                made.old_shape,
                made.new_shape,
                self,
                is_set=made.constant is not None or made.source is None,
                is_heir=heirs[made.source] == made.name,
            )
            for made in self.tensors
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON; `from_dict` is the inverse."""
        return {
            "method": self.method,
            "seed": self.seed,
            "exact": self.exact,
            "reasons": list(self.reasons),
            "model_class": self.model_class,
            "source_config": self.source.to_dict(),
            "config": self.config.to_dict(),
            "old_sizes": dict(self.old_sizes),
            "new_sizes": dict(self.new_sizes),
            "roles": dict(self.roles),
            "axes": {name: axis_map.to_dict() for name, axis_map in self.maps.items()},
            "layers": {name: asdict(layer_map) for name, layer_map in self.layers.items()},
            "tensors": [made.to_dict() for made in self.tensors],
            "initializer_range": self.initializer_range,
            "learned": self.learned,
            "dtype": self.dtype,
            "mixture": self.mixture and self.mixture.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "GrowthPlan":
        """The plan that `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            method=data["method"],
            seed=data["seed"],
            model_class=data["model_class"],
            old_sizes=dict(data["old_sizes"]),
            new_sizes=dict(data["new_sizes"]),
            roles=dict(data["roles"]),
            initializer_range=data["initializer_range"],
            learned=data["learned"],
            dtype=data["dtype"],
            source=_config(data["source_config"]),
            config=_config(data["config"]),
            maps={name: AxisMap.from_dict(axis_map) for name, axis_map in data["axes"].items()},
            layers={name: LayerMap.from_dict(layer_map) for name, layer_map in data["layers"].items()},
            tensors=tuple(TensorPlan.from_dict(made) for made in data["tensors"]),
            reasons=tuple(data["reasons"]),
            mixture=data["mixture"] and Mixture.from_dict(data["mixture"]),
        )

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON: to a file, or to `growlib.json` in a folder that exists. Returns the file."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        path.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "GrowthPlan":
        """Read a plan that `save` wrote: a file, or a folder with `growlib.json`, such as that of a grown checkpoint.

        Raises:
            GrowError: there is no such file, or it holds no plan.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        asked = f"reading the plan {str(path)!r}"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            missing = isinstance(error, FileNotFoundError)
            wrong = "there is no such file" if missing else f"it holds no plan ({type(error).__name__}: {error})"
            raise GrowError(
                asked, wrong, "a file that GrowthPlan.save wrote, or the folder of a grown model"
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GrowthPlan) and self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(plan: GrowthPlan) -> Iterator[str]:
    """The plan as a table. Layers that grow alike share their lines."""
    verdict = "exact" if plan.exact else "not exact: " + "; ".join(plan.reasons)
    yield fill(f"{plan.method}, seed {plan.seed}: {verdict}", COLUMNS, subsequent_indent="    ")
    yield from (f"  {name:<10} {plan.old_sizes[name]:>7} -> {plan.new_sizes[name]}" for name in plan.grows)
    for name, stack in plan.layers.items():
        yield fill(f"  {name:<10} {' '.join(layer_names(stack))}", COLUMNS, subsequent_indent="    ")
    if plan.mixture:
        yield f"  {plan.mixture}"
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    width = max(len(split_layer(made.name)[0]) for made in plan.tensors)
    shapes = max(len(_shapes(made)) for made in plan.tensors)
    for made in plan.tensors:
        name, layer = split_layer(made.name)
        length = min(max(COLUMNS - width - shapes - LAYERS, SHORTEST), LONGEST)
        drawn = bar(shares_of(made.layout, plan, made.following is not None), length)
        if made.constant is not None:
            drawn = SIGNS[0] * length if made.constant == 0 else f"{made.constant:g}" * length
        groups[name, _shapes(made), drawn].append(layer)
    yield from ("", LEGEND)
    for (name, shape, drawn), layers in groups.items():
        yield f"  {name:<{width}}  {shape:<{shapes}}  {drawn}  {layer_ranges(layers)}".rstrip()


def _shapes(made: TensorPlan) -> str:
    return " -> ".join("x".join(map(str, shape)) for shape in (made.old_shape, made.new_shape))


def _config(data: Mapping[str, Any]) -> PreTrainedConfig:
    model_type = data["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model type {model_type!r}; a class of your own needs AutoConfig.register"
        )
    return CONFIG_MAPPING[model_type].from_dict(dict(data))
