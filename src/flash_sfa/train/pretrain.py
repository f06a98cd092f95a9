"""``flash-sfa pretrain``: train a recipe's model on token shards and leave one result row.

Several GPUs, one process each: ``torchrun --nproc-per-node 4 -m flash_sfa.train.pretrain RECIPE --out DIR`` or
``accelerate launch -m flash_sfa.train.pretrain RECIPE --out DIR`` (DDP, or FSDP2 with train.fsdp; train.batch is that
of all together).

Files in --out: ``recipe.json`` (what ran), ``log.jsonl`` (the curve), ``checkpoint.pt`` (train.save_every),
``tensorboard/``,
``model/`` (with train.save_last, a Transformers checkpoint) and ``row.json`` (the result, written last).
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import dist, models
from .attention import key_bytes
from .basis import rebase
from .flops import flops_per_token, peak_flops
from .needle import NeedleTask
from .recipe import Recipe, load_recipe
from .schedule import learning_rate
from .shards import BlockOrder, TokenShards, open_shards, read_rows, write_json

IGNORE = -100


def token_losses(model: Any, inputs: Tensor, targets: Tensor, bf16: bool) -> Tensor:
    """Cross entropy of every target, fp32 (b, n); 0 where the target is -100. inputs, targets int64 (b,
    n)."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=inputs, use_cache=False).logits
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)


def mean_loss(model: Any, inputs: Tensor, targets: Tensor, bf16: bool) -> Tensor:
    """Mean of ``token_losses``."""
    return token_losses(model, inputs, targets, bf16).mean()


@torch.no_grad()
def evaluate(
    model: Any, data: TokenShards, *, context: int, batch: int, device: str, bf16: bool, limit: int = 0
) -> tuple[float, int]:
    """Summed token loss and token count over consecutive windows that do not overlap.

    Every token but the first is predicted once, from the at most ``context`` tokens before it in its own
    window.
    limit > 0 takes only the first ``limit`` tokens. Several processes share the windows.
    """
    tokens = data.tokens if limit <= 0 else min(limit, data.tokens)
    starts = list(range(0, tokens - 1, context))
    total = torch.zeros((), dtype=torch.float64, device=device)
    rounds = -(-len(starts) // (dist.size() * batch))  # the same for all processes, as FSDP needs
    for first in range(dist.rank() * batch, rounds * dist.size() * batch, dist.size() * batch):
        rows = [torch.full((context + 1,), IGNORE)] if first >= len(starts) else []
        for start in starts[first : first + batch]:
            row = torch.from_numpy(data.read(start, min(context + 1, tokens - start)))
            rows.append(F.pad(row, (0, context + 1 - len(row)), value=IGNORE))
        block = torch.stack(rows).to(device)
        inputs = block[:, :-1].clamp_min(0)
        total += token_losses(model, inputs, block[:, 1:], bf16).double().sum()
    return float(dist.total(total)), tokens - 1


def evaluate_all(model: Any, sets: dict[str, TokenShards], recipe: Recipe, device: str) -> dict[str, float]:
    """Perplexity of each source and, as "all", of their tokens together."""
    out: dict[str, float] = {}
    loss, count = 0.0, 0
    for name, data in sets.items():
        part, tokens = evaluate(
            model,
            data,
            context=recipe.model.context,
            batch=recipe.eval.batch,
            device=device,
            bf16=recipe.train.bf16,
            limit=recipe.eval.tokens,
        )
        out[name] = math.exp(min(part / tokens, 50.0))
        loss, count = loss + part, count + tokens
    if count:
        out["all"] = math.exp(min(loss / count, 50.0))
    return out


def observe(model: Any, data: TokenShards, recipe: Recipe, device: str, qkv: Path | None = None) -> dict[str, Any]:
    """Means over the layers with chosen attention (and per-layer lists) of the code statistics on two rows.

    qkv: where to save {layer: {"q", "k", "v"}} of one row, each (n, heads, d), of the first two kv heads (and
    their query heads) in the first, middle and last chosen layer.
    """
    context = min(recipe.model.context, (data.tokens - 1) // 2)
    rows = torch.from_numpy(read_rows(data, [0, context], context)).to(device)
    chosen = [m.sfa_train for m in models.attention_modules(model) if _is_chosen(m, recipe)]
    for at in chosen:
        at.observed, at.captured = [], []
    with torch.no_grad():
        token_losses(model, rows[:, :-1], rows[:, 1:], recipe.train.bf16)
    layers = [at.observed[0] for at in chosen if at.observed]
    if qkv is not None:
        kept = {}
        for i in sorted({0, len(chosen) // 2, len(chosen) - 1}):
            q, k, v = chosen[i].captured[0]
            heads = (2 * q.shape[1] // k.shape[1], 2, 2)
            kept[i] = {
                name: x[0, :h].transpose(0, 1).contiguous().cpu()
                for name, x, h in zip("qkv", (q, k, v), heads, strict=True)
            }
        torch.save(kept, qkv)
    for at in chosen:
        at.observed = at.captured = None
    names = list(layers[0]) if layers else []
    out: dict[str, Any] = {name: sum(layer[name] for layer in layers) / len(layers) for name in names}
    out["layers"] = {name: [round(layer[name], 4) for layer in layers] for name in names}
    return out


def _is_chosen(module: Any, recipe: Recipe) -> bool:
    """Layers the table speaks of: those of the recipe's kind, or a hybrid's global ones."""
    if recipe.attention.kind != "dense":
        return bool(module.sfa_train.kind == recipe.attention.kind)
    return getattr(module, "use_rope", 0) == 0 or recipe.model.family != "hybrid"


def cache_bytes(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Stored bytes a token: of one key and one value of one kv head in a chosen layer, and of the whole
    model.

    The model's figure counts only layers whose cache grows with the context, so not a hybrid's windowed ones.
    """
    m = recipe.model
    kv_heads, dv = m.kv_heads or m.heads, recipe.attention.v_dim or m.v_head_dim or m.head_dim
    chosen = [x for x in models.attention_modules(model) if _is_chosen(x, recipe)]
    k = key_bytes(m.head_dim, chosen[0].sfa_train, kv_heads)
    return {"k_bytes": k, "v_bytes": 2 * dv, "cache_bytes": len(chosen) * kv_heads * (k + 2 * dv)}


class TextTask:
    """Token shards: the rows of every step, and what the row says of held-out text."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        root = Path(recipe.data.root)
        self.train = open_shards([root / name for name in recipe.data.train])
        self.val = {name: open_shards([root / folder]) for name, folder in recipe.data.val.items()}
        self.test = {name: open_shards([root / folder]) for name, folder in recipe.data.test.items()}
        self.vocab_size = self.train.vocab_size
        self.order = BlockOrder(self.train.tokens, recipe.model.context, recipe.train.seed)

    def rows(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Part ``part`` of ``parts`` of the rows of a step, int64 (b, context + 1)."""
        count = self.recipe.train.batch // parts
        starts = self.order.starts(step * self.recipe.train.batch + part * count, count)
        return torch.from_numpy(read_rows(self.train, starts, self.recipe.model.context))

    def loss(self, model: Any, rows: Tensor, bf16: bool) -> Tensor:
        """Mean cross entropy of every token but the first of each row, and the attention's extra losses."""
        return mean_loss(model, rows[:, :-1], rows[:, 1:], bf16) + models.extra_loss(model, self.recipe)

    def curve(self, model: Any, device: str) -> dict[str, float]:
        """Loss on the first tokens of the first held-out source."""
        recipe, (name, data) = self.recipe, next(iter(self.val.items()))
        total, count = evaluate(
            model,
            data,
            context=recipe.model.context,
            batch=recipe.eval.batch,
            device=device,
            bf16=recipe.train.bf16,
            limit=recipe.eval.curve_tokens,
        )
        return {name: total / count}

    def results(self, model: Any, device: str) -> dict[str, Any]:
        """Perplexities of all sources."""
        return {
            "val": evaluate_all(model, self.val, self.recipe, device),
            "test": evaluate_all(model, self.test, self.recipe, device),
        }


def make_task(recipe: Recipe) -> TextTask | NeedleTask:
    """What the recipe trains on: the needle task if it names train lengths, else text."""
    return NeedleTask(recipe) if recipe.needle.train_lengths else TextTask(recipe)


def _optimizer(model: Any, recipe: Recipe, device: str) -> torch.optim.AdamW:
    spec = recipe.train
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(0.9, spec.beta2), fused=device == "cuda")


def commit() -> str:
    """The commit of the code, from git or FLASH_SFA_COMMIT."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FLASH_SFA_COMMIT", "unknown")


def _save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def pretrain(recipe: Recipe, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train and evaluate; returns the result row.

    A folder with a finished row is left as it is. One with a checkpoint of the same recipe goes on from
    there:
    rows, learning rates and (on one device and version) losses are those of an uninterrupted run.

    Raises:
        ValueError: data or recipe that do not fit, or an ``out`` that holds another recipe.
    """
    spec, m = recipe.train, recipe.model
    device = spec.device if spec.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"train.device: {str(error).splitlines()[0]}") from error
    dist.join(device)
    first, processes = dist.rank() == 0, dist.size()
    micro = spec.micro_batch or spec.batch // processes
    if spec.batch % processes or spec.batch % (micro * processes):
        raise ValueError(f"train.batch={spec.batch} must be a multiple of {processes} processes x {micro} rows")
    out.mkdir(parents=True, exist_ok=True)
    config = dataclasses.asdict(recipe)
    recipe_file, row_file, log_file = out / "recipe.json", out / "row.json", out / "log.jsonl"
    if recipe_file.is_file() and json.loads(recipe_file.read_text()) != json.loads(json.dumps(config)):
        raise ValueError(f"{out} holds a run of another recipe; choose another --out")
    if row_file.is_file():
        return dict(json.loads(row_file.read_text()))
    task = make_task(recipe)
    steps = spec.tokens // (spec.batch * m.context)
    parts = spec.batch // (micro * processes)

    torch.manual_seed(spec.seed)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    model = models.build_model(recipe, task.vocab_size).to(device).train()
    if spec.start:
        try:
            models.load_weights(model, Path(spec.start))
        except ValueError as error:
            raise ValueError(f"train.start: {error}") from error
    if recipe.attention.basis:
        rebase(model, recipe, task.rows(0)[: recipe.eval.batch, :-1].to(device))
    dist.barrier()
    if first:  # only now: a run that cannot begin leaves no folder that refuses the corrected recipe
        write_json(recipe_file, config)
    total, active = models.count_parameters(model, recipe)
    flops = flops_per_token(model, recipe)
    if spec.fsdp:
        dist.shard(model, models.blocks(model), compiled=spec.compile)
    optimizer = _optimizer(model, recipe, device)
    whole = spec.compile and not spec.fsdp  # a sharded model is compiled block by block
    wrapped = _Loss(model, torch.compile(task.loss, dynamic=False) if whole else task.loss)
    loss_fn: Callable[..., Tensor] = wrapped
    ddp: DistributedDataParallel | None = None
    if processes > 1 and not spec.fsdp:
        # Not split into buckets for overlap: the whole backward is one graph, as with one process.
        torch._dynamo.config.optimize_ddp = False
        loss_fn = ddp = DistributedDataParallel(wrapped)
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = peak_flops(device_name, spec.peak_tflops) if isinstance(task, TextTask) else None

    progress = torch.zeros((), device=device)
    models.follow_progress(model, recipe, progress)

    begin = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu" if spec.fsdp else device, weights_only=True)
        dist.load_state(model, optimizer, state, sharded=spec.fsdp)
        begin = int(state["step"])
    if first:
        kept = log_file.read_text().splitlines() if begin and log_file.is_file() else []
        lines = [line for line in kept if json.loads(line)["step"] <= begin]
        log_file.write_text("".join(line + "\n" for line in lines))
    board = _tensorboard(out, begin) if spec.tensorboard and first else None

    from tqdm import tqdm

    bar = tqdm(total=steps, initial=begin, desc=recipe.name, disable=True if quiet or not first else None, unit="step")
    has_curve = not isinstance(task, TextTask) or task.val
    curve_every = max(steps // recipe.eval.curve_points, 1) if recipe.eval.curve_points and has_curve else 0
    warmup = max(round(spec.warmup * steps), 1)
    began = time.monotonic()
    timed_from: tuple[float, int] | None = None
    paused, stopped, first_step_s = 0.0, False, 0.0
    running = torch.zeros((), device=device)
    gathered, done = 0, begin
    with (log_file if first else Path(os.devnull)).open("a", buffering=1) as log:
        for step in range(begin, steps):
            rate = learning_rate(
                step,
                total=steps,
                peak=spec.lr,
                warmup=warmup,
                schedule=spec.schedule,
                floor=spec.floor,
                decay=spec.decay,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            progress.fill_(step / max(steps - 1, 1))
            rows = task.rows(step, dist.rank(), processes)
            if device == "cuda":
                rows = rows.pin_memory()
            rows = rows.to(device, non_blocking=True)
            chunks = rows.chunk(parts)  # perhaps fewer than parts
            for i, part in enumerate(chunks):
                # Gradients are summed over processes once a step, with the last part.
                with ddp.no_sync() if ddp is not None and i < len(chunks) - 1 else nullcontext():
                    loss = loss_fn(part, spec.bf16) * (len(part) / len(rows))
                    torch.autograd.backward(loss)
                running += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            gathered += 1
            now = step + 1
            if step == begin:
                _sync(device)
                first_step_s = time.monotonic() - began
            if now == begin + 5:
                _sync(device)
                timed_from, paused = (time.monotonic(), now), 0.0
            if now % spec.log_every == 0 or now == steps:
                loss_now = float(dist.total(running)) / (gathered * processes)
                running.zero_()
                gathered = 0
                speed = _speed(timed_from, now, paused, spec.batch * m.context)
                entry = {
                    "step": now,
                    "tokens": now * spec.batch * m.context,
                    "loss": loss_now,
                    "lr": rate,
                    "grad_norm": dist.number(norm),
                    "tokens_per_s": round(speed),
                }
                shown = {"loss": f"{loss_now:.3f}", "tokens/s": f"{speed:.3g}"}
                if peak:
                    entry["mfu"] = round(speed * flops / (peak * processes), 4)
                    shown["mfu"] = f"{entry['mfu']:.1%}"
                log.write(json.dumps(entry) + "\n")
                bar.set_postfix(shown, refresh=False)
                if board is not None:
                    for key in entry.keys() - {"step"}:
                        board.add_scalar(f"train/{key}", entry[key], now)
                if not math.isfinite(loss_now):
                    raise FloatingPointError(f"{recipe.name}: the loss is {loss_now} at step {now}")
                late = 0 < spec.max_seconds < time.monotonic() - began
                stopped = spec.max_seconds > 0 and bool(dist.total(torch.tensor(int(late), device=device)))
            bar.update()
            if curve_every and now % curve_every == 0 and now < steps:
                _sync(device)
                pause = time.monotonic()
                curve = task.curve(model, device)
                log.write(json.dumps({"step": now, "val": curve}) + "\n")
                if board is not None:
                    for key, value in curve.items():
                        board.add_scalar(f"val/{key}", value, now)
                paused += time.monotonic() - pause
            if spec.save_every and now % spec.save_every == 0 and (first or spec.fsdp):
                state = {**dist.state(model, optimizer, sharded=spec.fsdp), "step": now}
                if first:
                    _save(checkpoint, state)
            done = now
            if stopped:
                break
    bar.close()
    if board is not None:
        board.close()
    _sync(device)
    speed = _speed(timed_from, done, paused, spec.batch * m.context)
    seconds = time.monotonic() - began
    if spec.save_last and (first or spec.fsdp):
        weights = dist.state(model, optimizer, sharded=spec.fsdp)["model"]
        if first:
            tied = model._tied_weights_keys or ()
            weights = {name: x for name, x in weights.items() if name not in tied}
            model.save_pretrained(out / "model", state_dict=weights)
    row = {
        "bench": "pretrain" if isinstance(task, TextTask) else "niah",
        "experiment": recipe.experiment,
        "name": recipe.name,
        "config": config,
        "seed": spec.seed,
        "tokens": done * spec.batch * m.context,
        "complete": done == steps,
        "params": total,
        "params_non_embedding": active,
        "loss": _last_loss(log_file, done) if first else math.nan,
        **cache_bytes(model, recipe),
        "tokens_per_s": round(speed),
        "first_step_s": round(first_step_s, 1),
        "train_s": round(seconds, 1),
        "processes": processes,
        "flops_per_token": flops,
        "peak_flops": peak,
        "mfu": round(speed * flops / (peak * processes), 4) if peak else None,
        "device": device_name,
        "torch": torch.__version__,
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    model.eval()
    progress.fill_(1.0)
    row.update(task.results(model, device))
    if isinstance(task, TextTask) and task.val and recipe.eval.statistics and (first or spec.fsdp):
        qkv = out / "qkv.pt" if recipe.eval.save_qkv and first else None
        row["codes"] = observe(model, next(iter(task.val.values())), recipe, device, qkv)
    row["quantized"] = _quantized(model, task, recipe, device)
    row["total_s"] = round(time.monotonic() - began, 1)
    if first:
        write_json(row_file, row)
    dist.barrier()
    return dict(json.loads(row_file.read_text()))


class _Loss(nn.Module):
    """The loss as a module's forward, which DDP needs."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, rows: Tensor, bf16: bool) -> Tensor:
        return self.loss(self.model, rows, bf16)


def _tensorboard(out: Path, begin: int) -> Any:
    """A TensorBoard writer that hides what an interrupted run wrote after step ``begin``; None if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=begin + 1)  # type: ignore[no-untyped-call]


def _last_loss(log_file: Path, steps: int) -> float:
    """Mean logged loss of the last 5% of the steps (at least the last entry)."""
    entries = [e for e in map(json.loads, log_file.read_text().splitlines()) if "loss" in e]
    if steps == 0:
        return math.nan
    last = [e["loss"] for e in entries if e["step"] > 0.95 * steps] or [entries[-1]["loss"]]
    return float(sum(last) / len(last))


def _quantized(model: Any, task: TextTask | NeedleTask, recipe: Recipe, device: str) -> list[dict[str, Any]]:
    """The model again with k rounded in the chosen layers: the rivals with a quantised key cache."""
    chosen = [x.sfa_train for x in models.attention_modules(model) if _is_chosen(x, recipe)]
    out = []
    for bits in recipe.eval.k_bits:
        for at in chosen:
            at.k_bits = bits
        out.append({"bits": bits, **cache_bytes(model, recipe), **task.results(model, device)})
    for at in chosen:
        at.k_bits = None
    return out


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _speed(timed_from: tuple[float, int] | None, step: int, paused: float, per_step: int) -> float:
    if timed_from is None or step <= timed_from[1]:
        return 0.0
    return (step - timed_from[1]) * per_step / max(time.monotonic() - timed_from[0] - paused, 1e-9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-sfa pretrain``."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, see recipes/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override, as in train.lr=1e-3; repeatable",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the run; resumes what it holds"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa pretrain``."""
    from ..cli import UsageError

    try:
        recipe = load_recipe(args.recipe, args.overrides)
        report(pretrain(recipe, args.out, quiet=args.quiet))
    except (ValueError, NotImplementedError, OSError, OverflowError) as error:
        raise UsageError(str(error)) from error
    except ImportError as error:
        raise UsageError(f"this command needs {error.name}: pip install 'flash-sfa[train]'") from None
    return 0


def report(row: dict[str, Any]) -> None:
    """Print the summary once and leave the group of processes."""
    if dist.rank() == 0:
        print(summary(row), flush=True)
    dist.leave()


def summary(row: dict[str, Any]) -> str:
    """One line of a result row."""
    shown = list(row["val"].items()) + [(name, value) for name, value in row["test"].items() if name != "all"]
    found = "ppl " + " ".join(f"{name} {value:.2f}" for name, value in shown)
    if "needle" in row:
        found = "found " + " ".join(f"{c['length']}: {c['accuracy']:.1%}" for c in row["needle_by_length"])
    return (
        f"{row['name']}: {row['tokens'] / 1e6:.1f}M tokens, loss {row['loss']:.3f}, {found}, "
        f"K {row['k_bytes']:g} B, {row['tokens_per_s'] / 1e6:.2f}M tokens/s, {row['total_s']:.0f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """``python -m flash_sfa.train.pretrain``: the same command without the others."""
    parser = argparse.ArgumentParser(prog="flash-sfa pretrain", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    report(pretrain(load_recipe(args.recipe, args.overrides), args.out, quiet=args.quiet))
    return 0


if __name__ == "__main__":
    sys.exit(main())
