"""Time training steps of the GPT-2 small shape, dense against SFA, on one GPU.

    python benchmarks/step_time.py --out runs/step.jsonl

A step is forward, backward, clipping and fused AdamW on random tokens, in bf16 with torch.compile, 32k tokens a step.
Dense runs with PyTorch's own choice of kernel and with cuDNN; SFA (topk = 8 of q and k) by masks and by the operator.
"""

import argparse
import contextlib
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sfa.train import models
from flash_sfa.train.pretrain import _optimizer, commit, mean_loss
from flash_sfa.train.recipe import build_recipe

TOKENS = 32768
VARIANTS = ("dense", "dense_cudnn", "sfa_mask", "sfa_op")


def measure(variant: str, context: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step and peak memory."""
    attention: dict[str, Any] = {"kind": "dense"}
    if variant.startswith("sfa"):
        attention = {"kind": "sfa", "topk_q": 8, "topk_k": 8, "path": variant.removeprefix("sfa_")}
    shape = {"family": "gpt2", "layers": 12, "width": 768, "heads": 12, "head_dim": 64, "context": context}
    batch = TOKENS // context
    recipe = build_recipe({"model": shape, "attention": attention, "train": {"batch": batch, "tokens": TOKENS}})
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = models.build_model(recipe, 50257).cuda().train()
    optimizer = _optimizer(model, recipe, "cuda")
    loss = torch.compile(lambda ids: mean_loss(model, ids[:, :-1], ids[:, 1:], True), fullgraph=True, dynamic=False)
    backends = [SDPBackend.CUDNN_ATTENTION] if variant == "dense_cudnn" else None
    times = []
    torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    with sdpa_kernel(backends) if backends else contextlib.nullcontext():
        for step in range(steps + 5):
            ids = torch.randint(0, 50257, (batch, context + 1), device="cuda")
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss(ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            end.record()
            end.synchronize()
            if step >= 5:
                times.append(start.elapsed_time(end))
            elif step == 0:
                first_s = time.monotonic() - begin
    times.sort()
    return {
        "ms_median": statistics.median(times),
        "ms_p20": times[len(times) // 5],
        "ms_p80": times[len(times) * 4 // 5],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": round(first_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    for context in args.contexts:
        dense = float("inf")
        for variant in args.variants:
            row = {
                "bench": "step", "impl": variant, "device": torch.cuda.get_device_name(), "dtype": "bfloat16",
                "batch": TOKENS // context, "heads": 12, "kv_heads": 12, "seqlen_q": context, "seqlen_k": context,
                "head_dim": 64, "v_head_dim": 64, "causal": True, "commit": commit(), "torch": torch.__version__,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            if variant.startswith("sfa"):
                row |= {"topk": 8, "dense_dims": 0, "codes": "random weights"}
            row |= measure(variant, context, args.steps)
            dense = min(dense, row["ms_median"]) if variant.startswith("dense") else dense
            with args.out.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(
                f"{context:6d} {variant:12} {row['ms_median']:8.2f} ms ({row['ms_p20']:.2f} to {row['ms_p80']:.2f})  "
                f"{row['ms_median'] / dense:.3f} of dense  {row['peak_bytes'] / 2**30:.1f} GiB", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
