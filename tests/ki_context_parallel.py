"""One of the processes of `test_parts_of_examples_take_the_steps_of_whole_ones`; the argument is its folder.

Each process has a half of every example, and an attention that reads the keys of the other. torch's own has no kernel
for CPUs, and the Trainer's needs FSDP2 on GPUs.
"""

import os
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from ki_tiny import arguments, examples, half, llama, shifted, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import AttentionInterface, AutoModelForCausalLM

from growlib import GrowError, KIConfig, KITrainer

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mesh = init_device_mesh("cpu", (2,))


def of_all(module, query, key, value, attention_mask, scaling, **_):
    """This process's queries on the keys of both; a key's gradient is the sum over the processes that read it."""
    key, value = (
        DTensor.from_local(x.contiguous(), mesh, [Shard(2)]).full_tensor(grad_placements=[Partial()])
        for x in (key, value)
    )
    length = query.shape[2]
    at, to = rank * length + torch.arange(length), torch.arange(2 * length)
    seen = {"attn_mask": to <= at[:, None], "scale": scaling, "enable_gqa": True}
    return F.scaled_dot_product_attention(query, key, value, **seen).transpose(1, 2).contiguous(), None


AttentionInterface.register("of_all", of_all)


def halves(rows):
    """Batches of 4 first halves and of the 4 second ones, in turn: each process takes its own."""
    for start in range(0, len(rows), 4):
        for columns in (slice(0, 5), slice(5, 10)):
            for row in rows[start : start + 4]:
                whole = {"input_ids": row["input_ids"], "position_ids": torch.arange(10), "labels": row["labels"]}
                whole["shift_labels"] = shifted(row["labels"][None])[0]
                yield {name: value[columns] for name, value in whole.items()}


def loaded(name):
    options = {"dtype": torch.float64, "attn_implementation": "of_all"}
    return AutoModelForCausalLM.from_pretrained(folder / name, **options)


runs = torch.load(folder / "runs.pt")
rows, found = list(halves(examples(16))), {}
for name, (settings, options) in runs.items():
    options |= {"remove_unused_columns": False}
    student = loaded("student")
    trainer = train(folder / "output", student, KIConfig(teacher=loaded("teacher"), **settings), rows, **options)
    parameters = {name: p.detach() for name, p in student.named_parameters()}
    found[name] = {"parameters": parameters, "logs": trainer.state.log_history}

with pytest.raises(GrowError, match="a part of an example"):
    train(folder / "output", loaded("student"), half(folder / "cache"), rows, **options)
accelerate.ParallelismConfig._validate_accelerator = lambda *_: None  # it lets examples be split on GPUs only
args = arguments(folder / "output", parallelism_config=accelerate.ParallelismConfig(cp_size=2))
accelerate.state.AcceleratorState._reset_state()
with pytest.raises(GrowError, match=r"context or sequence parallelism.* rows that your collator splits"):
    KITrainer(model=llama(0), args=args, ki=KIConfig(teacher=llama(1)))
if rank == 0:
    torch.save(found, folder / "result.pt")
torch.distributed.barrier()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
