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


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("bench needs a CUDA device, and PyTorch finds none here (see: flash-sfa env)")
    from . import attention, decode

    return {"attention": attention, "decode": decode}[args.kind].run(args)
