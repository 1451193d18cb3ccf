"""Where a grown model comes from, kept beside every checkpoint of its training."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from growlib.checkpoint.model_card import CARD, model_card
from growlib.errors import GrowError
from growlib.folders import folder_of
from growlib.growth_plan import GrowthPlan


class GrowthRecord(TrainerCallback):
    """A Trainer callback: the plan and the model card of a growth go along with what the Trainer saves.

    Each `checkpoint-N` and, at the end of the training, `output_dir` get `growlib.json` and `README.md`. What stands
    there already stays. For a folder that you save yourself (`trainer.save_model(folder)`) call `write(folder)`.

    Args:
        grown: the folder of the grown checkpoint, whose plan and card are taken; or the plan of a growth in memory.
        source: the small model, where `grown` is a plan: a folder or a hub id.

    Raises:
        GrowError: there is no plan in the folder, or a plan comes without a source.
    """

    def __init__(self, grown: GrowthPlan | str | Path, source: str | Path | None = None) -> None:
        if isinstance(grown, GrowthPlan):
            if source is None:
                wrong = "a plan does not say where its source is"
                raise GrowError("GrowthRecord(plan)", wrong, "GrowthRecord(plan, source), or the folder that was grown")
            self.plan, self.card = grown, model_card(source, folder_of(source, weights=False), grown)
            return
        folder = Path(grown)
        self.plan = GrowthPlan.load(folder)
        card = folder / CARD
        self.card = card.read_text(encoding="utf-8") if card.is_file() else ""

    def write(self, folder: str | Path) -> None:
        """Write the plan and the card into a folder that exists."""
        folder = Path(folder)
        self.plan.save(folder)
        if self.card and not (folder / CARD).exists():
            (folder / CARD).write_text(self.card, encoding="utf-8")

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint of the training was written."""
        if state.is_world_process_zero:
            self.write(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """The training has ended; its folder is where the Trainer saves the model by default."""
        if state.is_world_process_zero and Path(str(args.output_dir)).is_dir():
            self.write(str(args.output_dir))
