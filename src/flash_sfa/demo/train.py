"""The training loop: AdamW, cosine schedule, a state file that a later run goes on from."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .data import Text, train_batch, validation_windows
from .models import Settings, Variant, build

SAVE_EVERY_SECONDS = 5.0
WARMUP_SHARE = 0.05
CALIBRATION_SECONDS = 1.5
MIN_STEPS = 30
CHECKS = 8
Records = list[dict[str, Any]]


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def make_optimizer(model: Any, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy (nats a byte) of predicting tokens[:, 1:]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    text: Text,
    step: int,
    settings: Settings,
    device: torch.device,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    tokens = train_batch(text, step, seed=settings.seed, batch=settings.batch, context=settings.context)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = loss_of(model, tokens.to(device))
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def validation_loss(model: Any, windows: Tensor, device: torch.device, batch: int = 16) -> float:
    """Mean nats a byte over windows (n, context + 1), in the dtype of the weights."""
    model.eval()
    total = 0.0
    for part in torch.split(windows, batch):  # type: ignore[no-untyped-call]
        total += loss_of(model, part.to(device)).item() * len(part)
    model.train()
    return total / len(windows)


def seconds_a_step(variant: Variant, text: Text, settings: Settings, device: torch.device) -> float:
    """The median time of a training step of a throw-away model, first steps left out."""
    model = build(variant, settings, device)
    optimizer = make_optimizer(model, settings)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < CALIBRATION_SECONDS:
        start = time.perf_counter()
        train_step(model, optimizer, text, len(times), settings, device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times[2:]) // 2]


def calibrate(variants: dict[str, Variant], text: Text, settings: Settings, device: torch.device) -> int:
    """The number of steps that every variant gets, so that all of them fit in ``settings.train_seconds``."""
    together = sum(seconds_a_step(variant, text, settings, device) for variant in variants.values())
    return max(MIN_STEPS, min(settings.max_steps, int(settings.train_seconds / together)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Written beside and renamed, so that a kill leaves the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    os.replace(new, path)


def load_state(path: Path) -> dict[str, Any] | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def write_metrics(path: Path, records: dict[str, Records]) -> None:
    lines = [json.dumps({"variant": name, **record}) for name, rows in records.items() for record in rows]
    new = path.with_suffix(".new")
    new.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(new, path)


def train(
    variant: Variant,
    text: Text,
    settings: Settings,
    device: torch.device,
    state_path: Path,
    records: Records,
    on_save: Callable[[], None] = lambda: None,
) -> Any:
    """Train one variant to ``settings.steps`` and return the model; goes on from ``state_path`` if it exists.

    ``records`` is filled while training, so what an interrupt leaves behind can be reported; ``on_save`` is
    called after each write of the state. Batches depend
    on the step alone and the models have no dropout, so a resumed run needs no random state and repeats the
    numbers of an unbroken one.
    """
    model = build(variant, settings, device).train()
    optimizer = make_optimizer(model, settings)
    step, seconds = 0, 0.0
    state = load_state(state_path)
    records.clear()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        records.extend(state["records"])
    few = validation_windows(text, context=settings.context, limit=16)
    tokens_a_step = settings.batch * settings.context

    def save() -> None:
        save_state(
            state_path,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "records": list(records),
            },
        )
        on_save()

    bar = tqdm(
        total=settings.steps * tokens_a_step, initial=step * tokens_a_step, desc=f"train {variant.name:8}",
        unit="tok", unit_scale=True, dynamic_ncols=True, mininterval=0.5,
    )  # fmt: skip
    saved = time.perf_counter()
    with bar:
        while step < settings.steps:
            start = time.perf_counter()
            loss = train_step(model, optimizer, text, step, settings, device)
            seconds += time.perf_counter() - start
            step += 1
            record = {
                "step": step,
                "tokens": step * tokens_a_step,
                "loss": loss,
                "seconds": round(seconds, 4),
            }
            if step * CHECKS // settings.steps > (step - 1) * CHECKS // settings.steps:
                record["validation_loss_16_windows"] = validation_loss(model, few, device)
            records.append(record)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(tokens_a_step)
            if time.perf_counter() - saved > SAVE_EVERY_SECONDS:
                save()
                saved = time.perf_counter()
    save()
    return model
