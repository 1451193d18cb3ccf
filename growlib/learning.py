"""Growth by a map that is learned on text, then folded into plain weights."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from growlib.apply import apply
from growlib.checkpoint import loading as checkpoint
from growlib.checkpoint.loading import Source, dtype_of
from growlib.config import Target
from growlib.errors import GrowError
from growlib.growth import check_plan, plan_of, table_for
from growlib.growth_plan import GrowthPlan
from growlib.operators import Method, ligo

Batch = Mapping[str, Tensor]


def learn(
    small_ckpt: Source,
    target_config: Target | GrowthPlan,
    batches: Iterable[Batch],
    method: str | Method = "ligo",
    *,
    steps: int = 100,
    learning_rate: float = 3e-3,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """Grow a checkpoint by a map that is trained for some steps (LiGO, arXiv 2303.00980).

    Only the map is trained: its matrices make the large weights, the large model reads a batch, and its gradient goes
    back to the matrices (Adam, the rate falling linearly to zero). Of the large model this holds the weights and their
    gradients, no optimizer state; the graph from the matrices to the weights exists for one kind of tensor at a time.

    Args:
        small_ckpt: a model, a folder or a hub id. It is not modified.
        target_config: as in `expand`; a plan says method and seed by itself.
        batches: keyword arguments of the model's forward, `labels` among them, such as a DataLoader's. They are gone
            through again where `steps` needs more.
        method: `"ligo"`, or `"ligo+DEPTH"` where the depth factors start as another method's layers.
        steps: of training the map; 0 folds the map as it starts.
        learning_rate: of the map.
        seed: decides the start of the map and the dropout.
        dtype: of the result; the source's by default. The map is trained in float32 or wider.

    Returns:
        A model of the source's class, in eval mode, on the source's device. It does not compute what the source does.

    Raises:
        GrowError: the method learns nothing, a batch gives no loss, the batches end, or the loss is not finite.
    """
    small = checkpoint.load(small_ckpt)
    growth = _learnable(small, target_config, method, seed, steps, learning_rate)
    wanted, table = dtype_of(dtype) or small.dtype, table_for(small.config, type(small), growth.config)
    wide = torch.promote_types(small.dtype, torch.float32)
    tensors = {name: tensor.detach().to(wide) for name, tensor in small.state_dict().items()}
    parameters = {name for name, _ in small.named_parameters()}
    rows = [row for row in ligo.rows(growth, table, checkpoint.skeleton(small)) if row.sources[0][1] in parameters]
    factors = ligo.Factors(growth, rows, tensors)
    with torch.random.fork_rng(devices=[small.device] if small.device.type == "cuda" else []):
        torch.manual_seed(growth.seed)
        large = checkpoint.empty_model(small, growth.config, wide).train()
        checkpoint.fill(large, _fixed(growth, rows, tensors))
        for made in (made for row in rows for made in row.grown):
            large.get_parameter(made.name).data = torch.empty(0, device=small.device)  # the map's output stands in
        _train(large, factors, rows, batches, steps, learning_rate)
        del large
    grown = checkpoint.empty_model(small, growth.config, wanted)
    checkpoint.fill(grown, _fixed(growth, rows, tensors))
    with torch.no_grad():
        for row in rows:
            checkpoint.fill(grown, factors.grow(row).items())
    return grown


def _learnable(
    small: PreTrainedModel,
    target_config: Target | GrowthPlan,
    method: str | Method,
    seed: int,
    steps: int,
    learning_rate: float,
) -> GrowthPlan:
    """The plan whose map is to be learned. Raises GrowError where there is nothing to learn, or no way to."""
    if steps < 0 or learning_rate <= 0:
        asked = f"learning for {steps} steps at a rate of {learning_rate}"
        raise GrowError(asked, "one of them is out of range", "such as steps=100, learning_rate=3e-3")
    if isinstance(target_config, GrowthPlan):
        growth = target_config
        check_plan(growth, checkpoint.skeleton(small), growth.method, seed)
    else:
        growth = plan_of(type(small), checkpoint.skeleton(small), target_config, method, seed)
    if not growth.learned:
        raise GrowError(f"learning the growth {growth.method!r}", "it has nothing to learn", "ligo, or ligo+DEPTH")
    if growth.mixture:
        asked, wrong = (
            f"learning the growth of a {growth.model_class}",
            "a mixture of experts is not of the source's class",
        )
        raise GrowError(asked, wrong, "learn the dense growth, then expand it")
    return growth


def _fixed(growth: GrowthPlan, rows: list[ligo.Row], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What is not learned, by the rules of the plan: buffers, and biases that the source does not have."""
    learned = {made.name for row in rows for made in row.grown}
    return apply(replace(growth, tensors=tuple(t for t in growth.tensors if t.name not in learned)), tensors)


def _train(
    large: PreTrainedModel,
    factors: ligo.Factors,
    rows: list[ligo.Row],
    batches: Iterable[Batch],
    steps: int,
    learning_rate: float,
) -> None:
    optimizer = torch.optim.Adam(factors.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    for step, batch in enumerate(islice(_endless(batches), steps)):
        with torch.no_grad():
            weights = {name: tensor for row in rows for name, tensor in factors.grow(row).items()}
        loss = _loss_through(large, weights, batch)
        if not math.isfinite(loss):
            raise GrowError(f"step {step} of learning", f"the loss is {loss}", "a lower learning_rate")
        optimizer.zero_grad()
        _to_factors(factors, rows, weights)
        optimizer.step()
        schedule.step()


def _to_factors(factors: ligo.Factors, rows: list[ligo.Row], weights: dict[str, Tensor]) -> None:
    """The weights' gradients on to the factors, with the graph of one row at a time. Empties `weights`."""
    for row in rows:
        grown = factors.grow(row)
        gradients = {name: weights.pop(name).grad for name in grown}
        # No gradient: a tensor that the loss does not read. None on the way: all its axes are ids or positions.
        reached = [name for name, gradient in gradients.items() if gradient is not None and grown[name].requires_grad]
        if reached:
            torch.autograd.backward([grown[name] for name in reached], [gradients[name] for name in reached])


def _loss_through(large: PreTrainedModel, weights: dict[str, Tensor], batch: Batch) -> float:
    """The loss of the large model with these weights; each gets its gradient."""
    for weight in weights.values():
        weight.requires_grad_()
    inputs = {name: value.to(large.device) for name, value in batch.items()}
    loss = functional_call(large, weights, (), inputs, tie_weights=True).loss
    if loss is None:
        raise GrowError(f"learning on batches of {', '.join(batch)}", "they give no loss", "batches with labels")
    loss.backward()
    return loss.item()


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            wrong = "there are none left; a generator can be gone through once"
            raise GrowError("learning on the batches", wrong, "a list or a DataLoader, or fewer steps")
