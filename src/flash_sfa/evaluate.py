"""``flash-sfa eval``: quality and cost of a Transformers checkpoint, dense and with SFA side by side.

Quality: perplexity of a text file, and tasks of lm-evaluation-harness (an extra: pip install 'flash-sfa[eval]').
Cost: bytes of the cache a token, and tokens a second when generating.
"""

import argparse
import datetime
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoints import (
    add_model_arguments,
    cache_bytes,
    enable,
    encode,
    load_model,
    load_tokenizer,
    pad_token,
    read_text,
    row_bytes,
    setting_of,
    short,
)
from .cli import UsageError
from .generate import generate

# Our names: (lm-eval's name, its file below lm_eval/tasks, the splits that hold local data).
TASKS = {
    "piqa": ("piqa", "piqa/piqa.yaml", ("validation",)),
    "lambada": ("lambada_openai", "lambada/lambada_openai.yaml", ("test",)),
    "arc_easy": ("arc_easy", "arc/arc_easy.yaml", ("test",)),
    "arc_challenge": ("arc_challenge", "arc/arc_challenge.yaml", ("test",)),
    "hellaswag": ("hellaswag", "hellaswag/hellaswag.yaml", ("validation",)),
    "gsm8k": ("gsm8k", "gsm8k/gsm8k.yaml", ("train", "test")),
}
# RULER's needle tasks that make their own data.
NEEDLES = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")


def perplexity(
    model: Any, ids: Tensor, *, length: int, stride: int, batch_size: int = 1, limit: int | None = None
) -> dict[str, float]:
    """Perplexity of ids (1, n) over windows of ``length`` tokens that move by ``stride``, without a cache.

    A window scores its last ``stride`` tokens, the first one all but its first token; so tokens are scored once, and
    see at least length - stride others. With stride = length the first token of a window is not scored.

    Returns:
        {"tokens", "loss", "perplexity"}: scored tokens and mean loss in nats. limit scores the first windows only.

    Raises:
        ValueError: there are fewer than two tokens, or stride is not in [1, length].
    """
    n = ids.shape[1]
    if n < 2:
        raise ValueError(f"ids must hold at least 2 tokens, got {n}")
    if not 1 <= stride <= length or length < 2:
        raise ValueError(f"stride must be in [1, length] and length at least 2, got {stride} and {length}")
    windows, done = [], 1
    for begin in range(0, n, stride):
        end = min(begin + length, n)
        if end > done:
            windows.append((begin, end, min(end - done, end - begin - 1)))
            done = end
        if end == n:
            break
    windows = windows[:limit]
    total, tokens = 0.0, 0
    while windows:
        begin, end, scored = windows[0]
        group = [w for w in windows[:batch_size] if (w[1] - w[0], w[2]) == (end - begin, scored)]
        windows = windows[len(group) :]
        rows = torch.cat([ids[:, b:e] for b, e, _ in group])
        logits = model(rows, use_cache=False).logits[:, -scored - 1 : -1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, -scored:].flatten(), reduction="sum"))
        tokens += rows[:, -scored:].numel()
    return {"tokens": tokens, "loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700.0))}


def cost(model: Any, ids: Tensor, args: argparse.Namespace, pad: int) -> dict[str, float]:
    """Bytes of the cache after generating from ids, and tokens a second without the prefill."""
    sizes = {"min_new_tokens": args.new_tokens}
    generate(model, ids, args, new_tokens=2, pad=pad)
    _, _, first = generate(model, ids, args, new_tokens=1, pad=pad)
    _, cache, every = generate(model, ids, args, new_tokens=args.new_tokens, pad=pad, **sizes)
    tokens = args.new_tokens - 1
    return {
        "cache_bytes_a_token": row_bytes(cache) / (ids.numel() + tokens),
        "cache_bytes_in_use": cache_bytes(cache),
        "generated_tokens_a_second": tokens * ids.shape[0] / max(every - first, 1e-9),
    }


def check_tasks(names: list[str], data: Path | None) -> None:
    """Everything that can be wrong with tasks before a model is loaded."""
    for name in names:
        if name not in TASKS and name not in NEEDLES:
            raise UsageError(f"--tasks: unknown {name!r}; known: {', '.join((*TASKS, *NEEDLES))}")
    if data is not None:
        for name in names:
            for file in _files(name, data):
                if not file.is_file():
                    raise UsageError(f"--data {data}: {file.name} is missing, which holds {name}")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-evaluation-harness ({error.name}): pip install 'flash-sfa[eval]'") from None
    if set(names) & set(NEEDLES):
        try:
            import nltk  # noqa: F401
            import wonderwords  # noqa: F401
        except ImportError as error:
            raise UsageError(f"RULER's tasks need {error.name}: pip install 'flash-sfa[eval]'") from None


def _files(name: str, data: Path) -> list[Path]:
    splits = TASKS[name][2] if name in TASKS else ()
    return [data / (f"{name}.jsonl" if split == splits[-1] else f"{name}_{split}.jsonl") for split in splits]


def write_local_tasks(names: list[str], data: Path, folder: Path) -> list[str]:
    """Task files that read ``data`` instead of the hub, into ``folder``; lm-eval's names of the tasks."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    out = []
    for name in names:
        if name in NEEDLES:
            out.append(name)
            continue
        _, file, splits = TASKS[name]
        files = dict(zip(splits, (str(path.resolve()) for path in _files(name, data))))
        task = {
            "include": str(root / file), "task": f"{name}_local", "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": "train" if "train" in files else None,
            **{f"{split}_split": split if split in files else None for split in ("validation", "test")},
        }  # fmt: skip
        # JSON is YAML.
        (folder / f"{name}_local.yaml").write_text(json.dumps(task))
        out.append(f"{name}_local")
    return out


def run_tasks(model: Any, tokenizer: Any, where: str, args: argparse.Namespace) -> dict[str, float]:
    """{"task metric": value} of lm-evaluation-harness for a model in memory."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # RULER's answers come on top of its prompts of --length tokens.
    room = 256 if set(args.tasks) & set(NEEDLES) else 0
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=args.length + room)
    metadata = {"max_seq_lengths": [args.length], "tokenizer": where, "pretrained": where}
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            names = [TASKS[name][0] if name in TASKS else name for name in args.tasks]
        else:
            names = write_local_tasks(args.tasks, args.data, Path(folder))
        try:
            manager = TaskManager(include_path=folder, metadata=metadata)
            done = simple_evaluate(
                model=lm, tasks=names, task_manager=manager, limit=args.limit, bootstrap_iters=0, log_samples=False
            )
        except Exception as error:  # whatever the hub, the data or lm-eval raise
            where_from = "the hub" if args.data is None else str(args.data)
            raise UsageError(f"--tasks {','.join(args.tasks)} from {where_from}: {short(error)}") from error
    out = {}
    for task, metrics in done["results"].items():
        for metric, value in metrics.items():
            known = isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in metric
            if known and value != -1 and metric not in ("sample_len", "alias"):
                name = metric.replace(",none", "").replace(",", " ")
                out[f"{task.removesuffix('_local')} {name}"] = float(value)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-sfa eval``."""
    parser.add_argument("checkpoint", nargs="+", help="folders, or names on the hub; all with one tokenizer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 file: its perplexity")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window, and the most a task may use")
    parser.add_argument("--stride", type=int, help="tokens a window moves by (default: half of --length)")
    parser.add_argument("--windows", type=int, help="score the first windows only")
    parser.add_argument("--tasks", help=f"names with commas: {', '.join((*TASKS, *NEEDLES))}")
    parser.add_argument("--data", type=Path, metavar="DIR", help="local files NAME.jsonl of the tasks, not the hub's")
    parser.add_argument("--limit", type=int, help="the first items of each task only")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate for speed and cache size")
    parser.add_argument("--prompt-tokens", type=int, help="tokens to generate from (default: --length / 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON row for each column")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa eval``."""
    for name in ("length", "stride", "windows", "limit", "batch_size", "prompt_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.new_tokens < 2 or args.length < 2:
        raise UsageError(f"--new-tokens and --length must be at least 2, got {args.new_tokens} and {args.length}")
    if args.stride is not None and args.stride > args.length:
        raise UsageError(f"--stride must not exceed --length, got {args.stride} and {args.length}")
    args.tasks = [] if args.tasks is None else args.tasks.split(",")
    if args.text is None and not args.tasks:
        raise UsageError("give --text, --tasks, or both: what to measure")
    if args.tasks and (args.v_dtype or args.tolerance):
        raise UsageError("--v-dtype and --tolerance belong to the sparse cache, which --tasks do not use")
    setting = setting_of(args)
    text = None if args.text is None else read_text(args.text, "--text")
    if args.tasks:
        check_tasks(args.tasks, args.data)
        if args.tokenizer == "bytes":
            raise UsageError("--tasks need a tokenizer of Transformers, not bytes")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UsageError(f"--out {args.out}: a folder, or in a folder that does not exist")
    if not args.tasks and (args.data is not None or args.limit is not None):
        raise UsageError("--data and --limit are for --tasks")
    if len(set(args.checkpoint)) < len(args.checkpoint):
        raise UsageError("each checkpoint must be given once")

    rows = []
    settings = {}
    models = {}
    for path in args.checkpoint:
        models[path] = load_model(path, args)
        settings[path] = setting or getattr(models[path].config.get_text_config(decoder=True), "sfa", None)
    tokenizer = load_tokenizer(args.checkpoint[0], args.tokenizer)
    some_dense = any(value is None for value in settings.values())
    if all(value is None for value in settings.values()) and (args.v_dtype or args.tolerance):
        raise UsageError("--v-dtype and --tolerance need SFA: no checkpoint has config.sfa, so give --topk")
    for path, model in models.items():
        # A dense checkpoint is the dense side; alone, an SFA checkpoint is also run without its top-k.
        names = ["dense"] if settings[path] is None else ["sfa"] if some_dense else ["dense", "sfa"]
        for name in names:
            if name == "sfa":
                enable(model, settings[path] or {}, path)
            row: dict[str, Any] = {"bench": "eval", "checkpoint": Path(path).name, "attention": name}
            row |= {
                "sfa": settings[path] if name == "sfa" else None,
                "v_dtype": args.v_dtype if name == "sfa" else None,
                "tolerance": args.tolerance if name == "sfa" else 0.0,
            }
            rows.append(row | _measure(model, tokenizer, text, args))
    print(table(rows))
    if args.out is not None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lines = "".join(json.dumps(row | {"time": now, "torch": torch.__version__}) + "\n" for row in rows)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(lines)
    return 0


@torch.no_grad()
def _measure(model: Any, tokenizer: Any, text: str | None, args: argparse.Namespace) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and args.length > longest:
        raise UsageError(f"--length {args.length} is more than the {longest} positions of the model")
    row: dict[str, Any] = {"length": args.length}
    sample = "The quick brown fox jumps over the lazy dog. " * (args.length // 8 + 1)
    ids = encode(tokenizer, text or sample, model)
    if ids.shape[1] < 2:
        raise UsageError(f"--text {args.text}: too short, {ids.shape[1]} tokens; at least 2 are needed")
    if text is not None:
        stride = args.stride or max(1, args.length // 2)
        row |= perplexity(
            model, ids, length=args.length, stride=stride, batch_size=args.batch_size, limit=args.windows
        ) | {"stride": stride}
    prompt = ids[:, : args.prompt_tokens or max(1, args.length // 2)]
    if longest is not None and prompt.shape[1] + args.new_tokens > longest:
        raise UsageError(
            f"--prompt-tokens {prompt.shape[1]} and --new-tokens {args.new_tokens} are more than the {longest} "
            "positions of the model"
        )
    row |= cost(model, prompt, args, pad_token(tokenizer)) | {"prompt_tokens": prompt.shape[1]}
    if args.tasks:
        where = args.tokenizer or args.checkpoint[0]
        tasks = run_tasks(model, tokenizer, where, args)
        row["tasks"] = tasks
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Measures down, checkpoints and their attention across."""
    names = {
        "perplexity": "perplexity",
        "loss": "loss, nats a token",
        "tokens": "scored tokens",
        "cache_bytes_a_token": "cache bytes a token",
        "cache_bytes_in_use": "cache bytes with pages, sums",
        "generated_tokens_a_second": "generated tokens a second",
    }
    lines = [["", *(f"{row['checkpoint']} {row['attention']}" for row in rows)]]
    for key, label in names.items():
        if any(key in row for row in rows):
            lines.append([label, *(_number(row.get(key)) for row in rows)])
    for key in dict.fromkeys(key for row in rows for key in row.get("tasks", {})):
        lines.append([key, *(_number(row.get("tasks", {}).get(key)) for row in rows)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in lines
    )


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
