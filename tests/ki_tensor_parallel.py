"""One of the processes of `test_tensor_parallel_students_take_the_steps_of_one`; the argument is its folder."""

import os
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed
from ki_tiny import collate, examples, llama, train
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from growlib import GrowError, KIConfig, cache_teacher

accelerate.ParallelismConfig._validate_accelerator = lambda *_: None  # it lets models be split on GPUs only
folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")


def split(name):
    options = {"distributed_config": DistributedConfig(tp_size=2), "dtype": torch.float64}
    return AutoModelForCausalLM.from_pretrained(folder / name, **options)


def results(name, ki, whole_logits=False, **options):
    student = split(name)
    trainer = train(folder / "output", student, ki, examples(16), **options)
    assert trainer._ki_loss_form.access is None if whole_logits else trainer._ki_loss_form.access.mesh.size() == 2
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in student.named_parameters()}
    return {"parameters": {n: p.detach() for n, p in whole.items()}, "logs": trainer.state.log_history}


runs = torch.load(folder / "runs.pt")
teachers = {"beside": folder / "teacher", "split": split("teacher"), "cache": folder / "cache"}
found = {
    name: results(student, KIConfig(teacher=teachers[teacher], **settings), **options)
    for name, (student, teacher, settings, options) in runs.items()
}
with pytest.raises(GrowError, match="a student that is split in the same way"):
    train(folder / "output", llama(0), KIConfig(teacher=teachers["split"]), examples(16))
with pytest.raises(GrowError, match="each of which caches other examples"):
    cache_teacher(teachers["split"], examples(16), folder / "none", data_collator=collate)
if torch.distributed.get_rank() == 0:
    torch.save(found, folder / "result.pt")
torch.distributed.barrier()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
