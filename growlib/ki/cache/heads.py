"""A teacher's head beside the shards of its hidden states, stored once: head.safetensors.

    weight    [V, H], in the dtype of the states
    bias      [V], where there is one
    metadata  its scale and soft-cap, as JSON: see `Projection`

A head is a `Projection` of no positions. Shapes: V tokens, H hidden size.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from growlib.errors import GrowError
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.shards import Header, tensors_hash, written
from growlib.ki.cache.states import StateFormat
from growlib.ki.projection import Projection

HEAD = "head.safetensors"


def head_hash(head: Projection) -> str:
    """Of everything in it."""
    return tensors_hash(_constants(head), _tensors(head).items())


def _constants(head: Projection) -> str:
    return json.dumps([head.scale, head.softcap])


def _tensors(head: Projection) -> dict[str, torch.Tensor]:
    bias = {} if head.bias is None else {"bias": head.bias}
    return {"weight": head.weight, **bias}


def head_bytes(head: Projection) -> int:
    return sum(tensor.nbytes for tensor in _tensors(head).values())


def write_head(folder: Path, head: Projection) -> None:
    """Write head.safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(head).items()}
    with written(folder / HEAD) as temporary:
        save_file(tensors, temporary, {"head": _constants(head)})


def read_head(folder: Path, header: Header) -> Projection:
    """Read head.safetensors, memory-mapped; raises GrowError where it is missing, damaged, or of another cache."""
    asked = f"reading the teacher's cache {str(folder)!r}"
    valid = f"the same growlib.cache_teacher call again; it writes a missing {HEAD} (delete a damaged one first)"
    if not (folder / HEAD).is_file():
        raise GrowError(asked, f"{HEAD} is missing", valid)
    try:
        with safe_open(folder / HEAD, framework="pt") as file:
            scale, softcap = json.loads((file.metadata() or {})["head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        weight, bias = tensors["weight"], tensors.get("bias")
        head = Projection(weight.new_empty(0, weight.shape[-1]), weight, bias, scale, softcap)
        same = head_hash(head) == header.head
    except (OSError, RuntimeError) as error:
        wrong = f"{HEAD} cannot be opened ({error})"
        raise GrowError(asked, wrong, "the right to read it, and fewer files open") from error
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise GrowError(asked, f"{HEAD} is damaged ({error})", valid) from error
    if not same:
        raise GrowError(asked, f"{HEAD} was changed, or is of another cache: its hash is not the header's", valid)
    if not _fits(head, header.record_format):
        raise GrowError(asked, f"{HEAD} is damaged: it is no head of such states", valid)
    return head


def _fits(head: Projection, form: RecordFormat | StateFormat) -> bool:
    """Whether these are the shapes and dtypes of such states' head, and its constants are numbers."""
    if not isinstance(form, StateFormat):
        return False
    shapes = {"weight": (form.vocab, form.hidden_size), "bias": (form.vocab,)}
    whole = all(x.shape == shapes[name] and x.dtype == form.dtype for name, x in _tensors(head).items())
    return (
        whole and _is_number(head.scale) and (head.softcap is None or (_is_number(head.softcap) and head.softcap > 0))
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def on_device(head: Projection, device: torch.device) -> Projection:
    """A copy, also on the CPU, where the file is mapped and somebody may write to it."""
    bias = None if head.bias is None else head.bias.to(device, copy=True)
    return replace(head, hidden=head.hidden.to(device), weight=head.weight.to(device, copy=True), bias=bias)
