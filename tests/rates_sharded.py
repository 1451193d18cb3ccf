"""One of the processes of `test_rates_of_entries_under_fsdp2`; the argument is its folder.

The Trainer has no FSDP on CPUs, so the steps are taken here, and the callback is called as the Trainer calls it.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from test_training import wide
from tiny import token_ids
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from growlib import EntryRates

dist.init_process_group("gloo")
plan, big = wide()
ids = token_ids(big)


def train(model):
    """Three steps; every process has the same data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callback, state = EntryRates(plan, new=0.5, old=0.0), SimpleNamespace(global_step=0, max_steps=3)
    of_trainer = {"model": model, "lr_scheduler": scheduler}
    callback.on_train_begin(SimpleNamespace(deepspeed=None), state, None, **of_trainer)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        callback.on_pre_optimizer_step(None, state, None, **of_trainer)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, **of_trainer)
        optimizer.zero_grad()
    return {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in model.named_parameters()
    }


whole = train(big)
_, split = wide()
for layer in split.model.layers:
    fully_shard(layer)
fully_shard(split)
assert all(isinstance(p, DTensor) for p in split.parameters())
sharded = train(split)
if dist.get_rank() == 0:
    torch.save({"whole": whole, "sharded": sharded}, Path(sys.argv[1]) / "result.pt")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # the threads of the process group at times abort an ordinary exit
