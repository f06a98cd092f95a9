"""Print the scout's rows as a Markdown table: python benchmarks/scout_table.py benchmarks/results/scout_h200.jsonl"""

import json
import sys
from pathlib import Path


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    flat = []
    for row in rows:
        codes = row.get("codes") or {}
        flat.append((row["name"], row["k_bytes"], row["val"]["all"], row["test"]["wikitext2"], codes))
        for at in row.get("quantized") or []:
            flat.append(
                (f"{row['name']}, K in {at['bits']} bits", at["k_bytes"], at["val"]["all"], at["test"]["wikitext2"], {})
            )
    dense = {
        name.split("-")[0]: ppl for name, _, ppl, _, _ in flat if name.endswith("-dense") and "partial" not in name
    }
    print("| run | K bytes | perplexity | against dense | WikiText-2 | overlap | edges a pair |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, k_bytes, ppl, wikitext, codes in sorted(flat, key=lambda r: (r[0].split("-")[0], r[2])):
        against = ppl / dense[name.split("-")[0]] - 1
        measured = [f"{codes[key]:.2f}" if key in codes else "-" for key in ("overlap", "edges")]
        cells = [name, f"{k_bytes:.0f}", f"{ppl:.2f}", f"{against:+.1%}", f"{wikitext:.0f}", *measured]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
