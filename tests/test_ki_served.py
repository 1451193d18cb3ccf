"""Teachers that somebody serves: a stand-in speaks as vLLM and SGLang do, and a real tiny model stands behind it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainingArguments

from growlib import GrowError, KIConfig, KITrainer
from growlib.cli import main
from growlib.ki import AnswerFile, Server, Targets, cache_served
from growlib.ki.cache import served

TOP_K = 4
TEACHER = tiny("llama", seed=1)
VOCAB = TEACHER.config.vocab_size
ROWS = torch.randint(VOCAB, (6, 9), generator=torch.Generator().manual_seed(0)).tolist()


def spoken(ids, form, names=lambda token: f"t{token}"):
    """What a server of that kind answers."""
    with torch.no_grad():
        logprobs = TEACHER(torch.tensor([ids])).logits[0].log_softmax(-1)
    values, tokens = (part[:-1].tolist() for part in logprobs.topk(TOP_K))
    rows = [list(zip(v, t, strict=True)) for v, t in zip(values, tokens, strict=True)]
    own = [(logprobs[place, token].item(), token) for place, token in enumerate(ids[1:])]
    if form == "vllm":
        listed = [{str(t): {"logprob": v, "decoded_token": names(t)} for v, t in [one, *row]}
                  for one, row in zip(own, rows, strict=True)]  # fmt: skip
        return {"choices": [{"text": "", "prompt_logprobs": [None, *listed]}]}
    texts = [[[v, t, names(t)] for v, t in row] for row in rows]
    mine = [[v, t, names(t)] for v, t in own]
    return {"meta_info": {"input_token_logprobs": [[None, ids[0], ""], *mine], "input_top_logprobs": [None, *texts]}}


class Stand(BaseHTTPRequestHandler):
    seen: list
    fails: list

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body, self.headers.get("Authorization")))
        form = "sglang" if self.path.endswith("/generate") else "vllm"
        status = self.fails.pop() if self.fails else 200
        answer = json.dumps(spoken(body["prompt" if form == "vllm" else "input_ids"], form)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def stand(monkeypatch):
    handler = type("OneStand", (Stand,), {"seen": [], "fails": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(served, "PAUSE", 0.0)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def examples():
    return [{"input_ids": row, "labels": row} for row in ROWS]


def check(cache, tolerance=2e-3):
    """Against the model that was behind the server."""
    batch = {"input_ids": torch.tensor(ROWS), "labels": torch.tensor(ROWS)}
    targets, ce_2 = cache.read(batch)
    with torch.no_grad():
        logits = TEACHER(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = Targets.top_k(logits, TOP_K)
    torch.testing.assert_close(targets.ids, expected.ids)
    torch.testing.assert_close(targets.logprobs, expected.logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(targets.tail.exp(), expected.tail.exp(), atol=tolerance, rtol=0)
    ce = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(ce_2, torch.tensor([ce.item(), logits.shape[0]]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("address", ["/v1", "/generate"])
def test_a_server_is_asked(address, stand, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = Server(stand.url + address, "teacher", TOP_K)
    check(cache_served(examples(), tmp_path / "cache", server=server, top_k=TOP_K, vocab=VOCAB, shard_examples=4))
    assert len(stand.seen) == len(ROWS)  # each prompt once
    path, body, key = stand.seen[0]
    assert path == ("/generate" if address == "/generate" else "/v1/completions")
    assert key == "Bearer secret"
    assert body.get("prompt_logprobs", body.get("top_logprobs_num")) == TOP_K


@pytest.mark.parametrize("form", ["vllm", "vllm-choice", "sglang"])
def test_answers_from_a_file(form, tmp_path):
    lines = []
    for row in ROWS:
        answer = spoken(row, form.removesuffix("-choice"))
        if form == "vllm-choice":
            answer = {"prompt_token_ids": row, **answer["choices"][0]}
        lines.append(json.dumps({"input_ids": row, **answer} if form != "vllm-choice" else answer))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    check(cache_served(AnswerFile(tmp_path / "answers.jsonl"), tmp_path / "cache", top_k=TOP_K, vocab=VOCAB))


MAP = "map"


@pytest.mark.parametrize("form", ["vllm", "sglang", "struct", MAP])
def test_answers_from_a_parquet_file(form, tmp_path):
    """As JSON texts, as pandas and datasets nest dicts (a struct of every id), and as a map."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [spoken(row, "sglang" if form == "sglang" else "vllm") for row in ROWS]
    if form == "sglang":
        columns = {"input_ids": ROWS, "labels": ROWS, "meta_info": [json.dumps(row["meta_info"]) for row in rows]}
    else:
        answers = [row["choices"][0]["prompt_logprobs"] for row in rows]
        told = [json.dumps(one) for one in answers] if form == "vllm" else answers
        if form == MAP:
            kind = pa.map_(pa.string(), pa.struct({"logprob": pa.float64(), "decoded_token": pa.string()}))
            pairs = [[None if one is None else list(one.items()) for one in answer] for answer in answers]
            told = pa.array(pairs, pa.list_(kind))
        columns = {"prompt_token_ids": ROWS, "prompt_logprobs": told}
    parquet.write_table(pa.table(columns), tmp_path / "answers.parquet")
    check(cache_served(AnswerFile(tmp_path / "answers.parquet"), tmp_path / "cache", top_k=TOP_K, vocab=VOCAB))


def test_what_is_no_parquet_is_refused(tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "answers.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(GrowError, match="no whole Parquet file"):
        cache_served(AnswerFile(path), tmp_path / "cache", top_k=TOP_K, vocab=VOCAB)
    parquet.write_table(pa.table({"prompt_logprobs": ["[]"]}), path)
    with pytest.raises(GrowError, match=r"row 1: KeyError"):
        cache_served(AnswerFile(path), tmp_path / "cache", top_k=TOP_K, vocab=VOCAB)
    monkeypatch.setattr(served, "has_pyarrow", lambda: False)
    with pytest.raises(GrowError, match="needs pyarrow, which is not installed"):
        AnswerFile(path)


def test_a_student_learns_from_what_was_served(stand, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
    words = ["cache", stand.url + "/v1", str(data), str(tmp_path / "cache"), "--model", "teacher"]
    assert main([*words, "--top-k", str(TOP_K), "--vocab", str(VOCAB)]) == 0
    assert f"{len(ROWS)} examples, {8 * len(ROWS)} positions" in capsys.readouterr().out
    settings = TrainingArguments(tmp_path / "out", max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
    ki = KIConfig(teacher=tmp_path / "cache")
    trainer = KITrainer(tiny("llama", seed=2), settings, train_dataset=examples(), ki=ki)
    trainer.train()
    assert trainer.state.log_history[0]["ki/kd"] > 0


@pytest.mark.parametrize("option", ["--samples", "--temperature", "--seed"])
def test_what_a_server_cannot_do_is_refused(option, tmp_path, capsys):
    for first in (["http://nowhere/v1", "data.jsonl"], ["answers", "answers.jsonl"]):
        assert main(["cache", *first, str(tmp_path / "cache"), option, "2"]) == 2
        message = capsys.readouterr().err
        assert f"{option} 2" in message
        assert "--top-k alone" in message


def test_a_busy_server_is_asked_again_and_a_call_goes_on_where_it_was(stand, tmp_path):
    server = Server(stand.url + "/v1", "teacher", TOP_K)
    call = {"server": server, "top_k": TOP_K, "vocab": VOCAB, "shard_examples": 2}
    stand.fails += [503, 429]
    cache_served(examples()[:2], tmp_path / "one", **call)
    assert len(stand.seen) == 4  # two prompts, two refusals
    stand.fails += [400]
    with pytest.raises(GrowError, match=r"asking the server .*400.* the same call continues"):
        cache_served(examples(), tmp_path / "cache", **call)
    cached = len(list((tmp_path / "cache").glob("shard-*")))
    stand.seen.clear()
    check(cache_served(examples(), tmp_path / "cache", **call))
    assert len(stand.seen) == len(ROWS) - 2 * cached


def words(names):
    backend = Tokenizer(WordLevel({name: token for token, name in enumerate(names)}, unk_token=names[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=names[0])


def test_another_tokenizer_is_refused(stand, tmp_path):
    server = Server(stand.url + "/v1", "teacher", TOP_K)
    right, other = words([f"t{n}" for n in range(VOCAB)]), words([f"t{n + 1}" for n in range(VOCAB)])
    call = {"server": server, "top_k": TOP_K}
    check(cache_served(examples(), tmp_path / "right", tokenizer=right, **call))
    with pytest.raises(GrowError, match=r"have other texts: id \d+ is 't\d+' for the server, 't\d+' for the tokenizer"):
        cache_served(examples(), tmp_path / "other", tokenizer=other, **call)


def hurt(change):
    answer = spoken(ROWS[0], "vllm")["choices"][0]
    change(answer["prompt_logprobs"])
    return json.dumps({"input_ids": ROWS[0], **answer})


def scaled(rows):
    """Logits instead of log-probabilities."""
    for row in rows[1:]:
        for one in row.values():
            one["logprob"] += 3.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (hurt(lambda rows: rows.pop()), "8 distributions for 9|7 distributions for 9"),
        (hurt(lambda rows: rows[3].pop(str(ROWS[0][3]))), "token 3 of the prompt"),
        (hurt(scaled), "probabilities sum to"),
        (hurt(lambda rows: rows[1].update({"99999": {"logprob": -9.0}})), "id 99999 is not below"),
        (hurt(lambda rows: [rows[2].pop(t) for t in list(rows[2]) if t != str(ROWS[0][2])]), "top_k=4 of them"),
        (json.dumps({"input_ids": ROWS[0], "prompt_logprobs": 5}), "holds no answer"),
        (json.dumps({"input_ids": ROWS[0], "meta_info": {}}), "holds no answer"),
        (json.dumps({"prompt_logprobs": []}), "KeyError"),
        ("{", "JSONDecodeError"),
    ],
)
def test_what_is_no_answer_is_refused(line, said, tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"input_ids": ROWS[1], **spoken(ROWS[1], "vllm")}) + "\n" + line)
    with pytest.raises(GrowError, match=said):
        cache_served(AnswerFile(tmp_path / "answers.jsonl"), tmp_path / "cache", top_k=TOP_K, vocab=VOCAB)
    assert not list(tmp_path.glob("cache/shard-*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vocab": VOCAB}, "there are examples and no server"),
        ({"server": Server("http://localhost:1", "m", 2), "vocab": VOCAB}, "the server is asked for 2"),
        ({"server": Server("http://localhost:1", "m", TOP_K)}, "how many token ids"),
        ({"server": Server("http://localhost:1", "m", TOP_K), "vocab": VOCAB}, "asking the server"),
    ],
)
def test_a_request_that_cannot_be_is_refused(given, said, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "PAUSE", 0.0)
    with pytest.raises(GrowError, match=said):
        cache_served(examples(), tmp_path / "cache", top_k=TOP_K, **given)
    with pytest.raises(GrowError, match="no such file"):
        AnswerFile(tmp_path / "nothing.jsonl")
