"""Examples from files, and the command line that caches a teacher for them."""

import json

import numpy as np
import pytest
from ki_tiny import bert, llama
from test_ki_cache import ROWS, write
from test_ki_teacher import tokenizer

from growlib import GrowError
from growlib.cli import main
from growlib.ki import TeacherCache, read_examples
from growlib.ki.cache.data import padded

IDS = np.arange(12).reshape(3, 4)


@pytest.mark.parametrize("dtype", ["int64", "uint16"])
def test_an_array_is_read_a_row_at_a_time(tmp_path, dtype):
    np.save(tmp_path / "x.npy", IDS.astype(dtype))
    assert [row["labels"].tolist() for row in read_examples(tmp_path / "x.npy")] == IDS.tolist()


def test_lines_are_those_of_the_file_and_keep_what_a_model_reads(tmp_path):
    columns = ("token_type_ids", "position_ids", "attention_mask")
    first = {"input_ids": [5, 3], "labels": [-100, 3], "text": "a\u2028b", **{name: [1, 0] for name in columns}}
    lines = [json.dumps(first, ensure_ascii=False), "", json.dumps({**first, "input_ids": [4, 2]})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    rows = read_examples(tmp_path / "x.jsonl")
    assert [row["input_ids"] for row in rows] == [[5, 3], [4, 2]]
    batch = padded([*rows, {**{name: [1] for name in columns}, "input_ids": [7], "labels": [7]}])
    assert batch["input_ids"].tolist() == [[5, 3], [4, 2], [7, 0]]
    assert all(batch[name].tolist() == [[1, 0]] * 3 for name in columns)


def test_a_folder_is_of_text_whatever_its_name(tmp_path):
    (tmp_path / "x.npy").mkdir()
    (tmp_path / "x.npy" / "a.txt").write_text("word1")
    words = tokenizer(8)
    words.eos_token = "word0"
    assert len(read_examples(tmp_path / "x.npy", words, length=2)) == 1
    with pytest.raises(GrowError, match="length=1 has no token to predict"):
        read_examples(tmp_path / "x.npy", words, length=1)


def array(content, **options):
    def save(path):
        with path.open("wb") as file:
            np.save(file, content, **options)

    return save


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.npy", lambda path: path.write_bytes(b""), "not an array of numbers"),
        ("x.npy", lambda path: path.write_bytes(b"dear reader"), "not an array of numbers"),
        ("x.npy", array(np.array([{}]), allow_pickle=True), "not an array of numbers"),
        ("x.npy", array(IDS / 2), "float64"),
        ("x.npy", array(IDS[:, :0]), r"\(3, 0\)"),
        ("x.jsonl", lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
        ("x.jsonl", lambda path: path.write_text("\n\n"), "it is empty"),
        *(
            ("x.jsonl", lambda path, line=line: path.write_text('{"input_ids": [1]}\n' + line), "line 2")
            for line in ("{", "3", "{}", *(f'{{"input_ids": {x}}}' for x in ("[]", "[1.5]", "[[1]]", "[-1]", 1 << 31)))
        ),
    ],
)
def test_a_file_that_holds_no_examples_is_named(tmp_path, name, content, says):
    content(tmp_path / name)
    with pytest.raises(GrowError, match=says):
        read_examples(tmp_path / name)


def test_a_broken_tokenizer_beside_the_teacher_is_named(tmp_path):
    llama(1, hidden=8).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(GrowError, match="its tokenizer cannot be read"):
        write(tmp_path / "cache", tmp_path / "teacher")


def test_a_masked_model_needs_labels_of_its_own(tmp_path, capsys):
    bert(1, hidden=8).save_pretrained(tmp_path / "teacher")
    words = ["cache", str(tmp_path / "teacher"), str(tmp_path / "x.jsonl"), str(tmp_path / "cache")]
    for labels, code in (({}, 2), ({"labels": [-100, 3]}, 0)):
        (tmp_path / "x.jsonl").write_text(json.dumps({"input_ids": [1, 2], **labels}))
        assert main(words) == code
    assert "MaskedExamples" in capsys.readouterr().err


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
