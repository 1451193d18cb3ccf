"""The page "Evaluate and track", where lm_eval and tensorboard are installed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as T
from tiny import randomise
from tokenizers import Tokenizer, models, pre_tokenizers

import growlib
import tracked

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parent.parent / "docs" / "evaluate.md").read_text(encoding="utf-8")


def samples(folder):
    """The log-likelihoods of each question's choices."""
    (path,) = folder.rglob("samples_next_line_*.jsonl")
    return [float(row[0][0]) for line in path.read_text().splitlines() for row in json.loads(line)["resps"]]


def test_the_harness_gives_the_grown_model_its_sources_log_likelihoods(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task, question = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1] for kind in ("yaml", "json"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/next_line.yaml").write_text(task)
    (tmp_path / "tasks/next_line.jsonl").write_text(5 * question)
    signs = {sign: number for number, sign in enumerate(["<end>", *pre_tokenizers.ByteLevel.alphabet()])}
    made = Tokenizer(models.BPE(signs, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(tmp_path / "small")
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = randomise(T.LlamaForCausalLM(T.LlamaConfig(hidden_size=32, max_position_embeddings=128, **sizes)), 0)
    small.save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", {"hidden_size": 48, "num_hidden_layers": 2})
    for line in re.findall(r"^\$ lm_eval (.+)$", PAGE, re.MULTILINE):
        words = [sys.executable, "-m", "lm_eval", *shlex.split(line), "--device", "cpu"]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    before, after = samples(tmp_path / "eval/small"), samples(tmp_path / "eval/big")
    assert len(before) == 10
    assert len(set(before)) == 2
    assert after == pytest.approx(before, rel=1e-5)


def test_tensorboard_shows_all_that_the_figure_shows(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(Path(__file__).parent.parent)
    curves = tracked.tracked(str(tmp_path))
    alphas = [value for _, value in curves["train/ki/alpha"]]
    assert alphas[0] > 0
    assert alphas[-1] == 0
    assert {name for names in tracked.VALUES.values() for name in names} <= curves.keys()
