"""With other libraries, where they are installed: TRL's SFTTrainer, PEFT students. And images, in one's own loop.

They are no dependencies: CI without them skips these tests.
"""

import warnings

import pytest
import torch
from ki_tiny import arguments, collate, examples, half, llama, parameters, shifted, train
from transformers import ViTConfig, ViTForImageClassification

from growlib import KIMixin
from growlib.ki import Targets, ki_loss


@pytest.mark.filterwarnings("ignore")
def test_a_peft_student_learns_through_its_adapters(tmp_path):
    """The frozen head is reached through the wrapper; the step on the adapters is the hand-written one."""
    peft = pytest.importorskip("peft")
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
    assert trainer._ki_path.reach is not None
    stepped = torch.cat([p.detach().reshape(-1) for p in taught.parameters() if p.requires_grad])
    torch.testing.assert_close(stepped, by_hand, rtol=1e-5, atol=1e-6)
    assert torch.equal(frozen, taught.get_base_model().lm_head.weight)


def test_trls_sft_trainer_with_a_teacher(tmp_path):
    """Its loss has no logits with a gradient: it is taken for the plain CE, by word and by proof, or refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        from test_ki_teacher import tokenizer
        from trl import SFTConfig, SFTTrainer

        class TaughtSFT(KIMixin, SFTTrainer):
            loss_is_plain = True

        words = tokenizer(32)
        words.pad_token = words.eos_token = "[UNK]"
        ids = [row["input_ids"].tolist() for row in examples(16, ignored=False)]
        rows = datasets.Dataset.from_dict({"input_ids": ids})
        options = {
            name: value
            for name, value in arguments(tmp_path).to_dict().items()
            if name in ("output_dir", "use_cpu", "optim", "learning_rate", "max_steps", "disable_tqdm", "max_grad_norm")
        }
        student = llama(0)
        args = SFTConfig(
            **{**options, "max_steps": 2}, report_to="none", save_strategy="no", logging_steps=1, bf16=False,
            gradient_checkpointing=False, dataloader_pin_memory=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = TaughtSFT(
            model=student, args=args, train_dataset=rows, processing_class=words, ki=half(llama(1, hidden=8))
        )
        trainer.train()
    assert trainer._ki_path.reach is not None
    logs = [log for log in trainer.state.log_history if "ki/kd" in log]
    assert len(logs) == 2
    assert logs[0]["ki/alpha"] == 0.5
    assert logs[0]["ki/kd"] > 0.1
    assert (parameters(student) - parameters(llama(0))).abs().max() > 1e-3


def test_images_by_the_same_functions():
    """A classifier's logits [B, classes] and labels [B], dense or top-K, in a loop of one's own."""
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
    }

    def vit(seed, hidden):
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(hidden_size=hidden, num_labels=10, initializer_range=0.3, **sizes))

    student, teacher = vit(0, 16), vit(1, 8).eval()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    with torch.no_grad():
        logits = teacher(images).logits
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    divergences = []
    for _ in range(30):
        result = ki_loss(student(images).logits, labels, Targets.top_k(logits, 9), alpha=1.0)
        divergences.append(ki_loss(student(images).logits, labels, logits, alpha=1.0).kd.item())
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert divergences[-1] < 0.3 * divergences[0]
