"""The models that are there before the arms of a comparison: the small one, and the teachers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from base import text
from base.job import Finished
from base.lab import Lab
from base.start import Checkpoint
from base.training import evaluate
from growlib import GrowError

SHOWN = 3  # tokens that differ


@dataclass(frozen=True)
class Known:
    """A model whose held-out loss is known. What its training cost is None where it was given."""

    name: str
    checkpoint: Checkpoint
    eval_loss: float
    flops: float | None
    seconds: float | None

    def facts(self) -> dict[str, Any]:
        """Its part of results.json."""
        return {"key": self.checkpoint.key, "eval_loss": self.eval_loss, "flops": self.flops, "seconds": self.seconds}


def trained(name: str, done: Finished) -> Known:
    """One that a job has trained."""
    result = done.result
    return Known(name, done.model, result["final_eval_loss"], result["flops"]["student"], result["seconds"])


def given(name: str, path: Path, model: PreTrainedModel, lab: Lab) -> Known:
    """One that was there, as it is.

    Raises:
        GrowError: it cannot read the lab's text.
    """
    config, length = model.config.get_text_config(), lab.setting.text.sequence_length
    if len(lab.tokenizer) > config.vocab_size:
        wrong = f"its tokenizer has {len(lab.tokenizer)} tokens and its model {config.vocab_size}"
        raise GrowError(f"{name} {path}", wrong, "a checkpoint beside the tokenizer that it was trained with")
    positions = getattr(config, "max_position_embeddings", None) or length
    if positions < length:
        wrong = f"it has {positions} positions and the preset's sequences {length} tokens"
        raise GrowError(f"{name} {path}", wrong, f"a preset whose sequence_length is at most {positions}")
    (held_out,) = lab.held_out.values()
    blocks = text.Ordered(held_out, len(held_out), 0, lab.masking)
    loss = evaluate(model, blocks, lab.tokenizer, lab.setting.training)
    return Known(str(path), Checkpoint.given(path), loss, None, None)


def check_teacher(path: Path, model: PreTrainedModel, small: PreTrainedModel, lab: Lab) -> None:
    """Raise GrowError where a model cannot teach what grows from the small one: another task, or other tokens."""
    asked = f"--teacher {path}"
    kinds = ["masked" if is_masked(one) else "causal" for one in (model, small)]
    if kinds[0] != kinds[1]:
        raise GrowError(
            asked, f"it is a {kinds[0]} language model, the small one a {kinds[1]} one", f"a {kinds[1]} one"
        )
    theirs, ours = text.tokenizer_at(asked, path).get_vocab(), lab.tokenizer.get_vocab()
    if theirs != ours:
        valid = "a teacher with the tokenizer of the small model"
        raise GrowError(asked, f"its tokenizer is another one: {differences(theirs, ours)}", valid)


def differences(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    """The first ids whose tokens differ, and how many there are."""
    there, here = ({number: token for token, number in vocab.items()} for vocab in (theirs, ours))
    ids = sorted(number for number in there.keys() | here.keys() if there.get(number) != here.get(number))

    def token(vocab: Mapping[int, str], number: int) -> str:
        return repr(vocab[number]) if number in vocab else "no token"

    first = ", ".join(f"id {i} is {token(there, i)} there and {token(here, i)} here" for i in ids[:SHOWN])
    return f"{first} ({len(ids)} ids differ)"


def is_masked(model: PreTrainedModel) -> bool:
    """Whether a masked language model; anything else is trained as a causal one."""
    return "MaskedLM" in type(model).__name__
