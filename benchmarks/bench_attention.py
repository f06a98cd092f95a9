"""Prefill and training attention on a CUDA device: SFA (top-k inside) against dense attention of the same shape.

    python benchmarks/bench_attention.py --commit COMMIT --out benchmarks/results/attention.jsonl

Causal, bf16, fresh random data, B = max(1, 64k / n), 16 heads (8 for d = 256). Correctness is checked first, on a
small shape against float64; a red check stops the run.
"""

import argparse
import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import time_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sfa import sfa_attention, topk_sparsify


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def mask_cudnn(topk: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The masked dense rows through cuDNN: what a user would write, with our top-k."""
    q, k = (topk_sparsify(x, topk).to_dense() for x in (q, k))
    return dense(SDPBackend.CUDNN_ATTENTION, q, k, v)


def forward(fn: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        fn(q, k, v)


def forward_backward(fn: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    fn(q, k, v).backward(grad)
    q.grad = k.grad = v.grad = None


def check() -> float:
    """Error of sfa_attention in bf16 over the error of torch's math attention, both against float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 257, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    codes = [topk_sparsify(x, 8) for x in (q, k)]
    exact = sfa_attention(*(c.to(torch.float64) for c in codes), v.double(), causal=True, impl="reference")
    ours = sfa_attention(q, k, v, topk=8, causal=True)
    math = dense(SDPBackend.MATH, codes[0].to_dense(), codes[1].to_dense(), v)
    budget = 2 * (math.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    if error > budget:
        raise SystemExit(f"wrong result: error {error:.2e} over the budget {budget:.2e}; nothing is timed")
    return float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--topk", type=int, nargs="+", default=[8])
    parser.add_argument("--impls", nargs="+", default=["dense_cudnn", "dense_fa2", "mask_cudnn", "auto"])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    max_err = check()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    for d in args.dims:
        for n in args.lengths:
            heads, batch = (8 if d == 256 else 16), max(1, 65536 // n)
            q, k, v = (
                torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                for _ in range(3)
            )
            grad = torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16)
            cases: list[tuple[str, int | None, Callable[..., Tensor]]] = [
                ("dense_cudnn", None, functools.partial(dense, SDPBackend.CUDNN_ATTENTION)),
                ("dense_fa2", None, functools.partial(dense, SDPBackend.FLASH_ATTENTION)),
            ]
            for topk in args.topk:
                cases.append(("mask_cudnn", topk, functools.partial(mask_cudnn, topk)))
                for impl in ("auto", "triton"):
                    ours: Any = functools.partial(sfa_attention, topk=topk, causal=True, impl=impl)
                    cases.append((impl, topk, ours))
            for name, topk, fn in (case for case in cases if case[0] in args.impls):
                calls = {
                    "attention_fwd": functools.partial(forward, fn, q, k, v),
                    "attention_fwdbwd": functools.partial(forward_backward, fn, q, k, v, grad),
                }
                for bench, call in calls.items():
                    torch.cuda.reset_peak_memory_stats()
                    row = {
                        "bench": bench, "impl": name, "device": torch.cuda.get_device_name(), "dtype": "bfloat16",
                        "batch": batch, "heads": heads, "kv_heads": heads, "seqlen_q": n, "seqlen_k": n,
                        "head_dim": d, "v_head_dim": d, "causal": True, "codes": "random", "tolerance": 0,
                        "commit": args.commit, "torch": torch.__version__,
                        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    }  # fmt: skip
                    if topk is not None:
                        row |= {"topk": topk, "dense_dims": 0}
                    if name in ("auto", "triton"):
                        row["max_err"] = max_err
                    try:
                        row |= time_ms(call, repeats=args.repeats)
                        row["peak_bytes"] = torch.cuda.max_memory_allocated()
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {error}"[:300]
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{bench:17} {name:12} d={d:3} n={n:6} topk={topk} {row.get('ms_median', row.get('error'))}")


if __name__ == "__main__":
    main()
