"""Prototype of by-feature pages for decoding: layout, launcher, check against float64, timing. See docs/by_feature.md.

``python benchmarks/by_feature/by_feature.py --host`` checks the kernel's source compiled for the CPU; without
``--host`` it checks and times on a CUDA device and writes DIR/by_feature.jsonl.
"""

import argparse
import ctypes
import dataclasses
import datetime
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sfa import topk_sparsify
from flash_sfa.bench.decode import Report, graphed
from flash_sfa.bench.timing import time_ms
from flash_sfa.impl import nvrtc

SOURCE = Path(__file__).with_name("by_feature.cu")
HOST = Path(__file__).parents[2] / "tests" / "host_cuda.h"
BF16, LOG2E = torch.bfloat16, 1.4426950408889634
_POINTERS = (
    "q", "ids", "values", "ends", "v", "v_scale", "sums", "pages", "part_o", "part_ml", "weighed", "out",
    "lse", "rows_read",
)  # fmt: skip


class Params(ctypes.Structure):
    """The kernels' argument, as ``struct Params`` in by_feature.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in ("scale", "tolerance")),
        *((name, ctypes.c_int) for name in ("hq", "hkv", "used", "splits")),
    ]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for: the macros of by_feature.cu. STAGE is in pieces of 16 bytes."""

    D: int = 128
    W: int = 8
    WQ: int = 8
    DV: int = 128
    PAGE: int = 256
    ROWS: int = 1
    V: int = 0
    WARPS: int = 4
    UNROLL: int = 8
    STAGE: int = 160
    CTAS: int = 4
    STAGED: int = 1
    TOL: int = 0

    def macros(self) -> list[tuple[str, str]]:
        return [(f"SFA_{name}", str(value)) for name, value in dataclasses.asdict(self).items()]

    @property
    def names(self) -> tuple[str, ...]:
        return ("weigh", "by_feature_tolerance", "combine") if self.TOL else ("by_feature", "combine")

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a thread block, a little rounded up."""
        row = 16 * 32 // (self.DV * (1 if self.V else 2) // 16)  # 16 times the V rows a warp loads at once
        queue = self.PAGE + 2 * self.UNROLL * row // 16
        lists = self.WQ * self.ROWS
        own = self.ROWS * self.PAGE * 4 + self.STAGE * 16 + lists * 16 + queue * (4 + 4 * self.ROWS)
        own = (own + 15) // 16 * 16 + (self.UNROLL * 512 if self.STAGED else 16)
        rest = self.WARPS * self.ROWS * 8 + 12 * lists + 4 * lists + 4 * self.D + 4 + 4 * self.ROWS
        return self.WARPS * (own + 16) + (rest + 31) // 16 * 16


@dataclasses.dataclass
class Pages:
    """A sequence's pages, stored by feature, in a pool of which ``table`` names those in use.

    ids uint8 and values bf16 (pages, hkv, page * w); ends int16 bits (pages, hkv, d), where list u is entries
    ends[u - 1] to ends[u]; v (pages, hkv, page, dv) bf16 or int8 with scale (pages, hkv, page) bf16; sums fp32
    (pages, hkv, dv).
    """

    ids: Tensor
    values: Tensor
    ends: Tensor
    v: Tensor
    scale: Tensor
    sums: Tensor
    table: Tensor

    def rows(self) -> Tensor:
        """V as it is stored, (pages, hkv, page, dv) in fp32."""
        return self.v.float() * self.scale.float()[..., None] if self.v.dtype == torch.int8 else self.v.float()


def seal(values: Tensor, indices: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, values, ends of pages of row-major codes (..., page, w): the same bytes, sorted by (feature, token)."""
    *shape, page, w = values.shape
    features = indices.reshape(-1, page * w).long()
    order = features.sort(dim=1, stable=True).indices
    ids = (order // w).to(torch.uint8)
    counts = torch.zeros(features.shape[0], d, dtype=torch.int64, device=values.device)
    counts.scatter_add_(1, features, torch.ones_like(features))
    ends = counts.cumsum(1).to(torch.int16)
    listed = values.reshape(-1, page * w).gather(1, order)
    return ids.reshape(*shape, -1), listed.reshape(*shape, -1), ends.reshape(*shape, d)


def decay(d: int, skew: float, device: str) -> Tensor:
    return torch.exp(-skew / d * torch.arange(d, device=device)).to(BF16)


def random_pages(
    n: int, hkv: int, config: Config, device: str, *, skew: float = 0.0
) -> tuple[Pages, tuple[Tensor, Tensor]]:
    """Pages of n random tokens, and their codes row by row: values and indices (pages, hkv, page, w).

    Feature u of a key is scaled by e^(-skew u / d): 2 gives the overlap of trained codes.
    """
    page, d, dv = config.PAGE, config.D, config.DV
    count, parts = n // page, []
    for start in range(0, count, 64):
        size = min(64, count - start)
        k = torch.randn(size, hkv, page, d, device=device, dtype=BF16) * decay(d, skew, device)
        code = topk_sparsify(k, config.W)
        v = torch.randn(size, hkv, page, dv, device=device, dtype=BF16)
        scale = torch.ones(size, hkv, page, device=device, dtype=BF16)
        if config.V:
            scale = (v.abs().amax(-1).float() / 127).to(BF16)
            v = (v.float() / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
            sums = (v.float() * scale.float()[..., None]).sum(2)
        else:
            sums = v.float().sum(2)
        parts.append((*seal(code.values, code.indices, d), v, scale, sums, code.values, code.indices))
    ids, values, ends, v, scale, sums, rv, ri = (torch.cat(x) for x in zip(*parts, strict=True))
    table = torch.randperm(count, device=device).int()
    return Pages(ids, values, ends, v, scale, sums, table), (rv, ri)


def split_count(config: Config, pages: Pages, device: str) -> int:
    """Such that all thread blocks fit on the GPU at once."""
    hkv, used = pages.ids.shape[1], pages.table.numel()
    if device == "cpu":
        return min(3, used)
    gpu = torch.cuda.get_device_properties(device)
    fit = min(config.CTAS, gpu.shared_memory_per_multiprocessor // (config.shared + 1024))
    return max(1, min(gpu.multi_processor_count * fit // hkv, -(-used // config.WARPS)))


class _HostKernels:
    """by_feature.cu compiled for the CPU, thread by thread (tests/host_cuda.h)."""

    def __init__(self, config: Config) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library, main = Path(folder) / "x.so", Path(folder) / "x.cpp"
            main.write_text(
                f'#include "{SOURCE}"\n'
                'extern "C" int launch(int kernel, unsigned x, unsigned y, const Params* p, int size, int shared) {\n'
                "  if (size != sizeof(Params) || shared < (int)sizeof(All)) return 1;\n"
                + "".join(
                    f"  if (kernel == {i}) host::run([p] {{ {name}(*p); }}, {{x, y, 1}}, "
                    f"{'COMBINE_THREADS' if name == 'combine' else 'THREADS'});\n"
                    for i, name in enumerate(config.names)
                )
                + "  return 0;\n}\n"
            )
            macros = [f"-D{name}={value}" for name, value in config.macros()]
            command = [
                "g++",
                "-O1",
                "-std=c++17",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                "-w",
                "-D__align__(n)=alignas(n)",
            ]
            subprocess.run([*command, f'-DSFA_HOST="{HOST}"', *macros, "-o", library, main], check=True)
            self.library, self.names = ctypes.CDLL(str(library)), config.names

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, params: Params, *, shared: int = 0) -> None:
        code = self.library.launch(
            self.names.index(name), *grid[:2], ctypes.byref(params), ctypes.sizeof(params), shared or 2**30
        )
        if code:
            raise RuntimeError("struct Params or shared memory differ between the launcher and by_feature.cu")


@functools.cache
def load(config: Config, device: str) -> Any:
    if device == "cpu":
        return _HostKernels(config)
    big = config.names[:-1]
    return nvrtc.Kernels(
        SOURCE,
        config.macros(),
        config.names,
        torch.device(device),
        shared=dict.fromkeys(big, config.shared),
        prefer_shared=big,
    )


def attend(
    q: Tensor, pages: Pages, config: Config, *, tolerance: float = 0.0, splits: int | None = None, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """out (hq, dv), lse (hq,), rows read (hkv,) of one query token q (hq, d)."""
    hq, hkv, device = q.shape[0], pages.ids.shape[1], str(q.device)
    splits = splits or split_count(config, pages, device)
    new = functools.partial(torch.empty, device=q.device)
    out, lse = new(hq, config.DV, dtype=BF16), new(hq, dtype=torch.float32)
    part_o, part_ml, weighed = new(hq * splits * config.DV), new(hq * splits * 2), new(hq * splits * 2)
    rows_read = torch.zeros(hkv, dtype=torch.int32, device=q.device)
    tensors = {
        "q": q, "ids": pages.ids, "values": pages.values, "ends": pages.ends, "v": pages.v, "v_scale": pages.scale,
        "sums": pages.sums, "pages": pages.table, "part_o": part_o, "part_ml": part_ml, "weighed": weighed,
        "out": out, "lse": lse, "rows_read": rows_read if stats else None,
    }  # fmt: skip
    params = Params(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()}, scale=config.D**-0.5 * LOG2E,
        tolerance=tolerance, hq=hq, hkv=hkv, used=pages.table.numel(), splits=splits,
    )  # fmt: skip
    kernels = load(config, device)
    for name in config.names[:-1]:
        kernels.launch(name, (hkv, splits, 1), 32 * config.WARPS, params, shared=config.shared)
    kernels.launch("combine", (hq, 1, 1), 512 // config.DV * config.DV, params)
    return out, lse, rows_read


def check(
    q: Tensor, pages: Pages, code: tuple[Tensor, Tensor], config: Config, tolerance: float = 0.0
) -> tuple[float, int]:
    """The error over its budget, the worst of out and lse (above 1 is wrong), and the rows read."""
    out, lse, rows_read = attend(q, pages, config, tolerance=tolerance, stats=True)
    hkv, worst = pages.ids.shape[1], 0.0
    queries = topk_sparsify(q, config.WQ).to_dense()
    table = pages.table.long()
    for head in sorted({0, hkv // 2, hkv - 1}):
        values, indices = (x[table, head].reshape(-1, config.W) for x in code)
        keys = torch.zeros(values.shape[0], config.D, dtype=torch.float64, device=q.device)
        keys.scatter_add_(1, indices.long(), values.double())
        rows = pages.v[table, head].double()
        if config.V:
            rows = rows * pages.scale[table, head].double()[..., None]
        rows = rows.flatten(0, 1)
        for r in range(head * config.ROWS, (head + 1) * config.ROWS):
            scores = keys @ queries[r].double() * config.D**-0.5
            exact = scores.softmax(0) @ rows
            budget = 2.0**-8 * exact.abs().max() + 1e-6 * rows.abs().max() + tolerance * rows.abs().max()
            worst = max(worst, float((out[r].double() - exact).abs().max() / budget))
            wanted = scores.logsumexp(0)
            worst = max(worst, float((lse[r].double() - wanted).abs() / (1e-5 * (1 + wanted.abs()))))
            if not bool(torch.isfinite(out[r]).all()):
                return float("inf"), 0
    return worst, int(rows_read.sum())


def moved_bytes(q: Tensor, pages: Pages, config: Config, rows_read: int) -> dict[str, float]:
    """Bytes a step reads for each token and kv head, in sectors of 32 bytes: lists, ends, V with scales, sums."""
    hkv, tokens = pages.ids.shape[1], pages.table.numel() * pages.ids.shape[1] * config.PAGE
    queries = topk_sparsify(q, config.WQ).indices.long().reshape(hkv, -1)
    lists = ends = entries = 0
    for head in range(hkv):
        u = queries[head].unique()
        table = pages.ends[:, head].int()
        b, a = table[:, u], torch.where(u > 0, table[:, (u - 1).clamp(min=0)], 0)
        some = b > a
        sectors = ((b - 1) // 32 - a // 32 + 1) + ((2 * b - 1) // 32 - 2 * a // 32 + 1)
        lists += 32 * int((sectors * some).sum())
        entries += int((b - a).sum())
        ends += 32 * pages.ends.shape[0] * torch.cat([u // 16, (u - 1).clamp(min=0) // 16]).unique().numel()
    if config.TOL:  # read twice
        lists, ends = 2 * lists, 2 * ends
    v = rows_read * config.DV * pages.v.element_size() + (2 * tokens if config.V else 0)
    sums = tokens // config.PAGE * config.DV * 4
    parts = {"lists": lists, "ends": ends, "v": v, "sums": sums}
    return {name: x / tokens for name, x in parts.items()} | {
        "total": sum(parts.values()) / tokens, "entries": entries / tokens, "overlap": rows_read / tokens,
    }  # fmt: skip


# name: hq, hkv, base configuration, settings tried beside it; "waves" is how often all thread blocks fill the GPU
CASES: dict[str, tuple[int, int, Config, list[dict[str, int]]]] = {
    "mha_128": (32, 32, Config(), [
        {"UNROLL": 10}, {"UNROLL": 12, "CTAS": 3}, {"WARPS": 8, "CTAS": 2}, {"STAGE": 64}, {"waves": 2}, {"PAGE": 128},
    ]),
    "mha_128_skew": (32, 32, Config(), [{"STAGE": 64}, {"CTAS": 5}]),
    "mha_128_int8": (32, 32, Config(V=1), [{"UNROLL": 6}, {"CTAS": 3}, {"CTAS": 3, "UNROLL": 12}]),
    "mha_256": (16, 16, Config(D=256, DV=256), [{"CTAS": 3, "UNROLL": 12}, {"UNROLL": 12}]),
    "gqa_4": (32, 8, Config(ROWS=4, STAGE=176, PAGE=128), [{"UNROLL": 10}, {"PAGE": 256, "CTAS": 3}]),
    "gqa_4_int8": (32, 8, Config(ROWS=4, STAGE=176, PAGE=128, V=1, CTAS=3), [{"UNROLL": 6}, {"CTAS": 2}]),
    "mha_128_tol": (32, 32, Config(TOL=1), [{"UNROLL": 4}, {"UNROLL": 4, "CTAS": 5}]),
}  # fmt: skip
TOLERANCE = 1e-3  # of mha_128_tol


def changed(base: Config, change: dict[str, int]) -> Config:
    return dataclasses.replace(base, **{name: value for name, value in change.items() if name != "waves"})


def spread(case: str, d: int) -> float:
    """What q is multiplied by: 1, or such that scores of overlapping pairs have standard deviation 4."""
    if not case.endswith("_tol"):
        return 1.0
    q, k = (topk_sparsify(torch.randn(512, d), 8).to_dense() for _ in range(2))
    scores = q @ k.T * d**-0.5
    return float(4.0 / scores[scores != 0].std())


def check_host() -> int:
    """Small sizes on the CPU; 0 if all are within their budgets."""
    torch.manual_seed(0)
    wrong = 0
    for case, (_, _, base, _) in CASES.items():
        for change in ({}, {"STAGED": 0}, {"PAGE": 128, "STAGE": 24}, {"WQ": 16, "W": 2}, {"WARPS": 2, "UNROLL": 12}):
            config = dataclasses.replace(base, **change)
            for gain in (1.0, 6.0):
                heads = 2
                pages, code = random_pages(9 * config.PAGE, heads, config, "cpu")
                q = (torch.randn(heads * config.ROWS, config.D) * gain * spread(case, config.D)).to(BF16)
                worst, rows = check(q, pages, code, config, TOLERANCE if config.TOL else 0.0)
                share = rows / (heads * 9 * config.PAGE)
                print(
                    f"{case:13} {change!s:36} q x {gain:.0f}: {worst:.3f} of the budget, rows {share:.3f}", flush=True
                )
                wrong += not worst <= 1.0
    return int(wrong > 0)


def dense_ms(hq: int, hkv: int, d: int, n: int, repeats: int) -> dict[str, float]:
    """The dense step over bf16 K and V, by backend."""
    q = torch.randn(1, hq, 1, d, device="cuda", dtype=BF16)
    k, v = (torch.randn(1, hkv, n, d, device="cuda", dtype=BF16) for _ in range(2))
    found = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):
        shapes = {name: q} | ({f"{name}_grouped": q.view(1, hkv, hq // hkv, d)} if hq != hkv else {})
        for label, x in shapes.items():

            def step(x: Tensor = x, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(x, k, v, enable_gqa=x.shape[1] != hkv)

            try:
                found[label] = time_ms(graphed(step), repeats=repeats)["ms_median"]
            except Exception as error:
                torch.cuda.synchronize()
                print(f"dense {label} does not run: {str(error).splitlines()[0][:80]}", flush=True)
    return found


def run(out: Path, n: int, limit: float, cases: list[str]) -> int:
    """Check and time every case on the GPU; 1 if one is wrong."""
    started, wrong = time.time(), 0
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    copy = Report.copy_bandwidth()
    print(f"copy {copy / 1e12:.3f} TB/s", flush=True)
    with (out / "by_feature.jsonl").open("w") as file:
        for case in cases:
            hq, hkv, base, changes = CASES[case]
            best: tuple[float, str] = (float("inf"), "")
            tolerance = TOLERANCE if base.TOL else 0.0
            dense = dense_ms(hq, hkv, base.D, n, 10)
            fastest = min(dense.values(), default=float("nan"))
            print(f"{case}: dense {dense}  [{time.time() - started:.0f} s]", flush=True)
            made: dict[int, tuple[Pages, tuple[Tensor, Tensor]]] = {}
            skew = 2.0 if case.endswith("_skew") else 0.0
            q = (torch.randn(hq, base.D, device="cuda") * spread(case, base.D)).to(BF16) * decay(base.D, skew, "cuda")
            for change in [{}, *changes]:
                if time.time() - started > limit:
                    print("out of time", flush=True)
                    return wrong
                config = changed(base, change)
                try:
                    small, code = random_pages(40 * config.PAGE, hkv, config, "cuda", skew=skew)
                    worst, rows = check(q, small, code, config, tolerance)
                    if worst <= 1.0:
                        if config.PAGE not in made:
                            made.clear()
                            made[config.PAGE] = random_pages(n, hkv, config, "cuda", skew=skew)
                        pages, code = made[config.PAGE]
                        worst, rows = check(q, pages, code, config, tolerance)
                    if not worst <= 1.0:
                        print(f"{case:13} {change!s:40} WRONG: {worst:.2f} times its budget", flush=True)
                        wrong = 1
                        continue
                    parts = moved_bytes(q, pages, config, rows)
                    nbytes = parts["total"] * n * hkv
                    waves = change.get("waves", 1) * split_count(config, pages, "cuda")
                    splits = min(waves, n // (config.PAGE * config.WARPS))
                    call = functools.partial(attend, q, pages, config, tolerance=tolerance, splits=splits)
                    times = time_ms(graphed(call), repeats=15)
                except Exception as error:
                    print(f"{case:13} {change!s:40} does not run: {str(error).splitlines()[0][:90]}", flush=True)
                    torch.cuda.synchronize()
                    continue
                ms, least = times["ms_median"], nbytes / copy * 1e3
                best = min(best, (ms, str(change)))
                row = {
                    "bench": "by_feature", "case": case, "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "heads": hq, "kv_heads": hkv, "seqlen_k": n, "tolerance": tolerance,
                    "codes": "skewed" if skew else "random", "setting": change, "splits": splits,
                    **dataclasses.asdict(config),
                    **{name: round(x, 5) for name, x in times.items()}, "bytes": int(nbytes), "parts": parts,
                    "limit_ms": round(least, 5), "dense_ms": dense, "max_err": round(worst, 4),
                    "copy_gb_s": round(copy / 1e9, 1),
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(
                    f"{case:13} {change!s:40} {ms:.4f} ms ({times['ms_p20']:.4f}-{times['ms_p80']:.4f}) "
                    f"limit {least:.4f} ({least / ms:.0%}) {parts['total']:.1f} B/token rows {parts['overlap']:.3f} "
                    f"{fastest / ms:.2f}x dense, err {worst:.2f}",
                    flush=True,
                )
            print(f"{case}: best {best[0]:.4f} ms {best[1]} = {fastest / best[0]:.2f}x dense\n", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", action="store_true", help="check on the CPU and stop")
    parser.add_argument("--compile", metavar="ARCH", help="compile the settings of --cases into the cache and stop")
    parser.add_argument("--out", type=Path, default=Path("by_feature"))
    parser.add_argument("--n", type=int, default=131072)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further setting is tried")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    if args.host:
        return check_host()
    if args.compile:
        for case in args.cases:
            _, _, base, changes = CASES[case]
            for change in [{}, *changes]:
                macros = changed(base, change).macros()
                file = nvrtc.cubin_path(SOURCE, macros, args.compile)
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    part = file.with_suffix(".part")
                    part.write_bytes(nvrtc.compile_file(SOURCE, macros, args.compile))
                    part.rename(file)
        return 0
    with torch.no_grad():
        return run(args.out, args.n, args.limit, args.cases)


if __name__ == "__main__":
    sys.exit(main())
