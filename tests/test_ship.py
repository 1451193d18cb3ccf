"""What goes along with a grown model: the record through a training, the teacher's settings, the way to the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from tiny import tiny
from transformers import Trainer, TrainingArguments

import growlib
from growlib import GrowError, GrowthPlan, GrowthRecord, KIConfig, KITrainer
from growlib.cli import main

TARGET = {"hidden_size": 72}
ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4


def arguments(folder):
    return TrainingArguments(folder, max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)


def test_the_record_goes_along_with_each_checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "small")
    plan = growlib.expand_checkpoint(tmp_path / "small", tmp_path / "big", TARGET)
    card = (tmp_path / "big/README.md").read_text()
    big = growlib.expand(tmp_path / "small", plan)
    record = GrowthRecord(tmp_path / "big")
    trainer = Trainer(big, arguments(tmp_path / "out"), train_dataset=ROWS, callbacks=[record])
    trainer.train()
    trainer.save_model(tmp_path / "final")
    record.write(tmp_path / "final")
    for name in ("out/checkpoint-1", "out/checkpoint-2", "out", "final"):
        assert GrowthPlan.load(tmp_path / name) == plan
        assert (tmp_path / name / "README.md").read_text() == card
    (tmp_path / "final/README.md").write_text("mine")
    record.write(tmp_path / "final")
    assert (tmp_path / "final/README.md").read_text() == "mine"


def test_a_growth_in_memory_has_a_record_too(tmp_path):
    small = tiny("llama")
    small.save_pretrained(tmp_path / "small")
    plan = growlib.plan(small, TARGET, seed=3)
    GrowthRecord(plan, tmp_path / "small").write(tmp_path)
    assert "Grown from small" in (tmp_path / "README.md").read_text()
    assert GrowthPlan.load(tmp_path).seed == 3


@pytest.mark.parametrize("make", [lambda p: GrowthRecord(growlib.plan(tiny("llama"), TARGET)), GrowthRecord])
def test_a_record_of_nothing_is_refused(make, tmp_path):
    with pytest.raises(GrowError, match=r"source|no such file"):
        make(tmp_path)


def test_the_settings_of_the_teacher_are_saved(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "teacher")
    ki = KIConfig(teacher=str(tmp_path / "teacher"), stop_at=0.5, alpha=0.75)
    KITrainer(tiny("llama"), arguments(tmp_path / "out"), train_dataset=ROWS, ki=ki).train()
    saved = json.loads((tmp_path / "out/checkpoint-2/ki.json").read_text())
    assert saved["teacher"] == "teacher"  # its name, not its path
    assert (saved["schedule"], saved["stop_at"], saved["alpha"]) == ("linear", 0.5, 0.75)
    KITrainer(tiny("llama"), arguments(tmp_path / "plain"), train_dataset=ROWS, ki=None).train()
    assert not list((tmp_path / "plain").rglob("ki.json"))


def test_all_kinds_of_teachers_and_schedules_can_be_told():
    model = tiny("llama")
    for ki in (
        KIConfig(teacher=(model, model), weights=(0.25, 0.75), schedule=lambda progress: 1 - progress),
        KIConfig(teacher={"code": model, "prose": "a-hub/id"}, domain="kind"),
    ):
        assert set(json.loads(json.dumps(ki.described()))) == set(KIConfig.__dataclass_fields__)
    assert ki.described()["teacher"]["prose"] == "a-hub/id"


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub: it makes repositories and takes commits of small files."""

    files: dict
    refuses: set

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://{self.headers['Host']}/me/big"
        said = {"url": here}
        status = 403 if any(word in self.path for word in self.refuses) else 200
        if "preupload" in self.path:
            paths = [one["path"] for one in json.loads(body)["files"]]
            said = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "commit" in self.path and status == 200:
            rows = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line]
            self.files |= {row["path"]: base64.b64decode(row["content"]) for row in rows}
            said = {"commitUrl": f"{here}/commit/1", "commitOid": "1", "commitMessage": "Grown with growlib"}
        answer = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self):
        self.do_POST()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("OneHub", (Hub,), {"files": {}, "refuses": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    yield handler
    server.shutdown()
    server.server_close()


def test_the_result_goes_to_the_hub(hub, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "small")
    words = ["expand", str(tmp_path / "small"), str(tmp_path / "big"), "--set", "hidden_size=72"]
    assert main([*words, "--push-to-hub", "me/big"]) == 0
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "big").iterdir()}
    assert "/me/big/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(("refused", "is_written"), [("api", False), ("commit", True)])
def test_a_hub_that_refuses_costs_nothing(refused, is_written, hub, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "small")
    hub.refuses.add(refused)
    words = ["expand", str(tmp_path / "small"), str(tmp_path / "big"), "--set", "hidden_size=72"]
    assert main([*words, "--push-to-hub", "me/big"]) == 2
    assert (tmp_path / "big/model.safetensors").exists() == is_written
    said = capsys.readouterr().err
    assert "--push-to-hub me/big" in said
    assert ("hf upload" in said) == is_written


def test_a_name_that_is_none_is_refused_before_the_growth(hub, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "small")
    words = ["expand", str(tmp_path / "small"), str(tmp_path / "big"), "--set", "hidden_size=72"]
    assert main([*words, "--push-to-hub", "not a name/at all/"]) == 2
    assert not (tmp_path / "big").exists()
    assert "such as me/big" in capsys.readouterr().err
