"""The needle task: its generator, training on it, and needles in text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flash_sfa.cli import main
from flash_sfa.train import needle
from flash_sfa.train.niah import Essays, essay_cells, load_model
from flash_sfa.train.pretrain import make_task, pretrain
from flash_sfa.train.recipe import NeedleSpec, build_recipe

ROOT = Path(__file__).resolve().parent.parent
SPEC = NeedleSpec(needles=3, key_tokens=1, value_tokens=2, symbols=8, fillers=2)
TREE = {
    "model": {"family": "hybrid", "layers": 2, "width": 64, "heads": 2, "head_dim": 32, "window": 8, "global_every": 2},
    "attention": {"kind": "sfa", "topk_k": 6},
    "train": {"tokens": 64 * 32 * 160, "batch": 64, "lr": 5e-3, "bf16": False, "compile": False, "device": "cpu"},
    "eval": {"curve_points": 2, "batch": 8},
    "needle": {"train_lengths": [16, 32], "lengths": [16, 40], "depths": 3, "trials": 20},
}
TREE["model"]["context"] = 32  # 64 rows of 32 or 128 of 16 tokens a step
TREE["train"].update(save_last=True, log_every=10)
TREE["needle"].update(symbols=4, key_tokens=1, value_tokens=1)


@pytest.mark.parametrize("depth", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [20, 21, 57])
def test_the_needle_is_where_it_says_and_its_answer_unique(depth: float | None, length: int) -> None:
    rows, starts = needle.make_rows(SPEC, np.random.default_rng(1), 200, length, depth)
    size, marks = needle.needle_tokens(SPEC), (SPEC.fillers, SPEC.fillers + 1, SPEC.fillers + 2)
    assert rows.shape == (200, length) and rows.min() >= 0 and rows.max() < needle.vocabulary(SPEC)
    for row, start in zip(rows, starts, strict=True):
        asked, question = row[start : start + size], row[-size:]
        assert asked[0] == marks[0] and question[0] == marks[2] and asked[2] == question[2] == marks[1]
        assert np.array_equal(asked[1:], question[1:])
        found = np.flatnonzero(row[:-size] == marks[0])
        assert len(found) == 3 and np.diff(found).min() >= size and (row == marks[2]).sum() == 1
        for at in (1, slice(3, 5)):  # keys, then values, differ
            assert len({tuple(np.atleast_1d(row[f : f + size][at])) for f in found}) == 3
        assert (row[:-size] < SPEC.fillers).sum() == length - 4 * size
        if depth is not None:
            fillers_before = (row[:start] < SPEC.fillers).sum()
            assert fillers_before == round(depth * (length - 4 * size))
    if depth is None and length == 57:
        assert starts.min() == 0 and starts.max() == length - 2 * size


def test_rows_are_a_function_of_seed_and_step() -> None:
    task = make_task(build_recipe(TREE))
    whole = task.rows(3)
    assert torch.equal(whole, make_task(build_recipe(TREE)).rows(3)) and not torch.equal(whole[:2], task.rows(4)[:2])
    assert torch.equal(whole, torch.cat([task.rows(3, 0, 2), task.rows(3, 1, 2)])) and whole.numel() == 64 * 32
    assert {task.rows(step).shape[1] for step in range(12)} == {16, 32}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("needle", {"train_lengths": [7]}, "at least 8"),
        ("needle", {"train_lengths": [64]}, "model.context"),
        ("needle", {"train_lengths": [24]}, "divide"),
        ("needle", {"symbols": 1}, "words"),
        ("needle", {"trials": 0}, "trials"),
        ("model", {"family": "gpt2"}, "positions"),
    ],
)
def test_bad_needle_recipes_say_why(section: str, values: dict, message: str) -> None:
    tree = {**TREE, "needle": {**TREE["needle"], "value_tokens": 1}}
    tree["needle"]["needles"] = 1
    tree[section] = {**tree[section], **values}
    with pytest.raises(ValueError, match=message):
        build_recipe(tree)


@pytest.mark.parametrize("arguments", [(7, None), (20, 1.5)])
def test_bad_rows_say_why(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"length must be at least 20|depth must lie"):
        needle.make_rows(SPEC, np.random.default_rng(0), 1, *arguments)


def test_hits_count_whole_answers() -> None:
    class Fixed(torch.nn.Module):
        base_model = property(lambda self: self._base)

        def _base(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return type("Out", (), {"last_hidden_state": torch.nn.functional.one_hot(input_ids + 1, 12).float()})

        def get_output_embeddings(self) -> torch.nn.Module:
            return torch.nn.Identity()

    rows = torch.tensor([[5, 6, 7, 8], [5, 5, 7, 8], [5, 6, 6, 7]])
    assert [needle.count_hits(Fixed(), rows[i : i + 1], [2], False) for i in range(3)] == [1, 0, 0]
    assert (
        needle.count_hits(Fixed(), rows, [3, 1, 1], False) == 3
        and needle.count_hits(Fixed(), rows, [2] * 3, False) == 1
    )
    full, none = needle.cell(10, 0.5, 100, 100), needle.cell(10, 0.0, 100, 0)
    assert full["accuracy"] == 1 and full["stderr"] == pytest.approx(none["stderr"]) and 0.005 < full["stderr"] < 0.02
    assert needle.by_length([full, none])[0]["hits"] == 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command on a recipe: a model that learns, rows and a heat map."""
    import yaml

    folder = tmp_path_factory.mktemp("needle")
    (folder / "r.yaml").write_text(yaml.safe_dump(TREE))
    assert main(["niah", str(folder / "r.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def test_a_tiny_run_learns(trained: Path) -> None:
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in entries if "loss" in e]
    assert losses[0] > 1.2 and losses[-1] < 0.5
    rows = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    assert [(r["length"], r["depth"]) for r in rows] == [(n, d) for n in (16, 40) for d in (0, 0.5, 1)]
    assert all(r["trials"] == 20 and r["bench"] == "niah" and r["task"] == "synthetic" for r in rows)
    assert sum(r["hits"] for r in rows[:3]) > 40 and rows[0]["k_bytes"] == 18 and 0 < rows[0]["stderr"] < 0.2
    assert (trained / "niah.png").stat().st_size > 1000
    assert json.loads((trained / "row.json").read_text())["bench"] == "niah"


def test_a_killed_needle_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_sfa.train import pretrain as module

    tree = {**TREE, "train": {**TREE["train"], "tokens": 64 * 32 * 8, "save_every": 4, "log_every": 1}}
    recipe = build_recipe(tree)
    whole = pretrain(recipe, tmp_path / "whole", quiet=True)

    def save_and_die(path: Path, state: dict, real=module._save) -> None:  # type: ignore[no-untyped-def]
        real(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "killed", quiet=True)
    resumed = pretrain(recipe, tmp_path / "killed", quiet=True)
    assert resumed["needle"] == whole["needle"] and resumed["loss"] == whole["loss"]


def test_a_trained_folder_is_tested_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--depths", "2", "--trials", "5", "--device", "cpu"]
    assert main(["niah", str(trained), "--lengths", "16", "24", *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["length"] for r in rows] == [16, 16, 24, 24] and rows[0]["kind"] == "sfa"
    assert "16 tokens: " in capsys.readouterr().out
    assert main(["niah", str(trained), *arguments]) == 2
    assert "needs --essays" in capsys.readouterr().err
    assert main(["niah", str(ROOT / "recipes/tiny.yaml"), *arguments]) == 2
    assert "train_lengths" in capsys.readouterr().err


def words(text: str) -> list[int]:
    """A toy tokenizer: one id a character."""
    return [ord(c) % 128 for c in text]


def test_needles_in_essays() -> None:
    text = "One sentence here. Another, longer one there? " * 40
    essays = Essays(text, words)
    spell = lambda ids: "".join(map(chr, ids))  # noqa: E731
    for depth in (0.0, 0.4, 1.0):
        row, start, answer = essays.row(np.random.default_rng(3), 700, depth)
        assert len(row) == 700 and answer == 8
        number = spell(row[-8:])[1:]
        assert number.isdigit() and spell(row).count(number) == 2 and number not in text
        assert spell(row[start:]).startswith(" The special magic number for ")
        assert start == 0 or spell(row)[start - 1] in ".?"
        room = 700 - (700 - spell(row).index("\n\nThe")) - spell(row[start:]).index(number) - 8
        assert depth * room - 30 <= start <= depth * room
    with pytest.raises(ValueError, match="these essays"):
        essays.row(np.random.default_rng(0), 5000, 0.5)
    with pytest.raises(ValueError, match="sentence end"):
        Essays("no stop", words)


def test_essays_with_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Transformers checkpoints, dense and SFA, load and are tested; a run folder refuses topk."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    essays = Essays("One sentence here. Another, longer one there? " * 40, words)
    for topk in (None, 4):
        model, recipe = load_model(tmp_path, topk)
        assert recipe is None and (getattr(model.config, "sfa", None) is None) == (topk is None)
        cells = essay_cells(model, essays, lengths=[200], depths=2, trials=3, batch_tokens=400)
        assert [c["trials"] for c in cells] == [3, 3] and cells[0]["hits"] == 0
    with pytest.raises(ValueError, match="topk"):
        load_model(trained, 4)


def test_essays_by_the_command(tmp_path: Path) -> None:
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    text = (ROOT / "src/flash_sfa/data/tinyshakespeare.txt").read_text()[:20000]
    tokenizer.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(tmp_path))
    config = transformers.GPT2Config(vocab_size=320, n_positions=256, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "a.txt").write_text(text[:9000])
    (tmp_path / "b.txt").write_text(text[9000:])
    files = ["--essays", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    grid = ["--lengths", "160", "256", "--depths", "2", "--trials", "2", "--device", "cpu"]
    assert main(["niah", str(tmp_path), *files, *grid, "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(r["task"] == "essays" and r["trials"] == 2 for r in rows)
    (tmp_path / "small").mkdir()
    config.vocab_size = 290
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    other = [
        "niah",
        str(tmp_path / "small"),
        "--tokenizer",
        str(tmp_path),
        *files,
        *grid,
        "--out",
        str(tmp_path / "o2"),
    ]
    assert main(other) == 2 and not (tmp_path / "o2").exists()


@pytest.mark.parametrize("command", [["niah", "x", "--out", "y"], ["generate", "x", "y"]])
@pytest.mark.parametrize("seed", ["-1", str(2**70), "1.5"])
def test_bad_seed(command: list[str], seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--seed", seed])
    assert stop.value.code == 2 and "--seed" in capsys.readouterr().err
