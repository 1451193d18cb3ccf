"""One of the processes of `test_two_processes_take_the_steps_of_one`; the argument is its folder."""

import os
import sys
from pathlib import Path

import torch
from ki_tiny import examples, llama, parameters, train

from growlib import KIConfig

folder = Path(sys.argv[1])
student = llama(0)
trainer = train(
    folder / "two",
    student,
    KIConfig(teacher=llama(1, hidden=8), stop_at="auto", temperature=2.0),
    examples(16),
    max_steps=3,
    per_device_train_batch_size=2,
    logging_strategy="steps",
    logging_steps=1,
    per_device_eval_batch_size=2,
    eval_strategy="steps",
    eval_steps=2,
    trainer_options={"eval_dataset": examples(8, seed=5)},
)
assert trainer.accelerator.num_processes == 2
if trainer.is_world_process_zero():
    torch.save({"parameters": parameters(student), "logs": trainer.state.log_history}, folder / "result.pt")
trainer.accelerator.wait_for_everyone()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
