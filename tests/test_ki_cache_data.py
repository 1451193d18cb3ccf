"""Examples from files, and the command line that caches a teacher for them."""

import json

import pytest
from ki_tiny import llama
from test_ki_cache import ROWS

from growlib.cli import main
from growlib.ki import TeacherCache


def test_the_command_line_writes_and_verifies(tmp_path, capsys):
    teacher = llama(1, hidden=8)
    teacher.save_pretrained(tmp_path / "teacher")
    rows = [{"input_ids": row["input_ids"][: 4 + i % 5].tolist()} for i, row in enumerate(ROWS)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = str(tmp_path / "cache")
    common = [str(tmp_path / "teacher"), str(data)]
    assert main(["cache", *common, folder, "--top-k", "8", "--samples", "4", "--held-out", str(data)]) == 0
    assert "40 examples" in capsys.readouterr().out
    assert main(["cache", "verify", folder, *common]) == 0
    assert "the teacher: KL" in capsys.readouterr().out
    assert main(["cache", "verify", folder]) == 0
    header = TeacherCache(folder).header
    assert header.held_out_ce == pytest.approx(TeacherCache(folder).teacher_ce, rel=1e-5)
    for wrong in (["cache", *common], ["cache", "verify"], ["cache", "verify", str(tmp_path)]):
        assert main(wrong) == 2
    (tmp_path / "text.txt").write_text("word1 word2")
    assert main(["cache", common[0], str(tmp_path / "text.txt"), str(tmp_path / "c2")]) == 2
    assert "tokenizer" in capsys.readouterr().err
