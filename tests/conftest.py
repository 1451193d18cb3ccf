import torch
from hypothesis import settings

# Tiny models are fastest on one thread; examples that build a model may take as long as they need.
torch.set_num_threads(1)
settings.register_profile("growlib", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("growlib")
