"""One decoding step over the sparse cache on a CUDA device, against dense attention over a dense cache.

Fresh random data. A step is the whole call, top-k of q included, replayed from a CUDA graph with a cold L2. Every case
is checked against float64 before it is timed; one wrong result stops the run. ``limit_*`` rows are no measurements:
bytes over the copy bandwidth of this run.
"""

import argparse
import datetime
import functools
import json
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import SparseKVCache, sfa_attention_with_kvcache, topk_sparsify
from ..cli import UsageError
from ..impl import cuda_decode, nvrtc
from .timing import time_ms

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...] = (131072,)
    hq: int = 32
    hkv: int = 32
    d: int = 128
    sq: int = 1
    topk: int = 8
    dense_dims: int = 0
    page_size: int = 256
    v_dtype: torch.dtype = BF16
    tolerance: float = 0.0
    window: tuple[int, int] = (-1, -1)
    dense: bool = True  # time the dense baselines, too


def ragged(n: int) -> tuple[int, ...]:
    rng = random.Random(0)
    return tuple(rng.randint(1024, 32768) for _ in range(n))


LENGTHS = ragged(64)
CASES = {
    case.name: case
    for case in (
        Case("mha_128"),
        Case("mha_128_int8", v_dtype=torch.int8),
        Case("mha_128_fp8", v_dtype=torch.float8_e4m3fn),
        Case("gqa_4_int8", hkv=8, v_dtype=torch.int8),
        Case("mha_128_dense16_int8", dense_dims=16, v_dtype=torch.int8),
        Case("mha_256", hq=16, hkv=16, d=256),
        Case("gqa_4", hkv=8),
        Case("mha_128_dense16", dense_dims=16),
        Case("mha_128_16k", lengths=(16384,)),
        Case("gqa_4_16k", hkv=8, lengths=(16384,)),
        Case("mha_128_sq4", sq=4),
        Case("gqa_8", hq=64, hkv=8),
        Case("gqa_4_page16", hkv=8, page_size=16),
        Case("ragged_page16", LENGTHS, hkv=8, page_size=16, dense=False),
        Case("equal_page256", (sum(LENGTHS) // 64,) * 64, hkv=8),
        Case("mha_128_window", window=(4095, 0), dense=False),
    )
}
QUICK = ("mha_128", "mha_128_int8", "mha_256", "gqa_4", "gqa_4_16k")


def fill(case: Case, spare: int = 0) -> SparseKVCache:
    """A cache of the case's lengths, with room for `spare` pages more."""
    pages = sum(-(-n // case.page_size) for n in case.lengths) + spare
    cache = SparseKVCache(
        num_kv_heads=case.hkv, head_dim=case.d, topk=case.topk, dense_dims=case.dense_dims,
        max_tokens=pages * case.page_size, page_size=case.page_size, dtype=BF16, v_dtype=case.v_dtype, device="cuda",
    )  # fmt: skip
    random.Random(0).shuffle(cache._layers[0].free_pages)
    for n in case.lengths:
        (seq_id,) = cache.alloc(1).tolist()
        for start in range(0, n, 16384):
            count = min(16384, n - start)
            k, v = (torch.randn(1, count, case.hkv, case.d, device="cuda", dtype=BF16) for _ in range(2))
            cache.append(k, v, seq_ids=[seq_id])
    return cache


def check(case: Case, cache: SparseKVCache, q: Tensor) -> float:
    """Error of the call over its budget (design rule), on a few rows and heads; above 1 is wrong."""
    out, lse = sfa_attention_with_kvcache(
        q, cache, window_size=case.window, tolerance=case.tolerance, return_lse=True, impl="cuda"
    )
    code = topk_sparsify(q, case.topk, dense_dims=case.dense_dims).to_dense()
    group, worst = case.hq // case.hkv, 0.0
    for row in {0, len(case.lengths) // 2, len(case.lengths) - 1}:
        keys, v = cache.gather(0, row)
        n = v.shape[0]
        visible = torch.arange(n, device="cuda") <= torch.arange(n - case.sq, n, device="cuda")[:, None]
        if case.window[0] >= 0:
            first = torch.arange(n - case.sq, n, device="cuda")[:, None] - case.window[0]
            visible &= torch.arange(n, device="cuda") >= first
        for head in {0, case.hkv - 1}:
            key = keys.to_dense()[:, head]
            query, value = code[row, :, head * group], v[:, head].to(BF16)
            scores = (query.double() @ key.double().T * case.d**-0.5).masked_fill(~visible, -torch.inf)
            exact = scores.softmax(-1) @ v[:, head].double()
            with sdpa_kernel(SDPBackend.MATH):
                plain = F.scaled_dot_product_attention(
                    query[None, None], key[None, None], value[None, None], attn_mask=visible
                )
            error = (out[row, :, head * group].double() - exact).abs().max()
            budget = 2 * (plain[0, 0].double() - exact).abs().max() + torch.finfo(BF16).eps * exact.abs().max()
            wanted = scores.logsumexp(-1)
            off = ((lse[row, head * group].double() - wanted).abs() / (1e-5 * (1 + wanted.abs()))).max()
            worst = max(worst, float(error / budget), float(off))
    return worst


def graphed(fn: Callable[[], Any]) -> Callable[[], None]:
    """A replay of fn; its memory stays alive with the graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = fn()

    def replay(graph: Any = graph, kept: Any = kept) -> None:
        graph.replay()

    return replay


def moved_bytes(case: Case, cache: SparseKVCache, rows_read: int) -> int:
    """What a step reads: codes of all visible tokens, the V rows it reads, and a running sum a block."""
    tokens = sum(min(n, case.window[0] + 1) if case.window[0] >= 0 else n for n in case.lengths) * case.hkv
    code = cache.width * (2 + (1 if case.d <= 256 else 2)) + 2 * case.dense_dims
    sums = 0 if case.dense_dims else tokens // 128 * case.d * 4
    scale = 2 if cache.v_dtype.itemsize == 1 else 0
    return tokens * code + rows_read * (case.d * cache.v_dtype.itemsize + scale) + sums


def dense_step(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


class Report:
    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.commit, self.repeats = args.out / "decode.jsonl", args.commit, args.repeats
        args.out.mkdir(parents=True, exist_ok=True)
        self.out.unlink(missing_ok=True)
        self.copy = self.copy_bandwidth()
        print(f"copy: {self.copy / 1e12:.3f} TB/s", flush=True)

    @staticmethod
    def copy_bandwidth() -> float:
        x, y = (torch.randn(2**29, device="cuda", dtype=torch.float32) for _ in range(2))
        return 2 * x.nbytes / time_ms(lambda: y.copy_(x), repeats=10)["ms_median"] * 1e3

    def row(self, case: Case, impl: str, times: dict[str, float], nbytes: int, **more: Any) -> None:
        row = {
            "bench": "decode", "case": case.name, "impl": impl, "device": torch.cuda.get_device_name(),
            "dtype": "bfloat16", "batch": len(case.lengths), "heads": case.hq, "kv_heads": case.hkv,
            "seqlen_q": case.sq, "seqlen_k": max(case.lengths), "tokens": sum(case.lengths), "head_dim": case.d,
            "v_head_dim": case.d, "causal": True, "window": case.window[0], "codes": "random",
            **{name: round(value, 5) for name, value in times.items()}, "bytes": nbytes,
            "gb_s": round(nbytes / times["ms_median"] / 1e6, 1), "copy_gb_s": round(self.copy / 1e9, 1),
            "commit": self.commit, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__, "gpus": 1, **more,
        }  # fmt: skip
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{case.name:17} {impl:22} {times['ms_median']:8.4f} ms ({times['ms_p20']:.4f}-{times['ms_p80']:.4f}) "
            f"{row['gb_s'] / 1e3:6.3f} TB/s  {more.get('overlap', '')}",
            flush=True,
        )

    def limit(self, case: Case, impl: str, nbytes: int) -> None:
        ms = nbytes / self.copy * 1e3
        self.row(case, impl, {"ms_median": ms, "ms_p20": ms, "ms_p80": ms}, nbytes)

    def ours(self, case: Case) -> float:
        cache = fill(case)
        q = torch.randn(len(case.lengths), case.sq, case.hq, case.d, device="cuda", dtype=BF16)
        worst = check(case, cache, q)
        if not worst <= 1.0:
            raise UsageError(f"wrong result: {case.name} is off by {worst:.2f} times its budget; nothing more is timed")
        options: dict[str, Any] = {"window_size": case.window, "tolerance": case.tolerance, "impl": "cuda"}
        _, stats = sfa_attention_with_kvcache(q, cache, return_stats=True, **options)
        rows_read = int(stats["rows_read"].sum())
        nbytes = moved_bytes(case, cache, rows_read)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sfa_attention_with_kvcache(q, cache, **options)
        peak = torch.cuda.max_memory_allocated() - before
        times = time_ms(graphed(lambda: sfa_attention_with_kvcache(q, cache, **options)), repeats=self.repeats)
        more = {
            "topk": case.topk, "dense_dims": case.dense_dims, "tolerance": case.tolerance,
            "v_dtype": str(case.v_dtype).removeprefix("torch."), "page_size": case.page_size,
            "overlap": round(rows_read / (sum(case.lengths) * case.hkv), 4), "max_err": round(worst, 4),
            "peak_bytes": peak, "cache_of_dense": round(cache.nbytes / cache.dense_nbytes, 4),
        }  # fmt: skip
        self.row(case, "cuda", times, nbytes, **more)
        self.limit(case, "limit_ours", nbytes)
        return times["ms_median"]

    def dense(self, case: Case) -> float:
        """The fastest dense step, in milliseconds."""
        b, n = len(case.lengths), case.lengths[0]
        q = torch.randn(b, case.hq, case.sq, case.d, device="cuda", dtype=BF16)
        k, v = (torch.randn(b, case.hkv, n, case.d, device="cuda", dtype=BF16) for _ in range(2))
        nbytes = k.nbytes + v.nbytes
        mask: dict[str, Any] = (
            {} if case.sq == 1 else {"attn_mask": torch.ones(case.sq, n, device="cuda").tril(n - case.sq).bool()}
        )
        group = case.hq // case.hkv
        variants: dict[str, Callable[[], Tensor]] = {}
        for name, backend in (
            ("dense_cudnn", SDPBackend.CUDNN_ATTENTION),
            ("dense_fa2", SDPBackend.FLASH_ATTENTION),
            ("dense_efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            # Flash takes no mask: for several queries it skips the causal edge, which costs it nothing.
            options = mask if backend != SDPBackend.FLASH_ATTENTION else {}

            variants[name] = functools.partial(dense_step, backend, q, k, v, options)
            if group > 1 and case.sq == 1:  # the heads of a group as query rows, so that they share one read
                rows = q.view(b, case.hkv, group, case.d)
                variants[f"{name}_grouped"] = functools.partial(dense_step, backend, rows, k, v, options)
        best = float("inf")
        for name, step in variants.items():
            try:
                times = time_ms(graphed(step), repeats=self.repeats)
            except Exception as error:
                torch.cuda.synchronize()
                print(f"{case.name:17} {name:22} does not run: {str(error).splitlines()[0][:90]}", flush=True)
                continue
            self.row(case, name, times, nbytes)
            best = min(best, times["ms_median"])
        self.limit(case, "limit_dense", nbytes)
        self.limit(case, "limit_dense_fp8", nbytes // 2)
        return best

    def append(self, v_dtype: torch.dtype = BF16) -> None:
        """One token of 64 sequences, 32 heads: a replay that advances the lengths on the device."""
        case = Case("append_1", lengths=(1000,) * 64, page_size=128, v_dtype=v_dtype)
        cache = fill(case, spare=256)
        cache.reserve(2 * self.repeats + 60)
        k, v = (torch.randn(64, 1, case.hkv, case.d, device="cuda", dtype=BF16) for _ in range(2))
        cache.append(k, v)
        want = topk_sparsify(k[5, 0], case.topk)
        code, stored = cache.gather(0, 5)
        off = v_dtype == BF16 and not torch.equal(stored[-1], v[5, 0])
        if off or not torch.equal(code.indices[-1], want.indices) or not torch.equal(code.values[-1], want.values):
            raise UsageError("wrong result: the append kernel stores something else than topk_sparsify")
        times = time_ms(graphed(lambda: cache.append(k, v)), repeats=self.repeats)
        code_bytes = cache.width * 3 + case.d * v_dtype.itemsize
        nbytes = 64 * case.hkv * (2 * case.d * 2 + code_bytes + 8 * case.d)
        more = {"bench": "append", "topk": case.topk, "v_dtype": str(v_dtype).removeprefix("torch.")}
        self.row(case, "cuda", times, nbytes, **more)

    def sweep(self, case: Case) -> None:
        """The step over the kernel's settings, beside those that `configure` picks."""
        cache = fill(case)
        q = torch.randn(len(case.lengths), case.sq, case.hq, case.d, device="cuda", dtype=BF16)
        base = cuda_decode.configure(cache, case.sq * case.hq // case.hkv)
        settings: list[dict[str, int]] = [{}, {"CTAS": base.CTAS - 1}, {"CTAS": base.CTAS + 1}]
        settings += [{"UNROLL": n} for n in (4, 6, 8) if n != base.UNROLL]
        settings += [{"CTAS": base.CTAS + 1, "UNROLL": 4}, {"WARPS": 2, "CTAS": 2 * base.CTAS}]
        if case.v_dtype != BF16:
            settings += [{"VEC": 8, "UNROLL": 8}, {"VEC": 16, "CTAS": 3}, {"VEC": 16, "CTAS": 4, "UNROLL": 8}]
        if max(case.lengths) <= 16384:
            settings += [{"span": 2}, {"span": 2, "WARPS": 2}]
        wanted = None
        for setting in settings:
            options: dict[str, Any] = dict(setting)

            def call(options: dict[str, Any] = options) -> Any:
                window, scale = (-1, 0), case.d**-0.5
                return cuda_decode.attend(
                    q, cache, 0, list(cache._ids), window, scale, False, False, topk=case.topk, **options
                )

            try:
                out = call()[0].float()
                wanted = out if wanted is None else wanted
                off = float((out - wanted).abs().max() / wanted.abs().max())
                times = time_ms(graphed(call), repeats=self.repeats)
            except Exception as error:
                torch.cuda.synchronize()
                print(f"{case.name} {setting}: {str(error).splitlines()[0][:90]}", flush=True)
                continue
            print(f"{case.name:13} {setting!s:28} {times['ms_median']:.4f} ms, off by {off:.1e}", flush=True)


def run(args: argparse.Namespace) -> int:
    """Time every case, write decode.jsonl and decode.png, print a table; 1 if a case failed."""
    if (reason := nvrtc.missing(torch.cuda.current_device())) is not None:
        raise UsageError(f"the decode kernel is not available: {reason}")
    if unknown := set(args.cases or ()) - set(CASES):
        raise UsageError(f"--cases: unknown {sorted(unknown)}; known: {', '.join(CASES)}")
    torch.manual_seed(0)
    started, failed = time.time(), 0
    speeds: dict[str, float] = {}
    with torch.no_grad():
        report = Report(args)
        for name in args.cases or (QUICK if args.quick else CASES):
            try:
                ours = report.ours(CASES[name])
                if CASES[name].dense:
                    speeds[name] = report.dense(CASES[name]) / ours
                    print(
                        f"{name:17} {speeds[name]:.2f}x the fastest dense  [{time.time() - started:.0f} s]", flush=True
                    )
            except UsageError:
                raise
            except Exception:  # one case that does not run must not end the others
                failed += 1
                traceback.print_exc()
            torch.cuda.empty_cache()
        report.append()
        report.append(torch.int8)
        if args.sweep:
            for name in args.cases or (*QUICK, "gqa_4_int8", "mha_128_dense16_int8"):
                report.sweep(CASES[name])
                torch.cuda.empty_cache()
    plot(speeds, args.out / "decode.png")
    print(f"rows: {report.out}; {time.time() - started:.0f} s, {failed} failures")
    return 1 if failed else 0


def plot(speeds: dict[str, float], path: Path) -> None:
    """A bar a case: times as fast as the fastest dense step; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'flash-sfa[demo]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(6, 0.8 + 0.35 * len(speeds)))
    axis.barh(list(speeds)[::-1], list(speeds.values())[::-1])
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlabel("decode speed, 1 = fastest dense on the same GPU")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
