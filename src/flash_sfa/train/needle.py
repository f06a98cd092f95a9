"""The synthetic needle task: one value to find in a row of "#", by length and depth.

A row is made of token ids, no tokenizer needed::

    # # # <needle> key = value # # # # # <question> key = value

``#`` is one filler token (or several, drawn at random), a key and a value are a few symbols each. With more than
one needle the keys of a row differ, and so do the values. The loss is on the last value only.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import dist, models
from .recipe import NeedleSpec, Recipe


def vocabulary(spec: NeedleSpec) -> int:
    """The number of token ids: fillers, then <needle>, "=", <question>, then symbols."""
    return spec.fillers + 3 + spec.symbols


def needle_tokens(spec: NeedleSpec) -> int:
    """Tokens of one needle; the question with its answer has as many."""
    return 2 + spec.key_tokens + spec.value_tokens


def make_rows(
    spec: NeedleSpec, rng: np.random.Generator, count: int, length: int, depth: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the task, each exactly ``length`` tokens with the question and its answer at the end.

    Args:
        depth: where the asked needle stands, from 0 (first) to 1 (just before the question); None draws it for
            each row. Other needles stand anywhere.

    Returns:
        Token ids, int64 (count, length), and the number of the asked needle's first token, int64 (count,).

    Raises:
        ValueError: a length too short for the needles, or a depth outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from flash_sfa.train.needle import make_rows
        >>> from flash_sfa.train.recipe import NeedleSpec
        >>> spec = NeedleSpec(symbols=10, key_tokens=1, value_tokens=2)
        >>> rows, starts = make_rows(spec, np.random.default_rng(0), 1, 16, depth=0.5)
        >>> rows[0].tolist(), int(starts[0])
        ([0, 0, 0, 1, 9, 2, 6, 8, 0, 0, 0, 3, 9, 2, 6, 8], 3)
    """
    size = needle_tokens(spec)
    room = length - size * (spec.needles + 1)
    if room < 0:
        raise ValueError(f"length must be at least {length - room} for {spec.needles} needles, got {length}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    first_symbol = spec.fillers + 3
    keys = _distinct(rng, count, spec.needles, spec.key_tokens, spec.symbols)
    values = _distinct(rng, count, spec.needles, spec.value_tokens, spec.symbols)
    mark = np.full((count, spec.needles, 1), spec.fillers)
    needles = np.concatenate([mark, keys + first_symbol, mark + 1, values + first_symbol], axis=2)
    cuts = rng.integers(0, room + 1, (count, spec.needles))
    if depth is not None:
        cuts[:, 0] = round(depth * room)
    before = np.argsort(np.argsort(cuts, axis=1, kind="stable"), axis=1)  # needles that stand before each one
    starts = cuts + before * size
    rows = rng.integers(0, spec.fillers, (count, length)) if spec.fillers > 1 else np.zeros((count, length), np.int64)
    columns = starts[:, :, None] + np.arange(size)
    rows[np.arange(count)[:, None, None], columns] = needles
    rows[:, -size:] = needles[:, 0]
    rows[:, -size] = spec.fillers + 2
    return rows.astype(np.int64), starts[:, 0].astype(np.int64)


def _distinct(rng: np.random.Generator, count: int, needles: int, width: int, symbols: int) -> np.ndarray:
    """(count, needles, width) symbols; the words of a row differ."""
    words = rng.integers(0, symbols, (count, needles, width))
    weights = symbols ** np.arange(width)
    while needles > 1:
        codes = np.sort(words @ weights, axis=1)
        again = np.flatnonzero((codes[:, 1:] == codes[:, :-1]).any(1))
        if not len(again):
            break
        words[again] = rng.integers(0, symbols, (len(again), needles, width))
    return words


def answer_logits(model: Any, rows: Tensor, answer: int, bf16: bool) -> Tensor:
    """Logits of the last ``answer`` tokens of rows (b, n), each from the tokens before it: (b, answer, vocab)."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(hidden[:, -answer - 1 : -1])
    return logits.float()


@torch.no_grad()
def count_hits(model: Any, rows: Tensor, answers: list[int], bf16: bool) -> int:
    """Rows whose whole answer (the last ``answers[i]`` tokens) is what greedy decoding gives."""
    longest = max(answers)
    right = answer_logits(model, rows, longest, bf16).argmax(-1) == rows[:, -longest:]
    return sum(bool(row[longest - n :].all()) for row, n in zip(right.cpu(), answers, strict=True))


def cell(length: int, depth: float, trials: int, hits: int) -> dict[str, Any]:
    """One result. stderr is that of a share (hits + 1) / (trials + 2), so it is not 0 where all or none hit."""
    share = (hits + 1) / (trials + 2)
    stderr = math.sqrt(share * (1 - share) / trials)
    return {
        "length": length,
        "depth": round(depth, 4),
        "trials": trials,
        "hits": hits,
        "accuracy": hits / trials,
        "stderr": stderr,
    }


def by_length(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of each length pooled over the depths."""
    out = []
    for length in sorted({c["length"] for c in cells}):
        own = [c for c in cells if c["length"] == length]
        pooled = cell(length, 0.0, sum(c["trials"] for c in own), sum(c["hits"] for c in own))
        del pooled["depth"]
        out.append(pooled)
    return out


def depths(count: int) -> list[float]:
    """``count`` depths from 0 to 1, evenly; one alone is 0.5."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5]


class NeedleTask:
    """What ``pretrain`` trains on and evaluates when the recipe has needle.train_lengths.

    Every step draws one of the train lengths; it has as many rows as fit into train.batch * model.context tokens.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.spec = recipe, recipe.needle
        self.vocab_size = vocabulary(self.spec)

    def rows(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Part ``part`` of ``parts`` of the rows of a step, int64 (b, length)."""
        rng = np.random.default_rng([self.recipe.train.seed, 1, step])
        length = int(rng.choice(self.spec.train_lengths))
        count = self.recipe.train.batch * self.recipe.model.context // length
        if count % parts:
            raise ValueError(f"{count} rows of {length} tokens a step do not divide among {parts} processes")
        rows, _ = make_rows(self.spec, rng, count, length)
        return torch.from_numpy(rows[part * count // parts : (part + 1) * count // parts])

    def loss(self, model: Any, rows: Tensor, bf16: bool) -> Tensor:
        """Mean cross entropy of the answers, and the attention's extra losses."""
        answer = self.spec.value_tokens
        logits = answer_logits(model, rows, answer, bf16)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, -answer:].flatten())
        return loss + models.extra_loss(model, self.recipe)

    def cells(self, model: Any, device: str, trials: int, lengths: list[int]) -> list[dict[str, Any]]:
        """Trials at every length and depth; the rows depend on the seed, length and depth only."""
        out = []
        at_once = self.recipe.eval.batch * self.recipe.model.context
        for length in lengths:
            batch = max(at_once // length, 1)
            for i, depth in enumerate(depths(self.spec.depths)):
                rng = np.random.default_rng([self.recipe.train.seed, 2, length, i])
                rows = torch.from_numpy(make_rows(self.spec, rng, trials, length, depth)[0])
                hits = 0
                for chunk in torch.split(rows, batch)[dist.rank() :: dist.size()]:
                    answers = [self.spec.value_tokens] * len(chunk)
                    hits += count_hits(model, chunk.to(device), answers, self.recipe.train.bf16)
                out.append(cell(length, depth, trials, int(dist.total(torch.tensor(hits, device=device)))))
        return out

    def curve(self, model: Any, device: str) -> dict[str, float]:
        """Accuracy at the longest train length, few trials a depth."""
        length = max(self.spec.train_lengths)
        pooled = by_length(self.cells(model, device, min(self.spec.trials, 8), [length]))[0]
        return {f"needle-{length}": pooled["accuracy"]}

    def results(self, model: Any, device: str) -> dict[str, Any]:
        """What the row gets: every cell, and the lengths pooled over depth."""
        cells = self.cells(model, device, self.spec.trials, self.spec.lengths or self.spec.train_lengths)
        return {"val": {}, "test": {}, "needle": cells, "needle_by_length": by_length(cells)}
