"""``flash-sfa bench all``: a reduced grid of every bench and one HTML report. ``flash-sfa bench compare``: two runs.

The report reads nothing but the rows of its run (rows.jsonl beside it), and holds its pictures itself.
"""

import argparse
import base64
import html
import io
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .. import SparseKVCache, __version__
from ..cli import UsageError

Row = dict[str, Any]

# What makes two rows the same measurement; times, memory, versions and places are not part of it.
KEYS = (
    "bench", "case", "impl", "model", "device", "dtype", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k",
    "head_dim", "v_head_dim", "topk", "topk_q", "dense_dims", "tolerance", "codes", "causal", "window", "v_dtype",
    "score_dtype", "page_size", "gpus",
)  # fmt: skip
OURS = ("auto", "cpu", "cuda", "triton", "intersect", "sdpa")
# Start no further bench of a GPU after this many seconds; each ends within two minutes.
LAST_START = 420.0
MODEL = {"layers": 32, "kv_heads": 8, "head_dim": 128}
CACHES: dict[str, dict[str, Any]] = {
    "topk 8": {"topk": 8},
    "topk 8, V int8": {"topk": 8, "v_dtype": torch.int8},
    "topk 8 + 16 dense": {"topk": 8, "dense_dims": 16},
    "topk 16": {"topk": 16},
    "topk 16, V int8": {"topk": 16, "v_dtype": torch.int8},
}


# Rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl file, or of all of them in a folder; of a measurement made twice in one file, the last.

    A folder that `bench all` wrote is read from its rows.jsonl, which holds what the other files hold.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; wanted a .jsonl file or a folder of them")
    whole = path / "rows.jsonl"
    files = [path] if path.is_file() else [whole] if whole.exists() else sorted(path.glob("*.jsonl"))
    if not files:
        raise UsageError(f"{path} holds no .jsonl file")
    rows: dict[tuple[Any, ...], Row] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: cannot be read as text ({error})") from None
        for number, line in enumerate(lines, 1):
            try:
                row = dict(json.loads(line))
                if "error" in row or ("impl" in row and "ms_median" in row):  # others are no timings
                    rows[identity(row)] = row
            except (ValueError, TypeError, AttributeError):
                raise UsageError(f"{file}, line {number}: not a row of a bench: {line[:60]!r}") from None
    return list(rows.values())


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in KEYS)


def describe(row: Row) -> str:
    shown = {key: row[key] for key in KEYS if row.get(key) is not None and key not in ("device", "gpus", "tolerance")}
    return " ".join(
        f"{value}" if key in ("bench", "case", "impl") else f"{key}={value}" for key, value in shown.items()
    )


def timed(rows: Iterable[Row]) -> list[Row]:
    """Rows with a measured time: no errors, and no ``limit_*`` rows, which are computed."""
    return [r for r in rows if isinstance(r.get("ms_median"), int | float) and not r["impl"].startswith("limit")]


def compare(args: argparse.Namespace) -> int:
    """Print what got slower or faster from A to B beyond the spread of both; 1 if anything got slower."""
    a, b = ({identity(row): row for row in timed(read_rows(path))} for path in (args.a, args.b))
    both = [key for key in a if key in b]
    if not both:
        raise UsageError(
            f"no measurement is in both: {len(a)} rows in {args.a}, {len(b)} in {args.b}, on the same device?"
        )
    slower, faster = [], []
    for key in both:
        old, new = a[key], b[key]
        if low(new) > high(old):
            slower.append((old, new))
        elif high(new) < low(old):
            faster.append((old, new))
    for title, pairs in (("slower", slower), ("faster", faster)):
        for old, new in sorted(pairs, key=lambda pair: -pair[1]["ms_median"] / pair[0]["ms_median"]):
            print(
                f"{title}: {describe(new)}: {old['ms_median']:.4g} ms ({low(old):.4g} to {high(old):.4g}) -> "
                f"{new['ms_median']:.4g} ms ({low(new):.4g} to {high(new):.4g}), "
                f"{new['ms_median'] / old['ms_median']:.2f}x the time"
            )
    print(
        f"{len(both)} measurements in both: {len(slower)} slower, {len(faster)} faster, "
        f"{len(both) - len(slower) - len(faster)} within the spread; only in A {len(a) - len(both)}, "
        f"only in B {len(b) - len(both)}"
    )
    return 1 if slower else 0


def low(row: Row) -> float:
    return float(row.get("ms_p20") or row["ms_median"])


def high(row: Row) -> float:
    return float(row.get("ms_p80") or row["ms_median"])


# Running


def run(args: argparse.Namespace) -> int:
    """Run the benches of this machine, write OUT/rows.jsonl and OUT/report.html; 1 if a bench failed."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here (see: flash-sfa env)")
    args.out.mkdir(parents=True, exist_ok=True)
    started, failures = time.time(), []
    names = []
    for words in benches(device):
        if time.time() - started > LAST_START:
            failures.append(f"{words[0]}: not started, {time.time() - started:.0f} s had passed")
            continue
        print(f"\nflash-sfa bench {' '.join(words)}", flush=True)
        names.append(words[0])
        (args.out / f"{words[0]}.jsonl").unlink(missing_ok=True)
        try:
            if bench([*words, "--out", str(args.out), "--commit", args.commit]):
                failures.append(f"{words[0]}: some cases failed")
        except UsageError as error:
            failures.append(f"{words[0]}: {error}")
        except Exception as error:  # one bench that does not run must not end the others
            traceback.print_exc()
            failures.append(f"{words[0]}: {type(error).__name__}: {error}")
        if device == "cuda":
            torch.cuda.empty_cache()
    files = [args.out / f"{name}.jsonl" for name in names]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    rows += [*machine_rows(device, args.commit), *cache_rows(device, args.commit)]
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(rows, args.out / "report.html", failures, time.time() - started)
    print(f"\n{page}; rows: {args.out / 'rows.jsonl'}; {time.time() - started:.0f} s")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


def benches(device: str) -> list[list[str]]:
    """The command lines of a reduced grid."""
    if device == "cpu":
        return [["cpu", "--quick", "--repeats", "7"]]
    return [
        [
            "attention",
            "--lengths",
            "4096",
            "16384",
            "65536",
            "--dims",
            "64",
            "128",
            "--topk",
            "8",
            "16",
            "--repeats",
            "5",
        ],
        ["decode", "--quick", "--repeats", "10"],
        ["paper", "--quick", "--repeats", "5", "--seconds", "100"],
    ]


def bench(words: list[str]) -> int:
    """One ``flash-sfa bench`` command in this process."""
    from . import command

    parser = argparse.ArgumentParser(prog="flash-sfa bench")
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def stamp(commit: str, device: str) -> Row:
    from .cpu import device_name

    name = torch.cuda.get_device_name() if device == "cuda" else device_name()
    return {"device": name, "commit": commit, "torch": torch.__version__, "flash_sfa": __version__}


def machine_rows(device: str, commit: str) -> list[Row]:
    """The roof of this machine: copy bandwidth (read plus write) and the rate of a large matrix product."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy, product = (seconds(call, device) for call in (lambda: y.copy_(x), lambda: a @ b))
    peak = {"copy_gb_s": round(2 * x.nbytes / copy / 1e9, 1), "matmul_gflop_s": round(2 * n**3 / product / 1e9, 1)}
    return [
        {"bench": "machine", "impl": "torch", "dtype": str(dtype).removeprefix("torch.")} | stamp(commit, device) | peak
    ]


def seconds(call: Callable[[], Any], device: str) -> float:
    """Median of seven calls."""
    times = []
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def memory_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_rows(device: str, commit: str) -> list[Row]:
    """Bytes a token of caches that hold 4096 tokens, measured, and how many tokens of a model fit into the memory."""
    rows: list[Row] = []
    tokens, heads, d, memory = 4096, MODEL["kv_heads"], MODEL["head_dim"], memory_bytes(device)
    for name, options in CACHES.items():
        cache = SparseKVCache(num_kv_heads=heads, head_dim=d, max_tokens=tokens, device=device, **options)
        cache.alloc(1)
        x = torch.randn(1, tokens, heads, d, device=device, dtype=torch.bfloat16)
        cache.append(x, x)
        sizes = [("dense bf16", cache.dense_nbytes)] * (not rows) + [(name, cache.nbytes)]
        for case, nbytes in sizes:
            each = nbytes / tokens * MODEL["layers"]
            rows.append(
                {
                    "bench": "cache", "case": case, "impl": "ours" if case == name else "dense", "dtype": "bfloat16",
                    "head_dim": d, "kv_heads": heads, "layers": MODEL["layers"],
                    "bytes_per_token_and_head": round(nbytes / tokens / heads, 2), "memory_bytes": memory,
                    "tokens_that_fit": int(memory / each),
                } | stamp(commit, device)
            )  # fmt: skip
    return rows


# The report


def fastest_dense(rows: list[Row]) -> dict[tuple[Any, ...], float]:
    """The fastest dense time of every shape."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["impl"].startswith("dense"):
            best[shape(row)] = min(row["ms_median"], best.get(shape(row), float("inf")))
    return best


def shape(row: Row) -> tuple[Any, ...]:
    keys = (
        "bench",
        "case",
        "device",
        "dtype",
        "batch",
        "heads",
        "kv_heads",
        "seqlen_q",
        "seqlen_k",
        "head_dim",
        "v_head_dim",
    )
    return (*(row.get(key) for key in keys), row.get("causal"), row.get("codes"))


def speedups(rows: list[Row]) -> list[tuple[Row, float]]:
    """Our rows with how many times as fast as the fastest dense one of their shape they are."""
    dense = fastest_dense(rows)
    return [(r, dense[shape(r)] / r["ms_median"]) for r in rows if r["impl"] in OURS and shape(r) in dense]


def flops(row: Row) -> float:
    """What dense attention of this shape computes: 2 (d + dv) a visible pair and head."""
    n_q, n_k = row["seqlen_q"], row["seqlen_k"]
    pairs = n_q * n_k - (n_q * (n_q - 1) // 2 if row.get("causal") else 0)
    return 2.0 * (row["head_dim"] + row.get("v_head_dim", row["head_dim"])) * pairs * row["batch"] * row["heads"]


def dense_bytes(row: Row) -> float:
    """What dense attention of this shape must move: q, k, v and out once."""
    size = getattr(torch, row["dtype"]).itemsize
    dims = row["head_dim"] + row.get("v_head_dim", row["head_dim"])
    return size * row["batch"] * dims * (row["seqlen_q"] * row["heads"] + row["seqlen_k"] * row["kv_heads"])


def write_report(rows: list[Row], path: Path, failures: list[str], took: float) -> Path:
    """One HTML file with the pictures inside; without matplotlib the tables alone."""
    measured = timed(rows)
    pictures, note = draw(rows, measured)
    machine = next((r for r in rows if r["bench"] == "machine"), {})
    parts = [
        "<!doctype html><meta charset='utf-8'><title>flash-sfa bench</title>",
        "<style>body{font:15px/1.45 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;border-bottom:1px solid #ddd;"
        "text-align:right}td:first-child,th:first-child{text-align:left}.slow{color:#b00}</style>",
        "<h1>flash-sfa bench</h1>",
        f"<p>{html.escape(str(machine.get('device', 'unknown device')))}; torch {html.escape(torch.__version__)}; "
        f"flash-sfa {html.escape(__version__)}; commit {html.escape(str(machine.get('commit', 'unknown')))}; "
        f"{len(measured)} measurements in {took:.0f} s.</p>",
        *(f"<p class='slow'>Failed: {html.escape(failure)}</p>" for failure in failures),
        f"<p>{html.escape(note)}</p>" if note else "",
    ]
    for title, text, data in pictures:
        image = base64.b64encode(data).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>")
        parts.append(f"<img alt='{html.escape(title)}' src='data:image/png;base64,{image}'>")
    parts.append("<h2>Cache</h2>" + cache_table(rows))
    parts.append("<h2>Measurements</h2>" + table(rows, measured))
    path.write_text("\n".join(parts))
    return path


def cells(values: Iterable[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"


def cache_table(rows: list[Row]) -> str:
    lines = [cells(("cache", "bytes a token and kv head", "tokens that fit"), "th")]
    for row in rows:
        if row["bench"] == "cache":
            lines.append(cells((row["case"], f"{row['bytes_per_token_and_head']:.1f}", f"{row['tokens_that_fit']:,}")))
    return f"<table>{''.join(lines)}</table>"


def table(rows: list[Row], measured: list[Row]) -> str:
    ratios = {id(row): ratio for row, ratio in speedups(measured)}
    lines = [cells(("measurement", "ms", "20 to 80%", "speed, 1 = fastest dense"), "th")]
    for row in measured:
        ratio = f"{ratios[id(row)]:.2f}" if id(row) in ratios else ""
        spread = f"{low(row):.4g} to {high(row):.4g}"
        lines.append(cells((describe(row), f"{row['ms_median']:.4g}", spread, ratio)))
    lines += [cells((describe(row), "failed", str(row["error"])[:80], "")) for row in rows if row.get("error")]
    return f"<table>{''.join(lines)}</table>"


def draw(rows: list[Row], measured: list[Row]) -> tuple[list[tuple[str, str, bytes]], str]:
    """(title, text, PNG) of every picture that has data; and why there are none."""
    try:
        import matplotlib
    except ImportError:
        return [], "No pictures: matplotlib is not installed (pip install 'flash-sfa[demo]')."
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = []
    for title, text, paint in (
        ("Latency against n", "Median of a call; dense in grey tones. Lower is better.", paint_latency),
        (
            "Speed-up over (n, d, k)",
            "Fastest dense time over our fastest time, the lowest of all heads, codes and dtypes that were timed; rows "
            "are d and topk, columns tokens. Above 1 we are faster.",
            paint_heat,
        ),
        (
            "Roofline position",
            "Work and bytes of dense attention of the same shape over the measured time, so a point above the roof "
            "skipped work or bytes; the roof is this machine's copy and matrix product.",
            paint_roofline,
        ),
        ("Cache bytes", "Measured bytes a token and kv head, running sums and tables included.", paint_cache),
        (
            "Tokens that fit",
            f"All memory of the device over the bytes of a token in {MODEL['layers']} layers of {MODEL['kv_heads']} kv "
            f"heads, d = {MODEL['head_dim']}; nothing is left for weights.",
            paint_tokens,
        ),
    ):
        figure = paint(plt, rows, measured)
        if figure is not None:
            file = io.BytesIO()
            figure.tight_layout()
            figure.savefig(file, format="png", dpi=100)
            plt.close(figure)
            pictures.append((title, text, file.getvalue()))
    return pictures, ""


def paint_latency(plt: Any, rows: list[Row], measured: list[Row]) -> Any:
    panels = sorted({(r["bench"], r["head_dim"]) for r in measured if r.get("seqlen_k") and r.get("head_dim")})
    if not panels:
        return None
    figure, axes = plt.subplots(-(-len(panels) // 3), min(3, len(panels)), figsize=(12, 3.6 * -(-len(panels) // 3)),
                                squeeze=False)  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, d) in zip(axes.flat, panels):
        here = [r for r in measured if (r["bench"], r.get("head_dim")) == (name, d)]
        kinds = sorted({line_name(r) for r in here})
        for i, kind in enumerate(kinds):
            points: dict[int, float] = {}
            for r in here:
                if line_name(r) == kind:
                    points[r["seqlen_k"]] = min(r["ms_median"], points.get(r["seqlen_k"], float("inf")))
            grey = kind.startswith("dense")
            axis.plot(sorted(points), [points[n] for n in sorted(points)], marker="o", markersize=3, label=kind,
                      color=str(0.25 + 0.5 * i / len(kinds)) if grey else None)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{name}, d = {d}", fontsize=9)
        axis.set_xlabel("tokens")
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    return figure


def line_name(row: Row) -> str:
    parts = [row["impl"], f"topk {row['topk']}" if row.get("topk") else "", row.get("codes") or ""]
    parts += [f"{row.get('heads')}/{row.get('kv_heads')}", "" if row.get("causal", True) else "full"]
    return " ".join(part for part in parts if part and part != "random")


def paint_heat(plt: Any, rows: list[Row], measured: list[Row]) -> Any:
    fastest: dict[tuple[Any, ...], float] = {}
    for row, ratio in speedups(measured):
        if row.get("topk"):
            key = (row["bench"], row["head_dim"], row["topk"], row["seqlen_k"], shape(row))
            fastest[key] = max(ratio, fastest.get(key, 0.0))
    best: dict[tuple[Any, ...], float] = {}
    for key, ratio in fastest.items():
        best[key[:4]] = min(ratio, best.get(key[:4], float("inf")))
    names = sorted({key[0] for key in best})
    if not names:
        return None
    figure, axes = plt.subplots(1, len(names), figsize=(min(14, 5 * len(names)), 3.8), squeeze=False)
    for axis, name in zip(axes[0], names):
        kinds = sorted({key[1:3] for key in best if key[0] == name})
        lengths = sorted({key[3] for key in best if key[0] == name})
        grid = [[best.get((name, *kind, n), float("nan")) for n in lengths] for kind in kinds]
        axis.imshow(grid, cmap="RdYlGn", norm=plt.matplotlib.colors.LogNorm(0.25, 4.0), aspect="auto")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if value == value:
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.set_yticks(range(len(kinds)), [f"d={d} k={k}" for d, k in kinds])
        axis.set_title(name, fontsize=9)
    return figure


def paint_roofline(plt: Any, rows: list[Row], measured: list[Row]) -> Any:
    machine = next((r for r in rows if r["bench"] == "machine"), None)
    wanted = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "dtype")
    here = [r for r in measured if all(r.get(key) for key in wanted) and r["bench"] in ("attention_fwd", "decode")]
    if machine is None or not here:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for impl in sorted({r["impl"] for r in here}):
        mine = [r for r in here if r["impl"] == impl]
        x = [flops(r) / dense_bytes(r) for r in mine]
        y = [flops(r) / r["ms_median"] / 1e6 for r in mine]
        axis.scatter(x, y, s=18, marker="s" if impl.startswith("dense") else "o", label=impl)
    edges = [0.5, machine["matmul_gflop_s"] / machine["copy_gb_s"], 1e5]
    axis.plot(edges, [min(machine["copy_gb_s"] * x, machine["matmul_gflop_s"]) for x in edges], "k-", linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte, of dense attention")
    axis.set_ylabel("GFLOP/s, of dense attention")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def paint_cache(plt: Any, rows: list[Row], measured: list[Row]) -> Any:
    return bars(plt, rows, "bytes_per_token_and_head", "bytes a token and kv head")


def paint_tokens(plt: Any, rows: list[Row], measured: list[Row]) -> Any:
    return bars(plt, rows, "tokens_that_fit", "tokens")


def bars(plt: Any, rows: list[Row], key: str, label: str) -> Any:
    here = [r for r in rows if r["bench"] == "cache"]
    if not here:
        return None
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.35 * len(here)))
    drawn = axis.barh([r["case"] for r in here][::-1], [r[key] for r in here][::-1])
    axis.bar_label(drawn, labels=[f"{r[key]:,.0f}" for r in here][::-1], fontsize=8, padding=3)
    axis.set_xlabel(label)
    axis.margins(x=0.15)
    return figure
