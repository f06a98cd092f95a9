"""What is measured on a trained variant. All of it runs in float32 except the bfloat16 cache sizes."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..codes import SparseCode, topk_sparsify
from .data import Text, decode, validation_windows
from .models import Settings, Variant, cache_bytes, new_cache, parameters
from .train import validation_loss

# Two features count as tied at the top-k boundary if their magnitudes differ by less than this part of the
# row's largest: a thousand float32 roundings.
BOUNDARY = 1e-4


@contextmanager
def spy(model: Any, record: Callable[[int, Tensor, Any], None]) -> Iterator[None]:
    """While open, ``record(layer, q, k)`` sees the rows of every attention call of the model."""
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, query: Tensor, key: Any, *args: Any, **kwargs: Any) -> Any:
        record(module.layer_idx, query, key)
        return original(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attention)
    try:
        yield
    finally:
        AttentionInterface.register(name, original)


def code_mask(x: Any, variant: Variant) -> Tensor:
    """(..., d) bool: the features that top-k selected; always-on features are False."""
    if variant.topk is None:
        raise ValueError(f"variant {variant.name} is dense: it has no codes")
    if isinstance(x, Tensor):
        x = topk_sparsify(x, variant.topk, dense_dims=variant.dense_dims)
    code = x if isinstance(x, SparseCode) else x.to_code()  # what an SFACache gives holds its codes
    mask = torch.zeros(code.shape, dtype=torch.bool, device=code.indices.device)
    return mask.scatter(-1, code.indices.long(), True)


@torch.no_grad()
def code_statistics(model: Any, variant: Variant, windows: Tensor, device: torch.device) -> dict[str, float]:
    """overlap: share of visible pairs (i, j <= i) whose top-k features meet, over all layers and heads.
    balance_q, balance_k: entropy of which feature top-k selects, divided by the log of how many it may
    select, mean over layers and heads; 1 = all equally often.
    """
    counts: dict[str, dict[int, Tensor]] = {"q": {}, "k": {}}
    meets = pairs = 0

    def record(layer: int, query: Tensor, key: Any) -> None:
        nonlocal meets, pairs
        q, k = code_mask(query, variant), code_mask(key, variant)
        for side, mask in (("q", q), ("k", k)):
            counts[side][layer] = counts[side].get(layer, 0) + mask.sum((0, 2))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        shared = (q.float() @ k.float().transpose(-1, -2) > 0).tril()
        meets += int(shared.sum())
        pairs += int(torch.ones_like(shared).tril().sum())

    with spy(model, record):
        model(input_ids=windows[:, :-1].to(device), use_cache=False)
    result = {"overlap": meets / pairs}
    for side, by_layer in counts.items():
        share = torch.stack(list(by_layer.values())).double()
        share = share / share.sum(-1, keepdim=True)
        entropy = -torch.xlogy(share, share).sum(-1)
        result[f"balance_{side}"] = float(entropy.mean() / math.log(variant.qk_dim - variant.dense_dims))
    return result


@torch.no_grad()
def measured_cache_bytes(model: Any, tokens: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a token, over all layers and heads, of a cache filled by tokens (1, n) in ``dtype``."""
    model = copy.deepcopy(model).to(dtype)
    cache = new_cache(model)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    keys, every = cache_bytes(cache)
    return {"keys": keys / tokens.numel(), "all": every / tokens.numel()}


def _generate(model: Any, prompt: Tensor, new_tokens: int, *, cached: bool, **kwargs: Any) -> tuple[Any, float]:
    extra: dict[str, Any] = {"past_key_values": new_cache(model)} if cached else {}
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        use_cache=cached,
        return_dict_in_generate=True,
        output_logits=True,
        **extra,
        **{"do_sample": False, **kwargs},
    )
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def _error_budget(model: Any, prefix: Tensor, logits: Tensor) -> float:
    """How far float32 logits may be off: twice the uncached error against float64, plus rounding."""
    exact = copy.deepcopy(model).double()(input_ids=prefix, use_cache=False).logits[0, -1]
    error = (logits.double() - exact).abs().max()
    return float(2 * error + torch.finfo(torch.float32).eps * exact.abs().max())


def only_boundary_flips(
    rows: dict[tuple[int, str], Tensor], masks: dict[tuple[int, str], Tensor], variant: Variant
) -> bool:
    """Whether the uncached rows select other features than the cached masks, and only among tied ones.

    Keys are (layer, side). Looks at the first layer with a difference: later layers see different inputs.
    """
    for layer in sorted({layer for layer, _ in rows}):
        flips = 0
        for side in ("q", "k"):
            size, theirs = rows[layer, side].abs(), masks[layer, side]
            ours = code_mask(rows[layer, side], variant)
            # The widest gap between a feature that only one side kept and one that only the other kept.
            left = size.masked_fill(~(ours & ~theirs), -torch.inf).amax(-1)
            right = size.masked_fill(~(theirs & ~ours), torch.inf).amin(-1)
            differs = (ours != theirs).any(-1)
            if bool((differs & ~((left - right).abs() <= BOUNDARY * size.amax(-1))).any()):
                return False
            flips += int(differs.sum())
        if flips:
            return True
    return False


def _boundary_flip(model: Any, variant: Variant, prefix: Tensor, prompt_tokens: int) -> bool:
    """Replay prefix (1, n) with and without cache and compare the codes of all its rows."""
    if variant.topk is None:
        return False
    rows: dict[tuple[int, str], Tensor] = {}
    masks: dict[tuple[int, str], Tensor] = {}

    def record_uncached(layer: int, query: Tensor, key: Any) -> None:
        rows[layer, "q"], rows[layer, "k"] = query, key

    def record_cached(layer: int, query: Tensor, key: Any) -> None:
        mask, before = code_mask(query, variant), masks.get((layer, "q"))
        masks[layer, "q"] = mask if before is None else torch.cat([before, mask], dim=2)
        masks[layer, "k"] = code_mask(key, variant)

    with spy(model, record_uncached):
        model(input_ids=prefix, use_cache=False)
    cache = new_cache(model)
    with spy(model, record_cached):
        model(input_ids=prefix[:, :prompt_tokens], past_key_values=cache, use_cache=True)
        for position in range(prompt_tokens, prefix.shape[1]):
            model(input_ids=prefix[:, position : position + 1], past_key_values=cache, use_cache=True)
    return only_boundary_flips(rows, masks, variant)


@torch.no_grad()
def cached_equals_uncached(
    model: Any, variant: Variant, prompts: Tensor, settings: Settings
) -> tuple[dict[str, Any], dict[str, float]]:
    """Greedy generation with and without cache, compared token for token.

    A row may diverge only where a feature at the top-k boundary flipped, or where the two best logits are
    closer than the error budget; both are counted. Any other divergence fails.

    Returns (equality, speed): equality holds ok, rows, equal, flips, ties, failures (one line each) and the
    largest difference of logits before a divergence; speed holds tokens a second, cached and uncached.
    """
    _generate(model, prompts, 2, cached=True)
    _generate(model, prompts, 2, cached=False)
    with_cache, seconds_cached = _generate(model, prompts, settings.new_tokens, cached=True)
    without, seconds_uncached = _generate(model, prompts, settings.new_tokens, cached=False)
    start = prompts.shape[1]
    equality: dict[str, Any] = {"rows": len(prompts), "equal": 0, "flips": 0, "ties": 0, "failures": []}
    largest = 0.0
    for row in range(len(prompts)):
        ours, theirs = with_cache.sequences[row, start:], without.sequences[row, start:]
        different = (ours != theirs).nonzero()
        until = int(different[0]) if len(different) else len(ours) - 1
        for step in range(until + 1):
            gap = (with_cache.logits[step][row] - without.logits[step][row]).abs().max()
            largest = max(largest, float(gap)) if gap.isfinite() else math.inf
        if not len(different):
            equality["equal"] += 1
            continue
        prefix = without.sequences[row : row + 1, : start + until]
        logits = without.logits[until][row].float()
        margin = float(logits.topk(2).values.diff().abs())
        budget = _error_budget(model, prefix, logits)
        if _boundary_flip(model, variant, prefix, start):
            equality["flips"] += 1
        elif margin <= budget:
            equality["ties"] += 1
        else:
            equality["failures"].append(
                f"prompt {row} differs at new token {until + 1}: {int(ours[until])} with the cache, "
                f"{int(theirs[until])} without; logit margin {margin:.3g}, error budget {budget:.3g}"
            )
    equality["ok"] = not equality["failures"]
    equality["largest_logit_difference"] = largest
    tokens = prompts.shape[0] * settings.new_tokens
    return equality, {"cached": tokens / seconds_cached, "uncached": tokens / seconds_uncached}


@torch.no_grad()
def evaluate(model: Any, variant: Variant, text: Text, settings: Settings, device: torch.device) -> dict[str, Any]:
    """All measurements of a trained variant as plain numbers and strings."""
    model.eval()
    windows = validation_windows(text, context=settings.context, limit=settings.validation_windows)
    loss = validation_loss(model, windows, device)
    prompts = validation_windows(text, context=settings.context, limit=settings.prompts)
    prompts = prompts[:, : settings.prompt_tokens].to(device)
    equality, speed = cached_equals_uncached(model, variant, prompts, settings)
    torch.manual_seed(settings.seed)
    sample, _ = _generate(
        model, prompts[:1], settings.new_tokens, cached=True, do_sample=True, temperature=0.8, top_k=0
    )
    prefill = windows[:1, :-1].to(device)
    result: dict[str, Any] = {
        "parameters": parameters(model, variant, settings),
        "validation_loss": loss,
        "perplexity_byte": math.exp(loss),
        "perplexity_character": math.exp(loss * text.bytes_per_character),
        "validation_tokens": windows.shape[0] * settings.context,
        "cache_bfloat16": measured_cache_bytes(model, prefill, torch.bfloat16),
        "cache_float32": measured_cache_bytes(model, prefill, torch.float32),
        "equality": equality,
        "generation_tokens_a_second": speed,
        "prompt": decode(prompts[0].cpu()),
        "sample": decode(sample.sequences[0, prompts.shape[1] :].cpu()),
    }
    if variant.topk is not None:
        result.update(code_statistics(model, variant, windows[:16], device))
    return result
