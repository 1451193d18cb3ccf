"""Composites at the sizes of published checkpoints: a small model of each is built, seen with an image, and grows."""

import pytest
import transformers as T

import growlib
from growlib.architectures.schema import Growth

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
LLAVA = {  # LLaVA 1.5 7B
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
    },
    "image_token_index": 32000,
}
LLAMA_4 = {  # Scout
    "vision_config": {
        "hidden_size": 1408,
        "intermediate_size": 5632,
        "num_hidden_layers": 34,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
    },
    "text_config": {
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "vocab_size": 202048,
    },
    "image_token_index": 200092,
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
}
MLLAMA = {  # Llama 3.2 11B Vision
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "vision_output_dim": 7680,
    },
    "text_config": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "pad_token_id": 128004,
    },
    "image_token_index": 128256,
}
GEMMA_3 = {  # 4B
    "vision_config": {**SIGLIP, "image_size": 896},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
    },
    "mm_tokens_per_image": 256,
    "image_token_index": 262144,
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
}
PALIGEMMA = {  # 3B, of 224 pixels
    "vision_config": {**SIGLIP, "image_size": 224, "projection_dim": 2048},
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": 257216,
    },
    "projection_dim": 2048,
    "image_token_index": 257152,
}
QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN_3 = {  # Qwen3-VL 2B
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "depth": 24,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
    **QWEN_IDS,
}
QWEN_2_5 = {  # Qwen2.5-VL 3B
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    **QWEN_IDS,
}
MISTRAL_3 = {  # Mistral Small 3.1 24B
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    "image_token_index": 10,
    "spatial_merge_size": 2,
}
SMOLVLM = {  # 256M
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49280,
    },
    "image_token_id": 49190,
    "scale_factor": 4,
}
INTERNVL = {  # InternVL3 1B
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151674,
    },
    "image_token_id": 151667,
}
VOXTRAL = {  # Mini 3B
    "audio_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    "audio_token_id": 24,
}
GIT = {}  # microsoft/git-base has the sizes of the class
PUBLISHED = {
    T.Llama4ForConditionalGeneration: LLAMA_4,
    T.MllamaForConditionalGeneration: MLLAMA,
    T.Gemma3ForConditionalGeneration: GEMMA_3,
    T.PaliGemmaForConditionalGeneration: PALIGEMMA,  # its one KV head grows as several do
    T.Qwen3VLForConditionalGeneration: QWEN_3,
    T.Qwen2_5_VLForConditionalGeneration: QWEN_2_5,
    T.Mistral3ForConditionalGeneration: MISTRAL_3,
    T.SmolVLMForConditionalGeneration: SMOLVLM,
    T.InternVLForConditionalGeneration: INTERNVL,
    T.LlavaForConditionalGeneration: LLAVA,
    T.VoxtralForConditionalGeneration: VOXTRAL,
    T.GitForCausalLM: GIT,
}
WHOLE = {T.GitForCausalLM}  # its width grows by whole multiples
QUICK = {T.Llama4ForConditionalGeneration}


@pytest.mark.parametrize(
    "cls",
    [pytest.param(cls, marks=() if cls in QUICK else pytest.mark.slow, id=cls.__name__) for cls in PUBLISHED],
)
def test_a_published_composite_grows_deeper_and_wider_and_gets_more_heads(cls, tmp_path, monkeypatch):
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path))
    config = cls.config_class(**PUBLISHED[cls])
    table = growlib.infer(config, cls)
    grown = [Growth("hidden", "x2"), Growth("heads", "x2"), Growth(table.stacks[0].layers, "deeper")]
    grown += [] if cls in WHOLE else [Growth("hidden", "x1.5")]
    assert {growth: table.proven[growth] for growth in grown if not table.proven[growth].exact} == {}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [T.MllamaForConditionalGeneration, T.GotOcr2ForConditionalGeneration])
def test_what_stands_before_the_text_has_axes_of_its_own(cls, tmp_path, monkeypatch):
    """Mllama's cross-attention reads an image with keys and values, and norms queries and keys, unlike its
    self-attention. The positions of GOT-OCR's tower are as many as heads by chance."""
    monkeypatch.setenv("GROWLIB_CACHE", str(tmp_path))
    table = growlib.infer(cls.config_class(), cls)
    inexact = {growth: verdict for growth, verdict in table.proven.items() if not verdict.exact}
    assert {growth.ratio for growth in inexact} == {"x1.5"}
    assert all("rotary frequencies" in verdict.why for verdict in inexact.values())
