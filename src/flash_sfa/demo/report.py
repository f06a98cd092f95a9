"""The report of a run: terminal table, report.md, report.html with its pictures inside, PNG files."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .models import Settings, Variant
from .train import Records

COLOURS = {"dense": "#4c566a", "narrow": "#d08770", "sfa-rope": "#3a9d8f", "sfa": "#2e6fbb"}


# Measured with the default settings: the range of one variant's loss over three seeds and two run lengths.
SPREAD = 0.1


@dataclass
class Outcome:
    """What is known when the report is written; results holds the variants that finished."""

    settings: Settings
    variants: dict[str, Variant]
    records: dict[str, Records]
    results: dict[str, dict[str, Any]]
    machine: str
    seconds: float
    text_name: str
    bytes_per_character: float
    interrupted: bool = False


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def table(outcome: Outcome) -> list[list[str]]:
    """Rows of cells; the first row names the variants, the first column the measure."""
    names = [name for name in outcome.variants if outcome.records.get(name)]
    results = [outcome.results.get(name) for name in names]

    def row(label: str, cell: Any) -> list[str]:
        return [label, *("-" if result is None else cell(result) for result in results)]

    def training(name: str) -> str:
        records = outcome.records[name]
        step = records[-1]["step"]
        rate = _number(records[-1]["tokens"] / max(records[-1]["seconds"], 1e-9))
        return rate if step == outcome.settings.steps else f"stopped at step {step}"

    def equality(result: dict[str, Any]) -> str:
        e = result["equality"]
        excused = [f"{e['flips']} flips"] * bool(e["flips"]) + [f"{e['ties']} ties"] * bool(e["ties"])
        text = f"{e['equal']} of {e['rows']}" + (f" + {', '.join(excused)}" if excused else "")
        return text if e["ok"] else f"FAILED ({text})"

    rows = [
        ["", *names],
        row("parameters", lambda r: _number(r["parameters"])),
        row("validation loss, nats a byte", lambda r: f"{r['validation_loss']:.4f}"),
        row("perplexity a byte", lambda r: f"{r['perplexity_byte']:.3f}"),
    ]
    if outcome.bytes_per_character > 1.0001:
        rows.append(row("perplexity a character", lambda r: f"{r['perplexity_character']:.3f}"))
    return [
        *rows,
        row("key bytes a token, bf16 cache", lambda r: _number(r["cache_bfloat16"]["keys"])),
        row("K + V bytes a token, bf16 cache", lambda r: _number(r["cache_bfloat16"]["all"])),
        row("key bytes a token, fp32 cache", lambda r: _number(r["cache_float32"]["keys"])),
        row("K + V bytes a token, fp32 cache", lambda r: _number(r["cache_float32"]["all"])),
        row("pairs whose top-k features meet", lambda r: f"{r['overlap']:.3f}" if "overlap" in r else "-"),
        row("feature balance of q", lambda r: f"{r['balance_q']:.3f}" if "overlap" in r else "-"),
        row("feature balance of k", lambda r: f"{r['balance_k']:.3f}" if "overlap" in r else "-"),
        ["training, tokens/s", *(training(name) for name in names)],
        row("generation with cache, tokens/s", lambda r: _number(r["generation_tokens_a_second"]["cached"])),
        row("generation without, tokens/s", lambda r: _number(r["generation_tokens_a_second"]["uncached"])),
        row("greedy rows equal with and without", equality),
        row("largest logit difference", lambda r: f"{r['equality']['largest_logit_difference']:.1e}"),
    ]


def plain_table(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def findings(outcome: Outcome) -> list[str]:
    """Wins and losses of the sparse variants in plain sentences, and what the equality check found."""
    results, lines = outcome.results, []
    for name in ("sfa", "sfa-rope"):
        for rival in ("dense", "narrow"):
            if name in results and rival in results:
                gap = results[name]["validation_loss"] - results[rival]["validation_loss"]
                size = results[name]["cache_bfloat16"]["keys"] / results[rival]["cache_bfloat16"]["keys"]
                word = "level with" if abs(gap) < 5e-5 else "worse than" if gap > 0 else "better than"
                lines.append(
                    f"{name} is {word} {rival}: {gap:+.4f} nats a byte, with {size:.2f} of its key bytes (bf16)."
                    + (" Such short runs spread as much." if abs(gap) < SPREAD else "")
                )
    for name, result in results.items():
        e = result["equality"]
        lines += [f"FAILED: {name}: cached generation is not uncached generation: {f}" for f in e["failures"]]
    checked = [result["equality"] for result in results.values()]
    if checked and all(e["ok"] for e in checked):
        rows, equal = sum(e["rows"] for e in checked), sum(e["equal"] for e in checked)
        lines.append(
            f"Cached greedy generation equals uncached generation: {equal} of {rows} rows token for token; "
            f"{sum(e['flips'] for e in checked)} differ after a feature flipped at the top-k boundary, "
            f"{sum(e['ties'] for e in checked)} after a tie of the two best logits, which rounding explains."
        )
    return lines


def notes(outcome: Outcome) -> list[str]:
    """What a reader needs to judge the table."""
    s = outcome.settings
    model = "GPT-2 with learned positions" if s.positions == "absolute" else "mimo_v2_flash with rotary positions"
    width = s.heads * s.head_dim if s.positions == "absolute" else s.hidden
    per_head = ", ".join(f"{v.name} {v.key_bytes(2)}/{v.key_bytes(4)}" for v in outcome.variants.values())
    return [
        f"Text: {outcome.text_name}. A token is a byte, so the vocabulary is 256 and losses are per byte; "
        "the last tenth of the text is the validation text.",
        f"Model: {model}, {s.layers} layers, width {width}, "
        f"{s.heads} heads, v of {s.head_dim} features, context {s.context}.",
        f"Every variant trains for {s.steps} steps of {s.batch} x {s.context} = "
        f"{s.steps * s.batch * s.context:,} tokens, with seed {s.seed} and the same batches in the "
        f"same order. One seed and few tokens: such runs spread by about {SPREAD} in the loss of a variant.",
        "Cache bytes are measured on the tensors of a cache filled by a prefill, over all layers and heads. "
        f"Bytes of one key row in bf16/fp32: {per_head}. The widths are set so that narrow stores at least "
        "the key bytes of the sparse variants in either dtype.",
        "Training and quality run in float32 on a CPU; on CUDA training runs under bfloat16 autocast. "
        "Generation and its check run in float32.",
        "Pairs that meet: share of (query, visible key) pairs with a common top-k feature; always-on ones "
        "do not count. Feature balance: entropy of which features top-k selects, 1 = all equally often.",
        f"Generation speed: {s.prompts} sequences together, {s.prompt_tokens} prompt and {s.new_tokens} new "
        "tokens. At this size it measures call overhead, not memory traffic.",
        f"Machine: {outcome.machine}. Time of this command: {outcome.seconds:.0f} s.",
    ]


def _smooth(values: list[float], width: int) -> list[float]:
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e9f0", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_losses(outcome: Outcome, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=120)
    for name, records in outcome.records.items():
        if not records:
            continue
        colour = COLOURS[name]
        tokens = [record["tokens"] / 1e3 for record in records]
        losses = _smooth([record["loss"] for record in records], max(1, outcome.settings.steps // 40))
        axes.plot(tokens, losses, color=colour, alpha=0.45, linewidth=1.0)
        checks = [
            (r["tokens"] / 1e3, r["validation_loss_16_windows"]) for r in records if "validation_loss_16_windows" in r
        ]
        label = name if name in outcome.results else f"{name} (not finished)"
        axes.plot([x for x, _ in checks], [y for _, y in checks], "o-", color=colour, markersize=4, label=label)
    axes.set_xlabel("thousand training tokens")
    axes.set_ylabel("loss, nats a byte")
    axes.set_title("Loss: training (thin, smoothed) and 16 validation windows (dots)", fontsize=11, loc="left")
    finals = [y for records in outcome.records.values() for y in [r["loss"] for r in records][-5:]]
    if finals:
        axes.set_ylim(min(finals) - 0.15, min(4.2, max(finals) + 1.2))
    if any(outcome.records.values()):
        axes.legend(frameon=False)
    _style(axes)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_cache(outcome: Outcome, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.75 * max(1, len(outcome.results))), dpi=120)
    names = list(outcome.results)[::-1]
    for name in names:
        sizes = outcome.results[name]["cache_bfloat16"]
        values = sizes["all"] - sizes["keys"]
        axes.barh(name, sizes["keys"], color=COLOURS[name])
        axes.barh(name, values, left=sizes["keys"], color=COLOURS[name], alpha=0.3)
        text = f" keys {sizes['keys']:,.0f} + values {values:,.0f}"
        axes.text(sizes["all"], name, text, va="center", fontsize=8.5)
    axes.set_xlabel("bytes a token, all layers and heads, bf16")
    axes.set_title("Measured cache: keys (full colour) and values (pale)", fontsize=11, loc="left")
    axes.margins(x=0.35)
    _style(axes)
    axes.grid(axis="x", color="#e5e9f0", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _markdown_text(text: str) -> str:
    return "".join("\\" + c if c in "\\`*_{}[]<>#|~&" else c for c in text)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def markdown(outcome: Outcome) -> str:
    rows = table(outcome)
    lines = ["# Sparse Feature Attention on a small language model", ""]
    if outcome.interrupted:
        lines += ["**Interrupted: this report holds what finished. `--resume` goes on.**", ""]
    lines += [f"- {_markdown_text(line)}" for line in findings(outcome)]
    lines += ["", "| " + " | ".join(rows[0]) + " |", "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    lines += ["", "Variants:", ""]
    lines += [f"- {variant.name}: {variant.label}" for variant in outcome.variants.values()]
    lines += ["", "![loss curves](losses.png)", "", "![cache sizes](cache.png)", "", "## Notes", ""]
    lines += [f"- {_markdown_text(line)}" for line in notes(outcome)]
    if outcome.results:
        prompt = next(iter(outcome.results.values()))["prompt"]
        lines += ["", "## Samples (temperature 0.8)", "", "Prompt:", "", _fenced(prompt)]
        for name, result in outcome.results.items():
            lines += ["", f"{name}:", "", _fenced(result["sample"])]
    return "\n".join(lines) + "\n"


CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#2e3440;max-width:60em;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse;width:100%}
td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #e5e9f0}
td:first-child,th:first-child{text-align:left}
td{font-variant-numeric:tabular-nums}tr:hover td{background:#f4f6fa}
img{max-width:100%}pre{background:#f4f6fa;padding:.8em;white-space:pre-wrap;overflow-wrap:anywhere}
.bad{background:#bf616a;color:#fff;padding:.5em .8em}.notes{color:#4c566a;font-size:.93em}
"""


def html_page(outcome: Outcome, pictures: list[Path]) -> str:
    e = html.escape
    rows = table(outcome)
    head = "".join(f"<th>{e(cell)}</th>" for cell in rows[0])
    body = "\n".join("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    inline = {p.stem: base64.b64encode(p.read_bytes()).decode("ascii") for p in pictures}
    images = "\n".join(
        f'<p><img alt="{e(stem)}" src="data:image/png;base64,{data}"></p>' for stem, data in inline.items()
    )
    found = "".join(
        f"<li{' class=bad' if line.startswith('FAILED') else ''}>{e(line)}</li>" for line in findings(outcome)
    )
    labels = "".join(f"<li><b>{e(v.name)}</b>: {e(v.label)}</li>" for v in outcome.variants.values())
    remarks = "".join(f"<li>{e(line)}</li>" for line in notes(outcome))
    samples = "".join(f"<h3>{e(n)}</h3><pre>{e(r['sample'])}</pre>" for n, r in outcome.results.items())
    if outcome.results:
        prompt = next(iter(outcome.results.values()))["prompt"]
        samples = f"<h2>Samples (temperature 0.8)</h2><h3>prompt</h3><pre>{e(prompt)}</pre>{samples}"
    stopped = "<p class=bad>Interrupted: this report holds what finished. <code>--resume</code> goes on.</p>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Sparse Feature Attention: demo report</title>
<style>{CSS}</style></head><body>
<h1>Sparse Feature Attention on a small language model</h1>
{stopped if outcome.interrupted else ""}
<ul>{found}</ul>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
<h2>Variants</h2><ul>{labels}</ul>
{images}
<h2>Notes</h2><ul class="notes">{remarks}</ul>
{samples}
</body></html>
"""


def write(outcome: Outcome, folder: Path) -> None:
    """report.html, report.md, losses.png and cache.png into ``folder``."""
    pictures = [folder / "losses.png", folder / "cache.png"]
    plot_losses(outcome, pictures[0])
    plot_cache(outcome, pictures[1])
    (folder / "report.md").write_text(markdown(outcome), encoding="utf-8")
    (folder / "report.html").write_text(html_page(outcome, pictures), encoding="utf-8")
