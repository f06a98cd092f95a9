"""What a trained model needs of a long cache: codes and weights by layer, and what ``tolerance`` costs and saves.

    python benchmarks/long_context.py runs/NAME --data DIR/wikipedia-val --length 16384 --out rows.jsonl

Every row of ``--length`` tokens is read at once; its last ``--tail`` tokens are then attended again one by one through
a `SparseKVCache`, as generation would, at each tolerance. Loss is that of the tail. JSON rows: a layer, or a tolerance.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from flash_sfa import SparseKVCache, sfa_attention_with_kvcache
from flash_sfa.train import models
from flash_sfa.train.attention import LayerAttention, kept_features, train_attention
from flash_sfa.train.niah import load_model
from flash_sfa.train.pretrain import commit, token_losses
from flash_sfa.train.shards import open_shards, read_rows

Attention = Callable[..., tuple[Tensor, None]]


def plain(at: LayerAttention) -> bool:
    """True for a layer whose attention is that of the public operator."""
    ideas = (at.alibi, at.shrink, at.split_signs, at.recent, at.map_dim, at.share, at.drop, at.center)
    return at.kind == "sfa" and at.topk_k is not None and not any(ideas)


def cached_tail(tolerance: float, tail: int, rows_read: list[float]) -> Attention:
    """`train_attention` whose last ``tail`` queries go through a cache; rows_read gets the share of V rows read."""

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        out, _ = train_attention(module, q, k, v, mask, **options)
        at = module.sfa_train
        if not plain(at) or options.get("sliding_window") is not None:
            return out, None
        dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        b, n, hkv, d = k.shape
        cache = SparseKVCache(
            num_kv_heads=hkv, head_dim=d, v_head_dim=v.shape[-1], topk=at.topk_k, dense_dims=at.dense_dims,
            max_tokens=b * (n + 256), dtype=dtype, device=k.device,
        )  # fmt: skip
        cache.append(k[:, : n - tail], v[:, : n - tail], seq_ids=cache.alloc(b))
        for i in range(n - tail, n):
            one = slice(i, i + 1)
            out[:, one], stats = sfa_attention_with_kvcache(
                q[:, one], cache, k=k[:, one], v=v[:, one], topk=(at.topk_q, at.topk_k), tolerance=tolerance,
                softmax_scale=options["scaling"], return_stats=True, impl="cpu",
            )  # fmt: skip
            rows_read.append(float(stats["rows_read"].float().mean()) / (i + 1))
        return out, None

    return attend


def layer_rows(module: Any, tail: int) -> dict[str, float]:
    """Statistics of one layer over the last ``tail`` queries of what it captured."""
    at = module.sfa_train
    q, k, _ = at.captured[0]
    n, groups = k.shape[2], q.shape[1] // k.shape[1]
    q_on, k_on = kept_features(q, at.topk_q, at), kept_features(k, at.topk_k, at)
    share = k_on.float().mean((0, 2))[:, [u for u in range(k.shape[-1]) if u not in at.dense_dims]]
    share = share / share.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1) / math.log(share.shape[-1])
    codes = [torch.where(on, x, 0.0).float() for on, x in ((q_on, q), (k_on, k))]
    seen = torch.arange(n, device=q.device) <= torch.arange(n - tail, n, device=q.device)[:, None]
    totals: dict[str, list[Tensor]] = {"overlap": [], "v_rows": [], "rows_999": []}
    for h in range(k.shape[1]):  # a kv head at a time: (b, groups, tail, n) of scores
        mine = slice(h * groups, (h + 1) * groups)
        hit = (q_on[:, mine, n - tail :].float() @ k_on[:, h : h + 1].float().transpose(-1, -2) > 0) & seen
        scores = codes[0][:, mine, n - tail :] @ codes[1][:, h : h + 1].transpose(-1, -2) * module.scaling
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).sort(-1, descending=True).values
        needed = (weights.cumsum(-1) < 0.999).sum(-1) + 1
        totals["overlap"].append((hit.sum(-1) / seen.sum(-1)).mean())
        totals["v_rows"].append((hit.any(1).sum(-1) / seen.sum(-1)).mean())
        totals["rows_999"].append((needed / seen.sum(-1)).mean())
    return {name: float(sum(xs) / len(xs)) for name, xs in totals.items()} | {"balance_k": float(entropy.mean())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder of flash-sfa pretrain, trained with train.save_last")
    parser.add_argument("--data", type=Path, required=True, help="token shards of held-out text")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tail", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.0, 1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if not (args.run / "recipe.json").is_file():
        raise SystemExit(f"{args.run} is not a run of flash-sfa pretrain")
    model, recipe = load_model(args.run)
    if recipe is None:
        raise SystemExit(f"{args.run} holds no recipe")
    model.to(args.device)
    data = open_shards([args.data])
    if data.tokens <= args.rows * args.length:
        raise SystemExit(f"{args.data} holds {data.tokens} tokens, {args.rows * args.length + 1} are needed")
    chosen = [
        m for m in models.attention_modules(model) if plain(m.sfa_train) and getattr(m, "sliding_window", None) is None
    ]
    if not chosen or not 0 < args.tail < args.length:
        raise SystemExit("the run must have SFA layers without a window, and --tail must be below --length")
    about = {
        "bench": "long_context", "name": recipe.name, "seqlen": args.length, "tail": args.tail, "rows": args.rows,
        "topk": chosen[0].sfa_train.topk_k, "dense_dims": len(chosen[0].sfa_train.dense_dims),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__,
        "commit": commit(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    out = []
    for tolerance in [None, *args.tolerances]:
        read: list[float] = []
        AttentionInterface.register(
            "sfa_train", train_attention if tolerance is None else cached_tail(tolerance, args.tail, read)
        )
        loss = 0.0
        for r in range(args.rows):
            row = torch.from_numpy(read_rows(data, [r * args.length], args.length)).to(args.device)
            for m in chosen:
                m.sfa_train.captured = [] if tolerance is None and r == 0 else None
            with torch.no_grad():
                losses = token_losses(model, row[:, :-1], row[:, 1:], recipe.train.bf16)
            loss += float(losses[:, -args.tail :].double().mean()) / args.rows
            for m in chosen if tolerance is None and r == 0 else []:
                with torch.no_grad():
                    out.append({**about, "kind": "layer", "layer": m.layer_idx, **layer_rows(m, args.tail)})
        row_read = sum(read) / len(read) if read else None
        AttentionInterface.register("sfa_train", train_attention)
        out.append({**about, "kind": "tolerance", "tolerance": tolerance, "loss": loss, "v_rows_read": row_read})
        print(json.dumps({k: out[-1][k] for k in ("tolerance", "loss", "v_rows_read")}), flush=True)
    for line in out[: len(chosen)]:
        print({k: round(line[k], 4) for k in ("layer", "overlap", "v_rows", "rows_999", "balance_k")}, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
