"""The entry points of the weights half: plan a growth, and carry it out."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from growlib import config, operators, upcycling
from growlib.apply import apply
from growlib.architectures.schema import Architecture, Growth
from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.loading import Source, dtype_of, logger
from growlib.config import Target
from growlib.costs import bytes_of
from growlib.errors import GrowError
from growlib.growth_plan import GrowthPlan, Skeleton
from growlib.inference import architecture_of, fields, why_not
from growlib.limits import refuse_impossible, refuse_without_memory
from growlib.operators import Method
from growlib.parts import flat, flattened, last_word
from growlib.planner import Request, layer_map, make_plan


def plan(
    small_ckpt: Source | PreTrainedConfig, target_config: Target, method: str | Method = "lossless", *, seed: int = 0
) -> GrowthPlan:
    """Decide a growth without running it; the arguments are those of `expand`.

    Weights are not read: a config, a model on the meta device, or a folder with a config.json alone will do.

    The plan says whether the growth is exact (`.exact`), why not (`.reasons`), and where each tensor comes from
    (`str(plan)`, `.to_dict()`). `expand(small_ckpt, plan)` carries it out, `.save(path)` keeps it.
    """
    return plan_of(*checkpoint.describe(small_ckpt), target_config, method, seed)


def _dtype_in(target_config: Target) -> str | None:
    """The dtype that a dict of overrides names for the result."""
    named = target_config.get("dtype", target_config.get("torch_dtype")) if isinstance(target_config, Mapping) else None
    return None if named is None else str(dtype_of(named)).removeprefix("torch.")


def plan_of(
    model_class: type[PreTrainedModel], source: Skeleton, target_config: Target, method: str | Method, seed: int
) -> GrowthPlan:
    """The same for a class and a skeleton."""
    chosen = operators.method(method)
    effect_of = partial(fields.effect_of, model_class, source.config)
    if isinstance(target_config, Mapping):
        target_config = flattened(source.config, target_config)
    table = table_for(source.config, model_class, target_config)
    if isinstance(target_config, PreTrainedConfig | Mapping):
        refuse_impossible(source, table, target_config)
    target = target_of(source.config, table, target_config, chosen)
    if target.model_type == source.config.model_type:
        if chosen.reset:
            raise GrowError(f"method {chosen.name!r}", "the target has no experts to make", "the config of a mixture")
        wide = checkpoint.skeleton_of(model_class, target)
        growth = _checked(make_plan(Request(table, chosen, seed, source, wide, effect_of)), table, model_class, chosen)
        return replace(growth, dtype=_dtype_in(target_config))
    mixture, dense = upcycling.decide(model_class, source.config, target, table, chosen, seed)
    wide = checkpoint.skeleton_of(model_class, dense)
    growth = _checked(make_plan(Request(table, chosen, seed, source, wide, effect_of)), table, model_class, chosen)
    mixture_class = checkpoint.class_like(model_class, source.config.model_type, target)
    growth = upcycling.joined(growth, mixture, checkpoint.skeleton_of(mixture_class, target))
    return replace(growth, dtype=_dtype_in(target_config))


def table_for(source: PreTrainedConfig, model_class: type[PreTrainedModel], target_config: Target) -> Architecture:
    """The table of what grows: of the text, and of each tower of which the target changes a size."""
    text = architecture_of(source, model_class)
    parts = config.towers_changed(source, target_config, text)
    return architecture_of(source, model_class, parts) if parts else text


def target_of(source: PreTrainedConfig, table: Architecture, target_config: Target, chosen: Method) -> PreTrainedConfig:
    """The config that is asked for. Raises GrowError as `config.resolve`."""
    layers = chosen if chosen.depth else operators.method("lossless")  # so that make_plan can say that depth is missing
    stacks = {stack.layers: stack for stack in table.stacks}
    return config.resolve(
        source, target_config, table, lambda name, old, new: layer_map(layers, stacks[name], old, new).source
    )


def _checked(growth: GrowthPlan, table: Architecture, model_class: type[PreTrainedModel], chosen: Method) -> GrowthPlan:
    """The plan, with a reason where a tiny model contradicts what an inferred table claims."""
    if growth.reasons or not table.proven or not growth.grows:
        return growth
    old, new, axes = growth.old_sizes, growth.new_sizes, growth.roles
    kinds = {Growth.of(n, old[n], new[n]) if n in axes else Growth(n, "deeper") for n in growth.grows}
    why = why_not(growth.source, model_class, table, frozenset(kinds), chosen)
    reason = f"a growth of this kind is not proven for {table.model_type}: {why}"
    return replace(growth, reasons=(reason,)) if why else growth


def expand(
    small_ckpt: Source,
    target_config: Target | GrowthPlan,
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
            A plan that `growlib.plan` made for this source is carried out; it says method and seed by itself.
        method: a name of `growlib.methods()`, `module:attribute` of one of your own, WIDTH+DEPTH of these, or a Method.
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
    model = checkpoint.load(small_ckpt)
    growth = settled(type(model), checkpoint.skeleton(model), target_config, method, seed, exact)
    if exact and (broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]):
        wrong = f"its {broken[0]} holds values that are not finite"
        raise GrowError(f"growing a {growth.model_class} with exact=True", wrong, "a source of finite values")
    wanted = wanted or dtype_of(growth.dtype) or model.dtype
    refuse_without_memory(f"growing a {growth.model_class}", bytes_of(growth, wanted))
    model_class = checkpoint.class_like(type(model), model.config.model_type, growth.config)
    grown = checkpoint.empty_model(model, growth.config, wanted, model_class)
    tensors = apply(growth, model.state_dict())
    checkpoint.fill(grown, upcycling.mix(growth.mixture, dict(tensors)) if growth.mixture else tensors)
    return grown


def settled(
    model_class: type[PreTrainedModel],
    source: Skeleton,
    target_config: Target | GrowthPlan,
    method: str | Method,
    seed: int,
    exact: bool | None,
) -> GrowthPlan:
    """The plan that `expand` carries out. Logs why it is not exact; raises GrowError where that is refused."""
    if isinstance(target_config, GrowthPlan):
        growth = target_config
        check_plan(growth, source, method, seed)
    else:
        growth = plan_of(model_class, source, target_config, method, seed)
    if growth.learned:
        wrong, valid = "its map is learned on text", "growlib.learn(small, target, batches)"
        raise GrowError(f"expanding with method {growth.method!r}", wrong, valid)
    if growth.reasons and exact:
        asked = f"growing {source.config.model_type} with method {growth.method!r} and exact=True"
        raise GrowError(asked, "; ".join(growth.reasons), "another target, or exact=None for the closest growth")
    if growth.reasons and exact is None:
        logger.warning("this growth is not known to preserve the function: %s", "; ".join(growth.reasons))
    return growth


def check_plan(growth: GrowthPlan, source: Skeleton, method: str | Method, seed: int) -> None:
    """Raise GrowError where a plan was made for another source, or another method or seed is asked for beside it."""
    asked = f"carrying out a plan ({growth.method}, seed {growth.seed}, for a {growth.model_class})"
    if method not in ("lossless", growth.method) or seed not in (0, growth.seed):
        named = method.name if isinstance(method, Method) else method
        wrong = f"beside it method {named!r} and seed {seed} are asked for"
        raise GrowError(asked, wrong, "expand(small, plan), or a plan made with them")
    if source.model_class != growth.model_class:
        raise GrowError(asked, f"the source is a {source.model_class}", f"a {growth.model_class}")
    mine, planned = flat(source.config), flat(growth.source)
    differ = [key for key in planned if last_word(key) not in config.NO_FUNCTION and mine.get(key) != planned[key]]
    other = [f"{key} is {mine.get(key)!r}, not {planned[key]!r}" for key in differ]
    shapes = source.shapes
    needed = {made.source: made.old_shape for made in growth.tensors if made.source}
    other += [
        f"{name} is {shapes.get(name)}, not {shape}" for name, shape in needed.items() if shapes.get(name) != shape
    ]
    if other:
        raise GrowError(asked, f"the source is another one: {'; '.join(other[:3])}", "the source that it was made for")
