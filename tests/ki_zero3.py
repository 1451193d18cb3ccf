"""One of the processes of `test_zero3_takes_the_steps_of_one_process`; the argument is its folder."""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from ki_tiny import arguments, collate, examples, llama

from growlib import KIConfig, KITrainer

folder = Path(sys.argv[1])
zero3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # every tensor is split
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,  # plain SGD
    "zero_force_ds_cpu_optimizer": False,
}
student = llama(0, num_hidden_layers=2)
options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2}
trainer = KITrainer(
    model=student,
    args=arguments(folder, deepspeed=zero3, **options),
    train_dataset=examples(16),
    data_collator=collate,
    ki=KIConfig(teacher=folder / "teacher", stop_at=0.6),
)
trainer.train()
assert trainer.accelerator.num_processes == 2
assert trainer._ki_loss_form.access is not None
assert all(parameter.numel() == 0 for parameter in student.parameters())
with deepspeed.zero.GatheredParameters(list(student.parameters())):
    trained = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
if trainer.is_world_process_zero():
    torch.save({"parameters": trained, "logs": trainer.state.log_history}, folder / "result.pt")
trainer.accelerator.wait_for_everyone()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
