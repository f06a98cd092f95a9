"""Fill the measured tables of docs/kernels.md, docs/decode.md and docs/cpu.md from the rows in benchmarks/results.

python benchmarks/kernel_tables.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def load(name: str) -> list[Row]:
    lines = (ROOT / "benchmarks/results" / name).read_text().splitlines()
    return [row for row in map(json.loads, lines) if "ms_median" in row]


def source(rows: list[Row], name: str) -> str:
    commits = ", ".join(sorted({row["commit"][:7] for row in rows}))
    versions = f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {commits}"
    return f"{versions}; rows in `benchmarks/results/{name}`."


def attention(name: str = "attention_h200.jsonl") -> str:
    """ms of forward / forward + backward, and how many times as fast as the others auto is."""
    rows = load(name)
    out = [
        "| d | n | topk | dense cuDNN | mask + cuDNN | auto | auto against dense | auto against mask |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d, n, topk in sorted({(r["head_dim"], r["seqlen_q"], r["topk"]) for r in rows if r["impl"] == "auto"}):
        ms: dict[str, list[float]] = {}
        for row in sorted(rows, key=lambda row: len(row["bench"])):  # attention_fwd, then attention_fwdbwd
            if (row["head_dim"], row["seqlen_q"], row.get("topk", topk)) == (d, n, topk):
                ms.setdefault(row["impl"], []).append(row["ms_median"])
        impls = ("dense_cudnn", "mask_cudnn", "auto")
        cells = [" / ".join(f"{value:.2f}" for value in ms[impl]) for impl in impls]
        for impl in impls[:2]:
            cells.append(" / ".join(f"{other / ours:.2f}x" for other, ours in zip(ms[impl], ms["auto"])))
        out.append(f"| {d} | {n} | {topk} | " + " | ".join(cells) + " |")
    chose = sorted({f"{row['forward']} forward, {row['backward']} backward" for row in rows if "forward" in row})
    took = f" auto took {' or '.join(chose)}." if chose else ""
    return "\n".join([*out, "", source(rows, name) + took])


def describe(row: Row) -> str:
    """What is special about a case of decoding."""
    parts = [f"{row['heads']} / {row['kv_heads']} heads, d = {row['head_dim']}"]
    if row["batch"] > 1:
        parts.append(f"{row['batch']} sequences, {row['tokens']} tokens, pages of {row['page_size']}")
    elif row["page_size"] != 256:
        parts.append(f"pages of {row['page_size']}")
    if row["v_dtype"] != "bfloat16":
        parts.append(f"V in {row['v_dtype']}")
    if row["dense_dims"]:
        parts.append(f"{row['dense_dims']} always on")
    if row["seqlen_q"] > 1:
        parts.append(f"{row['seqlen_q']} queries")
    if row["window"] >= 0:
        parts.append(f"window of {row['window'] + 1}")
    return "; ".join(parts)


def decode() -> str:
    """ms of a step beside the fastest dense one and the byte limit."""
    rows = [row for row in load("decode_h200.jsonl") if row["bench"] == "decode"]
    out = [
        "| case | n | overlap | ms (20 to 80%) | byte limit, ms | fastest dense, ms | against dense | of the limit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        (ours,) = (row for row in here if row["impl"] == "cuda")
        limit = next(row["ms_median"] for row in here if row["impl"] == "limit_ours")
        best = min(
            (row for row in here if row["impl"].startswith("dense")), key=lambda row: row["ms_median"], default=None
        )
        shape, took = describe(ours), ours["ms_median"]
        cells = ["-", "-"]
        if best is not None:
            cells = [f"{best['ms_median']:.4f} ({best['impl'][6:]})", f"{best['ms_median'] / took:.2f}x"]
        out.append(
            f"| {shape} | {ours['seqlen_k']} | {ours['overlap']:.2f} | {took:.4f} ({ours['ms_p20']:.4f} to "
            f"{ours['ms_p80']:.4f}) | {limit:.4f} | {' | '.join(cells)} | {limit / took:.0%} |"
        )
    return "\n".join([*out, "", source(rows, "decode_h200.jsonl")])


def cpu() -> str:
    """ms of decode steps and prefill on a CPU beside PyTorch's attention."""
    rows = load("cpu.jsonl")
    out = [
        "| case | overlap | dense SDPA, ms | mask + SDPA, ms | cpu, ms (20 to 80%) | against dense | against mask |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        dense, mask, ours = (
            next(row for row in rows if (row["case"], row["impl"]) == (case, impl))
            for impl in ("dense_sdpa", "mask_sdpa", "cpu")
        )
        took = ours["ms_median"]
        out.append(
            f"| {case} | {ours['overlap']:.2f} | {dense['ms_median']:.2f} | {mask['ms_median']:.2f} | {took:.2f} "
            f"({ours['ms_p20']:.2f} to {ours['ms_p80']:.2f}) | {dense['ms_median'] / took:.2f}x | "
            f"{mask['ms_median'] / took:.2f}x |"
        )
    load_average = f"load average up to {max(row['load'] for row in rows):.1f}"
    return "\n".join([*out, "", f"{source(rows, 'cpu.jsonl')} numba {rows[0]['numba']}, {load_average}."])


def main() -> None:
    tables = (
        ("kernels.md", "attention", attention()),
        ("kernels.md", "attention_before_hopper", attention("attention_before_hopper_h200.jsonl")),
        ("kernels.md", "attention_dense_q", attention("attention_dense_q_h200.jsonl")),
        ("decode.md", "decode", decode()),
        ("cpu.md", "cpu", cpu()),
    )
    for page, name, table in tables:
        path = ROOT / "docs" / page
        block = f"<!-- rows: {name} -->\n\n{table}\n\n<!-- end -->"
        text, found = re.subn(
            rf"<!-- rows: {name} -->.*?<!-- end -->", lambda _, b=block: b, path.read_text(), flags=re.S
        )
        if found != 1:
            raise SystemExit(f"{path} must have one block {name}, has {found}")
        path.write_text(text)


if __name__ == "__main__":
    main()
