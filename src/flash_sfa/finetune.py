"""``flash-sfa finetune``: adapt a dense Transformers checkpoint to Sparse Feature Attention."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import (
    add_model_arguments,
    enable,
    encode,
    import_transformers,
    load_model,
    load_tokenizer,
    read_text,
    setting_of,
)
from .cli import UsageError

# What may differ between a run and its --resume.
_FREE = {"resume", "device", "log_steps", "save_steps", "run", "command"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-sfa finetune``."""
    parser.add_argument("checkpoint", help="a folder, or a name on the hub")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text to train on")
    parser.add_argument("--eval-text", type=Path, metavar="FILE", help="held-out text: perplexity before and after")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run and its checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="rows a micro-batch and device")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up; then a cosine to 0")
    parser.add_argument("--regulariser", type=float, default=0.1, metavar="LAMBDA", help="weight of R; 0 without it")
    parser.add_argument("--regulariser-end", type=float, metavar="LAMBDA", help="its weight at the end")
    parser.add_argument("--topk-from", type=int, metavar="N", help="topk at the first step, falling to --topk")
    parser.add_argument("--topk-steps", type=int, default=0, metavar="N", help="steps until it is there")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank and merge them (peft)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP, under torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=250)
    add_model_arguments(parser)


def rows_of(ids: Tensor, length: int) -> list[dict[str, list[int]]]:
    """Packed training rows of a token stream (1, n); what does not fill a row is left out."""
    rows = ids[0, : ids.shape[1] // length * length].view(-1, length).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa finetune``."""
    setting = _check(args)
    text = "\n".join(read_text(path, "--text") for path in args.text)
    held_out = None if args.eval_text is None else read_text(args.eval_text, "--eval-text")
    tokenizer = load_tokenizer(args.checkpoint, args.tokenizer)
    device, args.device = args.device, "cpu"  # the Trainer moves the model
    model = load_model(args.checkpoint, args).float()
    args.device = device
    enable(model, setting, args.checkpoint)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and args.length > longest:
        raise UsageError(f"--length {args.length} is more than the {longest} positions of the model")
    ids = encode(tokenizer, text, model)
    rows = rows_of(ids, args.length)
    if not rows:
        raise UsageError(f"--text holds {ids.shape[1]} tokens, less than one row of --length {args.length}")
    config = model.config
    if args.lora is not None:
        model = _with_lora(model, args.lora)
    trainer = _trainer(model, rows, args)
    main = trainer.is_world_process_zero()
    if main:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "finetune.json").write_text(json.dumps(_settings(args), indent=2) + "\n")
    trainer.train(resume_from_checkpoint=True if args.resume else None)
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)
    else:
        weights = None
    if main:
        result = trainer.accelerator.unwrap_model(trainer.model)
        if args.lora is not None:
            result = result.merge_and_unload()
        result.config = config
        result.save_pretrained(args.out / "model", state_dict=weights)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(args.out / "model")
        print(f"checkpoint: {args.out / 'model'}; log: {args.out / 'log.jsonl'}")
        if held_out is not None:
            print(_report(args, setting, tokenizer, held_out))
    return 0


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be wrong before a model is loaded; returns the setting of SFA."""
    for name in ("steps", "batch", "accumulate", "log_steps", "save_steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.length < 2:
        raise UsageError(f"--length must be at least 2, got {args.length}")
    if not args.lr > 0.0:
        raise UsageError(f"--lr must be above 0, got {args.lr}")
    if args.warmup < 0 or (args.lora is not None and args.lora < 1):
        raise UsageError(f"--warmup must be at least 0 and --lora at least 1, got {args.warmup} and {args.lora}")
    if args.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UsageError("--fsdp needs several processes: torchrun --nproc-per-node N -m flash_sfa.cli finetune ...")
    if args.fsdp and args.lora is not None:
        raise UsageError("--lora with --fsdp is not built; use DDP (leave --fsdp out)")
    setting = setting_of(args)
    if setting is None:
        raise UsageError("--topk is needed")
    stored = args.out / "finetune.json"
    if args.resume:
        if not stored.is_file() or not list(args.out.glob("checkpoint-*")):
            raise UsageError(f"--resume: {args.out} holds no checkpoint of a run")
        before = json.loads(stored.read_text())
        changed = [name for name, value in _settings(args).items() if before.get(name) != value]
        if changed:
            raise UsageError(
                f"--resume: {args.out} was started with another "
                + ", ".join(f"{n} ({before.get(n)!r})" for n in changed)
            )
    elif args.out.exists() and any(args.out.iterdir()) and int(os.environ.get("RANK", "0")) == 0:
        raise UsageError(f"--out {args.out} is not empty; use --resume, or another folder")
    if args.lora is not None:
        _import_peft()
    return setting


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide the result, as they go into a file."""
    plain = {name: value for name, value in vars(args).items() if name not in _FREE and not callable(value)}
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]


def _import_peft() -> Any:
    try:
        import peft
    except Exception:  # a broken installation may raise anything
        raise UsageError("--lora needs peft: pip install 'flash-sfa[lora]'") from None
    return peft


def _with_lora(model: Any, rank: int) -> Any:
    peft = _import_peft()
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, options)


def _trainer(model: Any, rows: list[dict[str, list[int]]], args: argparse.Namespace) -> Any:
    transformers = import_transformers()
    from .integrations.adapt import AdaptTrainer

    class Log(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, _: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs:
                with (args.out / "log.jsonl").open("a") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    options = transformers.TrainingArguments(
        str(args.out), max_steps=args.steps, per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate, learning_rate=args.lr, warmup_steps=args.warmup,
        lr_scheduler_type="cosine", bf16=args.bf16, gradient_checkpointing=args.gradient_checkpointing,
        logging_steps=args.log_steps, save_steps=args.save_steps, save_total_limit=2, seed=args.seed,
        report_to="none", use_cpu=args.device == "cpu", remove_unused_columns=False,
        fsdp=["full_shard"] if args.fsdp else None, fsdp_config={"version": 2} if args.fsdp else None,
        ddp_find_unused_parameters=False if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
    )  # fmt: skip
    try:
        return AdaptTrainer(
            model, options, train_dataset=rows, data_collator=transformers.default_data_collator, callbacks=[Log()],
            regulariser=args.regulariser, regulariser_end=args.regulariser_end, topk_from=args.topk_from,
            topk_steps=args.topk_steps,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def _report(args: argparse.Namespace, setting: dict[str, Any], tokenizer: Any, text: str) -> str:
    """Perplexity on held-out text: dense, SFA without training, SFA as adapted."""
    from .evaluate import perplexity

    lines = []
    for name, path, sparse in (
        ("dense, before", args.checkpoint, False),
        ("SFA, before", args.checkpoint, True),
        ("SFA, adapted", str(args.out / "model"), True),
    ):
        model = load_model(path, args)
        if sparse:
            enable(model, setting, path)
        ids = encode(tokenizer, text, model)
        with torch.no_grad():
            found = perplexity(model, ids, length=args.length, stride=args.length)
        lines.append(f"{name:14} perplexity {found['perplexity']:.4f} ({found['tokens']} tokens)")
    return "\n".join(lines)
