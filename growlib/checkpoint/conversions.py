"""Names on disk and names in modules, both ways, without a model in memory: by transformers' own key mapping.

A stored tensor may have another name than the parameter, and a parameter may be several stored tensors (the experts of
a mixture are stacked when they are loaded). Here the mapping is followed on the meta device first: which stored tensors
make which parameters, and the other way round. Then each group is converted by itself, when its turn comes.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import _get_tied_weight_keys
from transformers.utils.loading_report import LoadStateDictInfo

from growlib.checkpoint.loading import class_of, config_in, dtype_of
from growlib.folders import FLOATS, tensors_in

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Place = tuple[Path, str, tuple[int, ...]]  # of a stored tensor: its file, dtype and shape


class Unstreamable(Exception):
    """A checkpoint that only a model in memory can read or write. Says why."""


@dataclass(frozen=True)
class _Group:
    """Stored tensors that are converted together, and the parameters that they make."""

    first: str  # of the parameters
    converter: WeightConverter | None
    members: tuple[tuple[str, str], ...]  # (stored name, the pattern that it fits)


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their names in the model, in the dtype that loading gives them.

    Files are mapped into memory and read when a tensor is asked for. What needs no conversion takes no memory.
    """

    def __init__(self, model: PreTrainedModel, places: Mapping[str, Place]) -> None:
        """The model is on the meta device. Raises Unstreamable where stored and expected tensors do not fit."""
        self.model, self._places = model, places
        self._files = {file: safe_open(file, framework="pt") for file in {place[0] for place in places.values()}}
        self._expected = model.state_dict()
        self._dtypes = _dtypes(model)
        self._groups: dict[str, _Group] = {}  # by the names of parameters
        unexpected = self._find_groups()
        self._same = _same(model)
        self._check(unexpected)

    def __getitem__(self, name: str) -> Tensor:
        there = next((same for same in self._same.get(name, [name]) if same in self._groups), None)
        if there is None:
            raise KeyError(name)
        return self._converted(self._groups[there])[there]

    def __iter__(self) -> Iterator[str]:
        return iter(self._expected)

    def __len__(self) -> int:
        return len(self._expected)

    def _find_groups(self) -> set[str]:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, found, unexpected = self.model.base_model_prefix, defaultdict(list), set()
        for key in sorted(self._places, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, renamings, converters, prefix, self._expected)
            if renamed not in self._expected and key in self._expected:
                renamed, pattern = rename_source_key(key, [], [], prefix, self._expected)
            if renamed in self._expected:
                found[renamed].append((key, pattern or ""))
            else:
                unexpected.add(renamed)
        for first, members in found.items():
            group = _Group(first, by_pattern.get(members[0][1]), tuple(members))
            if group.converter is None and len(members) > 1:
                raise Unstreamable(f"{first} is stored more than once")
            try:
                made = self._converted(group, meta=True)
            except Exception as error:  # whatever a conversion of transformers raises
                raise Unstreamable(f"{first} is converted when it is loaded ({error})") from error
            self._groups |= dict.fromkeys(made, group)
            for name, tensor in made.items():
                if name not in self._expected or tensor.shape != self._expected[name].shape:
                    raise Unstreamable(f"{name} does not fit the config")
        return unexpected

    def _converted(self, group: _Group, meta: bool = False) -> dict[str, Tensor]:
        """The parameters of a group, in the dtype that the first of them has."""
        dtype = self._dtypes[group.first]
        tensors = {key: self._read(key, meta) for key, _ in group.members}
        if group.converter is None:
            return {group.first: tensors[group.members[0][0]].to(dtype)}
        converter = copy.deepcopy(group.converter)
        for key, pattern in group.members:
            converter.add_tensor(group.first, key, pattern, tensors[key].to(dtype))  # type: ignore[arg-type]
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _read(self, key: str, meta: bool) -> Tensor:
        file, dtype, shape = self._places[key]
        if dtype not in DTYPES:
            raise Unstreamable(f"{key} is stored as {dtype}")
        if meta:
            return torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        return self._files[file].get_tensor(key)

    def _check(self, unexpected: set[str]) -> None:
        """Raise Unstreamable where a tensor is missing or has no place; loading says it better."""
        for name, others in self._same.items():
            if sum(other in self._groups for other in others) > 1:
                raise Unstreamable(f"{name} is tied, and stored under both names")
        there = {other for name in self._groups for other in self._same.get(name, [name])}
        missing = set(self._expected) - there
        report = LoadStateDictInfo(set(missing), unexpected, set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(report)
        if missing or report.unexpected_keys:
            wrong = f"lack {min(missing)}" if missing else f"hold {min(report.unexpected_keys)}, which has no place"
            raise Unstreamable(f"the weights {wrong}")
        parameters = {name for name, _ in self.model.named_parameters()}
        odd = [key for key, (_, dtype, _) in self._places.items() if dtype not in FLOATS and key in parameters]
        if odd:
            raise Unstreamable(f"{odd[0]} is stored as no floating-point number")


def stored_in(asked: str, folder: Path) -> Stored:
    """The tensors of a checkpoint. Raises GrowError for a broken one, Unstreamable for one that cannot be read so."""
    places, config = tensors_in(asked, folder), config_in(asked, folder)
    floats = (DTYPES[dtype] for _, dtype, _ in places.values() if dtype in FLOATS)
    with torch.device("meta"):
        model = class_of(config)._from_config(config, dtype=dtype_of(config.dtype) or next(floats, torch.float32))
    model.tie_weights()
    if model.can_generate():
        hub: dict[str, Any] = {"cache_dir": None, "force_download": False, "proxies": None, "token": None}
        model.adjust_generation_fn(
            None,
            False,
            None,
            folder,
            local_files_only=True,
            revision="main",
            subfolder="",
            trust_remote_code=False,
            **hub,
        )
    return Stored(model, places)


def _same(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names of each tied parameter: by each of its names all of them."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _further_names(model: PreTrainedModel) -> set[str]:
    """The names under which a tied parameter is not stored. Raises Unstreamable where the class does not say it."""
    patterns, further = _get_tied_weight_keys(model), set()
    for names in {tuple(group) for group in _same(model).values()}:
        found = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in patterns)]
        further |= set(found[: len(names) - 1])
        if len(set(names) - further) > 1:
            raise Unstreamable(f"{names[0]} is tied, and its class does not say how")
    return further


def _dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """What each tensor is loaded as: the model's dtype, save what transformers keeps in float32."""
    plan = model._get_dtype_plan(model.dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if plan:
        kept, patterns, _ = build_glob_alternation(list(plan))
        found = {name: kept.search(name) for name in dtypes}
        dtypes |= {name: plan[patterns[str(match.lastgroup)]] for name, match in found.items() if match}
    return dtypes


@dataclass(frozen=True)
class Saved:
    """Parameters that are written together, and what is stored of them."""

    names: tuple[str, ...]  # of the parameters
    stored: Mapping[str, Tensor]  # on the meta device


class Written:
    """What a model stores, of which nothing but the shapes is there: groups of parameters, converted one at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        """The model is on the meta device. Raises Unstreamable where the mapping cannot be followed."""
        self._model = model
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        mapping = [m for m in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(m, PrefixChange)]
        model._weight_conversions = mapping  # type: ignore[assignment]  # as it would be found again for each group
        self._converts = bool(mapping)
        ignored = set(model._keys_to_ignore_on_save or ()) | _further_names(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
        first = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
        try:
            self._parameters = {name: first.get(id(model.get_parameter_or_buffer(name)), name) for name in state}
            self.groups = list(self._grouped(state, [entry.reverse_transform() for entry in mapping[::-1]]))
        except Exception as error:  # whatever transformers raises
            raise Unstreamable(f"its tensors are converted when it is saved ({error})") from error

    def _grouped(self, state: Mapping[str, Tensor], transforms: list) -> Iterator[Saved]:
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        together: dict[str, list[str]] = defaultdict(list)
        for name in state:
            renamed, pattern = rename_source_key(name, [], converters)
            together[name if pattern is None else f"{renamed} made of several"].append(name)
        for names in together.values():
            yield Saved(tuple(names), self.stored({name: state[name] for name in names}))

    def source_of(self, name: str) -> str:
        """The name by which a plan knows a parameter: the first of those that are tied."""
        return self._parameters[name]

    def stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of the parameters of one group."""
        return revert_weight_conversion(self._model, dict(parameters)) if self._converts else dict(parameters)

    def write_config(self, folder: Path) -> None:
        """What `save_pretrained` writes beside the weights."""
        config = self._model.config
        config.dtype, config.architectures = str(self._model.dtype).removeprefix("torch."), [type(self._model).__name__]
        config.save_pretrained(folder)
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(folder)
