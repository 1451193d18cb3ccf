"""A teacher's folder whose files hold anything: it loads, or only GrowError comes out."""

import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ki_tiny import llama
from test_ki_sources import saved, write

from growlib import GrowError
from growlib.ki.sources import load_teacher, tokenizer_at

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
# Not sizes of 2^40, which are a question of the machine's memory: a row of its own asks for them.
CONFIG = llama(1, hidden=8).config.to_dict()
FIELDS = sorted({*CONFIG, "quantization_config", "auto_map", "id2label"})
ODD = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([1.5, float("nan"), "", "x", [], {}, [1], {"a": 1}])
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("known") / "teacher")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=2))
def test_a_config_of_odd_fields_loads_or_is_refused(known, tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(known, folder, dirs_exist_ok=True)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))
    with suppress(GrowError):
        assert write(folder, folder / "cache").positions == 59


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=JSON.map(json.dumps) | st.text(max_size=20) | st.just("[" * 9999))
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"])
@example(content="{}")
def test_a_file_of_any_content_loads_or_is_refused(known, tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(known, folder, dirs_exist_ok=True)
    if name == "adapter_config.json":
        (folder / "config.json").unlink()
    (folder / name).write_text(content, encoding="utf-8", errors="replace")
    for load in (lambda: load_teacher(folder, "causal", None), lambda: tokenizer_at(str(folder))):
        with suppress(GrowError):
            load()
