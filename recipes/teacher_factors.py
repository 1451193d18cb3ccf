"""What makes a good teacher? One student, and teachers that differ in one thing each.

    python recipes/teacher_factors.py                       # 2 CPU cores: the demo preset's sizes, about 20 trainings
    python recipes/teacher_factors.py --preset miniature    # seconds, for CI; its numbers mean nothing

Width, depth, steps, size of its text, domain, and halves of the text that the student does or does not see (arXiv
2105.13880, sections 4.2 and 4.3, A.2, A.4). The student has the preset's target sizes and learns code. Expected number:
none is claimed; OUT/report.md says what came out.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import ki_plus_growth as recipe
from base.domains import code_and_prose
from base.knowledge import Lab
from base.setting import load_preset


def run(options: argparse.Namespace) -> None:
    """Train teachers and students, report."""
    setting = load_preset(options.preset)
    folder = options.out or Path("runs") / f"teacher-factors-{Path(options.preset).stem}"
    domains = code_and_prose(setting.text, folder)
    code, small, steps = domains["code"].train, setting.initial, setting.training.steps
    lab = Lab(setting, folder, domains["code"].tokenizer, {"code": domains["code"].held_out})
    half = len(code) // 2
    wide = dataclasses.replace(small, hidden=2 * small.hidden, heads=2 * small.heads, kv_heads=2 * small.kv_heads)
    deep = dataclasses.replace(small, layers=2 * small.layers)
    teachers = {
        "small": lab.learn("small", small, {"code": code}),
        "twice as wide": lab.learn("wide", wide, {"code": code}),
        "twice as deep": lab.learn("deep", deep, {"code": code}),
        "half the steps": lab.learn("short", small, {"code": code}, steps=max(steps // 2, 1)),
        "twice the steps": lab.learn("long", small, {"code": code}, steps=2 * steps),
        "1/4 of the text": lab.learn("quarter", small, {"code": code[: len(code) // 4]}),
        "1/16 of the text": lab.learn("sixteenth", small, {"code": code[: max(len(code) // 16, 1)]}),
        "prose": lab.learn("prose", small, {"prose": domains["prose"].train}),
        "half prose": lab.learn("mixed", small, {"prose": domains["prose"].train, "code": code[:half]}),
        "first half": lab.learn("first", small, {"code": code[:half]}),
        "second half": lab.learn("second", small, {"code": code[half:]}),
    }
    rows: list[tuple[str, ...]] = [("teacher", "its loss", "student's text", "student's loss")]
    results = {}
    of_students = {"all": code, "second half": code[half:]}
    for part, blocks in of_students.items():
        alone = lab.learn("student", setting.target, {"code": blocks})
        rows.append(("none", "", part, f"{alone.losses['code']:.4f}"))
        results[f"none, {part}"] = alone.losses["code"]
    for name, teacher in teachers.items():
        # Halves: the same student on text that its teacher has seen, and has not.
        part = "second half" if name.endswith(" half") and name != "half prose" else "all"
        student = lab.learn("taught", setting.target, {"code": of_students[part]}, teacher.path)
        rows.append((name, f"{teacher.losses['code']:.4f}", part, f"{student.losses['code']:.4f}"))
        results[f"{name}, {part}"] = student.losses["code"]
    lab.report("Factors of the teacher", rows, results)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    options = parse(arguments)
    return recipe.guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
