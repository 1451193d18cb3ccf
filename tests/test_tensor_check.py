"""Tensors of a grown checkpoint that are made again are those on disk; what was changed is found."""

import pytest
import torch
import transformers as T
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import SIZES, randomise, tiny

import growlib
from growlib import GrowError
from growlib.cli import main

ALL = 10**6
GROWTHS = {
    "llama": {"hidden_size": 72, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 72, "n_layer": 3},
    "bert": {"hidden_size": 96, "num_hidden_layers": 3},
    "mixtral": {"hidden_size": 72, "num_hidden_layers": 3},
}


def source(family):
    if family != "mixtral":
        return tiny(family)
    return randomise(T.MixtralForCausalLM(T.MixtralConfig(**SIZES["llama"], num_local_experts=4)), seed=0)


@pytest.fixture(params=GROWTHS)
def grown(request, tmp_path):
    source(request.param).save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", GROWTHS[request.param], max_shard_size="100KB")
    return tmp_path / "small", tmp_path / "big"


def change(folder, name=None):
    """Change the last bit of one value of a tensor; by default of the last one of the last file."""
    for file in sorted(folder.glob("*.safetensors"), reverse=True):
        with safe_open(file, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            facts = stored.metadata()
        if name is None or name in tensors:
            changed = tensors[name or max(tensors)].view(torch.uint8)
            changed.view(-1)[0] ^= 1
            save_file(tensors, file, facts)
            return name or max(tensors)
    raise AssertionError(name)


def test_what_was_grown_is_the_same(grown):
    checked = growlib.verify_tensors(*grown, tensors=ALL)
    assert checked.same
    assert len(checked.looked_at) == checked.of > 20
    assert "the same bit for bit" in str(checked)


def test_one_bit_is_found(grown):
    changed = change(grown[1])
    checked = growlib.verify_tensors(*grown, tensors=ALL)
    assert not checked.same
    assert len(checked.different) >= 1
    assert changed.rpartition(".")[2] in checked.different[0]
    assert checked.different[0] in str(checked)


def test_some_are_chosen_at_random(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", GROWTHS["llama"])
    chosen = [growlib.verify_tensors(tmp_path / "small", tmp_path / "big", 3, seed).looked_at for seed in range(8)]
    assert all(len(names) == 3 for names in chosen)
    assert len(set(chosen)) > 4
    change(tmp_path / "big", chosen[0][0])
    seen = [growlib.verify_tensors(tmp_path / "small", tmp_path / "big", 3, seed) for seed in range(8)]
    assert [one.same for one in seen] == [chosen[0][0] not in names for names in chosen]


def test_a_mixture_grown_from_a_dense_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "small")
    target = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", target)
    assert growlib.verify_tensors(tmp_path / "small", tmp_path / "big", ALL).same


def test_another_source_and_a_trained_model_differ(tmp_path):
    for name, seed in (("small", 0), ("other", 5)):
        tiny("llama", seed=seed).save_pretrained(tmp_path / name)
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", GROWTHS["llama"], dtype="bfloat16")
    assert growlib.verify_tensors(tmp_path / "small", tmp_path / "big", ALL).same
    other = growlib.verify_tensors(tmp_path / "other", tmp_path / "big", ALL)
    assert len(other.different) > 0.8 * other.of


def test_the_command_line(tmp_path, capsys):
    small, big = str(tmp_path / "small"), str(tmp_path / "big")
    tiny("llama").save_pretrained(small)
    assert main(["expand", small, big, "--set", "hidden_size=72"]) == 0
    assert main(["verify", small, big, "--tensors", "4"]) == 0
    assert "4 of " in capsys.readouterr().out
    change(tmp_path / "big")
    assert main(["verify", small, big, "--tensors", "100"]) == 1
    assert "differ" in capsys.readouterr().out
    assert main(["verify", small, big, "--tensors", "4", "--streaming"]) == 2
    assert "one of the two" in capsys.readouterr().err


def test_what_is_refused(tmp_path):
    small, big = tmp_path / "small", tmp_path / "big"
    tiny("llama").save_pretrained(small)
    growlib.expand_checkpoint(small, big, GROWTHS["llama"])
    with pytest.raises(GrowError, match="1 or more"):
        growlib.verify_tensors(small, big, tensors=0)
    tiny("gpt2").save_pretrained(tmp_path / "another")
    with pytest.raises(GrowError, match="the source that it was grown from"):
        growlib.verify_tensors(tmp_path / "another", big)
    tiny("llama", hidden_size=96).save_pretrained(tmp_path / "wider")
    with pytest.raises(GrowError, match="the source that it was grown from"):
        growlib.verify_tensors(tmp_path / "wider", big, ALL)
    (big / "growlib.json").unlink()
    with pytest.raises(GrowError, match=r"no growlib\.json"):
        growlib.verify_tensors(small, big)
