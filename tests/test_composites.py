"""Models of several parts: the text grows, what joins the parts follows, and the function stays with an image too."""

import logging

import pytest
import torch
import transformers
from composites import COMPOSITES, GEMMA, LLAVA, QWEN, SOUND, composite, config_of, same_with_an_image, target_of
from safetensors.torch import load_file

import growlib
from growlib.cli import main
from growlib.media import media_in, with_media
from growlib.outputs import every_input

QUICK = (GEMMA, QWEN, LLAVA, SOUND)
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMPOSITES]


def with_image(name, seed=3):
    """Inputs that are made here and not by growlib: two rows of text, each with an image of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 59, (2, 9), generator=generator)
    tokens = {GEMMA: 4, QWEN: 4, LLAVA: 16}[name]
    ids = torch.cat([ids[:, :5], torch.full((2, tokens), 60), ids[:, 5:]], 1)
    if name != QWEN:
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    grid = torch.tensor([[1, 4, 4]] * 2)
    values = torch.randn(32, 3 * 2 * 4 * 4, generator=generator)
    return {
        "input_ids": ids,
        "pixel_values": values,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 60).int(),
    }


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("name", NAMES)
def test_the_text_grows_in_width_and_depth_and_the_model_computes_the_same(name):
    small, target = composite(name), target_of(name)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    plan = growlib.plan(small, target)
    big = growlib.expand(small, plan, exact=True)
    assert plan.exact, plan.reasons
    for field, size in target["text_config"].items():
        assert getattr(big.config.text_config, field) == size
    same_with_an_image(small, big)
    assert growlib.verify(small, big).exact
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


@pytest.mark.parametrize("name", [GEMMA, QWEN, LLAVA])
def test_logits_stay_on_images_that_growlib_did_not_make(name):
    small = composite(name)
    big = growlib.expand(small, target_of(name))
    for seed in (3, 4):
        given = with_image(name, seed)
        expected = logits(small, given)
        assert (logits(big, given) - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
    other = {**given, "pixel_values": with_image(name, 5)["pixel_values"]}
    assert not torch.allclose(logits(small, other), expected, atol=1e-2), "the image has no effect"


@pytest.mark.parametrize("name", [GEMMA, QWEN, LLAVA, SOUND])
def test_what_stays_is_left_bit_for_bit(name):
    small = composite(name)
    big, old = growlib.expand(small, target_of(name)).state_dict(), small.state_dict()
    towers = [key for key in old if any(part in key for part in ("vision_tower", "visual.blocks", "audio_tower"))]
    assert len(towers) > 10
    assert all(torch.equal(big[key], old[key]) for key in towers)


def test_heads_groups_and_vocabulary_of_the_text_grow():
    small = composite(LLAVA)
    target = {"text_config": {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 90}}
    big = growlib.expand(small, target, exact=True)
    assert growlib.verify(small, big).exact
    assert big.config.text_config.vocab_size == 90
    assert big.config.image_token_index == 60


def test_dotted_names_nested_dicts_and_whole_configs_are_one_request():
    small, nested = composite(LLAVA), target_of(LLAVA)
    dotted = {f"text_config.{field}": size for field, size in nested["text_config"].items()}
    whole = config_of(LLAVA)
    for field, size in nested["text_config"].items():
        setattr(whole.text_config, field, size)
    plans = [growlib.plan(small, target) for target in (nested, dotted, whole)]
    made = [growlib.expand(small, plan).state_dict() for plan in plans]
    assert all(torch.equal(made[0][key], other[key]) for other in made[1:] for key in made[0])


def test_a_plan_needs_no_weights():
    assert growlib.plan(config_of(LLAVA), target_of(LLAVA)).exact


def test_what_says_the_texts_width_again_follows_it():
    big = growlib.plan(composite(QWEN), {"text_config": {"hidden_size": 48}}).config
    assert big.vision_config.out_hidden_size == 48
    assert big.vision_config.hidden_size == 16


def test_image_features_enter_behind_the_layers_that_they_entered_behind():
    """Qwen3-VL adds image features after its first layers: new layers may not push these back."""
    plan = growlib.plan(composite(QWEN), {"text_config.num_hidden_layers": 4})
    assert plan.layers["text_config.num_hidden_layers"].identity == (False, False, True, True)


def test_lists_of_layers_follow_in_their_own_part():
    big = growlib.plan(composite(GEMMA), {"text_config.num_hidden_layers": 4}).config
    assert len(big.text_config.layer_types) == 4
    assert big.vision_config.num_hidden_layers == 2


def test_verify_looks_at_an_image():
    """A growth that is exact on text alone, and whose projector is broken, is not exact."""
    small = composite(LLAVA)
    big = growlib.expand(small, target_of(LLAVA))
    text = every_input(small)[0]
    with torch.no_grad():
        big.model.multi_modal_projector.linear_1.bias.add_(1.0)
    assert torch.allclose(logits(small, text), logits(big, text), atol=1e-4)
    assert growlib.verify(small, big).verdict == "NOT exact"


def test_verify_looks_at_text_alone():
    small = composite(LLAVA)
    big = growlib.expand(small, target_of(LLAVA))
    with torch.no_grad():
        big.model.language_model.layers[0].self_attn.o_proj.weight[0].add_(1.0)
    assert growlib.verify(small, big).verdict == "NOT exact"


def test_verify_refuses_what_it_cannot_show_an_image_to(monkeypatch):
    small = composite(LLAVA)
    big = growlib.expand(small, target_of(LLAVA))
    monkeypatch.setattr("growlib.media._images", lambda *_: iter(()))
    with pytest.raises(growlib.GrowError, match="no image could be made"):
        growlib.verify(composite(LLAVA), big)


@pytest.mark.parametrize("name", [QWEN, LLAVA])
def test_a_grown_folder_loads_and_is_what_expand_makes(name, tmp_path):
    small, target = composite(name), target_of(name)
    small.save_pretrained(tmp_path / "small")
    growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", target, exact=True)
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "big").state_dict()
    made = growlib.expand(small, target).state_dict()
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[key], made[key]) for key in made)
    assert growlib.verify(tmp_path / "small", tmp_path / "big").planned == ()
    assert growlib.verify(tmp_path / "small", tmp_path / "big", streaming=True).exact
    plan = growlib.GrowthPlan.load(tmp_path / "big")
    assert plan == growlib.plan(tmp_path / "small", target)
    growlib.expand(tmp_path / "small", plan).save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("big", "again"))
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_the_command_line_grows_the_text(tmp_path, capsys):
    composite(LLAVA).save_pretrained(tmp_path / "small")
    source, grown = str(tmp_path / "small"), str(tmp_path / "big")
    sizes = ["--set", "text_config.hidden_size=36", "--set", "text_config.num_hidden_layers=3"]
    assert main(["plan", source, *sizes]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["expand", source, grown, *sizes, "--exact"]) == 0
    assert main(["verify", source, grown]) == 0
    assert main(["plan", source, "--scale", "width=2"]) == 0
    assert "text_config" in capsys.readouterr().out


WRONG = {
    "a field of a part at the top": ({"hidden_size": 48}, "text_config.hidden_size"),
    "no such part": ({"talk_config": {"hidden_size": 48}}, "text_config"),
    "no such dotted part": ({"talk_config.hidden_size": 48}, "text_config"),
    "no such field": ({"text_config": {"hidden_sise": 48}}, "text_config.hidden_size"),
    "no such dotted field": ({"text_config.hidden_sise": 48}, "text_config.hidden_size"),
    "a part that is a number": ({"text_config": 48}, "text_config"),
    "a part of another type": ({"text_config": {"model_type": "gpt2"}}, "text_config"),
    "a smaller text": ({"text_config": {"hidden_size": 16}}, "at least"),
    "no size": ({"text_config": {"hidden_size": 0}}, "at least"),
    "out of reach": ({"text_config": {"num_hidden_layers": 10**9}}, "up to"),
}


@pytest.mark.parametrize(("target", "valid"), WRONG.values(), ids=list(WRONG))
def test_wrong_requests_say_what_would_be_valid(target, valid):
    with pytest.raises(growlib.GrowError) as raised:
        growlib.expand(composite(LLAVA), target)
    (asked,) = target
    assert asked.partition(".")[0] in str(raised.value)
    assert valid in raised.value.valid + raised.value.wrong


def test_a_whole_config_with_another_text_is_refused():
    target = config_of(LLAVA)
    target.text_config = transformers.Qwen2Config(hidden_size=48)
    with pytest.raises(growlib.GrowError, match="text_config is a qwen2 config"):
        growlib.expand(composite(LLAVA), target)


def test_growth_that_cannot_be_exact_says_so(caplog):
    caplog.set_level(logging.WARNING, logger="growlib")
    growlib.expand(composite(LLAVA), {"text_config.head_dim": 12})
    assert "rotary" in caplog.text
    with pytest.raises(growlib.GrowError, match="rotary"):
        growlib.expand(composite(LLAVA), {"text_config.head_dim": 12}, exact=True)


@pytest.mark.parametrize("change", [{"image_token_index": 61}, {"vision_feature_layer": -1}], ids=str)
def test_what_acts_on_an_image_alone_is_a_reason(change):
    (field,) = change
    plan = growlib.plan(composite(LLAVA), {"text_config": {"hidden_size": 36}, **change})
    assert not plan.exact
    assert field in plan.reasons[0]


def test_made_images_act_and_differ_by_row():
    model = composite(LLAVA)

    def words(length):
        return torch.full((2, length), 7)

    (given,) = with_media(model, words, 2, seed=1).values()
    assert media_in(model) == {"image"}
    first, second = logits(model, given)
    assert not torch.allclose(first, second)
