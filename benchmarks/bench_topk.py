"""Top-k, expand and gather on a GPU: correctness first, then times of every variant, as JSONL rows.

    python benchmarks/bench_topk.py --out benchmarks/results/topk.jsonl [--commit COMMIT] [--grid-seconds 20]

A failing variant is printed and skipped. The exit status is 1 if anything was wrong.
"""

import argparse
import datetime
import functools
import itertools
import json
import random
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sfa.impl import reference
from flash_sfa.impl import triton_codes as codes

FAILED: list[str] = []


# Two other ways to find the entries, for the record: topk rounds of "largest, then remove it", and a bitonic
# sort spread over the threads of a row. Contiguous bf16 rows, d and topk powers of two.


@triton.jit
def _keys(x, row, D: tl.constexpr, NAN: tl.constexpr):
    c = tl.arange(0, D)[None, :]
    bits = tl.load(x + row[:, None] * D + c).to(tl.uint32) & 0xFFFF
    key = tl.minimum((bits << 17) | (bits >> 15), NAN)
    return key | (0x10000 | ((D - 1 - c) << 1)).to(tl.uint32)


@triton.jit
def _rounds(x, values, indices, D: tl.constexpr, K: tl.constexpr, NAN: tl.constexpr, R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    key = _keys(x, row, D, NAN)
    entries = ()
    for _ in tl.static_range(K):
        top = tl.max(key, 1)
        key = tl.where(key == top[:, None], 0, key)
        entries = entries + ((top << 15) | (top >> 17),)
    out = codes._table_of(codes._sort(entries), R)
    j = tl.arange(0, K)[None, :]
    tl.store(values + row[:, None] * K + j, out.to(tl.int16))
    tl.store(indices + row[:, None] * K + j, D - 1 - ((out >> 16) & 0x7FFF).to(tl.int32))


@triton.jit
def _sorted(x, values, indices, D: tl.constexpr, K: tl.constexpr, NAN: tl.constexpr, R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    top = tl.topk(_keys(x, row, D, NAN), K, 1)
    out = tl.sort((top << 15) | (top >> 17), 1, True)
    j = tl.arange(0, K)[None, :]
    tl.store(values + row[:, None] * K + j, out.to(tl.int16))
    tl.store(indices + row[:, None] * K + j, D - 1 - ((out >> 16) & 0x7FFF).to(tl.int32))


def experiment(kernel: Any, tile: int, warps: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(x: Tensor, topk: int, dense_dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        values = x.new_empty(*x.shape[:-1], topk)
        indices = x.new_empty(*x.shape[:-1], topk, dtype=torch.uint8)
        kernel[(x.numel() // x.shape[-1] // tile,)](
            x.view(torch.int16), values.view(torch.int16), indices, D=x.shape[-1], K=topk,
            NAN=(0x7F81 << 17), R=tile, num_warps=warps,
        )  # fmt: skip
        return values, indices, x.new_empty(*x.shape[:-1], 0)

    return run


def tuned(**options: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return lambda x, topk, dense_dims: codes.topk(x, topk, dense_dims, **options)


VARIANTS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "network": tuned(),
    "network_again": tuned(SHARED=False),
    "network_shared": tuned(SHARED=True),
    "select": tuned(kernel="select"),
    "rounds": experiment(_rounds, 32, 4),
    "sorted": experiment(_sorted, 32, 4),
}


# ------------------------------------------------------------------------------------------- correctness


def rows(n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows; among the first, ties, zeros of both signs, infinities and NaNs of several kinds."""
    gen = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(n, d, device="cuda", generator=gen).to(dtype)
    few = x[: min(n, 64)]
    few[:16] = torch.randint(-2, 3, few[:16].shape, device="cuda", generator=gen).to(dtype)
    few[16:18] = 0.0
    few[17:19, ::2] = -0.0
    few[20:22, 1::3] = torch.inf
    few[22:24, ::3] = torch.nan
    few[24:26] = torch.nan
    bits = few.view(torch.int16 if x.element_size() == 2 else torch.int32)
    bits[25:28, ::2] ^= 1
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def differ(x: Tensor, topk: int, dims: tuple[int, ...], run: Callable[..., Any]) -> str:
    """Empty if run, expand and gather agree with the reference."""
    ref, ours = reference.topk(x, topk, dims), run(x, topk, dims)
    if not torch.equal(ref[1], ours[1]):
        return f"indices differ in {int((ref[1] != ours[1]).any(-1).sum())} rows"
    if not same(ref[0], ours[0]) or not same(ref[2], ours[2]):
        return "values or dense differ"
    d = x.shape[-1]
    if not same(reference.expand(*ref, d, dims), codes.expand(*ref, d, dims)):
        return "expand differs"
    wanted, got = reference.gather(x, ref[1], dims), codes.gather(x, ref[1], dims)
    return "" if same(wanted[0], got[0]) and same(wanted[1], got[1]) else "gather differs"


def check(name: str, test: Callable[[], str]) -> bool:
    try:
        problem = test()
    except Exception:
        problem = traceback.format_exc(limit=3)
    if problem:
        FAILED.append(name)
        print(f"WRONG {name}: {problem}", flush=True)
    return not problem


def check_grid(seconds: float) -> str:
    """The grid in random order until the time is over; every compiled kernel costs about a second."""
    grid = list(
        itertools.product(
            (32, 60, 64, 80, 96, 128, 256, 512),
            (1, 2, 7, 8, 16, 32, None),
            (torch.bfloat16, torch.float16, torch.float32),
            ("none", "prefix", "some"),
            ("plain", "qkv", "transposed", "short"),
        )
    )
    random.Random(0).shuffle(grid)
    start, done = time.time(), 0
    for d, topk, dtype, dims_kind, view in grid:
        if time.time() - start > seconds:
            break
        dims = {"none": (), "prefix": tuple(range(d // 8)), "some": (d - 1, 3, d // 2)}[dims_kind]
        x = rows(2 * 150 * 3 * 5, d, dtype, done).view(2, 150, 3, 5, d)
        x = {
            "plain": x,
            "qkv": x[:, :, 1],
            "transposed": x[:, 3:140, 2].transpose(1, 2),
            "short": x[:1, :3, 0],
        }[view]
        name = f"topk d={d} topk={topk} {dtype} dense_dims={dims_kind} {view}"
        check(name, functools.partial(differ, x, topk or d, dims, codes.topk))
        done += 1
    return f"{done} of {len(grid)} cases of the grid in {time.time() - start:.0f} s"


def check_huge() -> str:
    """More than 2**31 elements: the first and the last rows."""
    n = 2**31 // 128 + 1000
    x = torch.randn(n, 128, device="cuda", dtype=torch.bfloat16)
    values, indices, _ = codes.topk(x, 8, ())
    dense = codes.expand(values, indices, values[:, :0], 128, ())
    back = codes.gather(x, indices, ())[0]
    for part in (slice(0, 500), slice(n - 2000, n)):
        ref = reference.topk(x[part], 8, ())
        if not torch.equal(ref[1], indices[part]) or not torch.equal(ref[0], values[part]):
            return f"top-k is wrong in rows {part}"
        if not torch.equal(dense[part], reference.expand(*ref, 128, ())):
            return f"expand is wrong in rows {part}"
        if not torch.equal(back[part], ref[0]):
            return f"gather is wrong in rows {part}"
    return ""


# ------------------------------------------------------------------------------------------------- times


def time_ms(run: Callable[[int], Any], repeats: int, warmup: int = 3) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile; run(i) gets a counter to rotate its buffers, each far above the L2."""
    for i in range(warmup):
        run(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    ms = sorted(begin.elapsed_time(end) for begin, end in events)
    return statistics.median(ms), ms[len(ms) // 5], ms[(4 * len(ms)) // 5]


class Report:
    def __init__(self, out: Path, commit: str) -> None:
        self.out, self.commit, self.copy_gb_s = out, commit, 0.0
        out.parent.mkdir(parents=True, exist_ok=True)

    def measure(
        self, impl: str, variant: str, x: Tensor, topk: int, r: int, moved: int,
        run: Callable[[int], Any], repeats: int = 25, bench: str = "topk", **more: Any,
    ) -> None:  # fmt: skip
        try:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            median, p20, p80 = time_ms(run, repeats)
            peak = torch.cuda.max_memory_allocated() - base
        except Exception:
            FAILED.append(f"time {impl} {variant}")
            print(f"FAILED {impl} {variant}: {traceback.format_exc(limit=3)}", flush=True)
            return
        gb_s = moved / median / 1e6
        if variant == "copy":
            self.copy_gb_s = gb_s
        row = {
            "bench": bench,
            "impl": impl,
            "variant": variant,
            "device": torch.cuda.get_device_name(),
            "dtype": str(x.dtype).removeprefix("torch."),
            "batch": x.shape[0],
            "seqlen_q": x.shape[1],
            "heads": x.shape[2],
            "head_dim": x.shape[3],
            "topk": topk,
            "dense_dims": r,
            "codes": "random",
            "contiguous": x.is_contiguous(),
            "ms_median": round(median, 5),
            "ms_p20": round(p20, 5),
            "ms_p80": round(p80, 5),
            "bytes": moved,
            "gb_s": round(gb_s, 1),
            "copy_gb_s": round(self.copy_gb_s, 1),
            "of_copy": round(gb_s / self.copy_gb_s, 4) if self.copy_gb_s else None,
            "peak_bytes": peak,
            "commit": self.commit,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "gpus": 1,
            **more,
        }
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{bench:7} {impl:16} {variant:22} {row['dtype']:9} d={x.shape[3]:<4} topk={topk:<3} r={r:<3} "
            f"{median:8.4f} ms ({p20:.4f}-{p80:.4f})  {gb_s:7.0f} GB/s  {row['of_copy'] or 0:.2f} of copy",
            flush=True,
        )


def code_bytes(x: Tensor, w: int, r: int) -> int:
    n = x.numel() // x.shape[-1]
    return n * ((w + r) * x.element_size() + w * (1 if x.shape[-1] <= 256 else 2))


def buffers(d: int, dtype: torch.dtype, elements: int) -> list[Tensor]:
    shape = (1, elements // d // 16, 16, d)
    return [torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype) for _ in range(2)]


def rotate(run: Callable[..., Any], *lists: Sequence[Tensor], **options: Any) -> Callable[[int], Any]:
    """The i-th call takes the i-th entry of every list, in turn."""
    return lambda i: run(*(each[i % len(each)] for each in lists), **options)


def torch_topk(x: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    at = x.abs().topk(topk, dim=-1, sorted=False).indices
    return x.gather(-1, at), at


def torch_mask(x: Tensor, topk: int) -> Tensor:
    at = x.abs().topk(topk, dim=-1, sorted=False).indices
    return x * torch.zeros_like(x).scatter_(-1, at, 1.0)


def measure_main(report: Report, elements: int) -> None:
    """bf16 rows of 128: every variant, the baselines, then the chosen variant with more options."""
    x = buffers(128, torch.bfloat16, elements)
    report.measure("copy", "copy", x[0], 0, 0, 2 * x[0].nbytes, rotate(Tensor.copy_, [x[1], x[0]], x))
    x = buffers(128, torch.bfloat16, elements)
    moved = x[0].nbytes + code_bytes(x[0], 8, 0)
    few = rows(4096, 128, torch.bfloat16, 1)
    for name, run in VARIANTS.items():
        if check(f"variant {name}", functools.partial(differ, few, 8, (), run)):
            repeats = 40 if "network" in name else 10
            report.measure("triton", name, x[0], 8, 0, moved, rotate(run, x, topk=8, dense_dims=()), repeats)
    report.measure("torch_topk", "topk+gather", x[0], 8, 0, moved, rotate(torch_topk, x, topk=8), 5)
    report.measure("torch_topk_mask", "topk+scatter", x[0], 8, 0, 2 * x[0].nbytes, rotate(torch_mask, x, topk=8), 5)

    for r, k in ((0, 8), (16, 8), (0, 16)):
        dims = tuple(range(r))
        made = [codes.topk(t, k, dims) for t in x]
        values, indices, dense = (list(part) for part in zip(*made))
        moved = x[0].nbytes + code_bytes(x[0], k, r)
        report.measure("triton", "auto", x[0], k, r, moved, rotate(codes.topk, x, topk=k, dense_dims=dims))
        expand = rotate(codes.expand, values, indices, dense, dim=128, dense_dims=dims)
        report.measure("triton", "expand", x[0], k, r, moved, expand, bench="expand")
        gather = rotate(codes.gather, x, indices, dense_dims=dims)
        report.measure("triton", "gather", x[0], k, r, moved, gather, bench="gather")
    some = tuple(range(0, 128, 8))
    moved = x[0].nbytes + code_bytes(x[0], 8, 16)
    report.measure("triton", "auto_spread_dims", x[0], 8, 16, moved, rotate(codes.topk, x, topk=8, dense_dims=some))
    q = [t[:, : t.shape[1] // 3 * 3].view(1, -1, 3, 16, 128)[:, :, 0] for t in x]
    moved = q[0].numel() * 2 + code_bytes(q[0], 8, 0)
    report.measure("triton", "auto_fused_qkv", q[0], 8, 0, moved, rotate(codes.topk, q, topk=8, dense_dims=()))


def measure_others(report: Report, elements: int) -> None:
    for d, dtype, k in (
        (64, torch.bfloat16, 8),
        (96, torch.bfloat16, 8),
        (128, torch.bfloat16, 1),
        (128, torch.bfloat16, 4),
        (256, torch.bfloat16, 8),
        (256, torch.bfloat16, 16),
        (512, torch.bfloat16, 8),
        (128, torch.float16, 8),
        (128, torch.float32, 8),
        (128, torch.float32, 16),
        (128, torch.bfloat16, 32),
    ):
        x = buffers(d, dtype, elements)
        moved = x[0].nbytes + code_bytes(x[0], k, 0)
        report.measure("triton", "auto", x[0], k, 0, moved, rotate(codes.topk, x, topk=k, dense_dims=()), 15)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--grid-seconds", type=float, default=20.0)
    parser.add_argument("--elements", type=int, default=2**22 * 128, help="of each timed tensor")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    if not args.commit:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        args.commit = git.stdout.strip()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    report = Report(args.out, args.commit)
    for part in (measure_main, measure_others):
        try:
            part(report, args.elements)
        except Exception:
            FAILED.append(part.__name__)
            traceback.print_exc()
    print(check_grid(args.grid_seconds), flush=True)
    torch.cuda.empty_cache()
    check("more than 2**31 elements", check_huge)
    print("all correct" if not FAILED else f"{len(FAILED)} failures: {FAILED}")
    return 1 if FAILED else 0


if __name__ == "__main__":
    raise SystemExit(main())
