"""Towers: what sees or hears grows in depth, units and width, alone and with the text, and the function stays."""

import itertools

import pytest
import torch
import transformers
from composites import (
    COMPOSITES,
    LLAVA,
    QWEN,
    TOWER_FIELDS,
    TOWER_NARROW,
    TOWER_UNSEEN,
    composite,
    config_of,
    same_with_an_image,
    target_of,
    tower_of,
    tower_target_of,
)
from safetensors.torch import load_file

import growlib
from growlib.apply import grow_tensor
from growlib.cli import main
from growlib.growth_plan import TensorPlan
from growlib.inference import architecture_of
from growlib.inference.towers import joined
from growlib.layer_fields import followed, kinds_said
from growlib.layouts import parse_layout

TOWERS = [
    pytest.param(name, marks=() if name == LLAVA else pytest.mark.slow) for name in COMPOSITES if name != TOWER_UNSEEN
]


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_grows_in_depth_units_and_width_and_the_model_computes_the_same(name):
    small, target = composite(name), tower_target_of(name)
    ((part, fields),) = target.items()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    big = growlib.expand(small, target, exact=True)
    for field, size in fields.items():
        assert getattr(getattr(big.config, part), field) == size
    same_with_an_image(small, big)
    assert growlib.verify(small, big).exact
    made = big.state_dict()
    text = [key for key in before if "language_model" in key or "text_model" in key or key.startswith("lm_head")]
    assert len(text) > 10
    assert all(torch.equal(made[key], before[key]) for key in text), "the text does not stay bit for bit"
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert sum(v.numel() for v in made.values()) > sum(v.numel() for v in before.values())


@pytest.mark.parametrize("name", TOWERS)
def test_both_parts_grow_at_once(name):
    small, target = composite(name), target_of(name) | tower_target_of(name)
    plan = growlib.plan(small, target)
    assert plan.exact, plan.reasons
    big = growlib.expand(small, plan)
    same_with_an_image(small, big)
    assert big.config.text_config.hidden_size > small.config.text_config.hidden_size


def test_a_norm_that_stays_is_left_bit_for_bit_where_its_weight_acts_as_one_plus_itself():
    plan = growlib.plan(config_of(LLAVA), target_of(LLAVA))
    weight = torch.tensor([1e-9, 0.3, -1e-8])
    made = TensorPlan("norm.weight", "norm.weight", parse_layout("1 + scale fixed"), (3,), (3,))
    assert torch.equal(grow_tensor(made, weight, plan), weight)


def test_a_projector_and_its_tower_that_are_broken_are_found():
    small = composite(LLAVA)
    big = growlib.expand(small, tower_target_of(LLAVA))
    with torch.no_grad():
        big.model.vision_tower.encoder.layers[1].mlp.fc2.bias.add_(1.0)
    assert growlib.verify(small, big).verdict == "NOT exact"


def test_new_layers_stand_before_the_place_where_the_output_is_taken():
    """LLaVA takes what goes into the last layer: this one stays the last, and acts."""
    plan = growlib.plan(composite(LLAVA), {"vision_config": {"num_hidden_layers": 5}})
    stack = plan.layers["vision_config.num_hidden_layers"]
    assert stack.source[-1] == 1
    assert not stack.identity[-1]
    assert [s for s, new in zip(stack.source, stack.identity, strict=True) if not new] == [0, 1]


@pytest.mark.parametrize("taken", [-1, -2, -3, 0, 1, 2, [-1, -2], [-2, 1]], ids=str)
@pytest.mark.parametrize("count", [3, 5])
def test_what_is_taken_behind_a_layer_tells_the_layers_before_it_from_those_after(taken, count):
    places = taken if isinstance(taken, list) else [taken]
    states = list(range(count + 1))  # the hidden states: state n has passed n layers
    kinds = kinds_said({"vision_feature_layer": taken}, count)
    for first, second in itertools.pairwise(range(count)):
        apart = any(states[place] == second for place in places)
        assert (kinds[first] != kinds[second]) == apart


def test_layers_whose_outputs_are_taken_go_on_to_be_taken_once():
    layers = [0, 0, 1, 2, 2]
    assert followed({"deepstack_visual_indexes": [0, 2]}, 3, layers) == {"deepstack_visual_indexes": [1, 4]}


@pytest.mark.slow
def test_as_many_outputs_of_layers_are_taken_as_before():
    big = growlib.plan(composite(QWEN), {"vision_config": {"depth": 6}}).config
    assert len(big.vision_config.deepstack_visual_indexes) == 2


def test_a_height_and_a_width_are_no_layers():
    assert followed({"image_size": [16, 16], "patch_size": (4, 4)}, 2, [0, 0, 1]) == {}
    assert kinds_said({"image_size": [16, 32]}, 2) == [(), ()]


def test_the_tower_is_looked_at_only_where_it_grows(monkeypatch):
    looked = []

    def looking(config, model_class, parts=()):
        looked.append(parts)
        return architecture_of(config, model_class, parts)

    monkeypatch.setattr("growlib.growth.architecture_of", looking)
    growlib.plan(config_of(LLAVA), target_of(LLAVA))
    assert [*looked] == [()]
    growlib.plan(config_of(LLAVA), {"vision_config": {"num_hidden_layers": 4}})
    assert looked[1:] == [(), ["vision_config"]]


def test_two_tables_that_claim_one_dimension_are_refused():
    text = growlib.infer(config_of(LLAVA), transformers.LlavaForConditionalGeneration)
    with pytest.raises(growlib.GrowError, match="may grow with vision_config and with another part"):
        joined(text, {"vision_config": text})


def test_a_grown_tower_on_disk_is_what_expand_makes(tmp_path):
    small, target = composite(LLAVA), target_of(LLAVA) | tower_target_of(LLAVA)
    small.save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", target, exact=True)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "big").state_dict()
    made = growlib.expand(small, target).state_dict()
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[key], made[key]) for key in made)
    assert growlib.verify(tmp_path / "small", tmp_path / "big", streaming=True).exact
    again = growlib.plan(tmp_path / "small", tmp_path / "big")  # a whole config is the same request
    assert growlib.GrowthPlan.load(tmp_path / "big").tensors == again.tensors
    command = ["expand", str(tmp_path / "small"), str(tmp_path / "again"), "--exact"]
    sizes = [f"{part}.{field}={size}" for part, fields in target.items() for field, size in fields.items()]
    assert main([*command, *(word for size in sizes for word in ("--set", size))]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("big", "again"))
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOWER_NARROW))
@pytest.mark.parametrize("grows", [1, 2], ids=["units", "width"])
def test_a_size_that_the_projector_reads_side_by_side_does_not_grow_alone(name, grows):
    field = TOWER_FIELDS[name][grows]
    size = 2 * getattr(getattr(config_of(name), tower_of(name)), field)
    with pytest.raises(growlib.GrowError, match=r"would change from|would shrink"):
        growlib.plan(config_of(name), {tower_of(name): {field: size}})


@pytest.mark.slow
def test_a_tower_that_runs_on_nothing_that_can_be_made_is_refused():
    with pytest.raises(growlib.GrowError, match="does not run on the images or sounds"):
        growlib.plan(config_of(TOWER_UNSEEN), {"vision_config": {"num_hidden_layers": 4}})


TOWER_FAULTS = {
    "the number of patches": ({"image_size": 32}, "image_size 16 -> 32: the number of positions follows from it"),
    "a smaller tower": ({"num_hidden_layers": 1}, "num_hidden_layers 2 -> 1"),
    "fewer units": ({"intermediate_size": 20}, "intermediate_size 28 -> 20"),
    "no such field": ({"num_layers": 4}, "vision_config has no field 'num_layers'"),
    "heads that do not divide": ({"num_attention_heads": 3}, "vision_config"),
    "out of reach": ({"num_hidden_layers": 10**9}, "vision_config.num_hidden_layers"),
}


@pytest.mark.parametrize(("change", "said"), TOWER_FAULTS.values(), ids=list(TOWER_FAULTS))
def test_wrong_requests_for_a_tower_say_why(change, said):
    with pytest.raises(growlib.GrowError) as raised:
        growlib.expand(composite(LLAVA), {"vision_config": change})
    assert said in str(raised.value)


def test_a_width_that_cannot_be_exact_says_so():
    """CLIP has a LayerNorm between its embeddings and its blocks: only whole copies pass it."""
    plan = growlib.plan(composite(LLAVA), {"vision_config": {"hidden_size": 24}})
    assert "vision_config.hidden_size" in "; ".join(plan.reasons)
    with pytest.raises(growlib.GrowError, match="hidden_size"):
        growlib.expand(composite(LLAVA), {"vision_config": {"hidden_size": 24}}, exact=True)
