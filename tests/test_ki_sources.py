"""What users call a teacher: models in wrappers, folders of every kind, names that lead nowhere."""

import ast
import io
import json
import os
from pathlib import Path

import peft
import pytest
import torch
from ki_tiny import VOCAB, arguments, collate, examples, gpt2, half, llama, parameters, sgd_step, shifted, train
from safetensors.torch import load_file, save_file
from test_ki_teacher import tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from growlib import GrowError, KIConfig, KIMixin, KITrainer, cache_teacher
from growlib.ki import verify_cache
from growlib.ki.sources import SAFE, load_teacher, model_in, name_of, short, tokenizer_at
from growlib.ki.tasks import task_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
ROWS = examples(8)
HERE = Path(__file__).parent


def write(teacher, folder, **options):
    return cache_teacher(teacher, ROWS, folder, data_collator=collate, top_k=4, samples=2, **options)


# ways to use a teacher: (teacher, folder) -> anything
USES = {
    "online": lambda teacher, folder: train(folder, llama(0), half(teacher), ROWS),
    "cached": lambda teacher, folder: write(teacher, folder / "cache"),
    "verified": lambda teacher, folder: verify_cache(write(llama(1, hidden=8), folder / "v").path, teacher, ROWS),
}


def saved(folder, change=None):
    """A teacher's folder, whose config a function changes."""
    llama(1, hidden=8).save_pretrained(folder)
    if change is not None:
        config = json.loads((folder / "config.json").read_text())
        config = change(config) or config
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora(model, **options):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


# A model of one's own


def state_of(model):
    """Everything of a model that its owner may notice."""
    return (
        [(p.dtype, p.device, p.requires_grad, p.sum().item()) for p in model.parameters()],
        [module.training for module in model.modules()],
        model.config.to_dict(),
        model.generation_config.to_dict(),
    )


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_model_that_is_passed_in_is_as_it_was_afterwards(tmp_path, monkeypatch, use, trains, fails):
    teacher = llama(1, hidden=8).train(trains)
    teacher.model.norm.eval()
    teacher.lm_head.weight.requires_grad_(False)
    before = state_of(teacher)
    if fails and use == "verified":
        pytest.skip("it would fail before the teacher is asked")
    if fails:
        monkeypatch.setattr("growlib.ki.teacher.Teacher._inputs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            USES[use](teacher, tmp_path)
    else:
        USES[use](teacher, tmp_path)
    assert state_of(teacher) == before


def test_it_is_given_back_when_it_has_said_its_last(tmp_path):
    """Not only after the training: the last steps are without it."""
    teacher, seen = llama(1, hidden=8).train(), []

    class Watch(KITrainer):
        def log(self, logs, *rest):
            seen.append((logs.get("ki/alpha"), teacher.training))
            super().log(logs, *rest)

    ki = KIConfig(teacher=teacher, schedule="heaviside", stop_at=0.5)
    train(tmp_path, llama(0), ki, examples(64), Watch, max_steps=4, logging_strategy="steps", logging_steps=1)
    assert [training for _, training in seen[:4]] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_never_cast(tmp_path, dtype):
    teacher = llama(1, hidden=8)
    for attempt in (
        lambda: KIConfig(teacher=teacher, teacher_dtype=dtype),
        lambda: KIConfig(teacher=nn.DataParallel(teacher), teacher_dtype=dtype),
        lambda: KIConfig(teacher=(teacher, "folder"), teacher_dtype=dtype),
        lambda: write(teacher, tmp_path / "cache", dtype=dtype),
    ):
        with pytest.raises(GrowError, match=rf"it is in torch.float32, and a model of yours is not cast to {dtype}"):
            attempt()
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert model_in(teacher, torch.float32) is teacher


# Wrappers

WRAPPERS = {
    "itself": lambda model: model,
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "lora": lora,
    "compiled lora": lambda model: torch.compile(lora(model), backend="eager"),
    "lora in place": lambda model: lora(model).get_base_model(),
    "parallel compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_in_a_wrapper_teaches_what_it_says(tmp_path, wrapper):
    """Adapters included."""
    wrapped, plain = WRAPPERS[wrapper](llama(1, hidden=8)), WRAPPERS[wrapper](llama(1, hidden=8))
    student, expected = llama(0), llama(0)
    train(tmp_path, student, half(wrapped), ROWS)
    says = plain.module if isinstance(plain, nn.DataParallel) else plain

    class Stub(nn.Module):
        def forward(self, **batch):
            return says.eval()(**batch)

    want = sgd_step(expected, Stub(), ROWS, shifted, alpha=0.5)
    torch.testing.assert_close(parameters(student), want, rtol=1e-4, atol=1e-6)
    if "lora" in wrapper:
        other = llama(0)
        train(tmp_path, other, half(llama(1, hidden=8)), ROWS)
        assert not torch.allclose(parameters(other), parameters(student), atol=1e-6)
    assert verify_cache(write(wrapped, tmp_path / "cache").path, wrapped, ROWS, data_collator=collate).compared


def pipeline():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    inside = llama(1, hidden=8)

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.auto_model = inside

    return SentenceTransformer(modules=[Transformer(), Pooling(8)])


def prompt_tuning():
    return peft.get_peft_model(llama(1, hidden=8), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(2, 2), "a teacher that is a Linear: it is no PreTrainedModel"),
        (lambda: nn.Sequential(llama(0)), "a teacher that is a Sequential"),
        (pipeline, r"SentenceTransformer: it is no PreTrainedModel.*st\[0\].auto_model"),
        (prompt_tuning, "its PROMPT_TUNING works outside of the model's layers"),
        (lambda: 3, "a teacher that is a int"),
        (lambda: llama, "a teacher that is a function"),
        (lambda: b"bytes", "a teacher that is a bytes"),
        (lambda: llama(0).config, "a teacher that is a LlamaConfig"),
        (lambda: [llama(0)], "a teacher that is a list"),
    ],
)
def test_what_is_no_teacher_is_named_in_few_words(tmp_path, make, says):
    for attempt in (lambda teacher: KIConfig(teacher=teacher), lambda teacher: write(teacher, tmp_path / "cache")):
        with pytest.raises(GrowError, match=says) as caught:
            attempt(make())
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [llama(0), [llama(0)], (llama(0),) * 9, {"a": llama(0)}, "x" * 999, list(range(999))])
def test_errors_show_no_value_at_length(value):
    assert len(short(value)) <= 80
    assert "Linear(" not in short(value)


def test_a_name_that_is_long_is_cut_at_its_start():
    teacher = llama(0)
    teacher.config.name_or_path = "/".join(["folder"] * 40) + "/last"
    assert len(name_of(teacher)) <= 82
    assert name_of(teacher).endswith("last'")


# Folders


def test_an_adapters_folder_is_loaded_on_its_base(tmp_path):
    base = saved(tmp_path / "base")
    adapted = lora(llama(1, hidden=8), task_type="CAUSAL_LM")
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, batch = load_teacher(tmp_path / "adapter", "causal", None), collate(ROWS)
    assert torch.allclose(loaded(**batch).logits, adapted.eval()(**batch).logits, atol=1e-5)
    assert not torch.allclose(loaded(**batch).logits, llama(1, hidden=8)(**batch).logits, atol=1e-2)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, says in ((None, "names no base model"), (3, "names no base model"), ("/nowhere", "does not load")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps(described | {"base_model_name_or_path": name})
        )
        with pytest.raises(GrowError, match=says):
            load_teacher(tmp_path / "adapter", "causal", None)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(GrowError, match="the adapter's weights are pickled"):
        load_teacher(tmp_path / "adapter", "causal", None)


@pytest.mark.parametrize("use", ["online", "cached"])
@pytest.mark.parametrize(
    "described",
    [{"quant_method": name} for name in ("bitsandbytes", "gptq", "awq", "compressed-tensors", "hqq", "no-such")]
    + [{"load_in_8bit": True}, "int8", ["int8"], 8, {"quant_method": ["a"]}],
    ids=str,
)
def test_a_quantised_teacher_that_does_not_load_says_so(tmp_path, use, described):
    folder = saved(tmp_path / "teacher", lambda config: config | {"quantization_config": described})
    with pytest.raises(GrowError, match=r"it is quantised with .*dequantise") as caught:
        USES[use](folder, tmp_path)
    assert not isinstance(described, dict) or str(described.get("quant_method", "")) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/at/all", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("../a/b/c", "there is no such folder"),
        ("~/nowhere/at/all", "there is no such folder"),
        (Path("nowhere"), "there is no such folder"),
        ("file.txt", "it is a file"),
        ("empty", "no config.json"),
        ("nothing/there", "no hub repository of this name is within reach"),
        ("nothing here", "no hub repository of this name is within reach"),
        ("", "."),
        ("a\0b", "there is no such folder"),
        ("x" * 999, "."),
    ],
)
@pytest.mark.parametrize("use", ["online", "cached"])
def test_a_path_that_leads_nowhere(tmp_path, monkeypatch, name, says, use):
    """It is never said to be out of the hub's reach where it is a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("file.txt").touch()
    Path("empty").mkdir()
    with pytest.raises(GrowError, match=says) as caught:
        USES[use](name, tmp_path)
    assert "connect" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda x: x.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(24, 8)}), "no place for .*layers.1"),
        (lambda x: x.update({"lm_head.weight": torch.zeros(VOCAB, 9)}), "do not fit the config in lm_head.weight"),
        *(
            (
                lambda x, dtype=dtype: x.update({"lm_head.weight": x["lm_head.weight"].to(dtype)}),
                "no floating-point|complex",
            )
            for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)
        ),
    ],
)
def test_every_tensor_of_a_file_is_used_or_named(tmp_path, change, says):
    file = saved(tmp_path / "teacher") / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(GrowError, match=says):
        write(tmp_path / "teacher", tmp_path / "cache")


def test_weights_that_are_written_over_later_do_not_change_a_loaded_teacher(tmp_path):
    folder = saved(tmp_path / "teacher")
    trainer = KITrainer(model=llama(0), args=arguments(tmp_path), ki=half(folder), train_dataset=ROWS)
    before = parameters(trainer._ki_provider.teacher.model).clone()
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert torch.equal(parameters(trainer._ki_provider.teacher.model), before)


# Whose tokens they are


def test_the_first_tokens_that_differ_are_named(tmp_path):
    folder = saved(tmp_path / "teacher")
    tokenizer(VOCAB).save_pretrained(folder)
    words = {f"{'other' if i in (3, 7, 8, 9, 20) else 'word'}{i}": i for i in range(VOCAB)}
    student = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")))
    with pytest.raises(GrowError, match=r"id 3 is 'word3' for the teacher, 'other3' for the student; id 7 .* 3 more"):
        KITrainer(model=llama(0), args=arguments(tmp_path), ki=half(folder), processing_class=student)


# Code of a checkpoint


def test_code_of_a_checkpoint_never_runs(tmp_path, monkeypatch):
    """Whatever stands on the terminal."""
    folder = saved(tmp_path / "teacher", lambda config: config | {"model_type": "mine"} | AUTO)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.T", None]}}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for attempt in (*(lambda use=use: USES[use](folder, tmp_path) for use in USES), lambda: tokenizer_at(str(folder))):
        with pytest.raises(GrowError):
            attempt()
    assert not (tmp_path / "ran").exists()


AUTO = {"auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}


@pytest.mark.parametrize("folder", ["recipes", "growlib/ki"])
def test_every_loading_call_says_that_it_runs_no_code(folder):
    for path in (HERE.parent / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                words = [ast.unparse(keyword) for keyword in node.keywords]
                said = {"trust_remote_code=False", "**SAFE", "**options"} & {*words}
                assert said, f"{path.name}, line {node.lineno}"
    assert SAFE == {"trust_remote_code": False}


# What a student's loss is


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_loss_over_several_labels_is_named(problem):
    for config, cls in ((ViTConfig, ViTForImageClassification), (BertConfig, BertForSequenceClassification)):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = cls(config(problem_type=problem, num_labels=3, **sizes))
        with pytest.raises(GrowError, match=r"its loss is .* Valid: one class out of two or more") as caught:
            task_of(model)
        assert "an image classifier" not in str(caught.value)


def test_another_architecture_with_the_same_tokens_teaches(tmp_path):
    student = llama(0)
    before = parameters(student).clone()
    train(tmp_path, student, half(gpt2(1, hidden=8)), ROWS)
    assert not torch.equal(parameters(student), before)


@pytest.mark.parametrize(("factor", "advised"), [(1.0, True), (0.5, False)])
def test_only_a_plain_loss_is_advised_to_say_so(tmp_path, factor, advised):
    """As trl's loss_type="dft", which gives no logits either."""

    class Behind(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            outputs["logits"] = outputs.logits.detach()
            return (factor * outputs.loss, outputs) if return_outputs else factor * outputs.loss

    class Taught(KIMixin, Behind): ...

    with pytest.raises(GrowError, match="carry no gradient") as caught:
        train(tmp_path, llama(0), half(llama(1, hidden=8)), ROWS, Taught)
    assert ("loss_is_plain" in str(caught.value)) == advised
    assert ("dft" in str(caught.value)) != advised
