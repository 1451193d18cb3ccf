"""An online teacher: checked against the student, and borrowed from its owner while it teaches."""

import inspect
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.guard import Guard
from growlib.ki.head_access import HeadAccess, NoHeadAccess, access_head, tensor_parallel
from growlib.ki.input_limits import InputLimits, refusing
from growlib.ki.projection import Projection
from growlib.ki.sources import first_line, load_teacher, model_in, name_of, tokenizer_at
from growlib.ki.targets import Logits
from growlib.ki.tasks import (
    ANY,
    CLASSIFIERS,
    LABELS,
    WITHOUT_HEAD,
    Positions,
    decoder_inputs,
    logits_in,
    outcomes,
    task_of,
)

logger = logging.getLogger("growlib")

NOT_FOR_THE_TEACHER = {*LABELS, "num_items_in_batch"}
MOST = 3  # differences that an error shows
Names = dict[str, int]


class Loan:
    """A model while it teaches: in eval mode, without gradients, and on a device, if it was not placed by its owner."""

    def __init__(self, model: PreTrainedModel, device: torch.device | None) -> None:
        self._training = {module: module.training for module in model.modules()}
        self._frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._model, self._home = model, None
        model.eval().requires_grad_(False)
        if device is not None and getattr(model, "hf_device_map", None) is None and model.device != device:
            self._home = model.device
            self._move(device)

    def _move(self, device: torch.device) -> None:
        model: Any = self._model
        try:
            model.to(device)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            asked = f"the teacher {name_of(model)} on {device}"
            valid = "a model that can be moved, or one with a device_map of its own"
            raise GrowError(asked, f"it cannot be moved there ({first_line(error)})", valid) from error

    def end(self) -> None:
        """Make the model what it was."""
        for module, training in self._training.items():
            module.training = training
        for parameter, wanted in self._frozen.items():
            parameter.requires_grad_(wanted)
        if self._home is not None:
            self._move(self._home)


class Teacher:
    """A model to learn from. It is no `nn.Module`, so that nothing that walks the student's modules finds it.

    Args:
        device: where it teaches; None: where it is.
        lent: it is somebody's, who gets it back as it was when it has taught (`give_back`).

    Attributes:
        model: frozen and in eval mode from its first prediction on.
        name: in an error.
        common_vocab: number of token ids that teacher and student share.
        task: decides how its labels are aligned with its logits.
        names: what its forward pass takes.
        limits: what it can read, known from its first prediction on.
        no_head: why its logits are computed as a whole, where they are; known from then on, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        common_vocab: int,
        *,
        device: torch.device | None = None,
        guard: Guard | None = None,
        lent: bool = False,
    ) -> None:
        self.model, self.common_vocab, self.name = model, common_vocab, name_of(model)
        self.task = task_of(model)
        self.guard, self._device, self._lent = guard or Guard(), device, lent
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self._takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        context = context if isinstance(context, int) and context > 0 else None
        self.limits = InputLimits(f"the teacher {self.name}", model, context)
        self._loan: Loan | None = None
        self._access: HeadAccess | None = None
        self._access_known = False
        self.no_head: str | None = None

    def give_back(self) -> None:
        """End the loan, if its model is somebody's; the next prediction begins another."""
        if self._loan is not None and self._lent:
            self._loan.end()
            self._loan = None

    @torch.no_grad()
    def predict(self, inputs: dict[str, Any], positions: Positions) -> Logits | Projection:
        """What it says on the student's inputs at the positions that count, over `common_vocab` token ids.

        Hidden states and head where growlib has access to the head, logits otherwise; on the teacher's device.
        Raises GrowError for a batch that it cannot read.
        """
        if self._loan is None:
            self._loan = Loan(self.model, self._device)
        kept = self._inputs(inputs)
        if not self._access_known:
            with self.limits.learning(kept), in_own_dtype(self.model, positions.labels.device):
                self._find_head(kept)
            self._access_known = True
        kept = self.limits.check(kept, self.guard)
        with refusing(self.limits.who, kept), in_own_dtype(self.model, positions.labels.device):
            if self._access is not None:
                whole: Logits | Projection = self._access.run(self.model, kept).tokens(0, self.common_vocab)
            else:
                logits = self._whole(kept)[..., : self.common_vocab]
                whole = Logits(logits.reshape(-1, logits.shape[-1]))
            return whole.rows(positions.flat.to(whole.device))

    def _find_head(self, kept: Mapping[str, Any]) -> None:
        try:
            if self.task in WITHOUT_HEAD:
                self._whole(kept)
                self.no_head = "its logits are few"
            else:
                self._access = access_head(self.model, self.model, kept)
        except NoHeadAccess as reason:
            self.no_head = str(reason)
            logger.info("the teacher's logits are computed as a whole: %s", reason)

    def _whole(self, kept: Mapping[str, Any]) -> torch.Tensor:
        logits = logits_in(self.model(**kept), self.task)
        if logits is None:
            raise GrowError(self.limits.who, f"it returns no logits for {self.task}", "a teacher that returns logits")
        return logits

    def _inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the teacher takes of a batch, where it takes it."""
        if self.model.training:  # whoever owns the model may have switched it
            self.model.eval()
        kept = {
            name: value
            for name, value in inputs.items()
            if name not in NOT_FOR_THE_TEACHER and (self._takes_any or name in self.names)
        }
        if "use_cache" in self.names:
            kept["use_cache"] = False
        if self.task == "seq2seq":
            kept |= decoder_inputs(self.model, inputs) or {"labels": inputs["labels"]}  # which it shifts itself
        device = self.model.device  # meta: accelerate reads the weights when they are needed, and moves the inputs
        return kept if device.type == "meta" else send_to_device(kept, device)


def in_own_dtype(model: PreTrainedModel, device: torch.device) -> AbstractContextManager[Any]:
    """No autocast of the training's device for a teacher in half precision. Of a float32 one it halves the work."""
    return nullcontext() if model.dtype == torch.float32 else torch.autocast(device.type, enabled=False)


def resolve_teacher(
    config: KIConfig,
    teacher: Any,
    student: PreTrainedModel,
    tokenizer: Any,
    device: torch.device,
    guard: Guard | None = None,
) -> Teacher:
    """Load one of `config.teacher`, and check that it can teach the student.

    Args:
        tokenizer: the student's, or None where it is not known.
        device: where the teacher goes; one with a device map of its own stays where it is.
        guard: of the training.

    Raises:
        GrowError: it cannot be loaded from safetensors, is made for another task, shares parameters with the student,
            or its token ids do not mean what the student's mean.
    """
    task = task_of(student)
    lent = model_in(teacher) is not None
    model = load_teacher(teacher, task, config.teacher_dtype)
    asked = f"KIConfig(teacher={name_of(model)})"
    if task_of(model) != task:
        raise GrowError(asked, f"a {task_of(model)} model cannot teach a {task} one", f"a {task} model")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        wrong = "DeepSpeed ZeRO-3 split its parameters when it was made, and no engine joins them again"
        valid = "its folder or hub id, which is loaded whole in each process; or a cache (growlib.cache_teacher)"
        raise GrowError(asked, wrong, valid)
    if tensor_parallel(model) not in (1, tensor_parallel(student)):
        wrong = f"it is split over {tensor_parallel(model)} processes, which read the same text with no such student"
        raise GrowError(asked, wrong, "a student that is split in the same way; or the teacher's folder or hub id")
    if not {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in student.parameters()):
        wrong = "it shares parameters with the student, which would be frozen with it"
        raise GrowError(asked, wrong, "a copy of the model")
    common_vocab = _shared_outcomes(asked, config, model, student, _tokenizers(teacher, model, tokenizer))
    if not lent:
        place(model, device)
    return Teacher(model, common_vocab, device=device, guard=guard, lent=lent)


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Put a model that growlib loaded on a device.

    On the CPU its weights are copied out of the file, which is mapped, and which somebody may write to.
    """
    if getattr(model, "hf_device_map", None) is not None:
        return
    Loan(model, device)
    if device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def _tokenizers(teacher: Any, model: PreTrainedModel, tokenizer: Any) -> list[Names | None]:
    """The ids of the teacher's and of the student's tokens; None where there is no tokenizer."""
    folder = model.name_or_path or ""
    own = tokenizer_at(os.fspath(teacher)) if isinstance(teacher, str | os.PathLike) else None
    return [known and known.get_vocab() for known in (own or tokenizer_at(folder), tokenizer)]


def _shared_outcomes(
    asked: str, config: KIConfig, model: PreTrainedModel, student: PreTrainedModel, tokens: list[Names | None]
) -> int:
    """How many ids, from 0 up, teacher and student share; of tokens, or of classes. GrowError where they differ."""
    task = task_of(student)
    if task not in (*CLASSIFIERS, "question-answering"):
        return _common_vocab(asked, config, [outcomes(model), outcomes(student)], tokens)
    both = [{i: name for name, i in (table or {}).items()} for table in tokens]
    shared = both[0].keys() & both[1].keys()
    if task != "image" and any(both[0][i] != both[1][i] for i in shared):
        raise GrowError(asked, f"its tokens are not the student's: {_differences(*tokens)}", "the student's tokenizer")
    if task == "question-answering":
        return ANY
    names = [_class_names(model), _class_names(student)]
    return _common_vocab(asked, config, [outcomes(model), outcomes(student)], names)


def _class_names(model: PreTrainedModel) -> Names | None:
    """The ids of a classifier's classes; None where they were given no names."""
    names = {name: int(i) for i, name in (model.config.id2label or {}).items()}
    return None if all(name == f"LABEL_{i}" for name, i in names.items()) else names


def _common_vocab(asked: str, config: KIConfig, vocabs: list[int], names: list[Names | None]) -> int:
    """How many ids, from 0 up, teacher and student share; of tokens, or of classes.

    Args:
        vocabs: how many ids the teacher has, and the student.
        names: the ids of the teacher's and the student's tokens; None where there is no tokenizer.
    """
    common = min(vocabs) if config.common_vocab is None else config.common_vocab
    wrong = f"teacher and student have {vocabs[0]} and {vocabs[1]} ids"
    if common > min(vocabs):
        raise GrowError(f"KIConfig(common_vocab={common})", wrong, f"at most {min(vocabs)}")
    if names[0] and names[1]:
        tables = [table or {} for table in names]
        if config.common_vocab is not None:
            tables = [{name: i for name, i in table.items() if i < common} for table in tables]
        of_teacher, of_student = tables
        if of_teacher != of_student:
            number = len(of_teacher.items() ^ of_student.items())
            wrong = f"its tokens or classes are not the student's: {number} (name, id) pairs are in only one of them; "
            valid = "a teacher with the student's, or common_vocab=the number of ids from 0 that agree"
            raise GrowError(asked, wrong + _differences(of_teacher, of_student), valid)
        return common if vocabs[0] == vocabs[1] else min(common, max(of_teacher.values()) + 1)
    if vocabs[0] != vocabs[1] and config.common_vocab is None:
        wrong += ", and without both tokenizers (the trainer's processing_class, the teacher's folder) nothing proves "
        valid = "a teacher with the student's vocabulary, both tokenizers, or common_vocab=the number of shared ids"
        raise GrowError(asked, wrong + "that only padding differs", valid)
    return common


def _differences(of_teacher: Names | None, of_student: Names | None) -> str:
    """The first ids that mean something else, in words."""
    both = [{i: name for name, i in (table or {}).items()} for table in (of_teacher, of_student)]
    ids = sorted(i for i in both[0].keys() | both[1].keys() if both[0].get(i) != both[1].get(i))
    words = [[repr(names[i])[:40] if i in names else "nothing" for names in both] for i in ids[:MOST]]
    shown = [f"id {i} is {a} for the teacher, {b} for the student" for i, (a, b) in zip(ids, words, strict=False)]
    return "; ".join(shown) + (f"; and {len(ids) - MOST} more" if len(ids) > MOST else "")
