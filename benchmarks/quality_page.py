"""Write the tables and the trade-off plot of docs/quality.md from the rows in benchmarks/results/*.jsonl.

    python benchmarks/quality_page.py

Text between ``<!-- rows: NAME -->`` and ``<!-- end -->`` is replaced, all other text stays. NAME is an experiment (the
``experiment`` of the rows; where it is missing, the file's name up to the first "_"), or niah. Names that end in -s0,
-s1, ... are seeds of one run: the table gives their mean and, from two seeds on, the standard deviation.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_CODES: dict[str, float] = {}
BITS = re.compile(r" K in (\d+) bits$")
# One look for each way to store k; families are panels of their own.
LOOKS = {
    "dense": ("black", "o"),
    "dense, fewer features rotate": ("0.55", "o"),
    "narrow q and k": ("tab:blue", "s"),
    "narrow q, k and v": ("tab:cyan", "s"),
    "dense, k in bits": ("tab:green", "^"),
    "SFA, q dense": ("tab:red", "D"),
    "SFA, q and k": ("tab:orange", "D"),
    "SFA with an idea": ("tab:purple", "*"),
}
IDEAS = (
    "shrink",
    "split_signs",
    "anneal",
    "fade",
    "recent",
    "balance",
    "distill",
    "match",
    "map_dim",
    "share",
    "drop",
    "center",
)


@dataclass
class Variant:
    """One run over its seeds: means of the measured numbers."""

    name: str
    family: str
    look: str
    k_bytes: float
    row: dict[str, Any]
    seeds: list[int] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    wikitext: list[float] = field(default_factory=list)
    codes: list[dict[str, float]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.perplexity)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.perplexity) if len(self.perplexity) > 1 else 0.0


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """All training rows; of runs with one experiment, name and seed the last complete one."""
    kept: dict[tuple[str, str, int], dict[str, Any]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row.get("bench") in ("pretrain", "niah") and row.get("complete") and "config" in row:
                row["experiment"] = row.get("experiment") or file.stem.split("_")[0]
                kept[row["experiment"], row["name"], row["seed"]] = row
    return list(kept.values())


def plain(name: str) -> str:
    """The name without its seed."""
    return re.sub(r"-s\d+$", "", name)


def look_of(row: dict[str, Any]) -> str:
    at, model = row["config"]["attention"], row["config"]["model"]
    if at["kind"] == "sfa" and any(at.get(name) for name in IDEAS):
        return "SFA with an idea"
    if at["kind"] == "sfa":
        return "SFA, q dense" if at["topk_q"] is None else "SFA, q and k"
    if at["kind"] == "narrow":
        return "narrow q, k and v" if at.get("v_dim") else "narrow q and k"
    return "dense" if model["rotary_dims"] is None else "dense, fewer features rotate"


def variants(rows: list[dict[str, Any]]) -> list[Variant]:
    """Runs of one experiment gathered over seeds, each quantised rival as one of its own."""
    found: dict[str, Variant] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        family = row["config"]["model"]["family"]
        entries = [(plain(row["name"]), look_of(row), row["k_bytes"], row, row.get("codes") or NO_CODES)]
        for q in row["quantized"]:
            name = f"{plain(row['name'])}, K in {q['bits']} bits"
            entries.append((name, "dense, k in bits", q["k_bytes"], {**row, **q}, NO_CODES))
        for name, look, k_bytes, own, codes in entries:
            new = Variant(name, {"gpt2": "absolute"}.get(family, family), look, k_bytes, own)
            at = found.setdefault(name, new)
            at.seeds.append(row["seed"])
            at.perplexity.append(own["val"]["all"])
            at.wikitext.append(own["test"]["wikitext2"])
            at.codes.append(codes)
    return sorted(found.values(), key=lambda v: (v.family, v.mean))


def references(found: list[Variant]) -> dict[str, Variant]:
    """The dense run of each family: the better of full width and everything at half width.

    One in which fewer features rotate counts where there is no other.
    """
    out: dict[str, Variant] = {}
    for v in found:
        whole = v.look == "dense" or (v.look == "narrow q, k and v" and v.name.endswith("-half"))
        if whole and (v.family not in out or lower(v, out[v.family])):
            out[v.family] = v
    for v in found:
        if v.look == "dense, fewer features rotate":
            out.setdefault(v.family, v)
    return out


def lower(v: Variant, other: Variant) -> bool:
    """Whether v has the lower mean over the seeds that both have."""
    theirs = dict(zip(other.seeds, other.perplexity, strict=True))
    pairs = [(p, theirs[seed]) for seed, p in zip(v.seeds, v.perplexity, strict=True) if seed in theirs]
    return bool(pairs) and sum(a for a, _ in pairs) < sum(b for _, b in pairs)


def against(v: Variant, reference: Variant) -> str:
    """Relative difference to the reference of the same seeds, with its standard deviation over them."""
    other = dict(zip(reference.seeds, reference.perplexity, strict=True))
    ratios = [100 * (p / other[seed] - 1) for seed, p in zip(v.seeds, v.perplexity, strict=True) if seed in other]
    if not ratios:
        return f"{100 * (v.mean / reference.mean - 1):+.1f}%"
    spread = f" ± {statistics.stdev(ratios):.1f}" if len(ratios) > 1 and v is not reference else ""
    return f"{statistics.fmean(ratios):+.1f}%{spread}"


def mean_code(v: Variant, key: str) -> str:
    values = [c[key] for c in v.codes if key in c]
    return f"{statistics.fmean(values):.2f}" if values else "-"


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    found = variants(rows)
    dense = references(found)
    lines = [
        "| run | seeds | K bytes | perplexity | against dense | WikiText-2 | overlap | edges a pair | balance of k | "
        "rows for 99.9% |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for v in found:
        spread = f" ± {v.spread:.2f}" if v.spread else ""
        change = against(v, dense[v.family]) if v.family in dense else "-"
        codes = [mean_code(v, key) for key in ("overlap", "edges", "balance_k", "rows_999")]
        cells = [v.name, str(len(v.perplexity)), f"{v.k_bytes:.0f}", f"{v.mean:.2f}{spread}", change]
        lines.append("| " + " | ".join([*cells, f"{statistics.fmean(v.wikitext):.0f}", *codes]) + " |")
    first = rows[0]
    names = ", ".join(f"{family}: {v.name}" for family, v in sorted(dense.items()))
    tokens = ", ".join(sorted({f"{row['tokens'] / 1e6:.0f}M" for row in rows}))
    sizes = sorted({row["params_non_embedding"] / 1e6 for row in rows})
    speeds = [row["tokens_per_s"] / 1e6 for row in rows if row["tokens_per_s"]]
    speed = f", {min(speeds):.2f} to {max(speeds):.2f}M tokens/s a run" if speeds else ""
    commits = ", ".join(sorted({str(row["commit"])[:7] for row in rows}))
    lines += [
        "",
        f"{len(rows)} runs, {tokens} tokens, {sizes[0]:.1f} to {sizes[-1]:.1f}M parameters without embeddings, context "
        f"{first['config']['model']['context']}, {first['device']}, torch {first['torch']}{speed}; commit {commits}.",
        (f"Dense is the better of full and half width ({names}). " if names else "")
        + "± is the standard deviation over seeds; the difference is that between runs of one seed.",
    ]
    return "\n".join(lines)


def needle_table(rows: list[dict[str, Any]]) -> str:
    """Share found by length, pooled over depths and seeds."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(plain(row["name"]), []).append(row["needle_by_length"])
        for q in row["quantized"]:
            found.setdefault(f"{plain(row['name'])}, K in {q['bits']} bits", []).append(q["needle_by_length"])
    lengths = sorted({c["length"] for seeds in found.values() for cells in seeds for c in cells})
    lines = ["| run | seeds | " + " | ".join(f"{n} tokens" for n in lengths) + " |"]
    lines.append("|---|---:|" + "---:|" * len(lengths))
    for name, seeds in sorted(found.items()):
        cells = []
        for n in lengths:
            own = [c for s in seeds for c in s if c["length"] == n]
            hits, trials = sum(c["hits"] for c in own), sum(c["trials"] for c in own)
            share = (hits + 1) / (trials + 2)
            cells.append(
                f"{100 * hits / trials:.1f} ± {100 * math.sqrt(share * (1 - share) / trials):.1f}" if own else "-"
            )
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    lines += ["", "Percent of trials with the whole answer right, ± the standard error over all trials of all seeds."]
    return "\n".join(lines)


def plot(found: list[Variant], path: Path, title: str) -> None:
    """Perplexity against the bytes of a stored key: a panel a family, every variant and rival, seeds as bars."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    families = sorted({v.family for v in found})
    figure = Figure(figsize=(4.6 * len(families) + 0.4, 5.0), layout="constrained")
    axes = figure.subplots(1, len(families), squeeze=False)[0]
    for axis, family in zip(axes, families, strict=True):
        own = [v for v in found if v.family == family]
        for v in own:
            colour, marker = LOOKS[v.look]
            low, high = v.mean - min(v.perplexity), max(v.perplexity) - v.mean
            axis.errorbar(
                v.k_bytes, v.mean, yerr=[[low], [high]], color=colour, marker=marker, markersize=6, capsize=3, alpha=0.9
            )
            bits = BITS.search(v.name)
            label = f"{bits[1]} bits" if bits else v.name.removeprefix("idea-").removeprefix(family + "-")
            label += " (v too)" if v.look == "narrow q, k and v" else ""
            axis.annotate(label, (v.k_bytes, v.mean), xytext=(5, 4), textcoords="offset points", fontsize=6.5)
        best: list[Variant] = []
        for v in sorted(own, key=lambda v: (v.k_bytes, v.mean)):
            if not best or v.mean < best[-1].mean:
                best.append(v)
        axis.step([v.k_bytes for v in best], [v.mean for v in best], where="post", color="0.8", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xlim(15, 215)
        axis.set_xticks([16, 32, 64, 128], ["16", "32", "64", "128"])
        axis.set_xlabel("bytes of a stored key (one token and kv head)")
        axis.set_title(family)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("perplexity, held-out text")
    used = [look for look in LOOKS if any(v.look == look for v in found)]
    handles = [Line2D([], [], color=LOOKS[u][0], marker=LOOKS[u][1], linestyle="", label=u) for u in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(used), 4), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def render(rows: list[dict[str, Any]], name: str, docs: Path) -> str:
    """The text of one block."""
    own = [row for row in rows if row["experiment"] == name]
    if not own:
        return f"No rows of this experiment in benchmarks/results yet ({name})."
    if name == "niah":
        return needle_table(own)
    plot(
        variants(own),
        docs / f"quality_{name}.png",
        f"{name}: bars span the seeds, the line is the best at these bytes or fewer",
    )
    return f"![perplexity against key bytes](quality_{name}.png)\n\n{perplexity_table(own)}"


def fill(text: str, rows: list[dict[str, Any]], docs: Path) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: a block without its end.
    """
    if len(re.findall(r"<!-- rows: ", text)) != len(re.findall(r"<!-- rows: (\w+) -->\n.*?<!-- end -->", text, re.S)):
        raise ValueError("every <!-- rows: NAME --> needs its <!-- end -->")

    def block(match: re.Match[str]) -> str:
        return f"<!-- rows: {match[1]} -->\n\n{render(rows, match[1], docs)}\n\n<!-- end -->"

    return re.sub(r"<!-- rows: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/quality.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args(argv)
    rows = read(sorted(args.results.glob("*.jsonl")))
    args.page.write_text(fill(args.page.read_text(), rows, args.page.parent))
    print(f"{args.page.name}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
