"""A position's targets as bytes of a fixed width, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlib import GrowError
from growlib.ki import Targets
from growlib.ki.cache.records import RecordFormat
from growlib.ki.cache.states import DTYPES, StateFormat


@pytest.mark.parametrize(
    ("vocab", "options", "size"),
    [
        (50_257, {"top_k": 16, "samples": 12}, 92),
        (151_936, {"top_k": 16, "samples": 12}, 104),
        (1 << 20, {"top_k": 16, "samples": 12}, 104),
        (262_400, {"top_k": 4, "samples": 6}, 38),
        (151_936, {"top_k": 50, "samples": 0}, 202),
    ],
)
def test_a_record_has_the_promised_size(vocab, options, size):
    assert RecordFormat(vocab, temperature=1.0, **options).bytes_per_position == size


@given(
    vocab=st.sampled_from([3, 1000, 1 << 16, (1 << 16) + 1, (1 << 18) + 7, 1 << 22]),
    top_k=st.integers(0, 3),
    samples=st.integers(0, 4),
    positions=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_records_keep_ids_exactly_and_probabilities_to_their_step(vocab, top_k, samples, positions, seed):
    if top_k + samples == 0:
        return
    record_format = RecordFormat(vocab, top_k, samples, 1.0)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (positions, top_k + samples), generator=generator)
    ids[:1] = vocab - 1
    tail = -8 * torch.rand(positions, generator=generator)
    logprobs = -24 * torch.rand(positions, top_k + samples, generator=generator)
    logprobs[:, top_k:] = (tail - torch.tensor(float(max(samples, 1))).log())[:, None]
    entropy = 11 * torch.rand(positions, generator=generator) if samples else None
    targets = Targets(logprobs, vocab, ids, tail, entropy, "sampled" if samples else "bucket", 1.0, samples)
    records = record_format.encode(targets)
    assert records.shape == (positions, record_format.bytes_per_position)
    back = record_format.decode(records)
    assert torch.equal(back.ids, ids)
    step = 24 / record_format.steps
    torch.testing.assert_close(back.logprobs[:, :top_k], logprobs[:, :top_k], rtol=0, atol=0.51 * step + 4e-6)
    torch.testing.assert_close(back.logprobs[:, top_k:], logprobs[:, top_k:], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(back.tail, tail, rtol=1e-3, atol=1e-6)
    assert (back.treatment, back.draws, back.vocab) == (targets.treatment, samples, vocab)
    if samples:
        torch.testing.assert_close(back.entropy, entropy, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("vocab", [2, 32, 128, 1 << 18])
def test_the_lowest_log_probabilities_are_lowest_and_leave_the_id_alone(vocab):
    logprobs = torch.tensor([[-23.999999, -24.0, -30.0, -torch.inf]]).T
    record_format, ids = RecordFormat(vocab, 1, 0, 1.0), torch.tensor([[0, 1, 0, vocab - 2]]).T
    back = record_format.decode(record_format.encode(Targets(logprobs, vocab, ids, torch.zeros(4), None, "bucket")))
    assert torch.equal(back.ids, ids)
    torch.testing.assert_close(back.logprobs, torch.full((4, 1), -24.0), rtol=1e-3, atol=0)


def test_more_than_22_bits_of_ids_are_refused():
    with pytest.raises(GrowError, match="at most 4194304 ids"):
        RecordFormat((1 << 22) + 1, 4, 0, 1.0)


def test_stored_states_that_are_no_numbers_are_refused():
    for dtype in DTYPES:
        form = StateFormat(32, 8, dtype)
        with pytest.raises(GrowError, match="hidden states that are no numbers"):
            form.decode(np.full((2, form.bytes_per_position), 255, np.uint8))
