"""One of the processes of `test_ki_distributed.py`; the argument is its folder."""

import os
import sys
from pathlib import Path

import pytest
import torch
from ki_tiny import arguments, collate, examples, llama, shifted
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from growlib import GrowError, KIConfig, KITrainer, cache_teacher
from growlib.ki.guard import Guard
from growlib.ki.head_access import access_head
from growlib.ki.providers import Part
from growlib.ki.step import Step, linear_step
from growlib.ki.targets import Targets
from growlib.ki.tasks import Positions

folder = Path(sys.argv[1])
rows, teacher = examples(16), llama(1, hidden=8)
cache_teacher(teacher, rows, folder / "cache", data_collator=collate, shard_examples=3, top_k=8, samples=0)
with pytest.raises(GrowError, match="seed = 1"):  # in both
    cache_teacher(teacher, rows, folder / "cache", data_collator=collate, shard_examples=3, top_k=8, samples=0, seed=1)
cache_teacher(teacher, rows, folder / "hidden", data_collator=collate, shard_examples=3, store="hidden")
ki = KIConfig(teacher=folder / "cache", stop_at=0.7)
options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2}
student = llama(0, num_hidden_layers=2)
trainer = KITrainer(model=student, args=arguments(folder, **options), train_dataset=rows, data_collator=collate, ki=ki)
trainer.train()
assert trainer.accelerator.num_processes == 2
assert trainer._ki_loss_form.access is not None
trained = {name: p.detach().clone() for name, p in student.named_parameters()}

# FSDP2: parameters are split; the head is whole only inside the root's forward pass.
split = llama(0, num_hidden_layers=2)
for layer in split.model.layers:
    fully_shard(layer)
fully_shard(split)
assert all(isinstance(p, DTensor) for p in split.parameters())
batch = collate(rows[trainer.args.process_index :: 2])
with torch.no_grad():
    logits = teacher(**batch).logits.flatten(0, 1)
unlabelled = {"input_ids": batch["input_ids"]}
positions = Positions.at(shifted(batch["labels"]))
part = Part("it", None, Targets.dense(logits[positions.flat]), None)
step = Step([part], positions, 0.5, KIConfig(teacher=teacher), Guard())
loss, _ = linear_step(step, access_head(split, split, unlabelled), split, unlabelled, 0.01)
loss.backward()
gradients = {name: p.grad.full_tensor() for name, p in split.named_parameters()}
if trainer.is_world_process_zero():
    result = {"parameters": trained, "logs": trainer.state.log_history, "gradients": gradients}
    torch.save(result, folder / "result.pt")
trainer.accelerator.wait_for_everyone()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
