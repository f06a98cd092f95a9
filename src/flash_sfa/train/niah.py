"""``flash-sfa niah``: a needle in a haystack, by length and depth.

Given a recipe, trains a model on the synthetic task (``flash_sfa.train.needle``) and tests it. Given a trained
folder of ``flash-sfa pretrain`` or a Transformers checkpoint and ``--essays``, hides a sentence in real text and asks
for its end; given the folder of a needle run, tests it again at other lengths. A trial hits if greedy decoding gives
the whole answer.

Files in --out: ``rows.jsonl`` (a row for every length and depth: trials, hits, accuracy, standard error) and
``niah.png`` (the heat map), beside those of ``flash-sfa pretrain``.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import check_device
from ..cli import seed_number
from . import dist, models, needle
from .attention import key_bytes
from .pretrain import commit, pretrain, report
from .recipe import Recipe, build_recipe, load_recipe

CITIES = ("Athens", "Berlin", "Cairo", "Dakar", "Geneva", "Havana", "Kyoto", "Lima", "Oslo", "Paris", "Quito", "Vienna")


class Essays:
    """Real text as a haystack.

    Args:
        text: the essays, joined.
        encode: text to token ids.

    Raises:
        ValueError: text without a sentence end.
    """

    def __init__(self, text: str, encode: Callable[[str], list[int]]) -> None:
        self.text, self.encode = text, encode
        self.tokens = np.asarray(encode(text), dtype=np.int64)
        stops = {i for word in (".", "?", "!", ".\n", ".\n\n") for i in encode(word)[:1]}
        self.ends = np.flatnonzero(np.isin(self.tokens, sorted(stops))) + 1
        if not len(self.ends):
            raise ValueError("the essays hold no sentence end, so there is no place for a needle")

    def row(self, rng: np.random.Generator, length: int, depth: float) -> tuple[np.ndarray, int, int]:
        """One trial: ids (length,), the needle's first token, and how many tokens at the end are the answer.

        The needle stands after the last sentence that ends at or before ``depth`` of the text. The number it holds
        stands nowhere else in the essays.

        Raises:
            ValueError: fewer tokens of essays than the row needs, a length too short, or a depth outside [0, 1].
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {depth}")
        city = str(rng.choice(CITIES))
        number = str(rng.integers(1_000_000, 10_000_000))
        while number in self.text:
            number = str(rng.integers(1_000_000, 10_000_000))
        sentence = f"The special magic number for {city} is"
        hidden = self.encode(f" {sentence} {number}.")
        question, answer = self.encode(f"\n\n{sentence}"), self.encode(f" {number}")
        room = length - len(hidden) - len(question) - len(answer)
        if not 0 <= room <= len(self.tokens):
            raise ValueError(
                f"length must lie in [{length - room}, {length - room + len(self.tokens)}] for these essays "
                f"({len(self.tokens)} tokens), got {length}"
            )
        first = int(rng.integers(0, len(self.tokens) - room + 1))
        hay = self.tokens[first : first + room]
        before = self.ends[(self.ends > first) & (self.ends <= first + round(depth * room))]
        cut = int(before[-1]) - first if len(before) else 0
        return np.concatenate([hay[:cut], hidden, hay[cut:], question, answer]), cut, len(answer)


def essay_cells(
    model: Any,
    essays: Essays,
    *,
    lengths: list[int],
    depths: int,
    trials: int,
    seed: int = 0,
    bf16: bool = False,
    batch_tokens: int = 16384,
) -> list[dict[str, Any]]:
    """Trials at every length and depth; the rows depend on seed, length, depth and the essays only."""
    out = []
    for length in lengths:
        for i, depth in enumerate(needle.depths(depths)):
            rng = np.random.default_rng([seed, 3, length, i])
            made = [essays.row(rng, length, depth) for _ in range(trials)]
            hits, batch = 0, max(batch_tokens // length, 1)
            for at in range(0, trials, batch):
                some = made[at : at + batch]
                rows = torch.from_numpy(np.stack([row for row, _, _ in some])).to(model.device)
                hits += needle.count_hits(model, rows, [count for _, _, count in some], bf16)
            out.append(needle.cell(length, depth, trials, hits))
    return out


def load_model(folder: Path, topk: int | None = None, dense_dims: int = 0) -> tuple[Any, Recipe | None]:
    """A model in eval mode, and its recipe if ``folder`` is one of ``flash-sfa pretrain`` (with train.save_last).

    A Transformers checkpoint with ``config.sfa`` attends by it; topk turns SFA on in one without.

    Raises:
        ValueError: a run folder without a saved model, or with topk.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "recipe.json").is_file():
        if topk is not None:
            raise ValueError(f"{folder} attends as its recipe says; topk is for Transformers checkpoints, got {topk}")
        if not (folder / "model").is_dir():
            raise ValueError(f"{folder} has no saved model; train it with train.save_last: true")
        recipe = build_recipe(json.loads((folder / "recipe.json").read_text()))
        model = models.build_model(recipe, AutoConfig.from_pretrained(folder / "model").vocab_size)
        models.load_weights(model, folder / "model", whole=True)
        return model.eval(), recipe
    model = AutoModelForCausalLM.from_pretrained(folder)
    setting = getattr(model.config, "sfa", None)
    if topk is not None:
        setting = {"topk": topk, "dense_dims": dense_dims}
    if setting:
        from ..integrations.transformers import enable_sfa

        enable_sfa(model, **setting)
    return model.eval(), None


def heat_map(cells: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy by length (across) and depth (down) as a PNG."""
    from matplotlib.figure import Figure

    lengths = sorted({c["length"] for c in cells})
    places = sorted({c["depth"] for c in cells})
    grid = np.full((len(places), len(lengths)), np.nan)
    for c in cells:
        grid[places.index(c["depth"]), lengths.index(c["length"])] = c["accuracy"]
    figure = Figure(figsize=(1.8 + 0.8 * len(lengths), 1.4 + 0.35 * len(places)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(places)), [f"{p:.2f}" for p in places])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label="found")
    figure.savefig(path, dpi=110)


def write_rows(out: Path, cells: list[dict[str, Any]], common: dict[str, Any]) -> None:
    """rows.jsonl and niah.png."""
    lines = [json.dumps({"bench": "niah", **common, **c}) for c in cells]
    (out / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    heat_map(cells, out / "niah.png", str(common["name"]))


def _about(recipe: Recipe | None, model: Any, name: str) -> dict[str, Any]:
    """What a row says of the model."""
    out: dict[str, Any] = {"name": name, "commit": commit(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    if recipe is not None:
        out.update(experiment=recipe.experiment, seed=recipe.train.seed, family=recipe.model.family)
        out.update(vars(recipe.attention), train_lengths=recipe.needle.train_lengths)
        if model is not None:
            kinds = [m.sfa_train for m in models.attention_modules(model)]
            m = recipe.model
            out["k_bytes"] = min(key_bytes(m.head_dim, at, m.kv_heads or m.heads) for at in kinds)
    elif model is not None:
        out["sfa"] = getattr(model.config, "sfa", None)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-sfa niah``."""
    parser.add_argument("target", type=Path, metavar="RECIPE_OR_CHECKPOINT", help="a YAML recipe, or a trained folder")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="for a recipe"
    )
    parser.add_argument("--essays", type=Path, nargs="+", metavar="FILE", help="text files: the haystack")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="for --essays; default: the checkpoint's folder")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="row lengths to test, in tokens")
    parser.add_argument("--depths", type=int, default=10, help="depths at every length (default 10)")
    parser.add_argument("--trials", type=int, default=50, help="rows at every depth (default 50)")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--topk", type=int, help="turn SFA on in a Transformers checkpoint")
    parser.add_argument("--dense-dims", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa niah``."""
    from ..cli import UsageError

    try:
        import matplotlib  # noqa: F401 (the heat map comes after hours of training)

        return _run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(str(error)) from error
    except ImportError as error:
        raise UsageError(f"this command needs {error.name}: pip install 'flash-sfa[train]'") from None


def _run(args: argparse.Namespace) -> int:
    for name in ("depths", "trials"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if not args.target.is_dir():
        if args.essays:
            raise ValueError(f"--essays tests a trained folder, got {args.target}")
        recipe = load_recipe(args.target, args.overrides)
        if not recipe.needle.train_lengths:
            raise ValueError(f"{args.target}: needle.train_lengths is empty, so there is no needle task to train on")
        row = pretrain(recipe, args.out, quiet=args.quiet)
        common = {**_about(recipe, None, recipe.name), "task": "synthetic"}
        common.update({key: row[key] for key in ("k_bytes", "tokens", "complete", "commit", "time")})
        if dist.rank() == 0:
            write_rows(args.out, row["needle"], common)
        report(row)
        return 0
    if args.overrides:
        raise ValueError("--set is for recipes")
    check_device(args.device)
    model, trained = load_model(args.target, args.topk, args.dense_dims)
    longest = getattr(model.config, "max_position_embeddings", None)
    if trained is None and longest is not None and max(args.lengths or [1024]) > longest:
        raise ValueError(f"--lengths {max(args.lengths or [1024])} is more than the {longest} positions of the model")
    model.to(args.device)
    if args.essays:
        from .prepare import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer or args.target)[0]
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in args.essays)
        known, size = tokenizer.get_vocab_size(), model.get_input_embeddings().num_embeddings
        if known > size:
            raise ValueError(f"the tokenizer has {known} tokens and the model {size}: they do not belong together")
        essays = Essays(text, lambda words: list(tokenizer.encode(words, add_special_tokens=False).ids))
        cells = essay_cells(
            model,
            essays,
            lengths=args.lengths or [1024],
            depths=args.depths,
            trials=args.trials,
            seed=args.seed,
            bf16=args.device != "cpu",
        )
    elif trained is not None and trained.needle.train_lengths and args.lengths:
        trained.needle.depths, trained.train.seed = args.depths, args.seed
        cells = needle.NeedleTask(trained).cells(model, args.device, args.trials, args.lengths)
    else:
        raise ValueError("a trained folder needs --essays, or --lengths where its recipe trained on the needle task")
    args.out.mkdir(parents=True, exist_ok=True)
    common = {**_about(trained, model, args.target.resolve().name), "task": "essays" if args.essays else "synthetic"}
    write_rows(args.out, cells, {**common, "test_seed": args.seed})
    for c in needle.by_length(cells):
        print(f"{c['length']} tokens: {c['hits']} of {c['trials']} found, {c['accuracy']:.1%} +- {c['stderr']:.1%}")
    return 0
