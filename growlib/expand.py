"""The entry points of the weights half: plan a growth, and carry it out."""

import torch
from transformers import PreTrainedModel

from growlib import checkpoint, families, methods, target, upcycle
from growlib.apply import apply
from growlib.checkpoint import Source, logger
from growlib.errors import GrowError
from growlib.methods import Method
from growlib.plan import GrowthPlan, layer_map, make_plan
from growlib.target import Target


def plan(small_ckpt: Source, target_config: Target, method: str | Method = "lossless", *, seed: int = 0) -> GrowthPlan:
    """Decide a growth without running it; the arguments are those of `expand`.

    The plan says whether the growth is exact (`.exact`), why not (`.reasons`), and where each tensor comes from
    (`str(plan)`, `.to_dict()`).
    """
    return plan_of(checkpoint.load(small_ckpt), target_config, method, seed)


def plan_of(model: PreTrainedModel, target_config: Target, method: str | Method, seed: int) -> GrowthPlan:
    """The same for a model in memory."""
    family = families.family_of(model.config, type(model))
    chosen = methods.method(method)
    layers = chosen if chosen.depth else methods.method("lossless")  # so that make_plan can say that depth is missing
    config = target.resolve(model.config, target_config, family, lambda old, new: layer_map(layers, old, new).source)
    other = config.model_type != model.config.model_type
    mixture = upcycle.decide(model, config, family, chosen, seed) if other else None
    wide = checkpoint.skeleton_of(type(model), mixture.dense if mixture else config)
    growth = make_plan(family, chosen, seed, checkpoint.skeleton(model), wide)
    if mixture is None:
        if chosen.resets:
            raise GrowError(f"method {chosen.name!r}", "the target has no experts to make", "the config of a mixture")
        return growth
    return upcycle.joined(growth, mixture, checkpoint.skeleton_of(checkpoint.class_like(model, config), config))


def expand(
    small_ckpt: Source,
    target_config: Target,
    method: str | Method = "lossless",
    *,
    seed: int = 0,
    exact: bool | None = None,
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """Grow a checkpoint into a larger model of the same class, or a dense one into a mixture of experts.

    Args:
        small_ckpt: a model, a folder or a hub id. It is not modified.
        target_config: a config, a folder, or a dict of overrides of the source's config. Sizes that a dict does
            not name stay, save those that the architecture ties to a named one (on GPT-2 and BERT a wider model
            gets more heads of the same head_dim). The config of a mixture of experts makes each feed-forward layer
            of a dense model its experts: LlamaForCausalLM to a MixtralConfig, Qwen3 to a Qwen3MoeConfig.
        method: a name of `growlib.methods()`, or WIDTH+DEPTH.
        seed: decides every free value, bit for bit.
        exact: True refuses a growth that does not preserve the function. None (the default) builds the closest
            growth and logs the reasons; False builds it and logs nothing.
        dtype: of the result, such as torch.bfloat16 or "bfloat16"; the source's by default. The arithmetic is
            float32 or wider.

    Returns:
        A model of the source's class, or of the mixture's for the same task, in eval mode, on the source's device.

    Raises:
        GrowError: what was asked, what is wrong, and what would be valid.
    """
    wanted = dtype_of(dtype)
    if methods.method(method).learned:
        wrong = "its map is learned on text"
        raise GrowError(
            f"expanding with method {methods.method(method).name!r}", wrong, "growlib.learn(small, target, batches)"
        )
    model = checkpoint.load(small_ckpt)
    growth = plan_of(model, target_config, method, seed)
    if growth.reasons and exact:
        asked = f"growing {model.config.model_type} with method {growth.method!r} and exact=True"
        raise GrowError(asked, "; ".join(growth.reasons), "another target, or exact=None for the closest growth")
    if growth.reasons and exact is None:
        logger.warning("this growth does not preserve the function: %s", "; ".join(growth.reasons))
    model_class = checkpoint.class_like(model, growth.config)
    grown = checkpoint.empty_model(model, growth.config, wanted or model.dtype, model_class)
    tensors = apply(growth, model.state_dict())
    checkpoint.fill(grown, upcycle.mix(growth.mixture, dict(tensors)) if growth.mixture else tensors)
    return grown


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by its name or as it is. Raises GrowError for anything else."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise GrowError(f"a result of dtype {dtype!r}", "it is no floating-point dtype", "such as torch.bfloat16")
    return wanted
