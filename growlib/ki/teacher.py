"""An online teacher: loaded, checked against the student, frozen."""

import inspect
import logging
import os
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from growlib.errors import GrowError
from growlib.ki.config import KIConfig
from growlib.ki.head_access import HeadAccess, NoHeadAccess, access_head
from growlib.ki.projection import Projection
from growlib.ki.targets import Logits
from growlib.ki.tasks import Positions, decoder_inputs, outcomes, task_of

logger = logging.getLogger("growlib")

AUTO_CLASS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
}
NOT_FOR_THE_TEACHER = {"labels", "shift_labels", "num_items_in_batch"}


class Teacher:
    """A frozen model to learn from.

    It is no `nn.Module`, so that nothing that walks the student's modules wraps, trains or saves it.

    Attributes:
        model: in eval mode, without gradients.
        common_vocab: number of token ids that teacher and student share.
        task: decides how its labels are aligned with its logits.
        names: what its forward pass takes.
    """

    def __init__(self, model: PreTrainedModel, common_vocab: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.common_vocab = common_vocab
        self.task = task_of(model)
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self._takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._access: HeadAccess | None = None
        self._access_known = False

    @torch.no_grad()
    def predict(self, inputs: dict[str, Any], positions: Positions) -> Logits | Projection:
        """What it says on the student's inputs at the positions that count, over `common_vocab` token ids.

        Hidden states and head where growlib has access to the head, logits otherwise; on the teacher's device.
        """
        kept = self._inputs(inputs)
        if not self._access_known:
            self._access_known = True
            try:
                self._access = access_head(self.model, self.model, kept)
            except NoHeadAccess as reason:
                logger.info("the teacher's logits are computed as a whole: %s", reason)
        if self._access is None:
            logits = self.model(**kept).logits[..., : self.common_vocab]
            whole: Logits | Projection = Logits(logits.reshape(-1, logits.shape[-1]))
        else:
            whole = self._access.run(self.model, kept).tokens(0, self.common_vocab)
        return whole.rows(positions.flat.to(whole.device))

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
        if self.model.config.is_encoder_decoder:
            kept |= decoder_inputs(self.model, inputs) or {"labels": inputs["labels"]}  # which it shifts itself
        device = self.model.device  # meta: accelerate reads the weights when they are needed, and moves the inputs
        return kept if device.type == "meta" else send_to_device(kept, device)


def resolve_teacher(
    config: KIConfig,
    teacher: PreTrainedModel | str | os.PathLike[str],
    student: PreTrainedModel,
    tokenizer: Any,
    device: torch.device,
) -> Teacher:
    """Load one of `config.teacher`, and check that it can teach the student.

    Args:
        tokenizer: the student's, or None where it is not known.
        device: where the teacher goes; one with a device map of its own stays where it is.

    Raises:
        GrowError: it cannot be loaded from safetensors, is made for another task, shares parameters with the student,
            or its token ids do not mean what the student's mean.
    """
    task = task_of(student)
    model = load_teacher(teacher, task, config.teacher_dtype)
    folder = model.name_or_path or ""
    asked = f"KIConfig(teacher={folder or type(model).__name__!r})"
    if task_of(model) != task:
        raise GrowError(asked, f"a {task_of(model)} model cannot teach a {task} one", f"a {task} model")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        wrong = "DeepSpeed ZeRO-3 split its parameters when it was made, and no engine joins them again"
        valid = "its folder or hub id, which is loaded whole in each process; or a cache (growlib.cache_teacher)"
        raise GrowError(asked, wrong, valid)
    if not {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in student.parameters()):
        wrong = "it shares parameters with the student, which would be frozen with it"
        raise GrowError(asked, wrong, "a copy of the model")
    if task == "image":
        names = [_class_names(model), _class_names(student)]
    else:
        names = [known and known.get_vocab() for known in (tokenizer_at(folder), tokenizer)]
    common_vocab = _common_vocab(asked, config, [outcomes(model), outcomes(student)], names)
    if getattr(model, "hf_device_map", None) is None:
        model.to(device=device, dtype=config.teacher_dtype)  # type: ignore[call-arg]
    return Teacher(model, common_vocab)


def load_teacher(teacher: Any, task: str | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model, or the safetensors weights of a folder or hub id, never its code; GrowError where they do not load.

    Without a task, the class is what the config names, or a causal one where it names none.
    """
    if isinstance(teacher, PreTrainedModel):
        return teacher
    if not isinstance(teacher, str | os.PathLike):
        wrong = f"the teacher is a {type(teacher).__name__}"
        raise GrowError("loading a teacher", wrong, "a PreTrainedModel, a folder or a hub id")
    folder = os.fspath(teacher)
    asked = f"the teacher {folder!r}"
    if task is not None and task not in AUTO_CLASS:
        raise GrowError(f"a teacher with task={task!r}", "there is no such task", ", ".join(AUTO_CLASS))
    kind = "language" if task is None else task
    try:
        if task is None:
            named = AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures or [""]
            model_class: Any = getattr(transformers, named[0], transformers.AutoModelForCausalLM)
        else:
            model_class = getattr(transformers, AUTO_CLASS[task])
        options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        model, report = model_class.from_pretrained(folder, dtype=dtype or "auto", **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        valid = "a folder or hub id with a config.json of a transformers architecture and safetensors weights"
        raise GrowError(asked, f"it does not load as a {kind} model ({error})", valid) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise GrowError(asked, f"the checkpoint lacks {missing}", f"the checkpoint of a {kind} model, head included")
    return model


def tokenizer_at(folder: str) -> Any:
    """The tokenizer beside the teacher's weights, or None; raises GrowError where it is broken."""
    if os.path.isdir(folder):
        if not any(os.path.isfile(os.path.join(folder, f"tokenizer{end}")) for end in (".json", "_config.json")):
            return None
    elif os.path.exists(folder) or not folder:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except OSError:
        return None
    except Exception as error:  # the tokenizers library raises plain exceptions
        wrong = f"its tokenizer cannot be read ({error})"
        raise GrowError(f"the teacher {folder!r}", wrong, "a tokenizer of transformers, or none") from error


def _class_names(model: PreTrainedModel) -> dict[str, int] | None:
    """The ids of an image classifier's classes; None where they were given no names."""
    names = {name: int(i) for i, name in (model.config.id2label or {}).items()}
    return None if all(name == f"LABEL_{i}" for name, i in names.items()) else names


def _common_vocab(asked: str, config: KIConfig, vocabs: list[int], names: list[dict[str, int] | None]) -> int:
    """How many ids, from 0 up, teacher and student share; of tokens, or of an image's classes.

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
            wrong = f"its tokens or classes are not the student's: {number} (name, id) pairs are in only one of them"
            valid = "a teacher with the student's, or common_vocab=the number of ids from 0 that agree"
            raise GrowError(asked, wrong, valid)
        return common if vocabs[0] == vocabs[1] else min(common, max(of_teacher.values()) + 1)
    if vocabs[0] != vocabs[1] and config.common_vocab is None:
        wrong += ", and without both tokenizers (the trainer's processing_class, the teacher's folder) nothing proves "
        valid = "a teacher with the student's vocabulary, both tokenizers, or common_vocab=the number of shared ids"
        raise GrowError(asked, wrong + "that only padding differs", valid)
    return common
