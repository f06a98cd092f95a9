"""flash-sfa generate and flash-sfa eval on tiny random checkpoints, and what they refuse."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf

from flash_sfa import evaluate
from flash_sfa.cli import main
from flash_sfa.integrations.transformers import enable_sfa
from tiny_models import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    config = hf.Qwen3Config(**SMALL | {"vocab_size": 256}, head_dim=16)
    model = hf.Qwen3ForCausalLM(config)
    model.save_pretrained(root / "dense")
    enable_sfa(model, topk=4, dense_dims=2).save_pretrained(root / "sfa")
    (root / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    return root


def test_perplexity_of_strided_windows(folder):
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    ids = torch.randint(256, (1, 53), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = []
        done = 1
        for begin in range(0, 53, 6):
            end = min(begin + 16, 53)
            row = model(ids[:, begin:end], use_cache=False).logits.log_softmax(-1)[0]
            losses += [-row[t - 1 - begin, ids[0, t]].item() for t in range(max(done, begin + 1), end)]
            done = end
            if end == 53:
                break
        for batch in (1, 4):
            got = evaluate.perplexity(model, ids, length=16, stride=6, batch_size=batch)
            assert got["tokens"] == len(losses) == 52
            assert math.isclose(got["loss"], sum(losses) / 52, rel_tol=1e-5)
        assert math.isclose(got["perplexity"], math.exp(got["loss"]))
        assert evaluate.perplexity(model, ids, length=16, stride=16)["tokens"] == 53 - 4
        assert evaluate.perplexity(model, ids, length=16, stride=6, limit=1)["tokens"] == 15
        for n, length, stride in ((1, 16, 6), (53, 16, 17), (53, 16, 0), (53, 1, 1)):
            with pytest.raises(ValueError):
                evaluate.perplexity(model, ids[:, :n], length=length, stride=stride)


def cells(out):
    """The printed table by row label."""
    lines = [line for line in out.splitlines() if "  " in line.strip()]
    return {line[:26].strip(): line[26:].replace(",", "").split() for line in lines}


def test_eval_shows_dense_and_sfa_side_by_side(folder, capsys, tmp_path):
    common = ["--text", str(folder / "text.txt"), "--tokenizer", "bytes", "--length", "64", "--new-tokens", "8"]
    assert main(["eval", str(folder / "sfa"), *common, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["attention"] for row in rows] == ["dense", "sfa"]
    assert rows[1]["sfa"] == {"topk": 4, "dense_dims": 2, "layers": None} and rows[0]["sfa"] is None
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    dense_bytes = 2 * 2 * (16 + 16) * 4
    assert rows[0]["cache_bytes_a_token"] == dense_bytes
    assert rows[1]["cache_bytes_a_token"] == 2 * 2 * (4 * (4 + 1) + 2 * 4 + 16 * 4) < rows[1]["cache_bytes_in_use"]
    shown = cells(capsys.readouterr().out)
    assert [float(x) for x in shown["perplexity"]] == pytest.approx([r["perplexity"] for r in rows], rel=1e-3)
    assert len(shown["generated tokens a second"]) == 2

    # Two checkpoints: the dense one is the dense side. topk of all features changes nothing.
    two = [str(folder / "dense"), str(folder / "sfa")]
    assert main(["eval", *two, *common, "--windows", "2", "--out", str(tmp_path / "two.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [(row["checkpoint"], row["attention"]) for row in rows] == [("dense", "dense"), ("sfa", "sfa")]
    assert main(["eval", two[0], *common, "--topk", "16", "--out", str(tmp_path / "all.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)


def test_generate(folder, capsys):
    common = ["--prompt", "To be", "--tokenizer", "bytes", "--max-new-tokens", "6"]
    assert main(["generate", str(folder / "dense"), *common, "--topk", "16", "--dense-too"]) == 0
    parts = capsys.readouterr().out.split("--- ")[1:]
    assert [part.split(":")[0] for part in parts] == ["dense", "sfa"]
    assert parts[0].split("\n", 1)[1] == parts[1].split("\n", 1)[1]
    assert main(["generate", str(folder / "sfa"), *common, "--v-dtype", "int8", "--sample", "--tolerance", "0.01"]) == 0
    assert "--- sfa: 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("no such folder", ["generate", "/nowhere/at/all", "--prompt", "x"]),
        ("no checkpoint", ["generate", "EMPTY", "--prompt", "x", "--tokenizer", "bytes"]),
        ("makes no token", ["generate", "DENSE", "--prompt", "x"]),
        ("a file, not the folder", ["generate", "TEXT", "--prompt", "x"]),
        ("--prompt is empty", ["generate", "DENSE", "--prompt", ""]),
        ("cannot be read", ["generate", "DENSE", "--prompt-file", "/nowhere"]),
        ("more than the 128 positions", ["generate", "DENSE", "--prompt", "x" * 100, "--tokenizer", "bytes"]),
        ("do not match", ["generate", "BROKEN", "--prompt", "x", "--tokenizer", "bytes"]),
        ("tokp", ["generate", "UNKNOWN", "--prompt", "x", "--tokenizer", "bytes"]),
        ("do not belong together", ["generate", "SMALL", "--prompt", "xyz", "--tokenizer", "bytes"]),
        ("need --topk", ["generate", "DENSE", "--prompt", "x", "--layers", "0"]),
        ("--topk must be", ["generate", "DENSE", "--prompt", "x", "--topk", "many"]),
        ("topk", ["generate", "DENSE", "--prompt", "x", "--tokenizer", "bytes", "--topk", "0"]),
        ("sparse cache, which --tasks", ["eval", "DENSE", "--tasks", "piqa", "--topk", "4", "--v-dtype", "int8"]),
        ("has no config.sfa", ["generate", "DENSE", "--prompt", "x", "--tokenizer", "bytes", "--v-dtype", "int8"]),
        ("tolerance", ["generate", "SFA", "--prompt", "x", "--tokenizer", "bytes", "--tolerance", "2"]),
        ("what to measure", ["eval", "DENSE"]),
        ("cannot be read", ["eval", "DENSE", "--text", "/nowhere"]),
        ("the file is empty", ["eval", "DENSE", "--text", "BLANK"]),
        ("not UTF-8", ["eval", "DENSE", "--text", "BINARY"]),
        ("--stride", ["eval", "DENSE", "--text", "TEXT", "--stride", "2000"]),
        ("128 positions", ["eval", "DENSE", "--text", "TEXT", "--tokenizer", "bytes", "--out", "OUT"]),
        ("folder that does not exist", ["eval", "DENSE", "--text", "TEXT", "--out", "/nowhere/rows.jsonl"]),
        ("--out", ["eval", "DENSE", "--text", "TEXT", "--out", "EMPTY"]),
        ("--data and --limit", ["eval", "DENSE", "--text", "TEXT", "--limit", "3"]),
        ("given once", ["eval", "DENSE", "DENSE", "--text", "TEXT"]),
        ("--temperature needs", ["generate", "DENSE", "--prompt", "x", "--temperature", "2"]),
        ("--device", ["generate", "DENSE", "--prompt", "x", "--tokenizer", "bytes", "--device", "meta"]),
        ("unknown 'poetry'", ["eval", "DENSE", "--tasks", "poetry"]),
        ("piqa.jsonl is missing", ["eval", "DENSE", "--tasks", "piqa", "--data", "EMPTY"]),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(words, arguments, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    names = {
        "DENSE": folder / "dense", "SFA": folder / "sfa", "TEXT": folder / "text.txt", "EMPTY": tmp_path / "empty",
        "BLANK": tmp_path / "blank", "BINARY": tmp_path / "binary", "OUT": tmp_path / "out.jsonl",
    }  # fmt: skip
    for name, changes in (
        ("BROKEN", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}),
        ("UNKNOWN", {"sfa": {"topk": 4, "tokp": 3}}),
    ):
        if name in arguments:
            names[name] = copy_of(folder / "dense", tmp_path / name, changes)
    if "SMALL" in arguments:
        names["SMALL"] = tmp_path / "small"
        hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "small")
    assert main([str(names.get(word, word)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith(f"flash-sfa {arguments[0]}: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def copy_of(source, target, changes):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_offline_without_local_files(tmp_path):
    """In a process of its own: the hub's client reads the switch when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "flash_sfa.cli", "generate", "someone/some-model", "--prompt", "x"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "someone/some-model" in done.stderr
    assert "Traceback" not in done.stderr
