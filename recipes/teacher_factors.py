"""What makes a good teacher? One student, and teachers that differ in one thing each.

    python recipes/teacher_factors.py --seeds 3             # 2 CPU cores: the demo preset's sizes, 24 trainings a seed
    python recipes/teacher_factors.py --preset miniature    # seconds, for CI; its numbers mean nothing

Width, depth, steps, size of its text, domain, and halves of the text that the student does or does not see (arXiv
2105.13880, sections 4.2 and 4.3, A.2, A.4). The student has the preset's target sizes and learns code. Time: 32 minutes
a seed on one busy core. Expected result: docs/results/knowledge.md.
"""

import dataclasses
import sys
from pathlib import Path

from base import study
from base.domains import code_and_prose
from base.lab import Lab
from base.setting import Setting


def factors(setting: Setting, folder: Path) -> study.Rows:
    """Held-out loss of each teacher and of its student."""
    domains = code_and_prose(setting.text, folder)
    prose, code = domains["prose"].train, domains["code"].train
    small, steps = setting.initial, setting.training.steps
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
        "prose": lab.learn("prose", small, {"prose": prose}),
        "half prose": lab.learn("mixed", small, {"prose": prose, "code": code[:half]}),
        "first half": lab.learn("first", small, {"code": code[:half]}),
        "second half": lab.learn("second", small, {"code": code[half:]}),
    }
    of_students = {"all": code, "second half": code[half:]}
    # Halves: the same student on text that its teacher has not seen, and has.
    text_of = {name: "second half" if name in ("first half", "second half") else "all" for name in teachers}
    alone = {
        part: lab.learn("student", setting.target, {"code": blocks}).losses["code"]
        for part, blocks in of_students.items()
    }
    rows = {f"none; student on {part}": {"student": loss} for part, loss in alone.items()}
    for name, teacher in teachers.items():
        part = text_of[name]
        student = lab.learn("taught", setting.target, {"code": of_students[part]}, teacher.model).losses["code"]
        gain = alone[part] - student
        rows[f"{name}; student on {part}"] = {"student": student, "gain": gain, "teacher": teacher.losses["code"]}
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the exit code."""
    return study.main(__doc__, "Teacher factors", factors, arguments)


if __name__ == "__main__":
    sys.exit(main())
