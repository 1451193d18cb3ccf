"""Several examples in one row: in the dataset that is cached, and in training."""

import pytest
import torch
from ki_tiny import arguments, bert, collate, examples, gpt2, llama, parameters
from test_ki_cache import HIDDEN, ROWS, STORES, content, write
from transformers import DataCollatorWithFlattening

from growlib import GrowError, KIConfig, KITrainer
from growlib.ki import verify_cache
from growlib.ki.cache.data import padded
from growlib.ki.cache.examples import examples_of
from growlib.ki.tasks import Positions


@STORES
def test_order_batches_padding_and_packing_may_change(tmp_path, store):
    """The same example has the same targets in whatever batch it stands."""
    short = [{name: x[: 5 + i % 4] for name, x in row.items()} for i, row in enumerate(examples(12, ignored=False))]
    cache = write(tmp_path / "cache", rows=short, data_collator=padded, **store)
    alone = [cache.read(padded([row]))[0] for row in short]
    order = [7, 2, 11, 0]
    together = cache.read(padded([short[i] for i in order]))[0]
    expected = torch.cat([content(alone[i]) for i in order])
    assert torch.equal(content(together), expected)
    left = padded([short[i] for i in order])
    mask = left["attention_mask"]
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        rows = [row[keep.bool()] for row, keep in zip(left[name], mask, strict=True)]
        left[name] = torch.stack([torch.nn.functional.pad(r, (mask.shape[1] - len(r), 0), value=fill) for r in rows])
    with pytest.raises(GrowError, match="padding on the right"):
        cache.read(left)  # the first token's label counts, and padding predicts it
    left["labels"][mask.flip(1).cumsum(1) == 1] = -100
    assert torch.equal(content(cache.read(left)[0]), expected)
    packed = DataCollatorWithFlattening()([{"input_ids": short[i]["input_ids"].tolist()} for i in order])
    assert packed["input_ids"].shape[0] == 1
    assert torch.equal(content(cache.read(dict(packed))[0]), expected)


@pytest.mark.parametrize("store", [{"samples": 0}, HIDDEN], ids=["probabilities", "hidden"])
def test_a_packed_dataset_has_the_targets_of_its_examples(tmp_path, store):
    """The records are those of the examples alone."""
    alone, pairs = write(tmp_path / "alone", **store), in_pairs()
    packed = write(tmp_path / "packed", rows=pairs, **store)
    assert len(packed) == 20
    assert packed.positions == alone.positions
    verified = verify_cache(packed.path, llama(1, hidden=8), pairs, data_collator=collate)
    assert verified.sound
    assert store is HIDDEN or verified.identical > 0.9  # states have no steps that hide rounding
    there, here = (cache.read(collate(ROWS))[0] for cache in (packed, alone))
    if store is not HIDDEN:
        assert torch.equal(there.ids, here.ids)
    torch.testing.assert_close(content(there), content(here), atol=1e-4, rtol=0)


def in_pairs(rows=ROWS):
    """Two examples in each row, as trl packs them."""
    return [
        {
            "input_ids": torch.cat([one["input_ids"], two["input_ids"]]),
            "labels": torch.cat([one["labels"], torch.tensor([-100]), two["labels"][1:]]),
            "position_ids": torch.arange(10).repeat(2),
        }
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]


@pytest.mark.parametrize(("maker", "mask"), [(llama, True), (gpt2, True), (bert, False)])
def test_rows_whose_examples_the_teacher_does_not_take_apart_are_refused(tmp_path, maker, mask):
    """It would say of the second example what it says after the first."""
    rows = [{**row, **({"attention_mask": torch.ones(20)} if mask else {})} for row in in_pairs()]
    with pytest.raises(GrowError, match="packs several examples"):
        write(tmp_path / "cache", maker(1), rows)
    assert not list((tmp_path / "cache").glob("shard*"))


def test_a_decoders_inputs_that_are_its_labels_shifted_change_no_digest():
    labels = torch.tensor([[5, 3, 8, -100], [7, 2, -100, -100]])
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": labels}
    positions = Positions.of(batch, "seq2seq")
    plain = examples_of(batch, "seq2seq", positions)
    shifted = torch.tensor([[0, 5, 3, 8], [0, 7, 2, 0]])
    for token, second_is_same in ((7, True), (6, False)):
        shifted[1, 1] = token
        others = examples_of({**batch, "decoder_input_ids": shifted}, "seq2seq", positions)
        same = [one.digest == other.digest for one, other in zip(plain, others, strict=True)]
        assert same == [True, second_is_same]


@pytest.mark.parametrize("source", ["probabilities", "hidden", "online"])
def test_packed_training_takes_the_step_of_padded_training(tmp_path, source):
    """Examples of several lengths in one row, from a cache that was written without packing."""
    rows = [{name: x[: 4 + i % 4].tolist() for name, x in row.items()} for i, row in enumerate(examples(8))]
    teacher = llama(1, hidden=8)
    write(tmp_path / "cache", teacher, rows, data_collator=padded, **(HIDDEN if source == "hidden" else {}))
    ki = KIConfig(teacher=teacher if source == "online" else tmp_path / "cache", schedule="constant", stop_at=None)
    steps = []
    for collator in (padded, DataCollatorWithFlattening()):
        student = llama(0)
        trainer = KITrainer(model=student, args=arguments(tmp_path), train_dataset=rows, data_collator=collator, ki=ki)
        trainer.train()
        steps.append(parameters(student))
    assert (steps[0] - parameters(llama(0))).abs().max() > 1e-3
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
