"""Every causal class of transformers that is built at tiny size: the step before its head is that of whole logits."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from ki_tiny import arguments, collate, half, parameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from growlib import GrowError, KITrainer
from growlib.inference.tiny import tiny_config, tiny_model
from growlib.outputs import vocabulary

TYPES = sorted({config_class.model_type for config_class in MODEL_FOR_CAUSAL_LM_MAPPING})
SAMPLE = {"qwen3", "gemma2", "phi", "falcon", "mamba", "granitemoe"}  # the others are slow


class WithWholeLogits(KITrainer):
    def _ki_form(self, model, inputs):
        self._ki_loss_form = super()._ki_form(model, inputs)._replace(access=None)
        return self._ki_loss_form


def tiny(model_type):
    """A model without dropout; skips what cannot be built small."""
    try:
        config = CONFIG_MAPPING[model_type]()
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        config = tiny_config(config, model_class)
        for name, value in config.to_dict().items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(config, name, 0.0)
        return tiny_model(model_class, config)
    except (GrowError, ValueError, StrictDataclassError) as error:
        assert model_type not in SAMPLE
        pytest.skip(str(error)[:100])


@pytest.mark.filterwarnings("ignore")  # of the many classes
@pytest.mark.parametrize("model_type", [t if t in SAMPLE else pytest.param(t, marks=pytest.mark.slow) for t in TYPES])
def test_a_step_before_the_head_is_the_step_of_whole_logits(tmp_path, model_type):
    torch.manual_seed(0)
    student = tiny(model_type)
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, vocabulary(student), (4, 7))]
    stepped, has_access = [], []
    for kind in (KITrainer, WithWholeLogits):
        model = copy.deepcopy(student)
        trainer = kind(
            model=model, args=arguments(tmp_path, learning_rate=1e-2), train_dataset=rows, data_collator=collate,
            ki=half(teacher),
        )  # fmt: skip
        trainer.train()
        stepped.append(parameters(model))
        has_access.append(trainer._ki_loss_form.access is not None)
    assert not has_access[1]
    if not has_access[0]:
        assert model_type not in SAMPLE
        pytest.skip("no access to its head: whole logits")
    assert (stepped[0] - parameters(student)).abs().max() > 1e-5
    torch.testing.assert_close(stepped[0], stepped[1], rtol=1e-5, atol=1e-6)
