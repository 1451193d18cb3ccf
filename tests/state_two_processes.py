"""One of the processes of `test_a_checkpoint_of_two_processes_goes_on`; the argument is its folder."""

import os
import sys
from pathlib import Path

import torch
from test_training_state import DOUBLE, trainer
from tiny import tiny

import growlib

folder = Path(sys.argv[1])
run = trainer(tiny("llama", scale=0.1), folder / "small")
assert run.accelerator.num_processes == 2
run.train()
wait = run.accelerator.wait_for_everyone
wait()
before, after = (folder / size / "checkpoint-3" for size in ("small", "big"))
if run.is_world_process_zero():
    growlib.expand_training_checkpoint(before, after, DOUBLE["llama"])
wait()
on = trainer(type(run.model).from_pretrained(after), folder / "big")
on.train(resume_from_checkpoint=str(after))
torch.save({"before": run.seen[3:], "after": on.seen}, folder / f"{on.accelerator.process_index}.pt")
on.accelerator.wait_for_everyone()  # one that leaves while the other still talks to it is aborted
sys.stdout.flush()
os._exit(0)  # nor may the threads of the process group outlive it: at times they abort an ordinary exit
