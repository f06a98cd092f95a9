"""Decoding one token with a Qwen3-0.6B-shaped random model: a static SFACache against dense SDPA over a full cache.

    python benchmarks/qwen3_decode.py --out rows.jsonl [--cases 32768x1,131072x1,32768x8] [--smoke]

Three timings for each side: the step as it is, and in CUDA graphs the attention calls of all layers and the whole step.
The dense cache is preallocated and full, and its step writes its key and value in place; dense attention is the faster
of cuDNN and FlashAttention-2, without a mask. The SFA step appends, top-k included, so its cache grows by a token at
each replay, as in generation. Caches hold random content. ``--smoke`` runs a tiny model on the CPU.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Cache, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from flash_sfa import sfa_attention_with_kvcache
from flash_sfa.integrations import transformers as sfa_hf

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BF16 = torch.bfloat16
BACKENDS = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_fa2": SDPBackend.FLASH_ATTENTION}
SHAPE = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 2**18,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
backend = ""


class FullLayer(CacheLayerMixin):
    """A preallocated dense layer that holds n tokens, of which a step overwrites the last."""

    is_sliding = False

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.keys, self.values = k, v
        self.at = torch.tensor([k.shape[2] - 1], device=k.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def dense(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """All of a full cache, no mask."""
    with sdpa_kernel(BACKENDS[backend]) if CUDA else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(query, key, value, scale=kwargs["scaling"], enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def milliseconds(fn: Callable[[], Any], repeats: int = 20) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            fn()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - begin))
    times.sort()
    last = len(times) - 1
    return {
        "ms_median": round(statistics.median(times), 4),
        "ms_p20": round(times[int(0.2 * last)], 4),
        "ms_p80": round(times[int(0.8 * last)], 4),
    }


def graphed(fn: Callable[[], Any]) -> Callable[[], Any]:
    """fn captured in a CUDA graph, after it ran twice on a side stream."""
    if not CUDA:
        return fn
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def reset_peak() -> None:
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_of(model: Any, cache: Any, n: int, b: int) -> Callable[[], Tensor]:
    ids = torch.full((b, 1), 5, device=DEVICE)
    positions = torch.full((1, 1), n - 1, device=DEVICE)
    return lambda: model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits


def random_rows(b: int, n: int, config: Any, heads: int) -> Tensor:
    return torch.randn(b, n, heads, config.head_dim, device=DEVICE, dtype=BF16)


def run_dense(model: Any, n: int, b: int) -> list[dict[str, Any]]:
    global backend
    config = model.config
    model.set_attn_implementation("dense_full")
    k, v = (random_rows(b, n, config, config.num_key_value_heads).transpose(1, 2) for _ in range(2))
    layers = [FullLayer(k.contiguous(), v.contiguous()) for _ in range(config.num_hidden_layers)]
    cache = Cache(layers=layers)
    del k, v
    reset_peak()
    q = random_rows(b, 1, config, config.num_attention_heads).transpose(1, 2).contiguous()
    rows, best = [], ("", float("inf"))
    for name in BACKENDS:
        backend = name

        def attention() -> None:
            for layer in layers:
                dense(None, q, layer.keys, layer.values, None, scaling=0.088)

        try:
            timed = milliseconds(graphed(attention))
        except RuntimeError as error:
            print(name, "cannot:", str(error)[:200])
            continue
        rows.append({"impl": name, "part": "attention", **timed})
        best = min(best, (name, timed["ms_median"]), key=lambda x: x[1])
    backend = best[0]
    step = step_of(model, cache, n, b)
    for part, fn in (("step", graphed(step)), ("step without a graph", step)):
        rows.append({"impl": backend, "part": part, **milliseconds(fn)})
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return [row | {"cache_bytes": stored} for row in rows]


def run_sfa(model: Any, n: int, b: int, topk: int, v_dtype: torch.dtype | None) -> list[dict[str, Any]]:
    config = model.config
    sfa_hf.enable_sfa(model, topk=topk)
    cache = sfa_hf.SFACache(config, v_dtype=v_dtype, max_length=n + 256, static=True)
    k, v = (random_rows(b, n - 1, config, config.num_key_value_heads) for _ in range(2))
    for layer in cache.layers:
        layer.append(layer.sparsify(k), v, None)
    new = k[:, :1].clone(), v[:, :1].clone()
    del k, v
    reset_peak()
    q = random_rows(b, 1, config, config.num_attention_heads)
    step = step_of(model, cache, n, b)

    def attention() -> None:
        for layer in cache.layers:
            sfa_attention_with_kvcache(q, layer.kv, seq_ids=layer.ids)

    def append() -> None:
        for layer in cache.layers:
            layer.kv.append(*new, seq_ids=layer.ids)

    # A captured append makes every later call outside of a graph read the lengths back, so the plain step comes first.
    parts = {"step without a graph": step, "attention": attention, "step": step, "append": append}
    rows = [
        {"impl": DEVICE, "part": part, **milliseconds(fn if "without" in part else graphed(fn))}
        for part, fn in parts.items()
    ]
    extra = {"topk": topk, "dense_dims": 0, "tolerance": 0.0, "v_dtype": str(v_dtype or BF16).removeprefix("torch.")}
    tokens = int(cache.layers[0].kv.seq_lengths().sum()) * config.num_hidden_layers
    extra |= {"cache_bytes": cache.nbytes(), "cache_bytes_a_token": round(cache.nbytes() / tokens, 2)}
    return [row | extra for row in rows]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="32768x1,131072x1,32768x8")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new measurement after this many seconds")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    begin = time.perf_counter()
    AttentionInterface.register("dense_full", dense)
    AttentionMaskInterface.register("dense_full", lambda **kwargs: None)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(BF16)
        model = Qwen3ForCausalLM(Qwen3Config(**(TINY if args.smoke else SHAPE))).eval()
        torch.set_default_dtype(torch.float32)
    print(f"model after {time.perf_counter() - begin:.1f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for case in args.cases.split(","):
        n, b = (int(x) for x in case.split("x"))
        sides: list[Callable[[], list[dict[str, Any]]]] = [
            lambda n=n, b=b: run_dense(model, n, b),
            *(lambda n=n, b=b, v=v: run_sfa(model, n, b, args.topk, v) for v in (None, torch.int8)),
        ]
        for side in sides:
            if time.perf_counter() - begin > args.seconds:
                print("out of time before", case)
                return
            if CUDA:
                torch.cuda.empty_cache()
            try:
                rows = side()
            except Exception as error:
                print(case, "failed:", repr(error)[:600], flush=True)
                rows = []
            base = {
                "bench": "qwen3_decode", "device": torch.cuda.get_device_name() if CUDA else "cpu",
                "dtype": "bfloat16", "batch": b, "heads": model.config.num_attention_heads,
                "kv_heads": model.config.num_key_value_heads, "layers": model.config.num_hidden_layers,
                "seqlen_q": 1, "seqlen_k": n, "head_dim": model.config.head_dim, "causal": True, "codes": "random",
                "peak_bytes": torch.cuda.max_memory_allocated() if CUDA else None,
                "commit": os.environ.get("FLASH_SFA_COMMIT"), "torch": torch.__version__, "gpus": 1,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            with args.out.open("a") as file:
                for row in rows:
                    file.write(json.dumps(base | row) + "\n")
                    print(case, row["impl"], row.get("v_dtype", ""), row["part"], row["ms_median"], flush=True)
            print(f"  {time.perf_counter() - begin:.1f} s", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
