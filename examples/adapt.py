"""From a dense checkpoint to Sparse Feature Attention: train one in minutes, adapt it with and without the regulariser,
and print what was lost and saved.

    python examples/adapt.py [--quick] [--out DIR]

The text is tiny Shakespeare, a token a byte; every step is a command that works for any checkpoint of Transformers.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flash_sfa.cli import main as flash_sfa
from flash_sfa.demo.data import load_text
from flash_sfa.demo.models import QUICK, Settings, make_variants
from flash_sfa.demo.train import calibrate, train


def train_dense(out: Path, quick: bool) -> Settings:
    """A small dense model with partly rotary positions, saved in ``out / "dense"``, with its text beside it."""
    settings = Settings(**(QUICK | {"train_seconds": 5.0} if quick else {"train_seconds": 90.0}))
    variant = replace(make_variants(settings)["dense"], rotary=settings.rotary)
    text = load_text(None, settings.context)
    for name, part in (("train", text.train), ("held-out", text.validation)):
        (out / f"{name}.txt").write_bytes(bytes(part.tolist()))
    device = torch.device("cpu")
    settings = replace(settings, steps=calibrate({"dense": variant}, text, settings, device))
    train(variant, text, settings, device, out / "dense.pt", []).save_pretrained(out / "dense")
    return settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores; the figures mean little")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt-example"))
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = train_dense(args.out, args.quick)

    setting = ["--topk", "8", "--dense-dims", "rotary"]
    steps, windows = (10, 30) if args.quick else (150, 200)
    # With all features kept, attention is dense: what the same steps do for the dense model.
    runs = {
        "dense-more": (["--topk", str(settings.head_dim)], "0"),
        "plain": (setting, "0"),
        "regularised": (setting, "0.03"),
    }
    for name, (kept, weight) in runs.items():
        status = flash_sfa([
            "finetune", str(args.out / "dense"), "--text", str(args.out / "train.txt"), "--out", str(args.out / name),
            "--steps", str(steps), "--batch", "4", "--length", str(settings.context), "--lr", "5e-4", "--regulariser",
            weight, "--log-steps", str(steps // 5), "--tokenizer", "bytes", "--device", "cpu", *kept,
        ])  # fmt: skip
        if status:
            return status
    rows = args.out / "eval.jsonl"
    common = ["--tokenizer", "bytes", "--device", "cpu", "--text", str(args.out / "held-out.txt"), "--length",
              str(settings.context), "--windows", str(windows), "--out", str(rows)]  # fmt: skip
    for names, more in ((("dense", "dense-more/model", "plain/model", "regularised/model"), []), (("dense",), setting)):
        if status := flash_sfa(["eval", *(str(args.out / name) for name in names), *common, *more]):
            return status
    dense, more, plain, regularised, _, untrained = (json.loads(line) for line in rows.read_text().splitlines())
    print(f"\n{'':28}{'perplexity':>12}{'lost':>9}{'cache bytes a token':>22}{'saved':>8}")
    table = {
        "dense": (dense, dense), "SFA, not trained": (untrained, dense), f"dense, {steps} more steps": (more, more),
        f"SFA, {steps} steps": (plain, more), f"SFA, {steps} steps, regularised": (regularised, more),
    }  # fmt: skip
    for label, (row, rival) in table.items():
        lost = row["perplexity"] / rival["perplexity"] - 1
        saved = 0.0 if row in (dense, more) else 1 - row["cache_bytes_a_token"] / dense["cache_bytes_a_token"]
        size = (1 - saved) * dense["cache_bytes_a_token"]
        print(f"{label:28}{row['perplexity']:12.3f}{lost:+9.1%}{size:22,.0f}{saved:8.0%}")
    print("Lost is against the dense model that was trained as long.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
