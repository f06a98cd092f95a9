"""``flash-sfa generate``: continue a prompt with a Transformers checkpoint, dense and with SFA."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import (
    Bytes,
    add_model_arguments,
    cache_bytes,
    enable,
    encode,
    load_model,
    load_tokenizer,
    new_cache,
    pad_token,
    read_text,
    setting_of,
)
from .cli import UsageError, seed_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-sfa generate``."""
    parser.add_argument("checkpoint", help="a folder, or a name on the hub")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the text to continue")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file that holds it")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--sample", action="store_true", help="sample; without it the likeliest token is taken")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument(
        "--dense-too", action="store_true", help="also generate with the same weights and dense attention"
    )
    add_model_arguments(parser)


@torch.no_grad()
def generate(
    model: Any, ids: Tensor, args: argparse.Namespace, *, new_tokens: int, pad: int, **kwargs: Any
) -> tuple[Tensor, Any, float]:
    """(sequences, cache, seconds) of one call of model.generate with a new cache."""
    cache = new_cache(model, args)
    if ids.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    options = {
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "pad_token_id": pad,
        "past_key_values": cache,
        **kwargs,
    }
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return out, cache, time.perf_counter() - begin


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa generate``."""
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not args.sample and args.temperature != 1.0:
        raise UsageError("--temperature needs --sample")
    if args.sample and not args.temperature > 0.0:
        raise UsageError(f"--temperature must be positive, got {args.temperature}")
    setting = setting_of(args)
    prompt = args.prompt if args.prompt is not None else read_text(args.prompt_file, "--prompt-file")
    if not prompt:
        raise UsageError("--prompt is empty")
    tokenizer = load_tokenizer(args.checkpoint, args.tokenizer)
    model = load_model(args.checkpoint, args)
    ids = encode(tokenizer, prompt, model)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + args.max_new_tokens > longest:
        raise UsageError(
            f"the prompt has {ids.shape[1]} tokens; with --max-new-tokens {args.max_new_tokens} that is more than the "
            f"{longest} positions of the model"
        )
    setting = setting or getattr(model.config.get_text_config(decoder=True), "sfa", None)
    if setting is None and (args.v_dtype or args.tolerance):
        raise UsageError(f"--v-dtype and --tolerance need SFA: {args.checkpoint} has no config.sfa, so give --topk")
    sample = {"do_sample": True, "temperature": args.temperature} if args.sample else {}
    names = (["dense"] if setting is None or args.dense_too else []) + ([] if setting is None else ["sfa"])
    for name in names:
        if name == "sfa" and setting is not None:
            enable(model, setting, args.checkpoint)
        torch.manual_seed(args.seed)
        out, cache, seconds = generate(
            model, ids, args, new_tokens=args.max_new_tokens, pad=pad_token(tokenizer), **sample
        )
        new = out[0, ids.shape[1] :].tolist()
        text = (
            tokenizer.decode(new) if isinstance(tokenizer, Bytes) else tokenizer.decode(new, skip_special_tokens=True)
        )
        print(f"--- {name}: {len(new)} tokens, {len(new) / seconds:.1f} a second, cache {cache_bytes(cache):,} bytes")
        print(text)
    return 0
