"""One of the processes of tests/test_fsdp_checkpoint.py; arguments: a folder, and `save`, `resume` or `schedule`.

The Trainer has FSDP on accelerators alone, which accelerate's state lists. Here the CPU is put on that list, and the
Trainer saves and loads as it does on GPUs.
"""

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.state

KINDS = {kind.name: kind for kind in accelerate.state.DistributedType}
accelerate.state.DistributedType = SimpleNamespace(**{**KINDS, "MULTI_NEURON": KINDS["MULTI_CPU"]})

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers as T  # noqa: E402
from test_fsdp_checkpoint import FORMS, TARGET, TIED  # noqa: E402
from test_training_state import trainer  # noqa: E402
from tiny import tiny  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from growlib import GrowthSchedule  # noqa: E402

folder, doing = Path(sys.argv[1]), sys.argv[2]


class Loaded(T.TrainerCallback):
    """What the processes hold together when the training begins."""

    def on_train_begin(self, args, state, control, model, optimizer, **_):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        optimizer = getattr(optimizer, "optimizer", optimizer)
        whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        self.weights, self.state = copy.deepcopy(whole)  # the numbers of steps go on where they are


for form in FORMS:
    config = {"version": 2, "state_dict_type": form, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    start = folder / "grown" / form / "checkpoint-3"
    if doing != "resume":
        model, out, resumed = tiny("llama", scale=0.1, tie_word_embeddings=TIED[form]), folder / "small" / form, None
    else:
        model, out, resumed = T.AutoModelForCausalLM.from_pretrained(start), folder / "big" / form, str(start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # the weights that count are those in FSDP's own form
    loaded = Loaded()
    if doing == "schedule":
        made = []

        def make_trainer(model, out=folder / "schedule" / form, config=config, made=made):
            made.append(trainer(model, out, fsdp=True, fsdp_config=config, save_strategy="no"))
            return made[-1]

        run = GrowthSchedule({3: TARGET}).train(make_trainer, model)
        run.seen = made[0].seen + made[1].seen
    else:
        run = trainer(model, out, fsdp=True, fsdp_config=config)
        if resumed:
            run.add_callback(loaded)
        run.train(resume_from_checkpoint=resumed)
    assert run.accelerator.is_fsdp2
    torch.save(
        {"seen": run.seen, "rate": run.lr_scheduler.get_last_lr(), **vars(loaded)},
        folder / f"{doing}-{form}-{dist.get_rank()}.pt",
    )
dist.barrier()
sys.stdout.flush()
os._exit(0)  # the threads of the process group at times abort an ordinary exit
