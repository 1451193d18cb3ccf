"""The page "From a 0.6B to a 1.7B, and on with training on 8 GPUs", command by command: a tiny Qwen3, two processes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from tiny import SPECIAL_TOKENS, randomise

import growlib
from growlib import cli

PAGE = (Path(__file__).parent.parent / "docs" / "big.md").read_text(encoding="utf-8")
SMALLER = {
    "hidden_size=2048": "hidden_size=32",
    "intermediate_size=6144": "intermediate_size=48",
    '"num_hidden_layers": 36': '"num_hidden_layers": 3',
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--bf16": "--use_cpu",
    "--max_steps 20000": "--max_steps 6 --report_to none --logging_steps 1 --disable_tqdm true",
    "--save_steps 1000": "--save_steps 3",
    "--per_device_train_batch_size 8": "--per_device_train_batch_size 2",
    "--warmup_steps 500": "--warmup_steps 1",
    "checkpoint-10000": "checkpoint-3",
}


def smaller(text):
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def qwen3(folder, seed, layers):
    config = T.Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True, **SPECIAL_TOKENS
    )  # fmt: skip
    randomise(T.Qwen3ForCausalLM(config), seed, scale=0.1).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the models under the names of the page, and tokens."""
    monkeypatch.chdir(tmp_path)
    qwen3("Qwen/Qwen3-0.6B", 0, 2)
    qwen3("Qwen/Qwen3-8B", 1, 3)
    np.save("tokens.npy", np.random.default_rng(0).integers(64, size=(40, 12)))
    return tmp_path


def losses(folder):
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in log if "loss" in row}


def torchrun(line):
    """As the page's, with this Python and this growlib."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(growlib.__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    subprocess.run(command, env=environment, check=True, timeout=240)


def test_the_page_from_its_first_command_to_its_last(place, capsys):
    script, grow = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    plan, expand, verify, cache, train, further = map(smaller, re.findall(r"^\$ (.+)$", PAGE, re.MULTILINE))
    for line in (plan, expand, verify, cache):
        assert cli.main(shlex.split(line)[1:]) == 0, line
    said = capsys.readouterr().out
    assert "lossless, seed 0: exact" in said
    big = T.AutoModelForCausalLM.from_pretrained("qwen3-1.7b")
    assert (big.config.hidden_size, big.config.intermediate_size) == (32, 48)
    (place / "train.py").write_text(script)

    torchrun(train)
    alone = losses(place / "out")
    assert list(alone) == [1, 2, 3, 4, 5, 6]
    assert (place / "out" / "checkpoint-3" / "rng_state_1.pth").is_file()

    exec(smaller(grow), {})
    assert growlib.GrowthPlan.load("deeper/checkpoint-3").exact
    torchrun(further)
    deeper = losses(place / "deeper")
    assert list(deeper) == [1, 2, 3, 4, 5, 6]
    assert deeper[4] == pytest.approx(alone[4], rel=1e-3)  # the same data, and more layers that do nothing yet
    assert T.AutoConfig.from_pretrained("deeper").num_hidden_layers == 3


def test_the_sizes_on_the_page_are_those_of_the_plan():
    config = T.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True
    )  # fmt: skip
    config.architectures = ["Qwen3ForCausalLM"]
    wider = growlib.plan(config, {"hidden_size": 2048, "intermediate_size": 6144})
    assert wider.exact
    for one in (config, wider.config):
        with torch.device("meta"):
            count = T.Qwen3ForCausalLM(one).num_parameters()
        assert f"{count:,}" in PAGE
