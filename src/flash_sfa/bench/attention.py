"""Prefill and training attention on a CUDA device: SFA (top-k inside) against dense attention of the same shape.

Causal, bf16, fresh random data, batch = max(1, tokens / n), 16 heads (8 for d = 256). Correctness is checked first, on
a small shape against float64; a red check stops the run.
"""

import argparse
import datetime
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import select_impl, sfa_attention, topk_sparsify
from ..cli import UsageError
from .timing import time_ms

OURS = ("auto", "cuda", "sdpa", "triton")


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def dense_fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-4, where its package is installed (flash-attn-4)."""
    from flash_attn.cute.interface import flash_attn_func  # type: ignore[import-not-found]

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def mask_cudnn(topk_q: int | None, topk_k: int, dense_dims: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The masked dense rows through cuDNN: what a user would write, with our top-k."""
    if topk_q is not None:
        q = topk_sparsify(q, topk_q, dense_dims=dense_dims).to_dense()
    k = topk_sparsify(k, topk_k, dense_dims=dense_dims).to_dense()
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
    wide = [code.to(torch.float64) for code in codes]
    exact = sfa_attention(wide[0], wide[1], v.double(), causal=True, impl="reference")
    ours = sfa_attention(q, k, v, topk=8, causal=True)
    math = dense(SDPBackend.MATH, codes[0].to_dense(), codes[1].to_dense(), v)
    budget = 2 * (math.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    if error > budget:
        raise UsageError(f"wrong result: error {error:.2e} over the budget {budget:.2e}; nothing is timed")
    return float(error)


def run(args: argparse.Namespace) -> int:
    """Time every case, write attention.jsonl and attention.png, print a table."""
    known = {"dense_cudnn", "dense_fa2", "dense_fa4", "mask_cudnn", *OURS}
    if unknown := set(args.impls) - known:
        raise UsageError(f"--impls: unknown {sorted(unknown)}; known: {sorted(known)}")
    max_err = check()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "attention.jsonl"
    file.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for d in args.dims:
        for n in args.lengths:
            heads, batch = (8 if d == 256 else 16), max(1, args.tokens // n)
            for row in time_shape(args, batch, n, heads, d):
                if row["impl"] in OURS:
                    row["max_err"] = max_err
                rows.append(row)
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
    plot(rows, args.out / "attention.png")
    print(f"rows: {file}, plot: {args.out / 'attention.png'}")
    return 0


def time_shape(args: argparse.Namespace, batch: int, n: int, heads: int, d: int) -> Iterator[dict[str, Any]]:
    """A row for every implementation, forward and forward + backward, of one shape; prints each."""
    q, k, v = (
        torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    grad = torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16)
    cases: list[tuple[str, int | None, Callable[..., Tensor]]] = [
        ("dense_cudnn", None, functools.partial(dense, SDPBackend.CUDNN_ATTENTION)),
        ("dense_fa2", None, functools.partial(dense, SDPBackend.FLASH_ATTENTION)),
        ("dense_fa4", None, dense_fa4),
    ]
    choices: dict[int | None, dict[str, str]] = {}
    for topk in args.topk:
        topk_q = None if args.dense_q else topk
        options: dict[str, Any] = {"topk": (topk_q, topk), "dense_dims": args.dense_dims, "causal": True}
        choice = choices[topk] = select_impl(q, k, v, **options)
        print(
            f"d={d} n={n} batch={batch} heads={heads} topk={topk}: auto takes {choice['forward']} forward "
            f"({choice['reason']}) and {choice['backward']} backward"
        )
        cases.append(("mask_cudnn", topk, functools.partial(mask_cudnn, topk_q, topk, args.dense_dims)))
        cases += [(impl, topk, functools.partial(sfa_attention, **options, impl=impl)) for impl in OURS]
    fastest: dict[str, float] = {}
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
                row |= {"topk": topk, "topk_q": None if args.dense_q else topk, "dense_dims": args.dense_dims}
            if name == "auto":
                row |= {key: choices[topk][key] for key in ("forward", "backward")}
            try:
                row |= time_ms(call, repeats=args.repeats)
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            except Exception as error:  # a baseline that does not run here is a row that says so
                row["error"] = f"{type(error).__name__}: {error}"[:300]
                print(f"  {bench:17} {name:12} {row['error'][:90]}")
                yield row
                continue
            if name.startswith("dense"):
                fastest[bench] = min(row["ms_median"], fastest.get(bench, row["ms_median"]))
            against = f"{fastest[bench] / row['ms_median']:.2f}x of the fastest dense" if bench in fastest else ""
            spread = f"({row['ms_p20']:.3f} to {row['ms_p80']:.3f})"
            print(f"  {bench:17} {name:12} {row['ms_median']:9.3f} ms {spread:22} {against}", flush=True)
            yield row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against the fastest dense kernel over the length; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'flash-sfa[demo]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dims = sorted({row["head_dim"] for row in rows})
    fig, axes = plt.subplots(2, len(dims), figsize=(4 * len(dims), 6), squeeze=False, sharex=True, sharey=True)
    for across, d in enumerate(dims):
        for down, bench in enumerate(("attention_fwd", "attention_fwdbwd")):
            here = [r for r in rows if r["head_dim"] == d and r["bench"] == bench and "ms_median" in r]
            lengths = sorted({r["seqlen_q"] for r in here})
            best = {
                n: min(
                    (r["ms_median"] for r in here if r["seqlen_q"] == n and r["impl"].startswith("dense")), default=None
                )
                for n in lengths
            }
            axis = axes[down][across]
            for kind in sorted({(r["impl"], r.get("topk", 0)) for r in here}):
                points = {r["seqlen_q"]: r["ms_median"] for r in here if (r["impl"], r.get("topk", 0)) == kind}
                shown = [n for n in lengths if n in points and best[n] is not None]
                label = kind[0] + (f" topk={kind[1]}" if kind[1] else "")
                axis.plot(shown, [best[n] / points[n] for n in shown], marker="o", label=label)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.set_title(f"{'forward' if down == 0 else 'forward + backward'}, d = {d}", fontsize=9)
    axes[0][0].legend(fontsize=7)
    axes[1][0].set_xlabel("tokens of a sequence")
    axes[0][0].set_ylabel("speed, 1 = fastest dense")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
