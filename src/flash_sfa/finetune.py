"""``flash-sfa finetune``: adapt a dense Transformers checkpoint to Sparse Feature Attention."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import (
    add_model_arguments,
    check_device,
    enable,
    encode,
    import_transformers,
    load_model,
    load_tokenizer,
    read_text,
    setting_of,
    short,
)
from .cli import UsageError, seed_number

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
    parser.add_argument("--topk-steps", type=int, default=0, metavar="N", help="steps until it is there, below --steps")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank and merge them (peft)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP, under torchrun")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--log-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=250)
    add_model_arguments(parser, generates=False)


def rows_of(ids: Tensor, length: int) -> list[dict[str, list[int]]]:
    """Packed training rows of a token stream (1, n); what does not fill a row is left out."""
    rows = ids[0, : ids.shape[1] // length * length].view(-1, length).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa finetune``."""
    setting = _check(args)
    text = "\n".join(read_text(path, "--text") for path in args.text)
    held_out = None if args.eval_text is None else read_text(args.eval_text, "--eval-text")
    settings = _settings(args, text)
    _check_out(args, settings)
    options = _options(args)
    tokenizer = load_tokenizer(args.checkpoint, args.tokenizer)
    on_cpu = argparse.Namespace(**(vars(args) | {"device": "cpu"}))  # the Trainer moves the model
    model = load_model(args.checkpoint, on_cpu).float()
    enable(model, setting, args.checkpoint)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and args.length > longest:
        raise UsageError(f"--length {args.length} is more than the {longest} positions of the model")
    ids = encode(tokenizer, text, model)
    rows = rows_of(ids, args.length)
    if not rows:
        raise UsageError(f"--text holds {ids.shape[1]} tokens, less than one row of --length {args.length}")
    if held_out is not None and encode(tokenizer, held_out, model).shape[1] < 2:
        raise UsageError(f"--eval-text {args.eval_text}: too short, at least 2 tokens are needed")
    if args.lora is not None:
        model = _with_lora(model, args.lora)
    trainer = _trainer(model, rows, args, options)
    main = trainer.is_world_process_zero()
    if main:
        (args.out / "finetune.json").write_text(json.dumps(settings, indent=2) + "\n")
    trainer.train(resume_from_checkpoint=True if args.resume else None)
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if main:
        if weights is None:
            result = trainer.accelerator.unwrap_model(trainer.model)
            weights = (result if args.lora is None else result.merge_and_unload()).state_dict()
        result = load_model(args.checkpoint, on_cpu)  # has the dtypes to save in
        enable(result, setting, args.checkpoint)
        result.load_state_dict(weights)
        result.save_pretrained(args.out / "model")
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(args.out / "model")
        print(f"checkpoint: {args.out / 'model'}; log: {args.out / 'log.jsonl'}")
        if held_out is not None:
            print(_report(args, setting, tokenizer, held_out))
    return 0


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """What can be wrong with the arguments alone; returns the setting of SFA."""
    rank = os.environ.get("LOCAL_RANK", "0")  # of torchrun, which has a GPU for each
    check_device(f"cuda:{rank}" if args.device == "cuda" else args.device)
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
    if args.lora is not None:
        _import_peft()
    return setting


def _check_out(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Whether --out is a new or empty folder, or with --resume one of a run with these settings."""
    there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {args.out}: {there} is not a folder that can be written to")
    stored = args.out / "finetune.json"
    if args.resume:
        if not stored.is_file() or not list(args.out.glob("checkpoint-*")):
            raise UsageError(f"--resume: {args.out} holds no checkpoint of a run")
        try:
            before = dict(json.loads(stored.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UsageError(f"--resume: {stored} cannot be read ({short(error)})") from None
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UsageError(
                f"--resume: {args.out} was started with another "
                + ", ".join(f"{n} ({before.get(n)!r})" for n in changed)
            )
    elif args.out.exists() and any(args.out.iterdir()) and int(os.environ.get("RANK", "0")) == 0:
        raise UsageError(f"--out {args.out} is not empty; use --resume, or another folder")


def _settings(args: argparse.Namespace, text: str) -> dict[str, Any]:
    """What decides the result, as it goes into a file: the arguments and a hash of the text."""
    plain = {name: value for name, value in vars(args).items() if name not in _FREE and not callable(value)}
    plain["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
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


def _options(args: argparse.Namespace) -> Any:
    """The Trainer's arguments, for the device that was asked for and one GPU a process."""
    transformers = import_transformers()
    wanted, several = torch.device(args.device), int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        options = transformers.TrainingArguments(
            str(args.out), max_steps=args.steps, per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate, learning_rate=args.lr, warmup_steps=args.warmup,
            lr_scheduler_type="cosine", bf16=args.bf16, gradient_checkpointing=args.gradient_checkpointing,
            logging_steps=args.log_steps, save_steps=args.save_steps, save_total_limit=2, seed=args.seed,
            report_to="none", use_cpu=wanted.type == "cpu", remove_unused_columns=False,
            fsdp=["full_shard"] if args.fsdp else None, fsdp_config={"version": 2} if args.fsdp else None,
            ddp_find_unused_parameters=False if several else None,
        )  # fmt: skip
        taken = options.device
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(f"Transformers refuses these arguments: {short(error)}") from error
    allowed = {None} if several else {None, taken.index or 0}
    if wanted.type != taken.type or wanted.index not in allowed:
        raise UsageError(
            f"--device {args.device}: the Trainer takes {taken}; choose another GPU by CUDA_VISIBLE_DEVICES, without "
            "an index here"
        )
    if options.n_gpu > 1:
        options._n_gpu = 1  # the Trainer would take all GPUs in one process
    return options


def _trainer(model: Any, rows: list[dict[str, list[int]]], args: argparse.Namespace, options: Any) -> Any:
    transformers = import_transformers()
    from .integrations.adapt import AdaptTrainer

    file = args.out / "log.jsonl"

    class Log(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_train_begin(self, _: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and file.is_file():
                file.write_text(_until(file.read_text(), state.global_step))

        def on_log(self, _: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs:
                with file.open("a") as log:
                    log.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    try:
        return AdaptTrainer(
            model, options, train_dataset=rows, data_collator=transformers.default_data_collator, callbacks=[Log()],
            regulariser=args.regulariser, regulariser_end=args.regulariser_end, topk_from=args.topk_from,
            topk_steps=args.topk_steps,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def _until(log: str, step: int) -> str:
    """The lines of a log up to a step, which a resumed run goes on from; what follows comes again."""
    kept = []
    for line in log.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:  # half a line, of a run that was killed
            break
        if entry["step"] > step or "loss" not in entry:  # the summary at the end of a run
            break
        kept.append(line)
    return "".join(kept)


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
