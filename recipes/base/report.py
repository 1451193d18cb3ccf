"""What a comparison of arms leaves: a table, results.json, curves.png, report.md."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from base.command import counted, say
from base.comparison import ARMS
from base.flops import flops_saved
from base.plots import draw_curves
from base.reference import NAME, against_the_better
from base.store import write_json, write_text

HEADER = ("arm", "held-out loss", "FLOPs", "of which teacher", "seconds", "FLOPs saved", "small model counted")
AGAINST_THE_BETTER = "saved against the better"


def results_of(
    setting: Mapping[str, Any], arms: Mapping[str, Any], reference: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of results.json; `reference` is None where it was not trained."""
    results = {"setting": dict(setting), "arms": dict(arms), "flops_saved": flops_saved(arms), "reference": reference}
    if reference:
        better = against_the_better(arms, reference) if "scratch" in arms else {}
        results["reference"] = {"name": NAME, **reference, **better}
    return results


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the comparison as text, the header first, then what was there before, the arms, and the reference."""
    setting, arms, reference = results["setting"], results["arms"], results["reference"]
    small, teachers = setting["small_model"], others_than_small(setting)
    known = [("(small)", small), *(("(teacher)", one) for one in teachers)]
    blank = ("", "", "") if reference else ("", "")
    rows: list[tuple[str, ...]] = [(*HEADER, AGAINST_THE_BETTER) if reference else HEADER]
    for name, one in known:
        rows.append((name, f"{one['eval_loss']:.3f}", *_cost(one["flops"], 0, one["seconds"]), *blank))
    users = [name for name in arms if name != "scratch" and not (name == "knowledge" and teachers)]
    counted = flops_saved(arms) | {n: flops_saved(arms, small["flops"] or 0.0)[n] for n in users}
    for name, result in arms.items():
        saved = blank
        if name != "scratch":
            unknown = name in users and small["flops"] is None
            saved = (_saved(results, name), _share(counted[name], unknown or "scratch" not in arms))
            saved = (*saved, _better(reference, name)) if reference else saved
        rows.append((name, *_row(result), *saved))
    if reference:
        rows.append((NAME, *_row(reference), *blank))
    return rows


def others_than_small(setting: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The teachers, where the small model is none of them."""
    return [one for one in setting["teachers"] if one["key"] != setting["small_model"]["key"]]


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    flops = result["flops"]
    cost = _cost(flops["student"] + flops["teacher"], flops["teacher"], result["seconds"])
    return f"{result['final_eval_loss']:.3f}", *cost


def _cost(flops: float | None, teacher: float, seconds: float | None) -> tuple[str, str, str]:
    shown = "unknown" if flops is None else f"{flops:.3g}"
    return shown, f"{teacher:.2g}" if teacher else "", "unknown" if seconds is None else f"{seconds:.0f}"


def _saved(results: Mapping[str, Any], arm: str) -> str:
    return _share(results["flops_saved"][arm], unknown="scratch" not in results["arms"])


def _better(reference: Mapping[str, Any], arm: str) -> str:
    saved = reference.get("flops_saved", {})
    return _share(saved.get(arm), unknown=not saved)


def _share(share: float | None, unknown: bool) -> str:
    if unknown:
        return "unknown"
    return "never reached" if share is None else f"{round(share, 2) + 0.0:.0%}"


def as_text(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    """The same rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def mean_and_deviation(values: list[float]) -> dict[str, float | None]:
    """Over seeds; one seed has no deviation."""
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None}


def shown(value: Mapping[str, float | None], form: str) -> str:
    """Mean ± deviation."""
    spread = value["deviation"]
    return form.format(value["mean"]) + ("" if spread is None else " ± " + form.format(spread))


def signed(value: Mapping[str, float | None]) -> str:
    """A difference with its sign, and its deviation without one."""
    spread = "" if value["deviation"] is None else f" ± {value['deviation']:.3f}"
    return f"{value['mean']:+.3f}{spread}"


def heading(title: str, results: Mapping[str, Any]) -> str:
    """The first lines of a report: what ran, when and on what, and its command."""
    setting, found = results["setting"], results["setting"]["environment"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers"))
    threads = counted(found["threads"], "thread", "threads")
    return f"""# {title}: {setting["model"]}, preset {setting["preset"]}

Date: {results["date"]}. {found["device"]}, {threads}, Python {found["python"]}, {versions}.

`{results["command"]}`"""


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    setting, arms, reference = results["setting"], results["arms"], results["reference"]
    said = [
        "FLOPs saved: 1 - (FLOPs, the teacher's included, at which the arm first reaches scratch's final "
        "held-out loss, linear between two evaluations) / (scratch's FLOPs). The column beside it adds the small "
        "model's own training to the arms that use it.",
        f"Start of the grown arms: method {setting['method']}, {setting['growth']}.",
        *(_of_teachers(setting) if any(ARMS[name].knowledge for name in arms) else []),
        *remarks_on_text(setting),
    ]
    if "scratch" not in arms:
        return [*said, "Arm scratch is missing, so nothing can be said about savings."]
    scratch_loss = arms["scratch"]["final_eval_loss"]
    said.append(verdict_on_small(scratch_loss, setting["small_model"]["eval_loss"]))
    if reference:
        return [*said, verdict_on_reference(scratch_loss, reference["final_eval_loss"])]
    return [*said, f"The reference, {NAME!r} for the FLOPs of the arms, is missing: --reference trains it."]


def _of_teachers(setting: Mapping[str, Any]) -> list[str]:
    knowledge = setting["knowledge"]
    names = ", ".join(f"{one['name']} (held-out loss {one['eval_loss']:.3f})" for one in setting["teachers"])
    averaged = " Their distributions are averaged." if len(setting["teachers"]) > 1 else ""
    return [
        f"Teacher: {names}.{averaged} Its weight: {knowledge['alpha']:g} at first, schedule {knowledge['schedule']}, "
        f"stop at {knowledge['stop_at']}."
    ]


def remarks_on_text(setting: Mapping[str, Any]) -> list[str]:
    """Where there was less text than the preset means."""
    used, asked, said = setting["text_used"], setting["text"], []
    distinct, seen = used["distinct_training_tokens"], setting["training"]["steps"] * setting["tokens_per_step"]
    if distinct < seen:
        warning = "" if asked["train_tokens"] else "WARNING: "
        said.append(f"{warning}{seen:,} tokens were trained on, {distinct:,} of them distinct: text came again.")
    if used["held_out_tokens"] <= asked["held_out_tokens"] - asked["sequence_length"]:
        said.append(
            f"WARNING: {used['held_out_tokens']:,} tokens were held out, {asked['held_out_tokens']:,} were asked: "
            "the held-out losses are coarser."
        )
    return said


def verdict_on_small(scratch_loss: float, small_loss: float) -> str:
    """Whether the arms were trained for long enough to mean anything."""
    if scratch_loss < small_loss:
        return f"Scratch ends at {scratch_loss:.3f}, below the small model's {small_loss:.3f}, as it must."
    return (
        f"THE COMPARISON MEANS NOTHING: scratch ends at {scratch_loss:.3f}, not below the small model's "
        f"{small_loss:.3f}. Who has the small model has no reason to train the larger one so briefly; "
        "train the arms for longer."
    )


def verdict_on_reference(scratch_loss: float, reference_loss: float) -> str:
    """Whether scratch is what its reader would do otherwise."""
    how = (
        f"{NAME!r} is the small model with a new schedule, for the FLOPs of the arm that gets most; it ends at "
        f"{reference_loss:.3f}"
    )
    what = f"The column {AGAINST_THE_BETTER!r} is that of FLOPs saved with the lower of the two instead of scratch."
    if scratch_loss <= reference_loss:
        return f"{how}, not below scratch's {scratch_loss:.3f}: scratch is what to beat. {what}"
    return f"SCRATCH IS NOT WHAT TO BEAT: it ends at {scratch_loss:.3f}. {how}. {what} Believe that one."


def show(folder: Path, name: str, rows: list[tuple[str, ...]], said: list[str]) -> None:
    """Print what a comparison left in NAME.json, NAME.png and NAME.md."""
    say("\n" + as_text(rows) + "\n")
    for remark in said:
        say(f"- {remark}")
    say(f"\nWritten: {folder}/{name}.json, {name}.png, {name}.md.")


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, curves.png and report.md into a folder."""
    write_json(folder / "results.json", results)
    setting, reference = results["setting"], results["reference"]
    named = results["arms"] | ({NAME: reference} if reference else {})
    small_loss = setting["small_model"]["eval_loss"]
    draw_curves(folder / "curves.png", {name: result["curve"] for name, result in named.items()}, small_loss)
    said = "\n".join(f"- {remark}" for remark in remarks(results))
    text = f"""# Growing {setting["model"]}: {", ".join(results["arms"])}

Preset {setting["preset"]}, seed {setting["seed"]}, {setting["training"]["steps"]} steps of \
{setting["tokens_per_step"]} tokens per arm, the same tokens in the same order; learning rates \
{", ".join(f"{arm} {rate:g}" for arm, rate in setting["learning_rate"].items())}.

{as_markdown(table(results))}

![held-out loss against FLOPs](curves.png)

{said}

All settings and all curves are in results.json.
"""
    write_text(folder / "report.md", text)
