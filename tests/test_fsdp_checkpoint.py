"""Training checkpoints in the forms of FSDP and torch.distributed.checkpoint grow without a process group."""

import os
import pickle
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers as T
from test_training_state import DOUBLE, trainer
from tiny import tiny
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import growlib
from growlib.checkpoint.distributed import read_tree, write_tree

FORMS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
TIED = {"SHARDED_STATE_DICT": True, "FULL_STATE_DICT": False}
TARGET = {**DOUBLE["llama"], "num_hidden_layers": 3}
ONE_FOLDER = "one folder"


def named(folder, model):
    """The optimizer's state of a Trainer's checkpoint, by names, as get_optimizer_state_dict has it."""
    state = torch.load(folder / "optimizer.pt")
    decayed = set(T.Trainer.get_decay_parameter_names(None, model))
    every = [name for name, _ in model.named_parameters()]
    names = dict(enumerate([n for n in every if n in decayed] + [n for n in every if n not in decayed]))
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: held for number, held in state["state"].items()}, "param_groups": groups}


def save(tree, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        dcp.save(tree, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def as_fsdp(plain, folder, form, model):
    """A checkpoint of one process, as FSDP would have saved it."""
    weights, optimizer = model.state_dict(), named(plain, model)
    kept = shutil.ignore_patterns("optimizer.pt", *(["*.json", "*.safetensors"] if form != "FULL_STATE_DICT" else []))
    shutil.copytree(plain, folder, ignore=kept)
    if form == ONE_FOLDER:
        save({"app": {"model": weights, "optim": optimizer}, "step": 3}, folder)
    elif form == "FULL_STATE_DICT":
        torch.save(weights, folder / "pytorch_model_fsdp.bin")
        torch.save(optimizer, folder / "optimizer.bin")
    else:
        shutil.copyfile(plain / "trainer_state.json", folder / "trainer_state.json")
        save({"model": weights}, folder / "pytorch_model_fsdp_0")
        save({"optimizer": optimizer}, folder / "optimizer_0")


def load(form, folder, model, optimizer):
    """Weights and optimizer, read as torch and accelerate read them: into what is there already."""
    if form == "FULL_STATE_DICT":
        return torch.load(folder / "pytorch_model_fsdp.bin"), torch.load(folder / "optimizer.bin")
    trees = {"app": {"model": model, "optim": optimizer}, "step": 0}
    places = {folder: trees}
    if form != ONE_FOLDER:
        trees = {"model": model, "optimizer": optimizer}
        places = {folder / "pytorch_model_fsdp_0": {"model": model}, folder / "optimizer_0": {"optimizer": optimizer}}
    for place, tree in places.items():
        with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
            dcp.load(tree, storage_reader=dcp.FileSystemReader(place), no_dist=True)
    return model, optimizer


def zeros(tree):
    if isinstance(tree, dict):
        return {key: zeros(value) for key, value in tree.items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return [zeros(value) for value in tree]
    return torch.zeros_like(tree) if isinstance(tree, torch.Tensor) else None


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of one process."""
    out = tmp_path_factory.mktemp("plain")
    trainer(tiny("llama", scale=0.1), out, max_steps=3).train()
    return out / "checkpoint-3"


def source(plain):
    return T.AutoModelForCausalLM.from_pretrained(plain)


@pytest.mark.parametrize("moments", ["dual", "keep-old-zero-new", "reset"])
@pytest.mark.parametrize("form", [*FORMS, ONE_FOLDER])
def test_each_form_grows_as_the_checkpoint_of_one_process(form, moments, plain, tmp_path):
    small = source(plain)
    as_fsdp(plain, tmp_path / "small", form, small)
    (tmp_path / "small" / "__7_0.distcp").touch()  # of the old size, so that it stays behind
    plan = growlib.expand_training_checkpoint(plain, tmp_path / "plain", TARGET, moments=moments)
    known = {} if form == "FULL_STATE_DICT" else {"config": small.config}
    ours = growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", TARGET, moments=moments, **known)
    assert ours.tensors == plan.tensors
    wanted, big = source(tmp_path / "plain"), source(tmp_path / "big")
    same(big.state_dict(), wanted.state_dict())
    expected = named(tmp_path / "plain", wanted)
    if moments == "reset":  # what torch needs all the same
        made = named(plain, small)["state"]["model.norm.weight"]
        expected["state"] = {
            n: {k: torch.zeros(p.shape if v.ndim else ()) for k, v in made.items()} for n, p in big.named_parameters()
        }
    weights, optimizer = load(form, tmp_path / "big", zeros(big.state_dict()), zeros(expected))
    same(weights, wanted.state_dict())
    same(optimizer["state"], expected["state"])
    assert optimizer["param_groups"] == expected["param_groups"]
    assert (moments == "reset") != any(one["exp_avg"].any() for one in optimizer["state"].values())
    beside = {path.name for path in (tmp_path / "big").iterdir()}
    assert "__7_0.distcp" not in beside
    assert {"config.json", "growlib.json", "README.md", "scheduler.pt", "rng_state.pth"} <= beside
    assert form == ONE_FOLDER or "trainer_state.json" in beside


def same(ours, expected):
    """Bit for bit."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            same(ours[name], value)
        else:
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


# Two processes


def processes(folder, doing):
    script = Path(__file__).with_name("fsdp_two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, script, folder, doing], env=environment, check=True, timeout=240)
    return {form: torch.load(folder / f"{doing}-{form}-0.pt") for form in FORMS}


@pytest.mark.slow
def test_a_training_with_fsdp2_goes_on(tmp_path):
    """Two processes save, this one grows without a process group, two processes resume: by the Trainer itself."""
    before = processes(tmp_path, "save")
    for form in FORMS:
        step = tmp_path / "small" / form / "checkpoint-3"
        model = tiny("llama", scale=0.1, tie_word_embeddings=TIED[form])
        assert len(list(step.glob("*/__[01]_0.distcp"))) == (4 if form == "SHARDED_STATE_DICT" else 0)
        known = None if (step / "config.json").exists() else model.config
        assert (known is None) == (form == "FULL_STATE_DICT")
        plan = growlib.expand_training_checkpoint(
            step, tmp_path / "grown" / form / "checkpoint-3", TARGET, config=known
        )
        assert plan.exact
    after, inside = processes(tmp_path, "resume"), processes(tmp_path, "schedule")
    for form in FORMS:
        assert inside[form]["seen"] == before[form]["seen"][:3] + after[form]["seen"]  # as GrowthSchedule does it
        wanted, weights = as_one_process(tmp_path, form)
        same(after[form]["weights"], weights)
        same(after[form]["state"]["state"], wanted["state"])
        ours, expected = (
            [{**group, "betas": tuple(group["betas"])} for group in groups]  # gathering makes them lists
            for groups in (after[form]["state"]["param_groups"], wanted["param_groups"])
        )
        assert ours == expected
        assert sum(one["exp_avg"].any().item() for one in wanted["state"].values()) > 10
        seen, small = after[form]["seen"], before[form]["seen"]
        assert [ids for ids, _ in seen] == [ids for ids, _ in small[3:]]  # the same data, in the same order
        assert seen[0][1] == pytest.approx(small[3][1], rel=1e-4)  # no jump
        assert seen[2][1] < seen[0][1] + 0.05
        assert after[form]["rate"] == before[form]["rate"]


def as_one_process(folder, form):
    """What growing the same training's checkpoint of one process gives: the optimizer's state, and the weights."""
    step, one = folder / "small" / form / "checkpoint-3", folder / "one" / form
    model = tiny("llama", scale=0.1, tie_word_embeddings=TIED[form])
    if form == "FULL_STATE_DICT":
        weights, state = torch.load(step / "pytorch_model_fsdp.bin"), torch.load(step / "optimizer.bin")
    else:
        weights, state = zeros(model.state_dict()), None
        with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
            dcp.load(
                {"model": weights}, storage_reader=dcp.FileSystemReader(step / "pytorch_model_fsdp_0"), no_dist=True
            )
        dcp_to_torch_save(step / "optimizer_0", folder / "whole.pt")
        state = torch.load(folder / "whole.pt")["optimizer"]
    model.load_state_dict(weights)
    model.save_pretrained(one)
    numbers = {name: number for number, name in enumerate(chain(*(group["params"] for group in state["param_groups"])))}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    held = {numbers[name]: held for name, held in state["state"].items()}
    torch.save({"state": held, "param_groups": groups}, one / "optimizer.pt")
    shutil.copyfile(step / "trainer_state.json", one / "trainer_state.json")
    growlib.expand_training_checkpoint(one, folder / "one-grown" / form, TARGET)
    grown = source(folder / "one-grown" / form)
    return named(folder / "one-grown" / form, grown), grown.state_dict()


# What cannot be read


class Harm:
    """What unpickling without a limit would run."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


def pickled_metadata(folder):
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Harm()))


def rewrite(tree, folder):
    shutil.rmtree(folder, ignore_errors=True)
    write_tree(folder, tree)


def pickled_value(folder):
    rewrite({"optimizer": {"param_groups": [{"lr": Harm(), "params": torch.zeros(1)}]}}, folder / "optimizer_0")


def per_process(folder):
    shutil.rmtree(folder / "pytorch_model_fsdp_0")
    (folder / "pytorch_model_fsdp_0_rank0.bin").touch()


def elsewhere(folder):
    """A part outside of the folder."""
    file = folder / "optimizer_0" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../optimizer_0/{info.relative_path}"
    file.write_bytes(pickle.dumps(metadata))


def another_model(folder):
    tree = read_tree("", folder / "pytorch_model_fsdp_0")
    tree["model"]["model.norm.weight"] = torch.zeros(7)
    rewrite(tree, folder / "pytorch_model_fsdp_0")


def another_name(folder):
    tree = read_tree("", folder / "optimizer_0")
    tree["optimizer"]["state"]["model.norm.other"] = tree["optimizer"]["state"].pop("model.norm.weight")
    rewrite(tree, folder / "optimizer_0")


def no_optimizer(folder):
    rewrite({"optimizer": {"state": {"a": torch.zeros(1)}}}, folder / "optimizer_0")


def flattened(folder):
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.rmtree(folder / name)
    write_tree(folder, {"model": {"a": torch.zeros(1)}, "optim": {"state.a.exp_avg": torch.zeros(1)}})


BROKEN = [
    (pickled_metadata, r"names posix.mkdir, which torch does not write there"),
    (pickled_value, "optimizer_0 is no whole folder"),
    (lambda folder: (folder / "optimizer_0" / "__0_0.distcp").unlink(), "__0_0.distcp, which is no file beside it"),
    (lambda folder: (folder / "optimizer_0" / "__0_0.distcp").write_bytes(b""), "optimizer_0 is no whole folder"),
    (lambda folder: (folder / "optimizer_0" / ".metadata").write_bytes(b""), "optimizer_0 is no whole folder"),
    (lambda folder: shutil.rmtree(folder / "optimizer_0"), "it has no optimizer_0"),
    (elsewhere, r"names \.\./optimizer_0/__0_0.distcp, which is no file beside it"),
    (per_process, "files of the processes"),
    (another_model, r"model.norm.weight is \(7,\), by its config \(48,\)"),
    (another_name, "its optimizer trains model.norm.other"),
    (no_optimizer, "no state dict of one optimizer"),
    (flattened, "2 state dicts of models and 0 of optimizers"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN)
def test_what_is_broken_is_told(break_it, message, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = source(plain)
    as_fsdp(plain, tmp_path / "small", "SHARDED_STATE_DICT", small)
    break_it(tmp_path / "small")
    with pytest.raises(growlib.GrowError, match=message):
        growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", TARGET, config=small.config)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_whole_file_unpickles_no_objects(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_fsdp(plain, tmp_path / "small", "FULL_STATE_DICT", source(plain))
    torch.save({"state": Harm(), "param_groups": []}, tmp_path / "small" / "optimizer.bin")
    with pytest.raises(growlib.GrowError, match=r"optimizer.bin is no whole file of tensors"):
        growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", TARGET)
    assert not (tmp_path / "harm").exists()


def test_the_config_is_asked_for(plain, tmp_path):
    small = source(plain)
    as_fsdp(plain, tmp_path / "small", "SHARDED_STATE_DICT", small)
    with pytest.raises(growlib.GrowError, match=r"it has no config.json: FSDP saves weights and optimizer alone"):
        growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", TARGET)
    config = T.LlamaConfig.from_pretrained(plain, num_hidden_layers=3)
    with pytest.raises(growlib.GrowError, match=r"do not have the same tensors: model.layers.2"):
        growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", TARGET, config=config)
    plan = growlib.plan(small, TARGET)
    growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "by plan", plan)  # which knows it
    growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "by folder", TARGET, config=plain)
    same(source(tmp_path / "by folder").state_dict(), source(tmp_path / "by plan").state_dict())


def test_a_mixture_begins_with_an_optimizer_that_torch_can_load(plain, tmp_path):
    as_fsdp(plain, tmp_path / "small", "FULL_STATE_DICT", source(plain))
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(growlib.GrowError, match="no moments of experts are known"):
        growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", experts)
    growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", experts, moments="reset")
    big, state = source(tmp_path / "big"), torch.load(tmp_path / "big" / "optimizer.bin")
    decayed = set(T.Trainer.get_decay_parameter_names(None, big))
    assert [set(group["params"]) == decayed for group in state["param_groups"]] == [True, False]
    for name, parameter in big.named_parameters():
        assert state["state"][name]["exp_avg"].shape == parameter.shape
        assert not any(value.any() for value in state["state"][name].values())


@pytest.mark.parametrize("layers", [1, 2])
def test_parameters_that_are_not_trained_stay_out_of_the_optimizer(layers, plain, tmp_path):
    small = source(plain)
    as_fsdp(plain, tmp_path / "small", "FULL_STATE_DICT", small)
    state = torch.load(tmp_path / "small" / "optimizer.bin")
    frozen = f"model.layers.{layers - 1}."
    state["state"] = {name: held for name, held in state["state"].items() if not name.startswith(frozen)}
    for group in state["param_groups"]:
        group["params"] = [name for name in group["params"] if not name.startswith(frozen)]
    torch.save(state, tmp_path / "small" / "optimizer.bin")
    plan = growlib.expand_training_checkpoint(tmp_path / "small", tmp_path / "big", TARGET)
    grown = torch.load(tmp_path / "big" / "optimizer.bin")
    trained = {made.name for made in plan.tensors if not made.source.startswith(frozen)}
    assert grown["state"].keys() == trained == {*chain(*(group["params"] for group in grown["param_groups"]))}


def test_deepspeed_folders_are_refused_with_what_to_do(plain, tmp_path):
    for name in ("global_step3/", "zero/", "zero_to_fp32.py"):
        folder = tmp_path / name.strip("/")
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("optimizer.pt"))
        (folder / name / "model.norm.weight").mkdir(parents=True) if name.endswith("/") else (folder / name).touch()
        with pytest.raises(growlib.GrowError, match=r"in DeepSpeed's format .*zero_to_fp32.py .*ds_to_universal.py"):
            growlib.expand_training_checkpoint(folder, tmp_path / "big", TARGET)


def test_expand_leaves_distributed_weights_behind(plain, tmp_path):
    """A folder that holds both: the weights grow, and what is of the old size does not come along."""
    as_fsdp(plain, tmp_path / "small", "SHARDED_STATE_DICT", source(plain))
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(plain / name, tmp_path / "small" / name)
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", TARGET)
    assert not [path for path in (tmp_path / "big").rglob("*") if path.suffix == ".distcp" or path.is_dir()]
