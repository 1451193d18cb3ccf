import pytest
import torch
from hypothesis import settings

# Tiny models are fastest on one thread; examples that build a model may take as long as they need.
torch.set_num_threads(1)
settings.register_profile("growlib", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("growlib")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which all four arms of the miniature preset are finished. It must stay as it is."""
    import ki_plus_growth

    folder = tmp_path_factory.mktemp("miniature")
    assert ki_plus_growth.main(["--preset", "miniature", "--out", str(folder)]) == 0
    return folder
