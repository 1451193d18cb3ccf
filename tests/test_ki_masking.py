"""The masks of `MaskedExamples` are those of the epoch, however the data are loaded."""

import pytest
import torch
from ki_tiny import VOCAB, arguments, bert, collate, examples

from growlib import KIConfig, KITrainer
from growlib.ki import MaskedExamples


class Watching(KITrainer):
    """Keeps the inputs of its steps."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen.append(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)


def epochs_seen(folder, resume=None, **options):
    """The epoch whose masks each step saw, of two steps an epoch."""
    masked = MaskedExamples([{"input_ids": row["input_ids"]} for row in examples(8)], 0, VOCAB, masks=3, share=0.4)
    trainer = Watching(
        model=bert(0),
        args=arguments(folder, max_steps=8, per_device_train_batch_size=4, save_steps=3, **options),
        train_dataset=masked,
        data_collator=collate,
        ki=KIConfig(teacher=bert(1), stop_at=1.0),
    )
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    of_epoch = {e: {tuple(masked.masked(i, e)["input_ids"].tolist()) for i in range(8)} for e in range(3)}
    return [
        next(e for e, rows in of_epoch.items() if set(map(tuple, batch.tolist())) <= rows) for batch in trainer.seen
    ]


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_each_epoch_has_its_masks(tmp_path, workers):
    assert epochs_seen(tmp_path, **workers) == [0, 0, 1, 1, 2, 2, 0, 0]


def test_a_resumed_training_goes_on_with_the_masks_of_its_epoch(tmp_path):
    epochs_seen(tmp_path, save_strategy="steps")
    assert epochs_seen(tmp_path, resume=str(tmp_path / "checkpoint-3")) == [1, 2, 2, 0, 0]


def test_wrapped_samplers_leave_the_epoch_to_the_trainer(tmp_path):
    """As with several processes, whose loaders do not tell the data."""
    masked = MaskedExamples([{"input_ids": torch.arange(9)}], 0, VOCAB)
    trainer = KITrainer(model=bert(0), args=arguments(tmp_path), train_dataset=masked, ki=KIConfig(teacher=bert(1)))
    trainer.state.epoch = 2.0
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert masked.epoch == 2
