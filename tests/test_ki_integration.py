"""With other libraries: TRL's SFTTrainer, PEFT students, torch.compile, teachers that accelerate places."""

import logging
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from ki_tiny import arguments, collate, examples, half, llama, parameters, shifted, train
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from growlib import GrowError, KIConfig, KIMixin, KITrainer, cache_teacher
from growlib.ki import Targets, ki_loss
from growlib.ki.tasks import task_of


@pytest.mark.filterwarnings("ignore")
def test_a_peft_student_learns_through_its_adapters(tmp_path):
    """There is access to the frozen head through the wrapper; the step on the adapters is the hand-written one."""
    import peft

    rows, teacher = examples(8), llama(1, hidden=8)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def student():
        torch.manual_seed(5)
        return peft.get_peft_model(llama(0), config)

    expected, batch = student(), collate(rows)
    with torch.no_grad():
        logits = teacher(**batch).logits
    loss = ki_loss(expected(**batch).logits, shifted(batch["labels"]), logits, alpha=0.5).loss
    adapters = [p for p in expected.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, adapters)
    by_hand = torch.cat([(p - 0.1 * g).detach().reshape(-1) for p, g in zip(adapters, gradients, strict=True)])
    taught = student()
    frozen = taught.get_base_model().lm_head.weight.clone()
    trainer = train(tmp_path, taught, half(teacher), rows)
    assert trainer._ki_loss_form.access is not None
    stepped = torch.cat([p.detach().reshape(-1) for p in taught.parameters() if p.requires_grad])
    torch.testing.assert_close(stepped, by_hand, rtol=1e-5, atol=1e-6)
    assert torch.equal(frozen, taught.get_base_model().lm_head.weight)


def taught_sft(folder, rows, ki, **options):
    """trl's SFTTrainer with a teacher."""
    from test_ki_teacher import tokenizer
    from trl import SFTConfig, SFTTrainer

    class TaughtSFT(KIMixin, SFTTrainer):
        loss_is_plain = True

    words = tokenizer(32)
    words.pad_token = words.eos_token = "[UNK]"
    names = ("output_dir", "use_cpu", "optim", "learning_rate", "disable_tqdm", "max_grad_norm")
    plain = {name: value for name, value in arguments(folder).to_dict().items() if name in names}
    args = SFTConfig(
        **plain, max_steps=2, report_to="none", save_strategy="no", logging_steps=1, bf16=False,
        gradient_checkpointing=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return TaughtSFT(model=llama(0), args=args, train_dataset=rows, processing_class=words, ki=ki)


@pytest.mark.filterwarnings("ignore")  # of trl
def test_trls_sft_trainer_with_a_teacher(tmp_path):
    """Its loss has no logits with a gradient: it is taken for the plain CE, by word and by proof, or refused."""
    ids = [row["input_ids"].tolist() for row in examples(16, ignored=False)]
    rows = datasets.Dataset.from_dict({"input_ids": ids})
    trainer = taught_sft(tmp_path, rows, half(llama(1, hidden=8)), dataset_kwargs={"skip_prepare_dataset": True})
    trainer.train()
    assert trainer._ki_loss_form.access is not None
    logs = [log for log in trainer.state.log_history if "ki/kd" in log]
    assert len(logs) == 2
    assert logs[0]["ki/alpha"] == 0.5
    assert logs[0]["ki/kd"] > 0.1
    assert (parameters(trainer.model) - parameters(llama(0))).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # of trl
def test_trls_packed_rows_from_a_cache(tmp_path):
    """Cached as its trainer packs and collates them; the steps are those with the teacher beside it."""
    ids = [row["input_ids"].tolist()[: 4 + i % 6] for i, row in enumerate(examples(64, ignored=False))]
    rows = datasets.Dataset.from_dict({"input_ids": ids})
    teacher = llama(1, hidden=8)
    online = taught_sft(tmp_path, rows, half(teacher, top_k=31), packing=True, max_length=32)
    assert len(online.train_dataset) < 32
    path = tmp_path / "cache"
    cache_teacher(teacher, online.train_dataset, path, data_collator=online.data_collator, top_k=31, samples=0)
    cached = taught_sft(tmp_path, rows, half(path), packing=True, max_length=32)
    for trainer in (online, cached):
        trainer.train()
    torch.testing.assert_close(parameters(cached.model), parameters(online.model), rtol=1e-3, atol=1e-4)
    assert (parameters(cached.model) - parameters(llama(0))).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_a_compiled_student_takes_the_same_steps_in_two_graphs(tmp_path, caplog):
    """One graph up to the head for every taught step, whatever α, and one for the plain steps after `stop_at`."""
    rows, ki = examples(64), KIConfig(teacher=llama(1, hidden=8), stop_at=0.7)
    options = {"max_steps": 6, "per_device_train_batch_size": 4}
    plain, compiled = llama(0), llama(0)
    train(tmp_path, plain, ki, rows, **options)
    torch.compiler.reset()
    counters.clear()
    with caplog.at_level(logging.WARNING, "growlib"):
        trainer = train(tmp_path, compiled, ki, rows, torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert not [record for record in caplog.records if record.name == "growlib"]
    assert trainer._ki_loss_form.access is not None
    assert counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(parameters(compiled), parameters(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_too_large_for_the_device_stays_on_disk(tmp_path, top_k):
    """accelerate reads its layers when they run; the step is that of the teacher in memory."""
    rows, whole = examples(8), llama(1, hidden=8, num_hidden_layers=2)
    whole.save_pretrained(tmp_path / "teacher")
    names = ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert offloaded.lm_head.weight.is_meta
    one, other = llama(0), llama(0)
    train(tmp_path, one, half(whole, top_k=top_k), rows)
    train(tmp_path, other, half(offloaded, top_k=top_k), rows)
    torch.testing.assert_close(parameters(other), parameters(one), rtol=1e-6, atol=1e-7)
    assert offloaded.lm_head.weight.is_meta


def vit(seed, hidden, **options):
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
    config = ViTConfig(
        hidden_size=hidden, patch_size=4, initializer_range=0.3, **{"num_labels": 10, **sizes, **options}
    )
    return ViTForImageClassification(config)


IMAGES, CLASSES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10


def test_images_in_a_loop_of_ones_own():
    """A classifier's logits [B, classes] and labels [B], dense or top-K."""
    student, teacher = vit(0, 16), vit(1, 8).eval()
    with torch.no_grad():
        logits = teacher(IMAGES).logits
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    divergences = []
    for _ in range(30):
        result = ki_loss(student(IMAGES).logits, CLASSES, Targets.top_k(logits, 9), alpha=1.0)
        divergences.append(ki_loss(student(IMAGES).logits, CLASSES, logits, alpha=1.0).kd.item())
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert divergences[-1] < 0.3 * divergences[0]


@pytest.mark.parametrize("by_domain", [False, True])
def test_images_in_the_trainer(tmp_path, by_domain):
    """The step is the hand-written one; the teacher is loaded from its folder."""
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, CLASSES, strict=True)]
    teacher, expected = vit(1, 8).eval(), vit(0, 16)
    teacher.save_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        logits = teacher(IMAGES).logits
    result = ki_loss(expected(IMAGES).logits, CLASSES, logits, alpha=0.5, temperature=2.0)
    gradients = torch.autograd.grad(result.loss, list(expected.parameters()))
    by_hand = parameters(expected) - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    options = {}
    if by_domain:
        rows = [{**row, "kind": i % 2} for i, row in enumerate(rows)]
        options = {"domain": "kind"}
    source = {0: tmp_path / "teacher", 1: tmp_path / "teacher"} if by_domain else tmp_path / "teacher"
    student = vit(0, 16)
    train(tmp_path, student, half(source, temperature=2.0, **options), rows, per_device_train_batch_size=12)
    torch.testing.assert_close(parameters(student), by_hand, rtol=1e-5, atol=1e-6)


def test_images_of_other_classes_are_refused(tmp_path):
    named = {"id2label": {i: f"kind {i}" for i in range(10)}}
    other = vit(1, 8, id2label={**named["id2label"], 3: "another"})
    with pytest.raises(GrowError, match=r"classes are not the student's: 2 \(name, id\) pairs"):
        KITrainer(model=vit(0, 16, **named), args=arguments(tmp_path), ki=half(other))
    KITrainer(model=vit(0, 16), args=arguments(tmp_path), ki=half(other))  # without names nothing can be compared
    assert task_of(DeiTForImageClassification(DeiTConfig(hidden_size=8, num_attention_heads=1))) == "image"
    with pytest.raises(GrowError, match="of several labels at once"):
        task_of(vit(0, 16, problem_type="multi_label_classification"))


@pytest.mark.slow
def test_a_teacher_on_another_device():
    """In a process of its own, which has a second device without values."""
    script = Path(__file__).with_name("ki_two_devices.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)
    assert result.stdout == "both devices kept apart\n", result.stderr
