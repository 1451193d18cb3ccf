"""Tiny models, data and trainers for the tests of Knowledge Inheritance."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from growlib.ki import KIConfig, KITrainer, ki_loss

VOCAB = 32


def llama(seed=0, hidden=16, vocab=VOCAB, **overrides):
    torch.manual_seed(seed)
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
    }
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, initializer_range=0.3, **{**sizes, **overrides})
    return LlamaForCausalLM(config)


def bert(seed=0, hidden=16, dropout=0.0):
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
        )
    )


def gpt2(seed=0, hidden=16):
    torch.manual_seed(seed)
    sizes = {"n_embd": hidden, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.3}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes, **ends)
    )


def t5(seed=0, hidden=16):
    torch.manual_seed(seed)
    sizes = {"d_model": hidden, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


MAKERS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def examples(count, length=10, seed=1, ignored=True):
    """Token sequences; example i ignores its first i % 5 + 1 labels, so micro-batches differ in count."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        if ignored:
            labels[: i % 5 + 1] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder, **overrides):
    """Plain SGD without clipping, so that a step shows the gradient; nothing reported or saved."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "seed": 3,
    }
    return TrainingArguments(**{**defaults, **overrides})


def train(folder, model, ki, rows, trainer_class=KITrainer, resume=None, trainer_options=None, **overrides):
    """Train `model` and return its trainer."""
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=rows,
        data_collator=collate,
        **({} if trainer_class.__name__ == "Trainer" else {"ki": ki}),
        **(trainer_options or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def half(teacher, **options):
    """α = 0.5 throughout."""
    return KIConfig(teacher=teacher, schedule="constant", stop_at=None, alpha=0.5, **options)


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def shifted(labels):
    """Causal alignment written out: position i predicts the label of position i + 1."""
    aligned = torch.full_like(labels, -100)
    aligned[:, :-1] = labels[:, 1:]
    return aligned


def sgd_step(model, teacher, rows, align, *, lr=0.1, **loss_options):
    """One hand-written SGD step on `ki_loss` over one batch; returns the new parameters."""
    batch = collate(rows)
    with torch.no_grad():
        teacher_logits = teacher.eval()(**batch).logits
    loss = ki_loss(model(**batch).logits, align(batch["labels"]), teacher_logits, **loss_options).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return parameters(model) - lr * torch.cat([g.reshape(-1) for g in gradients])


class CountForwards:
    """Counts a module's forward passes."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self._add)

    def _add(self, *_):
        self.count += 1
