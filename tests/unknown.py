"""Transformers that exist nowhere: unusual names, a fused layout, and an axis that misleads."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LoomConfig(PreTrainedConfig):
    model_type = "loom"

    def __init__(self, lexicon=53, breadth=48, strands=4, pit=72, storeys=2, squash="relu", **options):
        self.lexicon, self.breadth, self.strands, self.pit = lexicon, breadth, strands, pit
        self.storeys, self.squash = storeys, squash
        super().__init__(**{"tie_word_embeddings": False, **options})


class Balance(nn.Module):
    """An RMSNorm under another name, its weight acting as 1 + w."""

    def __init__(self, breadth: int) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(breadth))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.tilt)


class Storey(nn.Module):
    """One block: values, keys and queries of each strand lie beside each other in one map."""

    def __init__(self, config: LoomConfig) -> None:
        super().__init__()
        self.strands, self.squash = config.strands, config.squash
        self.calm_a, self.calm_b = Balance(config.breadth), Balance(config.breadth)
        self.warp = nn.Linear(config.breadth, 3 * config.breadth)
        self.weft = nn.Linear(config.breadth, config.breadth)
        self.descend = nn.Linear(config.breadth, 2 * config.pit)
        self.ascend = nn.Linear(config.pit, config.breadth)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, breadth = x.shape
        fused = self.warp(self.calm_a(x)).view(batch, length, self.strands, 3, -1).transpose(1, 2)
        value, key, query = fused.unbind(3)
        scores = query @ key.transpose(-1, -2) / (breadth // self.strands) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -1e9).softmax(-1)
        x = x + self.weft((scores @ value).transpose(1, 2).reshape(batch, length, breadth))
        gate, up = self.descend(self.calm_b(x)).chunk(2, -1)
        if self.squash == "relu":
            return x + self.ascend(gate.relu() * up)
        return x + self.ascend(gate.softmax(-1) * up)  # misleads: looks like units, but is normalised over them


class LoomForCausalLM(PreTrainedModel):
    config_class = LoomConfig
    base_model_prefix = "loom"

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.lexicon, config.breadth)
        self.tower = nn.ModuleList(Storey(config) for _ in range(config.storeys))
        self.calm = Balance(config.breadth)
        self.speak = nn.Linear(config.breadth, config.lexicon, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(self, input_ids: Tensor, return_dict: bool = True, **_: object) -> CausalLMOutput:
        x = self.words(input_ids)
        for storey in self.tower:
            x = storey(x)
        return CausalLMOutput(logits=self.speak(self.calm(x)))
