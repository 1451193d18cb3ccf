"""Tiny composites: models of several configs, every parameter random."""

import torch
import transformers

from growlib.outputs import every_input, outputs

LLAMA = {"model_type": "llama"}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 70,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"hidden_size": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VIT = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 28,
    "patch_size": 4,
    "out_hidden_size": 32,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "num_mel_bins": 10,
    "max_source_positions": 40,
}
IMAGE = {"image_token_index": 60}
IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
SIGLIP = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
CLIP = {"model_type": "clip_vision_model", **VIT, "projection_dim": 12}

GEMMA, QWEN, LLAVA, SOUND = (
    "Gemma3ForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)

# class -> its config: top-level fields, text_config, the other parts
COMPOSITES = {
    "LlavaForConditionalGeneration": ({**IMAGE}, {**LLAMA, **TEXT}, {"vision_config": CLIP}),
    "LlavaNextForConditionalGeneration": (
        {**IMAGE, "image_grid_pinpoints": [[32, 32]]},
        {**LLAMA, **TEXT},
        {"vision_config": CLIP},
    ),
    "LlavaOnevisionForConditionalGeneration": (
        {**IMAGE, "image_grid_pinpoints": [[32, 32]], "vision_feature_layer": -1},
        {"model_type": "qwen2", **TEXT},
        {"vision_config": SIGLIP},
    ),
    "VipLlavaForConditionalGeneration": (
        {**IMAGE, "vision_feature_layers": [-1, -2]},
        {**LLAMA, **TEXT},
        {"vision_config": CLIP},
    ),
    "Gemma3ForConditionalGeneration": (
        {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4},
        {
            **TEXT,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        {"vision_config": SIGLIP},
    ),
    "PaliGemmaForConditionalGeneration": (
        {**IMAGE, "projection_dim": 24},
        {"model_type": "gemma", **TEXT},
        {"vision_config": {**SIGLIP, "projection_dim": 24}},
    ),
    "Mistral3ForConditionalGeneration": (
        {**IMAGE, "spatial_merge_size": 2},
        {"model_type": "mistral", **TEXT},
        {"vision_config": {"model_type": "pixtral", **VIT, "head_dim": 8}},
    ),
    "Idefics3ForConditionalGeneration": (
        {"image_token_id": 60, "scale_factor": 2},
        {**LLAMA, **TEXT},
        {"vision_config": VIT},
    ),
    "SmolVLMForConditionalGeneration": (
        {"image_token_id": 60, "scale_factor": 2},
        {**LLAMA, **TEXT},
        {"vision_config": VIT},
    ),
    "InternVLForConditionalGeneration": (
        {"image_token_id": 60},
        {"model_type": "qwen2", **TEXT},
        {"vision_config": {**VIT, "image_size": [16, 16], "patch_size": [4, 4]}},
    ),
    "Qwen2VLForConditionalGeneration": (
        IDS,
        {**TEXT, **MROPE},
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "hidden_size": 32,
            }
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        IDS,
        {**TEXT, **MROPE},
        {"vision_config": {**QWEN_VIT, "window_size": 16, "fullatt_block_indexes": [1]}},
    ),
    "Qwen3VLForConditionalGeneration": (
        IDS,
        {**TEXT, **MROPE},
        {"vision_config": {**QWEN_VIT, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}},
    ),
    "Llama4ForConditionalGeneration": (
        {"image_token_index": 60},
        {
            **TEXT,
            "intermediate_size_mlp": 44,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        {
            "vision_config": {
                **VIT,
                "intermediate_size": 64,
                "vision_output_dim": 20,
                "projector_input_dim": 20,
                "projector_output_dim": 20,
            }
        },
    ),
    "AyaVisionForConditionalGeneration": (
        {"image_token_index": 60, "alignment_intermediate_size": 40, "vision_feature_layer": -1},
        {"model_type": "cohere2", **TEXT, "sliding_window": 8},
        {"vision_config": SIGLIP},
    ),
    "Qwen2AudioForConditionalGeneration": (
        {"audio_token_index": 60},
        {"model_type": "qwen2", **TEXT},
        {"audio_config": {"model_type": "qwen2_audio_encoder", **WHISPER}},
    ),
    "VoxtralForConditionalGeneration": (
        {"audio_token_id": 60},
        {**LLAMA, **TEXT},
        {
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "num_mel_bins": 10,
                "max_source_positions": 40,
            }
        },
    ),
    "Cohere2VisionForConditionalGeneration": (
        {"image_token_id": 60, "alignment_intermediate_size": 40, "downsample_factor": 2},
        {"model_type": "cohere2", **TEXT, "sliding_window": 8},
        {"vision_config": SIGLIP},
    ),
    "LightOnOcrForConditionalGeneration": (
        {"image_token_id": 60},
        {"model_type": "qwen3", **TEXT},
        {"vision_config": {"model_type": "pixtral", **VIT, "head_dim": 8}},
    ),
    "Ovis2ForConditionalGeneration": (
        {"image_token_id": 60, "visual_indicator_token_ids": [61, 62, 63, 64, 65], "hidden_size": 24},
        {"model_type": "qwen2", **TEXT},
        {"vision_config": {**VIT, "vocab_size": 30, "hidden_stride": 2, "num_visual_indicator_tokens": 5}},
    ),
    "VideoLlavaForConditionalGeneration": (
        {"image_token_index": 60, "video_token_index": 61},
        {**LLAMA, **TEXT},
        {"vision_config": CLIP},
    ),
    "DeepseekVLForConditionalGeneration": ({"image_token_id": 60}, {**LLAMA, **TEXT}, {"vision_config": SIGLIP}),
    "GotOcr2ForConditionalGeneration": (
        {"image_token_index": 60},
        {"model_type": "qwen2", **TEXT},
        {
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 4,
                "mlp_dim": 32,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
            }
        },
    ),
    "PaddleOCRVLForConditionalGeneration": (IDS, {**TEXT, **MROPE}, {"vision_config": VIT}),
    "Qwen3VLMoeForConditionalGeneration": (
        IDS,
        {**TEXT, **MROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        {"vision_config": {**QWEN_VIT, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    ),
    "Qwen3_5ForConditionalGeneration": (
        IDS,
        {
            **TEXT,
            "hidden_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.25,
            },
        },
        {"vision_config": {**QWEN_VIT, "num_position_embeddings": 16}},
    ),
    "Glm4vForConditionalGeneration": (
        {**IDS, "image_start_token_id": 64, "image_end_token_id": 65},
        {**TEXT, **MROPE},
        {"vision_config": {**QWEN_VIT, "image_size": 16}},
    ),
    "Idefics2ForConditionalGeneration": (
        {"image_token_id": 60},
        {"model_type": "mistral", **TEXT},
        {
            "vision_config": VIT,
            "perceiver_config": {
                "hidden_size": 24,
                "resampler_n_latents": 3,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
        },
    ),
    "GlmAsrForConditionalGeneration": (
        {"audio_token_id": 60},
        {**LLAMA, **TEXT},
        {
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_mel_bins": 10,
                "max_position_embeddings": 100,
            }
        },
    ),
    "AudioFlamingo3ForConditionalGeneration": (
        {"audio_token_id": 60},
        {"model_type": "qwen2", **TEXT},
        {
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_mel_bins": 10,
                "max_source_positions": 40,
            }
        },
    ),
}

# Exact at whole multiples of the text's width only.
WHOLE_MULTIPLES = {
    "Glm4vForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
}

# class -> the fields of its tower that say the layers, the units of its feed-forward layers, and the width
_USUAL = ("num_hidden_layers", "intermediate_size", "hidden_size")
TOWER_FIELDS = (
    dict.fromkeys(COMPOSITES, _USUAL)
    | {
        "Qwen2VLForConditionalGeneration": ("depth", "", "embed_dim"),  # its units are a multiple of its width
        "Qwen2AudioForConditionalGeneration": ("encoder_layers", "encoder_ffn_dim", "d_model"),
        "GotOcr2ForConditionalGeneration": ("num_hidden_layers", "mlp_dim", "hidden_size"),
        **{n: ("depth", *_USUAL[1:]) for n in COMPOSITES if n.startswith(("Qwen2_5", "Qwen3"))},
        "Glm4vForConditionalGeneration": ("depth", "", "hidden_size"),  # it has as many as the text is wide
    }
)
# Classes whose tower's width grows exactly by whole multiples only, and those in which it does not by itself: there
# the projector reads several vectors side by side, as many as the feed-forward layers have units.
TOWER_WHOLE = {
    "LlavaForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "LightOnOcrForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "AudioFlamingo3ForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
}
TOWER_UNSEEN = "VideoLlavaForConditionalGeneration"  # one of its two towers runs on videos only
TOWER_NARROW = {
    "Llama4ForConditionalGeneration",
    "VoxtralForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
}


def tower_of(name: str) -> str:
    """The part of a class's config that sees or hears."""
    return next(part for part in COMPOSITES[name][2] if part in ("vision_config", "audio_config"))


def config_of(name: str):
    top, text, others = COMPOSITES[name]
    model_class = getattr(transformers, name)
    return model_class.config_class(**top, text_config=dict(text), **{k: dict(v) for k, v in others.items()})


def composite(name: str, seed: int = 0):
    """A tiny model of a class, in eval mode, every parameter drawn anew."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)._from_config(config_of(name), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = parameter.mean().round().item() if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def target_of(name, times=1.5):
    """Overrides that widen and deepen the text."""
    text = config_of(name).text_config
    times = 2 if name in WHOLE_MULTIPLES else times
    wide = {"hidden_size": int(text.hidden_size * times)}
    return {"text_config": {**wide, "num_hidden_layers": 2 * text.num_hidden_layers}}


def tower_target_of(name):
    """Overrides that give the tower twice the layers and more units, and its width where that can be exact."""
    layers, units, width = TOWER_FIELDS[name]
    part, tower = tower_of(name), getattr(config_of(name), tower_of(name))
    fields = {layers: 2 * getattr(tower, layers)}
    if name in TOWER_NARROW:
        return {part: fields}
    fields |= {units: getattr(tower, units) + 12} if units else {}
    return {part: fields | {width: int(getattr(tower, width) * (2 if name in TOWER_WHOLE else 1.5))}}


def same_with_an_image(small, big):
    """Logits on text alone, and with what the class sees or hears."""
    inputs = every_input(small)
    assert len(inputs) > 1, "neither an image nor a sound was looked at"
    for given in inputs:
        expected = outputs(small, given)["logits"]
        apart = (outputs(big, given)["logits"] - expected).abs().max() / (expected.max() - expected.min())
        assert apart < 1e-5
