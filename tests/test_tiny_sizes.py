"""The small model of a class: sizes that fit each other, and inputs on which it runs."""

import pytest
import transformers as T

import growlib
from growlib.errors import GrowError
from growlib.inference import smaller
from growlib.inference.tiny import tiny_config, tiny_model
from growlib.media import media_in, wanted
from growlib.outputs import every_input, inputs_of


def test_equal_numbers_outside_the_text_get_smaller_together():
    fields = {"vision.out": 4096, "projector.in": 4096, "vision.ids": 999, "text.rank": 4096, "text.hidden_size": 4096}
    options = list(smaller._options(fields, "text", {"text.hidden_size"}))
    assert {tuple(fields) for tried in options for fields in tried} == {
        ("vision.out", "projector.in"),
        ("vision.ids",),
        ("text.rank",),
    }
    assert all(len(set(fields.values())) == 1 for tried in options for fields in tried)


def test_a_scan_is_small_too():
    small = tiny_config(T.KimiLinearConfig(), T.KimiLinearForCausalLM)
    assert small.linear_num_heads * small.linear_head_dim < 200


def test_a_model_of_any_length_is_given_tokens():
    config = T.XLNetConfig(vocab_size=61, d_model=24, n_layer=1, n_head=4, d_inner=36)
    assert inputs_of(T.XLNetLMHeadModel(config))["input_ids"].shape == (2, 7)


def test_a_part_that_a_config_leaves_out_is_not_waited_for():
    small = tiny_config(T.Gemma4Config(), T.Gemma4ForConditionalGeneration)
    assert small.vision_config is None
    assert wanted(tiny_model(T.Gemma4ForConditionalGeneration, small)) == set()


@pytest.mark.parametrize(
    ("cls", "kind"), [(T.VoxtralForConditionalGeneration, "audio"), (T.GitForCausalLM, "image")], ids=["sound", "image"]
)
def test_the_defaults_of_a_class_are_seen_with_their_media(cls, kind):
    """Voxtral's default has no id for a sound; the text of GIT is the top level, and its tower a part of it."""
    model = tiny_model(cls, tiny_config(cls.config_class(), cls))
    every_input(model)
    assert media_in(model) == {kind}


def test_layers_side_by_side_are_as_many_as_are_left():
    cls = T.MllamaForConditionalGeneration
    seen = tiny_config(cls.config_class(), cls).vision_config
    assert seen.vision_output_dim == seen.hidden_size * (1 + len(seen.intermediate_layers_indices))


@pytest.mark.parametrize("cls", [T.CLIPForImageClassification, T.SiglipForImageClassification])
def test_a_class_that_runs_on_images_alone_is_refused_with_what_grows_instead(cls):
    with pytest.raises(GrowError, match=r"runs on images alone.*VisionModel"):
        growlib.infer(cls.config_class(), cls)


def test_a_type_that_grows_in_no_size_says_why():
    with pytest.raises(GrowError, match="each of its stages has a width of its own"):
        growlib.infer(T.BitConfig(), T.BitForImageClassification)


def test_a_part_that_is_switched_off_stays_off():
    """A size of 0 of shared experts: none are there, and a table for some would not fit."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    counts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    small = T.GraniteMoeSharedForCausalLM(T.GraniteMoeSharedConfig(**sizes, **counts, shared_intermediate_size=0))
    assert growlib.plan(small, {"num_hidden_layers": 4, "hidden_size": 48}).exact
