import gc
import logging
import os

import pytest
import torch
from hypothesis import settings

# Tiny models are fastest on one thread; examples that build a model may take as long as they need.
torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton runs on the CPU, if it reads this before anything (tiny, too) imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("growlib", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("growlib")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Without `-n`, the whole suite runs in a process per core, two to eight, where pytest-xdist is installed."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")  # in no worker
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = min(max(os.cpu_count() or 1, 2), 8) * (not config.option.usepdb)
        config.option.dist = "loadfile"  # fixtures of a module are made once


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_stays():
    """Every Trainer collects garbage, and would look at each object of torch and transformers again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else nanobind calls it leaked


@pytest.fixture(autouse=True)
def _growlib_speaks():
    """A recipe that a test ran in this process has silenced growlib's warnings."""
    logging.getLogger("growlib").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which all four arms of the miniature preset are finished. It must stay as it is."""
    import ki_plus_growth

    folder = tmp_path_factory.mktemp("miniature")
    assert ki_plus_growth.main(["--preset", "miniature", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(tmp_path):
    """A tiny llama on disk."""
    from tiny import tiny

    tiny("llama").save_pretrained(tmp_path / "small")
    return tmp_path / "small"
