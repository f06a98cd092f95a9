"""Decode and prefill on the CPU: impl="cpu" against PyTorch's SDPA, dense and on masked rows, in the same run.

The implementations of a case take turns, a round after the other, each with caches flushed, so that a change of the
machine's load meets all of them. Every case is checked against float64 before it is timed; one wrong result stops the
run. Codes: "random" (normal keys and queries), or "skewed" (feature u of a head scaled by e^{-2u/d}, which gives the
overlap of the first trained models, 0.85; docs/quality.md now has 0.93 to 1.0).
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import SparseKVCache, __version__, sfa_attention, sfa_attention_with_kvcache, topk_sparsify
from ..cli import UsageError
from ..impl import cpu_numba


@dataclass(frozen=True)
class Case:
    """decode: one query token over n cached ones; prefill: n over n, causal."""

    bench: str
    n: int
    hq: int = 8
    hkv: int = 8
    d: int = 128
    topk: int = 8
    codes: str = "random"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return (
            f"{'decode' if self.bench == 'decode' else 'prefill'} n={self.n} heads={self.hq}/{self.hkv} d={self.d} "
            f"topk={self.topk} {self.codes} {str(self.dtype).removeprefix('torch.')}"
        )


CASES = (
    *(Case("decode", n, codes=codes) for n in (4096, 32768) for codes in ("random", "skewed")),
    Case("decode", 32768, topk=4),
    Case("decode", 32768, topk=16),
    Case("decode", 32768, d=64),
    Case("decode", 32768, 32, 8),
    Case("decode", 32768, dtype=torch.bfloat16),
    *(Case("attention_fwd", n, 4, 4, codes=codes) for n in (2048, 8192) for codes in ("random", "skewed")),
    Case("attention_fwd", 8192, 4, 4, topk=4),
    Case("attention_fwd", 4096, 4, 4, topk=16),
    Case("attention_fwd", 4096, 4, 4, d=64),
    Case("attention_fwd", 4096, 4, 1),
    Case("attention_fwd", 4096, 4, 4, dtype=torch.bfloat16),
)
QUICK = (
    Case("decode", 4096, 4, 4),
    Case("decode", 32768, 4, 4),
    Case("decode", 32768, 4, 4, codes="skewed"),
    Case("decode", 32768, 4, 4, topk=16),
    Case("attention_fwd", 1024, 2, 2),
    Case("attention_fwd", 4096, 2, 2),
    Case("attention_fwd", 4096, 2, 2, codes="skewed"),
    Case("attention_fwd", 4096, 2, 2, d=64),
)


def device_name() -> str:
    """The processor's name and the threads PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0] if models else name}, {torch.get_num_threads()} threads"


def rows(case: Case, n: int, heads: int) -> Tensor:
    """Fresh rows (1, n, heads, d) whose top-k supports are balanced, or skewed."""
    x = torch.randn(1, n, heads, case.d)
    if case.codes == "skewed":
        x = x * torch.exp(torch.arange(case.d) * (-2.0 / case.d))
    return x.to(case.dtype)


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every call: median, 20th and 80th percentile; a round times each once, after a flush."""
    # Not a torch tensor: torch's threads would spin for milliseconds after filling it, in the way of the next call.
    flush = np.empty(2**24, np.float32)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            flush.fill(turn)
            start = time.perf_counter()
            call()
            if turn:  # the first round compiles and touches memory
                times[name].append((time.perf_counter() - start) * 1e3)
    stats = {}
    for name, values in times.items():
        values.sort()
        stats[name] = {
            "ms_median": statistics.median(values),
            "ms_p20": values[int(0.2 * (len(values) - 1))],
            "ms_p80": values[int(0.8 * (len(values) - 1))],
        }
    return stats


def error_over_budget(out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> float:
    """Error of out (heads, rows, dv) over its budget (design rule): above 1 is wrong. q and k are masked rows."""
    scale = q.shape[-1] ** -0.5
    score = (q.double() @ k.double().mT * scale).masked_fill(~visible, -torch.inf)
    exact = score.softmax(-1) @ v.double()
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible)[0]
    budget = 2 * (plain.double() - exact).abs().max() + torch.finfo(out.dtype).eps * exact.abs().max()
    return float((out.double() - exact).abs().max() / budget)


def by_head(x: Tensor) -> Tensor:
    """(1, n, heads, d) -> (1, heads, n, d), contiguous: the layout that suits SDPA."""
    return x.transpose(1, 2).contiguous()


def decode_calls(case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    cache = SparseKVCache(
        num_kv_heads=case.hkv, head_dim=case.d, topk=case.topk, max_tokens=case.n, dtype=case.dtype, device="cpu"
    )
    cache.alloc(1)
    k, v, q = rows(case, case.n, case.hkv), rows(case, case.n, case.hkv), rows(case, 1, case.hq)
    if case.codes == "skewed":
        v = torch.randn_like(v)
    cache.append(k, v)
    masked = by_head(topk_sparsify(k, case.topk).to_dense())
    k, v = by_head(k), by_head(v)
    group = case.hq // case.hkv

    def dense(query: Tensor, key: Tensor) -> Tensor:
        # The heads of a group as query rows, so that they share one read of the cache.
        grouped = query.view(1, case.hkv, group, case.d)
        return F.scaled_dot_product_attention(grouped, key, v)

    out, stats = sfa_attention_with_kvcache(q, cache, return_stats=True, impl="cpu")
    heads = (0, case.hkv - 1)
    code = topk_sparsify(q, case.topk).to_dense().view(case.hkv, group, case.d)
    everything = torch.ones(group, case.n, dtype=torch.bool)
    worst = max(
        error_over_budget(out.view(case.hkv, group, -1)[h, None], code[h, None], masked[0, h, None], v[0, h, None],
                          everything)
        for h in heads
    )  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {
        "dense_sdpa": lambda: dense(q, k),
        "mask_sdpa": lambda: dense(cpu_numba.sparsify(q, case.topk).to_dense(), masked),
        "cpu": lambda: sfa_attention_with_kvcache(q, cache, impl="cpu"),
    }
    overlap = int(stats["rows_read"].sum()) / (case.n * case.hkv)
    more = {"max_err": worst, "overlap": round(overlap, 4), "cache_of_dense": cache.nbytes / cache.dense_nbytes}
    return calls, more


def prefill_calls(case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    q, k, v = rows(case, case.n, case.hq), rows(case, case.n, case.hkv), rows(case, case.n, case.hkv)
    if case.codes == "skewed":
        v = torch.randn_like(v)
    options: dict[str, Any] = {"topk": case.topk, "causal": True}
    out = sfa_attention(q, k, v, impl="cpu", **options)
    codes = [topk_sparsify(x, case.topk).to_dense() for x in (q, k)]
    last, group = min(64, case.n), case.hq // case.hkv
    visible = torch.ones(last, case.n, dtype=torch.bool).tril(case.n - last)
    worst = max(
        error_over_budget(out[0, -last:, h][None], codes[0][0, -last:, h][None], codes[1][0, :, h // group][None],
                          v[0, :, h // group][None], visible)
        for h in (0, case.hq - 1)
    )  # fmt: skip
    pairs = (codes[0][0, -last:, 0] != 0).float() @ (codes[1][0, :, 0] != 0).float().mT > 0
    dense_q, dense_k, value = (by_head(x) for x in (q, k, v))
    gqa = case.hq != case.hkv

    def mask_sdpa() -> Tensor:
        query, key = (by_head(cpu_numba.sparsify(x, case.topk).to_dense()) for x in (q, k))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)

    calls: dict[str, Callable[[], Any]] = {
        "dense_sdpa": lambda: F.scaled_dot_product_attention(dense_q, dense_k, value, is_causal=True, enable_gqa=gqa),
        "mask_sdpa": mask_sdpa,
        "cpu": lambda: sfa_attention(q, k, v, impl="cpu", **options),
    }
    return calls, {"max_err": worst, "overlap": round(float(pairs.float().mean()), 4)}


def run(args: argparse.Namespace) -> int:
    """Time every case, write OUT/cpu.jsonl, print a table."""
    if args.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {args.repeats}")
    if (reason := cpu_numba.missing()) is not None:
        raise UsageError(f"impl='cpu' is not available: {reason}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "cpu.jsonl"
    file.unlink(missing_ok=True)
    torch.manual_seed(0)
    started = time.time()
    device = device_name()
    print(f"{device}; load {os.getloadavg()[0]:.1f}", flush=True)
    with torch.no_grad():
        for case in QUICK if args.quick else CASES:
            calls, more = (decode_calls if case.bench == "decode" else prefill_calls)(case)
            if not more["max_err"] <= 1.0:
                raise UsageError(f"wrong result: {case.name}: {more['max_err']:.2f} times its budget; nothing is timed")
            before = os.getloadavg()[0]
            times = in_turns(calls, args.repeats)
            ours = times["cpu"]["ms_median"]
            for impl, stats in times.items():
                row = {
                    "bench": case.bench, "case": case.name, "impl": impl, "device": device,
                    "dtype": str(case.dtype).removeprefix("torch."), "batch": 1, "heads": case.hq,
                    "kv_heads": case.hkv, "seqlen_q": 1 if case.bench == "decode" else case.n, "seqlen_k": case.n,
                    "head_dim": case.d, "v_head_dim": case.d, "causal": True, "codes": case.codes,
                    **{name: round(value, 4) for name, value in stats.items()},
                    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    "load": round(max(before, os.getloadavg()[0]), 2), "commit": args.commit,
                    "torch": torch.__version__, "numba": _numba_version(), "flash_sfa": __version__,
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": f"flash-sfa bench cpu --repeats {args.repeats}" + (" --quick" if args.quick else ""),
                }  # fmt: skip
                if not impl.startswith("dense"):
                    row |= {"topk": case.topk, "dense_dims": 0, "tolerance": 0}
                if impl == "cpu":
                    row |= {name: round(value, 4) for name, value in more.items()}
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(
                    f"{case.name:66} {impl:10} {stats['ms_median']:9.2f} ms "
                    f"({stats['ms_p20']:.2f} to {stats['ms_p80']:.2f})"
                    + (
                        f"  cpu is {stats['ms_median'] / ours:.2f}x as fast"
                        if impl != "cpu"
                        else f"  {more['overlap']}"
                    ),
                    flush=True,
                )
            del calls
    print(f"rows: {file}; {time.time() - started:.0f} s")
    return 0


def _numba_version() -> str:
    import numba

    return str(numba.__version__)
