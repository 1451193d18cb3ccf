"""The command line: growlib expand | plan | verify | methods | families | cache."""

import argparse
import difflib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from growlib import checkpoint
from growlib.errors import GrowError
from growlib.expand import expand, plan
from growlib.families import families, family
from growlib.families.inference import heard
from growlib.families.schema import layout_text
from growlib.methods import methods
from growlib.verify import verify

# What stands beside the weights in a checkpoint folder and describes the text, not the architecture.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, 1 where a verification fails, or 2 for a request that growlib refuses."""
    parser = _parser()
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return options.run(options)
    except GrowError as error:
        print(f"growlib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `growlib plan ... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="growlib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("expand", _expand, "grow a checkpoint into a larger one"),
        ("plan", _plan, "show what a growth would do, without running it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("source", help="a folder or a hub id")
        if name == "expand":
            command.add_argument("destination", help="a folder that does not exist yet")
            command.add_argument("--exact", action="store_true", help="refuse what does not preserve the function")
        command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the config")
        command.add_argument("--config", help="a folder with the target's config.json, instead of --set")
        command.add_argument("--method", default="lossless", help="see growlib methods (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command = commands.add_parser("verify", help="compare a source and its grown model on random tokens")
    command.add_argument("source")
    command.add_argument("grown")
    command.set_defaults(run=_verify)
    commands.add_parser("methods", help="the growth methods").set_defaults(run=_methods)
    command = commands.add_parser("families", help="the model types with a table, and the inference of others")
    command.add_argument("--check", metavar="TYPE", help="infer the table of a model type and show the verdict")
    command.set_defaults(run=_families)
    _cache_parser(commands)
    return parser


def _cache_parser(commands: Any) -> None:
    text = "run a teacher over a dataset once and keep what it says, or verify what was kept"
    command = commands.add_parser(
        "cache",
        help=text,
        description=text,
        usage="growlib cache TEACHER DATA FOLDER [options] | growlib cache verify FOLDER [TEACHER DATA]",
    )
    command.add_argument("arguments", nargs="+", help="DATA: a .npy array of token ids, a .jsonl file, or text")
    command.add_argument("--top-k", type=int, default=16, help="exact tokens per position (default: %(default)s)")
    command.add_argument("--samples", type=int, default=12, help="draws per position (default: %(default)s)")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0, help="of the draws")
    command.add_argument("--length", type=int, default=512, help="tokens of a block of text (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--held-out", help="data on which the teacher's own loss is measured")
    command.set_defaults(run=_cache)


def _target(options: argparse.Namespace) -> str | dict[str, Any]:
    if bool(options.config) == bool(options.set):
        raise GrowError("reading the target", "name it once", "either --set FIELD=VALUE ... or --config FOLDER")
    return options.config or dict(_setting(text) for text in options.set)


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not (field and equals and value):
        raise GrowError(f"--set {text}", "it is not FIELD=VALUE", "such as --set hidden_size=1024")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def _expand(options: argparse.Namespace) -> int:
    with checkpoint.new_folder(options.destination) as folder:
        source = checkpoint.load(options.source)
        growth = plan(source, _target(options), options.method, seed=options.seed)
        grown = expand(source, growth.config, options.method, seed=options.seed, exact=True if options.exact else None)
        grown.save_pretrained(folder)
        (folder / "growlib.json").write_text(json.dumps({"source": options.source, **growth.to_dict()}))
        for pattern in TOKENIZER_FILES:
            for path in Path(options.source).glob(pattern):
                shutil.copy2(path, folder)
        measured = verify(source, grown)
    count = sum(parameter.numel() for parameter in grown.parameters())
    print(f"{options.destination}: {count:,} parameters, {measured}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    growth = plan(options.source, _target(options), options.method, seed=options.seed)
    print(json.dumps(growth.to_dict()) if options.json else growth)
    return 0


def _verify(options: argparse.Namespace) -> int:
    measured = verify(options.source, options.grown)
    print(measured)
    return 0 if measured.exact else 1


def _methods(options: argparse.Namespace) -> int:
    rows = [("method", "width", "depth", "exact", "source")]
    rows += [(m.name, "yes" if m.width else "-", "yes" if m.depth else "-", m.exact, m.source) for m in methods()]
    print(_table(rows))
    return 0


def _check(model_type: str) -> int:
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=5) or ["llama"]
        raise GrowError(f"--check {model_type}", "transformers has no such model type", ", ".join(close))
    table = heard(CONFIG_MAPPING[model_type]())
    print(_table([("axis", "size", "meets"), *((n, a.size, a.meets or "never grows") for n, a in table.axes.items())]))
    print()
    print(_table([("tensor", "layout"), *((row, layout_text(layout)) for row, layout in table.tensors.items())]))
    print()
    for stack in table.stacks:
        print(f"{stack.layers} blocks {stack.block}  without {', '.join(stack.writers)} they are the identity")
    print()
    if table.candidates:
        print(_table([("candidate", "verdict"), *((name, why or "exact") for name, why in table.candidates)]))
    else:
        print("a curated table: no candidates")
    print()
    print(_table([("growth", "verdict"), *((name, why or "exact") for name, why in (table.proven or {}).items())]))
    return 0


def _families(options: argparse.Namespace) -> int:
    if options.check:
        return _check(options.check)
    rows = [("family", "axes that grow")]
    for name in families():
        axes = [axis for axis, facts in family(name).axes.items() if facts.meets]
        rows.append((name, ", ".join([*axes, *dict.fromkeys(stack.layers for stack in family(name).stacks)])))
    print(_table(rows))
    return 0


def _cache(options: argparse.Namespace) -> int:
    # Here, because it imports the Trainer, which the other commands do not need.
    from growlib.ki import cache_teacher, verify_cache
    from growlib.ki.cache.data import padded, read_examples
    from growlib.ki.tasks import task_of
    from growlib.ki.teacher import tokenizer_at

    words = options.arguments
    verifying = words[0] == "verify"
    if len(words) not in ((2, 4) if verifying else (3,)):
        valid = "growlib cache TEACHER DATA FOLDER, or growlib cache verify FOLDER [TEACHER DATA]"
        raise GrowError("growlib cache " + " ".join(words), f"these are {len(words)} arguments", valid)
    teacher, data = words[2:] or ("", "") if verifying else words[:2]
    tokenizer = tokenizer_at(teacher) if teacher else None
    dataset = read_examples(data, tokenizer, options.length) if data else None
    if verifying:
        found = verify_cache(words[1], teacher or None, dataset, tokenizer=tokenizer, data_collator=padded)
        print(found)
        return 0 if found.sound else 1
    held_out = read_examples(options.held_out, tokenizer, options.length) if options.held_out else None
    model = checkpoint.load(teacher)
    task, rows = task_of(model), chain(dataset or (), held_out or ())
    if task != "causal" and any(row["labels"] is row["input_ids"] for row in rows):
        wrong = f"there are no labels, and for a {task} model the tokens are none"
        raise GrowError(f"growlib cache {' '.join(words)}", wrong, "a .jsonl with labels; growlib.ki.MaskedExamples")
    cache = cache_teacher(
        model,
        dataset,
        words[2],
        top_k=options.top_k,
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
        tokenizer=tokenizer,
        data_collator=padded,
        held_out=held_out,
        batch_size=options.batch_size,
    )
    each = cache.bytes_on_disk / max(cache.positions, 1)
    print(f"{words[2]}: {len(cache):,} examples, {cache.positions:,} positions of {each:.1f} bytes on disk")
    print(f"the teacher's loss there: {cache.teacher_ce:.4f}")
    return 0


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
