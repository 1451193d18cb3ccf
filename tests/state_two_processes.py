"""One of the processes of `test_a_checkpoint_of_two_processes_goes_on`; the argument is its folder."""

import os
import sys
from pathlib import Path

import torch
from test_training_state import DOUBLE, trainer
from tiny import tiny

import growlib

folder, made = Path(sys.argv[1]), []


def make_trainer(model):
    made.append(trainer(model, folder))
    return made[-1]


on = growlib.GrowthSchedule({3: DOUBLE["llama"]}).train(make_trainer, tiny("llama", scale=0.1))
assert on.accelerator.num_processes == 2
unchanged = trainer(tiny("llama", scale=0.1), folder / "constant")
unchanged.train()
torch.save({"before": unchanged.seen[3:], "after": on.seen}, folder / f"{on.accelerator.process_index}.pt")
on.accelerator.wait_for_everyone()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
