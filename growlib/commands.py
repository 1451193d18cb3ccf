"""What the commands do. They print tables of at most 100 columns."""

import argparse
import difflib
import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from growlib import operators
from growlib.architectures import families as known_families
from growlib.architectures import table_of
from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.hub import repository, upload
from growlib.config import Target, scaled
from growlib.costs import bytes_of, cost_table, parameters_of, sizes_that_stay
from growlib.errors import GrowError
from growlib.growth import plan as decide
from growlib.growth_plan import GrowthPlan
from growlib.inference import architecture_of, infer, verified
from growlib.limits import fits_into_memory
from growlib.nearest import nearest_exact
from growlib.own import imported
from growlib.papers import bibtex
from growlib.parts import towers
from growlib.progress import progress_bar
from growlib.show import WIDTH, table
from growlib.streaming import write_grown
from growlib.tensor_check import verify_tensors
from growlib.training import starting_rate
from growlib.verification import verify as compare

UNCHECKED = 3  # exit code: the check could not run, or cannot tell
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def expand(options: argparse.Namespace) -> int:
    growth = _plan(options)
    hub = repository(options.push_to_hub) if options.push_to_hub else None
    checked: list[tuple[int, str]] = []

    def check(folder: Path) -> str:
        checked.append(_measured(options, folder, growth))
        return checked[-1][1]

    with progress_bar(f"writing {options.destination}") as progress:
        write_grown(
            options.source,
            options.destination,
            growth,
            exact=True if options.exact else None,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            check=check,
            progress=progress,
        )
    ((code, measured),) = checked
    print(f"{options.destination}: {parameters_of(growth):,} parameters, {measured}")
    if hub:
        print(f"{options.push_to_hub}: {upload(hub, options.push_to_hub, options.destination)}")
    return code


def _measured(options: argparse.Namespace, folder: Path, growth: GrowthPlan) -> tuple[int, str]:
    """The exit code and what the closing check says. Raises GrowError where --exact is not kept."""
    asked = f"expanding {options.source} with --exact"
    try:
        large = not fits_into_memory(2 * bytes_of(growth, torch.float32))  # as it is, and once more in float32
        measured = compare(options.source, folder, streaming=large)
    except Exception as error:  # whatever a class of transformers raises on inputs that were made for it
        wrong = f"the result cannot be checked ({type(error).__name__}: {error})"
        if options.exact:
            raise GrowError(asked, wrong, "no --exact, which writes it unchecked") from error
        return UNCHECKED, f"written, but {wrong}"
    measured = replace(measured, planned=None)
    if options.exact and not measured.exact:
        raise GrowError(asked, f"the closing check says: {measured}", "no --exact, which writes it all the same")
    return UNCHECKED if measured.verdict == "cannot tell" else 0, str(measured)


def plan(options: argparse.Namespace) -> int:
    try:
        growth = _plan(options)
    except GrowError as error:
        offer = "" if isinstance(error.__cause__, OSError) else _nearest(options)  # not a target that cannot be read
        raise GrowError(error.asked, error.wrong, f"{error.valid}; {offer}" if offer else error.valid) from error
    if options.save:
        growth.save(options.save)
    if options.json:
        print(json.dumps(growth.to_dict()))
        return 0
    print(growth)
    if growth.reasons and (offer := _nearest(options)):
        print(textwrap.fill(offer, WIDTH, subsequent_indent="  "))
    stays = ", ".join(f"{field}={size}" for field, size in sizes_that_stay(growth).items())
    print("\n" + textwrap.fill(f"sizes that stay: {stays or 'none'}", WIDTH, subsequent_indent="  "))
    print("\n" + table(cost_table(growth)))
    print(f"\ntraining it: {starting_rate(options.source)}")
    return 0


def _nearest(options: argparse.Namespace) -> str:
    """The exact growth that is nearest to what the options ask for, in words; empty where none is found."""
    if options.plan or (options.config and (options.set or options.scale)):
        return ""
    try:
        found = nearest_exact(options.source, _target(options), options.method or "lossless")
    except GrowError:
        return ""
    return "nearest exact: " + ", ".join(f"{name}={value}" for name, value in found.items()) if found else ""


def _plan(options: argparse.Namespace) -> GrowthPlan:
    """The plan that the options name or describe. Raises GrowError where --exact is not kept."""
    growth = _any_plan(options)
    if growth.reasons and options.exact:
        asked = f"growing {growth.source.model_type} with method {growth.method!r} and --exact"
        raise GrowError(asked, "; ".join(growth.reasons), "another target, or no --exact for the closest growth")
    return growth


def _any_plan(options: argparse.Namespace) -> GrowthPlan:
    if options.table:
        known_families(options.table)
    ways = [bool(options.set or options.scale), bool(options.config), bool(options.plan)]
    if sum(ways) != 1:
        valid = "--set FIELD=VALUE and --scale PART=FACTOR, or --config FOLDER, or --plan FILE"
        raise GrowError("reading the target", "it is named " + ("twice" if any(ways) else "nowhere"), valid)
    if options.plan:
        if options.method or options.seed is not None:
            raise GrowError(f"--plan {options.plan}", "it says method and seed by itself", "--plan alone")
        return GrowthPlan.load(options.plan)
    return decide(options.source, _target(options), options.method or "lossless", seed=options.seed or 0)


def _target(options: argparse.Namespace) -> Target:
    """What --config, or --set and --scale, ask for."""
    if options.config:
        return str(options.config)
    target: dict[str, Any] = dict(_setting("--set", text) for text in options.set)
    if options.scale:
        model_class, skeleton = checkpoint.describe(options.source)
        factors = dict(_setting("--scale", text) for text in options.scale)
        target = scaled(skeleton.config, architecture_of(skeleton.config, model_class), factors) | target
    return target


def _setting(option: str, text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not (field and equals and value):
        example = "--set hidden_size=1024" if option == "--set" else "--scale width=2 depth=1.5"
        raise GrowError(f"{option} {text}", "it is not NAME=VALUE", f"such as {example}")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def verify(options: argparse.Namespace) -> int:
    if options.tensors is not None:
        if options.streaming:
            wrong = "--tensors runs no model, so there is nothing to stream"
            raise GrowError(f"growlib verify --streaming --tensors {options.tensors}", wrong, "one of the two")
        checked = verify_tensors(options.source, options.grown, options.tensors)
        print(checked)
        return 0 if checked.same else 1
    measured = compare(options.source, options.grown, streaming=options.streaming)
    print(measured)
    return {"exact": 0, "NOT exact": 1, "cannot tell": UNCHECKED}[measured.verdict]


def methods(options: argparse.Namespace) -> int:
    rows = operators.methods()
    if options.bibtex:
        print(bibtex(paper for row in rows for paper in row.papers))
        return 0
    shown = [("method", "width", "depth", "exact", "source")]
    shown += [(m.name, "yes" if m.width else "-", "yes" if m.depth else "-", m.exact, m.source) for m in rows]
    print(table(shown))
    return 0


def families(options: argparse.Namespace) -> int:
    names = known_families(options.table)
    if options.check:
        return _check(options.check)
    rows = [("family", "axes that grow")]
    for name in names:
        known = table_of(name)
        axes = [axis for axis, facts in known.axes.items() if facts.role]
        rows.append((name, ", ".join([*axes, *dict.fromkeys(stack.layers for stack in known.stacks)])))
    print(table(rows))
    return 0


def _check(name: str) -> int:
    if ":" in name:
        asked, valid = f"--check {name}", "module:Class, a PreTrainedModel with a config_class"
        own = imported(asked, name, valid)
        if not (isinstance(own, type) and issubclass(own, PreTrainedModel) and own.config_class):
            raise GrowError(asked, f"it is a {type(own).__name__}", valid)
        print("\n\n".join([str(infer(own.config_class(), own)), *_towers(own.config_class(), own)]))
        return 0
    if name not in CONFIG_MAPPING:
        close = difflib.get_close_matches(name, CONFIG_MAPPING.keys(), n=5) or ["llama"]
        raise GrowError(f"--check {name}", "transformers has no such model type", ", ".join(close))
    config = CONFIG_MAPPING[name]()
    print("\n\n".join([str(verified(config)), *_towers(config, None)]))
    return 0


def _towers(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> Iterator[str]:
    """The tables of what sees and hears in a model of several parts, or why there are none."""
    for part in towers(config):
        try:
            yield f"its {part}, {infer(config, model_class, part)}"
        except GrowError as error:
            yield f"its {part} does not grow: {error.wrong}"


def cache(options: argparse.Namespace) -> int:
    # Here, because it imports the Trainer, which the other commands do not need.
    from growlib.ki import AnswerFile, Server, cache_served, cache_teacher, verify_cache
    from growlib.ki.cache.data import padded, read_examples
    from growlib.ki.sources import load_teacher, tokenizer_at
    from growlib.ki.tasks import task_of

    words = options.arguments
    verifying, is_served = words[0] == "verify", words[0].startswith(("http://", "https://"))
    if len(words) not in ((2, 4) if verifying else (3,)):
        valid = "growlib cache TEACHER DATA FOLDER, growlib cache answers FILE FOLDER, or growlib cache verify FOLDER"
        raise GrowError("growlib cache " + " ".join(words), f"these are {len(words)} arguments", valid)
    if words[0] == "answers" or is_served:
        if options.store == "hidden":
            raise GrowError("growlib cache --store hidden", "servers do not give hidden states", "no --store")
        given = {name: getattr(options, name) for name in ("samples", "temperature", "seed")}
        if told := [f"--{name} {value}" for name, value in given.items() if value is not None]:
            wrong = "servers list their most probable tokens at temperature 1, and draw none"
            raise GrowError(f"growlib cache {' '.join(told)}", wrong, "--top-k alone")
        tokenizer = tokenizer_at(options.tokenizer) if options.tokenizer else None
        top_k = 16 if options.top_k is None else options.top_k
        server = Server(words[0], options.model or "", top_k) if is_served else None
        asked: Any = read_examples(words[1], tokenizer, options.length) if is_served else AnswerFile(words[1])
        return _told(
            cache_served(asked, words[2], server=server, top_k=top_k, vocab=options.vocab, tokenizer=tokenizer),
            words[2],
        )
    teacher, data = words[2:] or ("", "") if verifying else words[:2]
    tokenizer = tokenizer_at(teacher) if teacher else None
    dataset = read_examples(data, tokenizer, options.length) if data else None
    if verifying:
        measured = verify_cache(words[1], teacher or None, dataset, tokenizer=tokenizer, data_collator=padded)
        print(measured)
        return 0 if measured.sound else 1
    held_out = read_examples(options.held_out, tokenizer, options.length) if options.held_out else None
    model = load_teacher(teacher, None, None)
    task, rows = task_of(model), chain(dataset or (), held_out or ())
    if task != "causal" and any(row["labels"] is row["input_ids"] for row in rows):
        wrong = f"there are no labels, and for a {task} model the tokens are none"
        raise GrowError(f"growlib cache {' '.join(words)}", wrong, "a .jsonl with labels; growlib.ki.MaskedExamples")
    written = cache_teacher(
        model,
        dataset,
        words[2],
        store=options.store,
        top_k=options.top_k,
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
        tokenizer=tokenizer,
        data_collator=padded,
        held_out=held_out,
        batch_size=options.batch_size,
    )
    return _told(written, words[2])


def _told(written: Any, folder: str) -> int:
    each = written.bytes_on_disk / max(written.positions, 1)
    print(f"{folder}: {len(written):,} examples, {written.positions:,} positions of {each:.1f} bytes on disk")
    print(f"the teacher's loss there: {written.teacher_ce:.4f}")
    return 0
