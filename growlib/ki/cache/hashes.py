"""What a cache is of, as hashes."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


def weights_hash(model: nn.Module) -> str:
    """Of the class, and of every tensor's name, dtype, shape and bytes; tied tensors once."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return f"{type(model).__name__} {digest.hexdigest()}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its (token, id) pairs."""
    pairs = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return hashlib.blake2b(pairs.encode(), digest_size=16).hexdigest()


def digests_hash(digests: Iterable[bytes]) -> str:
    """Of examples in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for one in digests:
        digest.update(one)
    return digest.hexdigest()


def spread(count: int, at_most: int = 256) -> list[int]:
    """Up to `at_most` of `count` numbers from 0, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist() if count else []
