"""``flash-sfa bench``: one subcommand a kind of call."""

import argparse
import os
from pathlib import Path

from ..cli import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    summary = "prefill and training attention, top-k included, against dense attention of the same shape"
    attention = kinds.add_parser("attention", help=summary, description=summary)
    attention.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for attention.jsonl and .png")
    attention.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens of a sequence")
    attention.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256], help="head dims")
    attention.add_argument("--topk", type=int, nargs="+", default=[8], help="features kept of q and k")
    attention.add_argument("--dense-q", action="store_true", help="top-k of k only, as topk=(None, TOPK)")
    attention.add_argument("--dense-dims", type=int, default=0, help="features that are always kept")
    attention.add_argument("--impls", nargs="+", default=["dense_cudnn", "dense_fa2", "mask_cudnn", "auto"])
    attention.add_argument("--repeats", type=int, default=10)
    attention.add_argument("--tokens", type=int, default=65536, help="tokens of a batch, at least one sequence")
    attention.add_argument("--commit", default=os.environ.get("FLASH_SFA_COMMIT", "unknown"), help="noted in the rows")
    summary = "a decoding step over the sparse cache, against dense attention over a dense one"
    decode = kinds.add_parser("decode", help=summary, description=summary)
    decode.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for decode.jsonl and .png")
    decode.add_argument("--cases", nargs="+", help="names of cases; all without it")
    decode.add_argument("--quick", action="store_true", help="a few cases")
    decode.add_argument("--sweep", action="store_true", help="also time the kernel's settings")
    decode.add_argument("--repeats", type=int, default=20)
    decode.add_argument("--commit", default=os.environ.get("FLASH_SFA_COMMIT", "unknown"), help="noted in the rows")
    summary = "the grid of the paper's kernel table: posting lists, our kernels and dense baselines"
    paper = kinds.add_parser("paper", help=summary, description=summary)
    paper.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for paper.jsonl; rows in it are kept"
    )
    paper.add_argument(
        "--quick", action="store_true", help="up to 16k tokens, not causal, topk 8 and 16 (32 above d = 256)"
    )
    paper.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; 1k to 64k and 128k without it")
    paper.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="widths of q and k")
    impls = ["dense_fma", "dense_cudnn", "dense_fa2", "dense_blocks", "intersect", "triton", "auto"]
    paper.add_argument("--impls", nargs="*", default=impls)
    paper.add_argument(
        "--models", nargs="*", default=[], help="also run gpt2, qwen3: random weights, the paper's shapes"
    )
    paper.add_argument("--batch", type=int, help="sequences; 8 without it, 1 at 128k")
    paper.add_argument("--repeats", type=int, default=10, help="timed calls; 5 where a call takes over 1 s")
    paper.add_argument("--seconds", type=float, help="start no further row after this time")
    paper.add_argument("--commit", default=os.environ.get("FLASH_SFA_COMMIT", "unknown"), help="noted in the rows")
    summary = "decode and prefill on this CPU, against PyTorch's attention"
    cpu = kinds.add_parser("cpu", help=summary, description=summary)
    cpu.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for cpu.jsonl")
    cpu.add_argument("--quick", action="store_true", help="a few cases")
    cpu.add_argument("--repeats", type=int, default=15, help="rounds; each times every implementation once")
    cpu.add_argument("--commit", default=os.environ.get("FLASH_SFA_COMMIT", "unknown"), help="noted in the rows")
    summary = "a reduced grid of every bench on this machine, within 10 minutes, and one HTML report"
    everything = kinds.add_parser("all", help=summary, description=summary)
    everything.add_argument(
        "--out", type=Path, default=Path("runs/bench/all"), help="folder for report.html and rows; those there go"
    )
    everything.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU, without it")
    everything.add_argument("--commit", default=os.environ.get("FLASH_SFA_COMMIT", "unknown"), help="noted in the rows")
    summary = "rows of two runs against each other; exit status 1 if B is slower beyond the spread"
    compare = kinds.add_parser("compare", help=summary, description=summary)
    for name in ("a", "b"):
        compare.add_argument(name, type=Path, metavar=name.upper(), help="a .jsonl file, or a folder of them")


def run(args: argparse.Namespace) -> int:
    import torch

    if args.kind in ("cpu", "all", "compare"):
        from . import cpu, report

        return {"cpu": cpu.run, "all": report.run, "compare": report.compare}[args.kind](args)
    if not torch.cuda.is_available():
        raise UsageError("bench needs a CUDA device, and PyTorch finds none here (see: flash-sfa env)")
    from . import attention, decode, paper

    return {"attention": attention, "decode": decode, "paper": paper}[args.kind].run(args)
