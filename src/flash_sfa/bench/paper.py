"""The grid of the paper's kernel table (arXiv 2603.22300, Table 9) on this machine's GPU, with what its figures hide.

Forward, bf16, random data, B = 8 sequences of H = 8 heads (B = 1 at 128k), full as the paper's figures imply and
causal; top-k of q and k is inside the timed call, and timed alone. Baselines: dense attention without tensor cores, as
the paper has it (``dense_fma``, from the benchmark folder of the repository); cuDNN; FlashAttention-2; above d = 256,
where neither takes the call, ``dense_blocks``: bf16 matrix products over blocks of queries, softmax between.

``--models`` adds random models of the shapes that the paper runs, GPT-2 124M and Qwen3-0.6B: prefill, further tokens.
A row that is in the file already, of the same device and commit, is not measured again, so a stopped run goes on.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import SparseCode, SparseKVCache, select_impl, sfa_attention, topk_sparsify
from ..cli import UsageError
from ..impl.intersect import by_feature
from .timing import time_ms

BF16 = torch.bfloat16
HEADS = 8
LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536)
LONGEST = 131072
DENSE = ("dense_fma", "dense_cudnn", "dense_fa2", "dense_blocks")
SFA = ("intersect", "triton", "auto")
# Width of q and k: (width of v, entries kept).
SHAPES = {64: (64, (8,)), 128: (128, (4, 8, 16, 32)), 256: (256, (4, 8)), 512: (128, (32,)), 1024: (128, (32,))}
_FMA = Path(__file__).resolve().parents[3] / "benchmarks" / "dense_fma.py"
_SOFTMAX_FLOPS = 7  # a pair, as the paper counts


@dataclass(frozen=True)
class Case:
    impl: str
    d: int
    dv: int
    topk: int | None  # None: dense
    n: int
    batch: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Pairs of query and key that count, over all heads."""
        return self.batch * HEADS * (self.n * (self.n + 1) // 2 if self.causal else self.n * self.n)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The grid, short sequences first, so that a stopped run has whole lines."""
    lengths = args.lengths or ((1024, 4096, 16384) if args.quick else (*LENGTHS, LONGEST))
    for n in lengths:
        batch = args.batch or (1 if n >= LONGEST else 8)
        for d, (dv, topks) in SHAPES.items():
            if d not in args.dims:
                continue
            for causal in (False,) if args.quick else (False, True):
                for impl in args.impls:
                    if impl in DENSE:
                        if (impl == "dense_blocks") == (d > 256):
                            yield Case(impl, d, dv, None, n, batch, causal)
                        continue
                    few = [topk for topk in topks if topk in (8, 16)] or topks
                    for topk in few if args.quick else topks:
                        if impl != "triton" or d <= 256:
                            yield Case(impl, d, dv, topk, n, batch, causal)


def accounting(d: int, dv: int, topk: int) -> dict[str, float]:
    """FLOPs a pair and cache bytes a token and kv head as the paper counts them (its Table 6, Appendix J)."""
    edges = topk * topk / d
    dense, sparse = 2 * d + 2 * dv + _SOFTMAX_FLOPS, 2 * edges + 2 * dv + _SOFTMAX_FLOPS
    index = 1 if d <= 256 else 2
    kv_dense, kv_sparse = 2 * (d + dv), topk * (2 + index) + 2 * dv
    return {
        "paper_edges": edges, "paper_flops_dense": dense, "paper_flops": sparse,
        "paper_flops_saved": 1 - sparse / dense, "paper_kv_dense": kv_dense, "paper_kv": kv_sparse,
        "paper_kv_saved": 1 - kv_sparse / kv_dense,
    }  # fmt: skip


def edges(q: SparseCode, k: SparseCode) -> float:
    """Common features of a query and a key, the mean over all pairs."""
    total = 0.0
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            counts = [torch.bincount(x.indices[b, :, h].flatten().long(), minlength=x.dim).double() for x in (q, k)]
            total += float(counts[0] @ counts[1])
    return total / (q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])


def overlap(q: SparseCode, k: SparseCode) -> float:
    """Share of pairs with a common feature, of the first 1024 queries and keys of a head."""
    members = [torch.zeros(min(1024, x.shape[1]), x.dim, device=x.device) for x in (q, k)]
    for rows, x in zip(members, (q, k)):
        rows.scatter_(1, x.indices[0, : len(rows), 0].long(), 1.0)
    return float((members[0] @ members[1].T > 0).double().mean())


def dense_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Dense attention by bf16 matrix products over blocks of queries; for widths that no fused kernel takes."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    n, out = q.shape[2], torch.empty_like(v)
    block = max(128, min(n, 2**28 // (q.shape[0] * q.shape[1] * n)))
    for start in range(0, n, block):
        end = min(start + block, n)
        seen = end if causal else n
        scores = (q[:, :, start:end] * q.shape[-1] ** -0.5) @ k[:, :, :seen].transpose(-1, -2)
        if causal:
            rows = torch.arange(start, end, device=q.device)[:, None]
            scores.masked_fill_(torch.arange(seen, device=q.device) > rows, -torch.inf)
        out[:, :, start:end] = scores.softmax(-1) @ v[:, :, :seen]
    return out.transpose(1, 2)


def dense_sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


@functools.cache
def _dense_fma() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dense_fma", _FMA)
    if spec is None or spec.loader is None or not _FMA.exists():
        raise RuntimeError("dense_fma is in the benchmarks folder of the repository, which is not here")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The call of a case on q, k, v."""
    if case.impl == "dense_fma":
        return lambda q, k, v: _dense_fma().attention(q, k, v, case.causal)
    if case.impl == "dense_blocks":
        return functools.partial(dense_blocks, causal=case.causal)
    if case.impl in DENSE:
        cudnn = case.impl == "dense_cudnn"
        backend = SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION
        return functools.partial(dense_sdpa, backend, causal=case.causal)
    return functools.partial(sfa_attention, topk=case.topk, causal=case.causal, impl=case.impl)


def check(case: Case) -> float:
    """The largest error of a call of this kind on a small shape; over the budget (CONTRIBUTING.md) ends the run."""
    gen = torch.Generator(device="cuda").manual_seed(0)
    q, k = (torch.randn(2, 389, 2, case.d, device="cuda", dtype=BF16, generator=gen) for _ in range(2))
    v = torch.randn(2, 389, 2, case.dv, device="cuda", dtype=BF16, generator=gen)
    ours = function(case)(q, k, v)
    if case.topk is not None:
        q, k = (topk_sparsify(x, case.topk).to_dense() for x in (q, k))
    exact = dense_sdpa(SDPBackend.MATH, q.double(), k.double(), v.double(), case.causal)
    math = dense_sdpa(SDPBackend.MATH, q, k, v, case.causal)
    budget = 2 * (math.double() - exact).abs().max() + torch.finfo(BF16).eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    # dense_blocks rounds scores to bf16, as a plain user would; it is a baseline, so it may be less exact.
    if not error <= (8 if case.impl == "dense_blocks" else 1) * budget:
        raise UsageError(f"wrong result: {case}: error {error:.2e} over the budget {budget:.2e}; nothing more is timed")
    return float(error)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a case."""
    row: dict[str, Any] = {
        "bench": "paper", "impl": case.impl, "device": torch.cuda.get_device_name(), "dtype": "bfloat16",
        "batch": case.batch, "heads": HEADS, "kv_heads": HEADS, "seqlen_q": case.n, "seqlen_k": case.n,
        "head_dim": case.d, "v_head_dim": case.dv, "causal": case.causal, "tolerance": 0, "gpus": 1,
        "commit": args.commit, "torch": torch.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    q, k = (torch.randn(case.batch, case.n, HEADS, case.d, device="cuda", dtype=BF16) for _ in range(2))
    v = torch.randn(case.batch, case.n, HEADS, case.dv, device="cuda", dtype=BF16)
    flops = case.pairs * (2 * case.d + 2 * case.dv + _SOFTMAX_FLOPS)
    if case.topk is not None:
        code_q, code_k = (topk_sparsify(x, case.topk) for x in (q, k))
        found = edges(code_q, code_k)
        row |= {"topk": case.topk, "dense_dims": 0, "codes": "random", "overlap": round(overlap(code_q, code_k), 4)}
        row |= {"edges": round(found, 4), **accounting(case.d, case.dv, case.topk)}
        row["kernel"] = select_impl(q, k, v, topk=case.topk, causal=case.causal, impl=case.impl)["forward"]
        if row["kernel"] == "intersect":
            flops = int(case.pairs * (2 * found + 2 * case.dv + _SOFTMAX_FLOPS))
        del code_q, code_k
        topk = time_ms(lambda: (topk_sparsify(q, case.topk or 1), topk_sparsify(k, case.topk or 1)), repeats=5)
        row["topk_ms"] = round(topk["ms_median"], 4)
    row["max_err"] = check(case)
    call = functools.partial(function(case), q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    took = time.perf_counter() - started
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    repeats = args.repeats if took < 1.0 else max(5, min(args.repeats, 5))
    row |= {name: round(ms, 4) for name, ms in time_ms(call, repeats=repeats, warmup=2 if took < 1.0 else 1).items()}
    row["flops"] = flops
    row["tflops"] = round(flops / row["ms_median"] / 1e9, 2)
    return row


def cache_rows(args: argparse.Namespace, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Measured bytes of a cache of 16k tokens beside the paper's count, by shape; of keys by feature; and edges."""
    n = 16384
    for d, (dv, topks) in SHAPES.items():
        for topk in topks:
            if d not in args.dims:
                continue
            cache = SparseKVCache(
                num_kv_heads=HEADS, head_dim=d, v_head_dim=dv, topk=topk, max_tokens=n, dtype=BF16, device=device
            )
            cache.alloc(1)
            k, v = (torch.randn(1, n, HEADS, width, device=device, dtype=BF16) for width in (d, dv))
            cache.append(k, v)
            code = topk_sparsify(k, topk)
            pages = by_feature(code, page=256, group=1)
            found = edges(topk_sparsify(torch.randn_like(k), topk), code)
            tokens = n * HEADS
            yield {
                "bench": "paper_cache", "impl": "cache", "dtype": "bfloat16", "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if device == "cuda" else device, "edges": round(found, 4),
                "head_dim": d, "v_head_dim": dv, "topk": topk, "seqlen_k": n, "kv_heads": HEADS,
                "kv": round(cache.nbytes / tokens, 2), "kv_dense": round(cache.dense_nbytes / tokens, 2),
                "kv_saved": round(1 - cache.nbytes / cache.dense_nbytes, 4),
                "feature_bytes": round(sum(x.nbytes for x in pages) / tokens, 2), **accounting(d, dv, topk),
                "commit": args.commit, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }  # fmt: skip


def model_config(name: str, n: int) -> tuple[Any, int]:
    """The shape of a model that the paper runs, for n tokens, and its topk."""
    import transformers

    if name == "gpt2":
        return transformers.GPT2Config(n_positions=n + 64), 8
    return transformers.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=n + 64, tie_word_embeddings=True,
    ), 16  # fmt: skip


def time_model(model: Any, new_cache: Callable[[], Any], ids: Tensor, steps: int = 16) -> dict[str, float]:
    """Milliseconds of a forward pass over ids that fills a cache, and of a further token (median, p20, p80)."""

    def timed(tokens: Tensor, cache: Any) -> float:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e3

    warm = new_cache()
    timed(ids[:, :256], warm)
    timed(ids[:, :1], warm)
    del warm
    prefill = []
    for _ in range(2):
        cache = None  # the memory of the first before the second
        cache = new_cache()
        prefill.append(timed(ids, cache))
    times = sorted(timed(ids[:, :1], cache) for _ in range(steps))
    return {
        "prefill_ms": round(min(prefill), 2), "ms_median": round(statistics.median(times), 3),
        "ms_p20": round(times[int(0.2 * (steps - 1))], 3), "ms_p80": round(times[int(0.8 * (steps - 1))], 3),
    }  # fmt: skip


def model_row(name: str, impl: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """A random model of the paper's shape on n tokens: plain eager Transformers, for both sides."""
    import transformers

    from ..integrations.transformers import SFACache, enable_sfa

    config, topk = model_config(name, n)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation="sdpa")
    model = model.to("cuda").eval()
    row: dict[str, Any] = {
        "bench": "paper_model", "impl": impl, "model": name, "device": torch.cuda.get_device_name(),
        "dtype": "bfloat16", "batch": 1, "seqlen_q": n, "seqlen_k": n, "causal": True, "codes": "random weights",
        "transformers": transformers.__version__, "torch": torch.__version__, "commit": args.commit, "gpus": 1,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if impl == "auto":
        enable_sfa(model, topk=topk)
        row["topk"] = topk
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(config.vocab_size, (1, n), device="cuda")
    new_cache = (lambda: SFACache(model.config)) if impl == "auto" else (lambda: transformers.DynamicCache())
    row |= time_model(model, new_cache, ids)
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same measurement."""
    names = (
        "bench", "impl", "model", "device", "commit", "batch", "seqlen_q", "seqlen_k", "head_dim", "v_head_dim",
        "causal",
    )  # fmt: skip
    # A model's topk goes with its name, and only its SFA rows have one.
    return (*(row.get(name) for name in names), None if "model" in row else row.get("topk"))


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed run left unfinished is dropped from it."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines[:-1]))
        lines.pop()
    return [json.loads(line) for line in lines]


def run(args: argparse.Namespace) -> int:
    """Time what is missing in OUT/paper.jsonl, print a line a case."""
    if unknown := set(args.impls) - {*DENSE, *SFA}:
        raise UsageError(f"--impls: unknown {sorted(unknown)}; known: {', '.join((*DENSE, *SFA))}")
    if unknown := set(args.dims) - set(SHAPES):
        raise UsageError(f"--dims: unknown {sorted(unknown)}; known: {', '.join(map(str, SHAPES))}")
    if unknown := set(args.models) - {"gpt2", "qwen3"}:
        raise UsageError(f"--models: unknown {sorted(unknown)}; known: gpt2, qwen3")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "paper.jsonl"
    done = _rows(file) if args.commit != "unknown" else []  # rows of an unknown source may be of another one
    # A baseline that does not run here will not the next time either; a failure of ours is tried again.
    known = {key(row) for row in done if "error" not in row or row["impl"].startswith("dense")}
    device = torch.cuda.get_device_name()
    started, failed = time.time(), 0

    def write(row: dict[str, Any]) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    torch.manual_seed(0)
    with torch.no_grad():
        if not any(row["bench"] == "paper_cache" and row["commit"] == args.commit for row in done):
            for row in cache_rows(args):
                write(row)
        todo: list[tuple[dict[str, Any], str, Callable[[], dict[str, Any]]]] = []
        common = {"device": device, "commit": args.commit}
        for case in cases(args):
            row = common | {
                "bench": "paper", "impl": case.impl, "batch": case.batch, "seqlen_q": case.n, "seqlen_k": case.n,
                "head_dim": case.d, "v_head_dim": case.dv, "topk": case.topk, "causal": case.causal,
            }  # fmt: skip
            sees = "causal" if case.causal else "full"
            name = f"{case.impl:13} d={case.d:<4} topk={case.topk!s:4} n={case.n:<6} {sees:6}"
            todo.append((row, name, functools.partial(measure, case, args)))
        for model in args.models:
            for impl in ("dense_sdpa", "auto"):
                for n in args.lengths or (32768, LONGEST):
                    row = common | {
                        "bench": "paper_model", "impl": impl, "model": model, "batch": 1, "seqlen_q": n,
                        "seqlen_k": n, "causal": True,
                    }  # fmt: skip
                    run_model = functools.partial(model_row, model, impl, n, args)
                    todo.append((row, f"{impl:13} {model} n={n}", run_model))
        for row, name, call in todo:
            if key(row) in known:
                continue
            if args.seconds is not None and time.time() - started > args.seconds:
                print(f"stopped after {args.seconds} s; the same command goes on")
                break
            try:
                row = call()
                rate = (
                    f"{row['tflops']:7.1f} TFLOP/s" if "tflops" in row else f"a token, prefill {row['prefill_ms']} ms"
                )
                print(f"{name} {row['ms_median']:10.3f} ms {rate}  [{time.time() - started:.0f} s]", flush=True)
            except UsageError:
                raise
            except Exception as error:  # a baseline that does not run here is a row that says so
                torch.cuda.synchronize()
                failed += not row["impl"].startswith("dense")
                row["error"] = f"{type(error).__name__}: {error}"[:300]
                print(f"{name} {row['error'][:90]}")
            write(row)
            torch.cuda.empty_cache()
    print(f"rows: {file}; {time.time() - started:.0f} s, {failed} failures")
    return 1 if failed else 0
