"""Shards, recipes, schedules, the top-k mask, training and its resume, on tiny models."""

import importlib.util
import json
import lzma
import os
import queue
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from flash_sfa import sfa_attention, topk_sparsify
from flash_sfa.integrations.settings import layer_setting
from flash_sfa.train import models
from flash_sfa.train.attention import keep_topk, key_bytes, quantize_keys, topk_mask
from flash_sfa.train.flops import flops_per_token
from flash_sfa.train.prepare import load_tokenizer, prepare, read_pieces, wikitext_rows
from flash_sfa.train.pretrain import _save, evaluate, mean_loss, pretrain, token_losses
from flash_sfa.train.recipe import build_recipe, load_recipe
from flash_sfa.train.schedule import learning_rate
from flash_sfa.train.shards import BlockOrder, open_shards, write_index

ROOT = Path(__file__).resolve().parent.parent
SHAKESPEARE = ROOT / "src/flash_sfa/data/tinyshakespeare.txt"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ByteLevelBPETokenizer()
    text = SHAKESPEARE.read_text()[:60000]
    tokenizer.train_from_iterator(
        text.split("\n\n"), vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "plays.txt.xz"
    text = SHAKESPEARE.read_text()[:120000]
    documents = [text[i : i + 30000] for i in range(0, len(text), 30000)]
    with lzma.open(path, "wt", encoding="utf-8") as stream:
        stream.write("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, text_file: Path) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare([text_file], tokenizer_dir, root / "train", quiet=True)
    return root


def tiny(data_root: Path, **sections: dict) -> dict:
    tree: dict = {
        "model": {"layers": 1, "width": 32, "heads": 2, "head_dim": 16, "context": 32, "rotary_dims": 4},
        "attention": {"kind": "sfa", "topk_k": 3, "dense_dims": 4},
        "data": {"root": str(data_root), "train": ["train"], "val": {"plays": "train"}},
        "train": {
            "tokens": 32 * 8 * 12,
            "batch": 8,
            "lr": 3e-3,
            "bf16": False,
            "compile": False,
            "device": "cpu",
        },
        "eval": {"tokens": 512, "curve_points": 1, "curve_tokens": 128},
    }
    tree["train"]["log_every"] = 1
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return tree


# --- shards
# ---------------------------------------------------------------------------------------------------


def test_shard_file_is_raw_little_endian(data_root: Path, tokenizer_dir: Path, text_file: Path) -> None:
    index = json.loads((data_root / "train/index.json").read_text())
    raw = np.frombuffer((data_root / "train/00000.bin").read_bytes(), dtype="<u2")
    tokenizer, eos, _ = load_tokenizer(tokenizer_dir)
    documents = lzma.decompress(text_file.read_bytes()).decode().split("\n<|endoftext|>\n")
    assert len(documents) == 4
    expected: list[int] = []
    for i, document in enumerate(documents):
        last = i == len(documents) - 1
        expected += ([eos] if i else []) + tokenizer.encode(document + ("" if last else "\n")).ids
    assert raw.tolist() == expected
    assert index["dtype"] == "uint16" and index["documents"] == 4 and index["tokens"] == len(expected)
    assert open_shards([data_root / "train"]).vocab_size == 400


def test_pieces_tokenise_like_the_whole(tokenizer_dir: Path) -> None:
    tokenizer, _, _ = load_tokenizer(tokenizer_dir)
    text = SHAKESPEARE.read_text()[:20000] + "\n\n\n  indented\n\tand tabs \n\nend  \nx\n"
    whole = tokenizer.encode(text).ids
    pieces = list(read_pieces(text.splitlines(keepends=True), limit=50))
    assert len(pieces) > 100 and "".join(piece for piece, _ in pieces) == text
    assert [fresh for _, fresh in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [i for piece, _ in pieces for i in tokenizer.encode(piece).ids] == whole


def test_empty_documents_are_dropped() -> None:
    lines = ["<|endoftext|>\n", "a\n", "<|endoftext|>\n", "<|endoftext|>\n", "b"]
    assert list(read_pieces(lines)) == [("a\n", True), ("b", True)]


def test_wikitext_rows() -> None:
    assert "".join(wikitext_rows([" \n", " = T = \n", " \n", " x \n"])) == "\n\n = T = \n\n\n\n\n x \n"


@pytest.mark.parametrize("shard_tokens", [1000, 1 << 20])
def test_prepare_resumes_to_the_same_bytes(
    tmp_path: Path, tokenizer_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    from flash_sfa.train import prepare as module

    monkeypatch.setattr(module, "BATCH_CHARS", 1)
    texts = [text_file, text_file]
    prepare(texts, tokenizer_dir, tmp_path / "whole", shard_tokens=shard_tokens, quiet=True)

    real, calls = module._append, []

    def dies(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt  # after the bytes, before the state is saved

    monkeypatch.setattr(module, "_append", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(texts, tokenizer_dir, tmp_path / "killed", shard_tokens=shard_tokens, quiet=True)
        with pytest.raises(ValueError, match="no index"):
            open_shards([tmp_path / "killed"])
    prepare(texts, tokenizer_dir, tmp_path / "killed", shard_tokens=shard_tokens, quiet=True)
    assert len(calls) > 6
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    with pytest.raises(ValueError, match="other arguments"):
        prepare(texts[:1], tokenizer_dir, tmp_path / "whole", shard_tokens=shard_tokens, quiet=True)


def test_reads_across_shards(tmp_path: Path) -> None:
    for folder, sizes, start in (("a", [5, 7], 0), ("b", [4], 12)):
        (tmp_path / folder).mkdir()
        shards = []
        for i, size in enumerate(sizes):
            np.arange(start, start + size).astype("<u4").tofile(tmp_path / folder / f"{i:05d}.bin")
            shards.append((f"{i:05d}.bin", size))
            start += size
        write_index(tmp_path / folder, shards, vocab_size=70000, eos=0, documents=1)
    data = open_shards([tmp_path / "a", tmp_path / "b"])
    assert data.tokens == 16
    for first in range(16):
        for count in range(16 - first + 1):
            assert data.read(first, count).tolist() == list(range(first, first + count))
    with pytest.raises(ValueError, match="16"):
        data.read(10, 7)
    (tmp_path / "b/00000.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="bytes"):
        open_shards([tmp_path / "b"])


def test_block_order_covers_each_epoch_once_and_is_a_function_of_the_row() -> None:
    order = BlockOrder(1000, 10, seed=3)
    rows = order.starts(0, 2 * order.per_epoch)
    first, second = rows[: order.per_epoch], rows[order.per_epoch :]
    assert order.per_epoch == 99
    for epoch in (first, second):
        assert np.array_equal(np.diff(sorted(epoch)), np.full(98, 10)) and max(epoch) + 11 <= 1001
    assert first != second
    assert BlockOrder(1000, 10, seed=3).starts(120, 30) == rows[120:150]
    assert BlockOrder(1000, 10, seed=4).starts(0, 99) != first


# --- schedule and recipes
# -------------------------------------------------------------------------------------


def test_schedules() -> None:
    common = {"total": 100, "peak": 2.0, "warmup": 10, "floor": 0.1}
    cosine = [learning_rate(s, **common) for s in range(101)]
    assert cosine[0] == pytest.approx(0.2) and cosine[9] == pytest.approx(2.0) and cosine[100] == pytest.approx(0.2)
    assert cosine[55] == pytest.approx(1.1) and all(a >= b for a, b in pairwise(cosine[9:]))
    wsd = [learning_rate(s, schedule="wsd", decay=0.2, **common) for s in range(101)]
    assert wsd[10:81] == pytest.approx([2.0] * 71) and wsd[90] == pytest.approx(1.1) and wsd[100] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="linear"):
        learning_rate(0, schedule="linear", **common)


def test_recipes_in_the_repository_load() -> None:
    import yaml

    files = [f for f in ROOT.glob("recipes/**/*.yaml") if f.name != "queue.yaml"]
    assert len(files) >= 5
    for file in files:
        load_recipe(file)
    for file in ROOT.glob("recipes/**/queue.yaml"):
        for entry in yaml.safe_load(file.read_text()):
            values = {**({"train.start": "model"} if "start" in entry else {}), **entry.get("set", {})}
            sets = [f"{key}={json.dumps(value)}" for key, value in values.items()]
            recipe = load_recipe(file.parent / entry["recipe"], sets)
            models.make_config(recipe, 50257)


@pytest.mark.parametrize("topk", [(4, 4), (None, 4)])
def test_what_a_checkpoint_says_is_what_it_was_trained_with(data_root: Path, topk: tuple[int | None, int]) -> None:
    tree = tiny(data_root, model={"layers": 2}, attention={"topk_q": topk[0], "topk_k": topk[1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = models.build_model(build_recipe(tree), 100).config
    assert [layer_setting(config, i) for i in range(2)] == [(topk, config.sfa["dense_dims"])] * 2


def test_recipe_base_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {layers: 2, width: 64}\ntrain: {lr: 1e-3}")
    (tmp_path / "one.yaml").write_text("base: base.yaml\nmodel: {layers: 3}")
    recipe = load_recipe(tmp_path / "one.yaml", ["train.tokens=1e6", "model.heads=4"])
    assert (recipe.name, recipe.model.layers, recipe.model.width, recipe.model.heads) == ("one", 3, 64, 4)
    assert recipe.train.lr == 1e-3 and recipe.train.tokens == 1_000_000


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"family": "bert"}}, "gpt2"),
        ({"model": {"layers": 1.5}}, "integer"),
        ({"model": {"layers": True}}, "layers"),
        ({"attention": {"kind": "sfa"}}, "topk_k"),
        ({"attention": {"kind": "dense", "topk_k": 4}}, "takes no"),
        ({"attention": {"kind": "narrow"}}, "qk_dim"),
        ({"attention": {"kind": "sfa", "topk_k": 0}}, "at least 1"),
        ({"attention": {"kind": "sfa", "topk_k": 2, "v_dim": 4}}, "v_dim"),
        ({"train": {"batch": 8, "micro_batch": 3}}, "micro_batch"),
        ({"train": {"tokens": 5}}, "one step"),
        ({"train": {"tokens": float("inf")}}, "integer"),
        ({"train": {"log_every": 0}}, "log_every"),
        ({"data": {"train": [5]}}, "data.train must hold str"),
        ({"train": {"fsdp": True}, "attention": {"kind": "sfa", "topk_k": 2, "center": True}}, "center"),
    ],
)
def test_bad_recipes_say_why(tree: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(tree)


# --- the mask
# -------------------------------------------------------------------------------------------------


def rows_with_ties(dtype: torch.dtype, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(d)
    x = (torch.randn(48, 3, d, generator=generator) * 4).round().div(4).to(dtype)
    x[0, 0, 5] = x[0, 0, d - 2] = float("nan")
    x[1] = 0
    x[2, :, 3] = -0.0
    x[3, :, 7], x[4, :, 9] = float("inf"), -float("inf")
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d", [16, 64, 300])
@pytest.mark.parametrize("dense_dims", [(), (0, 1, 2, 3), (5, 9)])
def test_mask_selects_like_topk_sparsify(dtype: torch.dtype, d: int, dense_dims: tuple[int, ...]) -> None:
    x = rows_with_ties(dtype, d)
    for topk in (1, 3, 8, 33, d):
        mask = topk_mask(x, topk, dense_dims)
        width = min(topk, d - len(dense_dims)) + len(dense_dims)
        assert torch.equal(mask.sum(-1), torch.full(x.shape[:-1], width))
        ours, codes = keep_topk(x, topk, dense_dims), topk_sparsify(x, topk, dense_dims=dense_dims)
        assert torch.equal(ours.nan_to_num(99.0), codes.to_dense().nan_to_num(99.0))


def test_mask_gradient_is_straight_through() -> None:
    x = torch.randn(6, 16, requires_grad=True)
    weight = torch.randn(6, 16)
    (keep_topk(x, 3, (0,)) * weight).sum().backward()
    assert torch.equal(x.grad, weight * topk_mask(x.detach(), 3, (0,)))


def test_mask_path_equals_the_op(data_root: Path) -> None:
    for family, extra in (("rotary", {}), ("hybrid", {"rotary_dims": None, "window": 8, "global_every": 1})):
        tree = tiny(data_root, model={"family": family, **extra}, attention={"topk_q": 5})
        outs = {}
        for path in ("mask", "op"):
            tree["attention"]["path"] = path
            torch.manual_seed(0)
            model = models.build_model(build_recipe(tree), 100)
            ids = torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(1))
            loss = token_losses(model, ids[:, :-1], ids[:, 1:], False)
            loss.mean().backward()
            outs[path] = (loss.detach(), [p.grad for p in model.parameters() if p.grad is not None])
        assert torch.allclose(outs["mask"][0], outs["op"][0], atol=1e-5)
        for a, b in zip(outs["mask"][1], outs["op"][1], strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "rotary", "hybrid", "qwen3"])
@pytest.mark.parametrize("kind", ["dense", "narrow", "sfa"])
def test_attention_by_the_formula(data_root: Path, family: str, kind: str) -> None:
    """One layer's output against float64 sfa_attention on what entered top-k, and no look into the future."""
    if family == "qwen3" and kind == "narrow":
        with pytest.raises(NotImplementedError, match="narrow"):
            models.make_config(build_recipe({"model": {"family": family}, "attention": {"kind": kind, "qk_dim": 8}}), 9)
        return
    attention = {"dense": {}, "narrow": {"qk_dim": 6}, "sfa": {"topk_k": 3, "topk_q": 4}}[kind]
    tree = tiny(data_root, model={"family": family, "rotary_dims": None, "global_every": 1})
    tree["attention"] = {"kind": kind, **attention}
    torch.manual_seed(0)
    model = models.build_model(build_recipe(tree), 100).eval()
    module = models.attention_modules(model)[0]
    ids = torch.randint(0, 100, (2, 32))
    seen: list[torch.Tensor] = []
    projection = module.c_proj if family == "gpt2" else module.o_proj
    projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    at = module.sfa_train
    assert at.kind == kind
    at.captured = []
    with torch.no_grad():
        before = token_losses(model, ids[:, :-1], ids[:, 1:], False)
    q, k, v = (x.transpose(1, 2).double() for x in at.captured[0])
    if kind == "narrow":
        assert q.shape[-1] == 6
    topk = {"dense": q.shape[-1], "narrow": q.shape[-1], "sfa": (4, 3)}[kind]
    scale = 6**-0.5 if kind == "narrow" else 16**-0.5
    expected = sfa_attention(q, k, v, topk=topk, causal=True, softmax_scale=scale, impl="reference")
    assert torch.allclose(seen[0].double(), expected.flatten(2), atol=1e-5)
    at.captured = None
    changed = ids.clone()
    changed[:, 20:] = 7
    with torch.no_grad():
        after = token_losses(model, changed[:, :-1], ids[:, 1:], False)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 21:], after[:, 21:])


def test_parameters_of_the_narrow_rival(data_root: Path) -> None:
    counts = {}
    for family in ("gpt2", "rotary"):
        tree = tiny(data_root, model={"family": family, "rotary_dims": None})
        tree["attention"] = {"kind": "narrow", "qk_dim": 6}
        recipe = build_recipe(tree)
        counts[family] = models.count_parameters(models.build_model(recipe, 100), recipe)[1]
    # rotary: q, k of 2 heads x 6, v and o of 32, mlp 85, three norms
    assert counts["rotary"] == 2 * 32 * 12 + 2 * 32 * 32 + 3 * 32 * 85 + 3 * 32
    tree["model"]["family"] = "gpt2"
    tree["attention"]["v_dim"] = 10
    recipe = build_recipe(tree)
    model = models.build_model(recipe, 100)
    ids = torch.randint(0, 100, (2, 33))
    mean_loss(model, ids[:, :-1], ids[:, 1:], False).backward()
    unused = sum(int((p.grad == 0).sum()) for p in model.transformer.h.parameters() if p.grad is not None)
    everything = sum(p.numel() for p in model.parameters())
    # the bias of k never gets a gradient: it moves all scores of a row alike
    counted = models.count_parameters(model, recipe)[0]
    assert 0 <= unused - (everything - counted) <= 32 and everything - counted == 2 * 33 * (10 + 10 + 6) + 2 * 32 * 6
    # gpt2: the same with biases, mlp 128 twice, three norms with bias
    assert counts["gpt2"] == 33 * (12 + 12 + 32) + 33 * 32 + 33 * 128 + 129 * 32 + 6 * 32


def test_quantized_keys() -> None:
    k = torch.randn(2, 3, 100, 8)
    for bits in (8, 4, 2):
        rounded = quantize_keys(k, bits)
        for group in (slice(0, 64), slice(64, 100)):
            x, r = k[:, :, group], rounded[:, :, group]
            step = (x.amax(2) - x.amin(2)) / (2**bits - 1)
            assert ((x - r).abs().amax(2) <= step / 2 + 1e-6).all()
            assert max(len(r[0, 0, :, f].unique()) for f in range(8)) <= 2**bits
    at = models.LayerAttention(k_bits=4)
    assert key_bytes(64, at) == 32 + 4
    assert key_bytes(64, models.LayerAttention("sfa", topk_k=8, dense_dims=(0, 1, 2, 3))) == 24 + 8
    assert (
        key_bytes(64, models.LayerAttention("narrow", qk_dim=16)) == 32
        and key_bytes(64, models.LayerAttention()) == 128
    )


# --- training
# -------------------------------------------------------------------------------------------------


def test_evaluate_counts_every_token_once(data_root: Path) -> None:
    recipe = build_recipe(tiny(data_root))
    data = open_shards([data_root / "train"])
    model = models.build_model(recipe, data.vocab_size).eval()
    total, count = evaluate(model, data, context=32, batch=3, device="cpu", bf16=False, limit=100)
    expected = 0.0
    for start in (0, 32, 64, 96):
        row = torch.from_numpy(data.read(start, min(33, 100 - start)))[None]
        with torch.no_grad():
            expected += float(token_losses(model, row[:, :-1], row[:, 1:], False).sum())
    assert count == 99 and total == pytest.approx(expected, rel=1e-5)


def test_training_learns_and_leaves_a_row(data_root: Path, tmp_path: Path) -> None:
    row = pretrain(
        build_recipe(tiny(data_root, train={"tokens": 32 * 8 * 60}, eval={"save_qkv": True})),
        tmp_path,
        quiet=True,
    )
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in entries if "loss" in e]
    assert len(losses) == 60 and losses[0] > 5.5 and row["loss"] < 4.9
    assert row["loss"] == pytest.approx(np.mean(losses[57:])) and row["complete"]
    assert row["k_bytes"] == 3 * 3 + 2 * 4 and row["cache_bytes"] == 2 * (17 + 32)
    assert 1 < row["val"]["plays"] < 200 and row["codes"]["overlap"] == 1.0 and 0 < row["codes"]["balance_k"] <= 1
    assert json.loads((tmp_path / "row.json").read_text()) == json.loads(json.dumps(row))
    qkv = torch.load(tmp_path / "qkv.pt")
    assert qkv[0]["q"].shape == (32, 2, 16)


def test_resume_matches_an_uninterrupted_run(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build_recipe(tiny(data_root, train={"save_every": 4, "schedule": "wsd"}))
    whole = pretrain(recipe, tmp_path / "whole", quiet=True)

    def save_and_die(path: Path, state: dict) -> None:
        _save(path, state)
        if state["step"] == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flash_sfa.train.pretrain._save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "killed", quiet=True)
    with (tmp_path / "killed/log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 9, "loss": 0.0}) + "\n")  # written after the last checkpoint
    resumed = pretrain(recipe, tmp_path / "killed", quiet=True)

    def curve(folder: str) -> list[tuple]:
        lines = map(json.loads, (tmp_path / folder / "log.jsonl").read_text().splitlines())
        return [(e["step"], e.get("loss"), e.get("lr"), e.get("grad_norm"), e.get("val")) for e in lines]

    assert curve("killed") == curve("whole") and len(curve("whole")) >= 12
    assert resumed["val"] == whole["val"] and resumed["loss"] == whole["loss"]
    with pytest.raises(ValueError, match="another recipe"):
        pretrain(build_recipe(tiny(data_root)), tmp_path / "killed", quiet=True)


def test_micro_batches_give_the_same_update(data_root: Path, tmp_path: Path) -> None:
    losses = []
    for micro in (8, 2):
        recipe = build_recipe(tiny(data_root, train={"tokens": 32 * 8 * 4, "micro_batch": micro}))
        losses.append(pretrain(recipe, tmp_path / str(micro), quiet=True)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def curve_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def torchrun(recipe: Path, out: Path) -> dict:
    """The row of two processes."""
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flash_sfa.train.pretrain", str(recipe), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("r: ") == 1  # one of the two reports
    return json.loads((out / "row.json").read_text())


def test_sharded_training_is_that_of_one_process(data_root: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo, micro-batches, a learned map inside attention; also when it goes on from a save."""
    import yaml

    tree = tiny(data_root, train={"micro_batch": 2, "save_every": 8, "save_last": True, "compile": False})
    tree["model"] = {**tree["model"], "layers": 2, "rotary_dims": None}
    tree["attention"] = {"kind": "sfa", "topk_k": 4, "map_dim": 16}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    alone = pretrain(load_recipe(tmp_path / "r.yaml"), tmp_path / "one", quiet=True)
    tree["train"]["fsdp"] = True
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    row = torchrun(tmp_path / "r.yaml", tmp_path / "two")
    (tmp_path / "two/row.json").unlink()
    again = torchrun(tmp_path / "r.yaml", tmp_path / "two")
    for ours in (row, again):
        assert (ours["processes"], ours["params"]) == (2, alone["params"])
        assert ours["val"]["all"] == pytest.approx(alone["val"]["all"], rel=1e-4)
        assert ours["codes"]["rows_999"] == pytest.approx(alone["codes"]["rows_999"], rel=1e-2)
    curves = [curve_of(tmp_path / out) for out in ("one", "two")]
    assert [e["step"] for e in curves[0]] == [e["step"] for e in curves[1]] and len(curves[0]) >= 12
    for a, b in zip(*curves, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4)
        assert a.get("grad_norm") == pytest.approx(b.get("grad_norm"), rel=1e-2)
    weights = [safetensors(tmp_path / out / "model") for out in ("one", "two")]
    assert weights[0].keys() == weights[1].keys() and any("sfa_map_q" in name for name in weights[0])
    assert all(torch.allclose(x, weights[1][name], atol=1e-3) for name, x in weights[0].items())


def safetensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_two_processes_train_like_one(data_root: Path, tmp_path: Path) -> None:
    """DDP over gloo: equal losses at an equal global batch, from the start and from one process's checkpoint."""
    import shutil

    import yaml

    tree = tiny(data_root, train={"micro_batch": 2, "save_every": 8}, eval={"k_bits": [2]})
    tree["attention"] = {"kind": "dense"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "r.yaml")
    whole = pretrain(recipe, tmp_path / "one", quiet=True)
    shutil.copytree(tmp_path / "one", tmp_path / "half")
    (tmp_path / "half/row.json").unlink()
    for out in ("two", "half"):
        row = torchrun(tmp_path / "r.yaml", tmp_path / out)
        assert (row["processes"], whole["processes"]) == (2, 1) and row["tokens"] == whole["tokens"]
        assert row["val"]["all"] == pytest.approx(whole["val"]["all"], rel=1e-4)
        assert row["quantized"][0]["val"]["all"] == pytest.approx(whole["quantized"][0]["val"]["all"], rel=1e-3)
        assert row["codes"]["rows_999"] == pytest.approx(whole["codes"]["rows_999"], rel=1e-2)
        ours, theirs = curve_of(tmp_path / out), curve_of(tmp_path / "one")
        assert [e["step"] for e in ours] == [e["step"] for e in theirs] and len(ours) >= 12
        for a, b in zip(ours, theirs, strict=True):
            assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4) and a.get("lr") == b.get("lr")
            assert a.get("grad_norm") == pytest.approx(b.get("grad_norm"), rel=1e-2)


def test_batches_that_do_not_divide_say_why(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_sfa.train.pretrain.dist.size", lambda: 3)
    with pytest.raises(ValueError, match=r"train.batch=8 .* 3 processes"):
        pretrain(build_recipe(tiny(data_root)), tmp_path, quiet=True)


def test_mfu_counts_the_stated_products(data_root: Path, tmp_path: Path) -> None:
    for attention, d_qk in (({"kind": "sfa", "topk_k": 3}, 16), ({"kind": "narrow", "qk_dim": 6}, 6)):
        tree = tiny(data_root, model={"family": "hybrid", "rotary_dims": None, "layers": 2, "global_every": 2})
        tree["model"]["window"] = 8
        tree["attention"] = attention
        recipe = build_recipe(tree)
        model = models.build_model(recipe, 400)
        n = models.count_parameters(model, recipe)[0]
        windowed, whole = 8 - 8 * 7 / 64, 33 / 2
        assert windowed == sum(min(i + 1, 8) for i in range(32)) / 32
        expected = 6 * (n + 2 * (32 * windowed + (d_qk + 16) * whole))
        assert flops_per_token(model, recipe) == pytest.approx(expected)
    gpt2 = build_recipe(tiny(data_root, model={"family": "gpt2", "rotary_dims": None}))
    model = models.build_model(gpt2, 400)
    n = models.count_parameters(model, gpt2)[0] - 32 * 32  # positions take part in no product
    assert flops_per_token(model, gpt2) == pytest.approx(6 * (n + 2 * 32 * 33 / 2))
    row = pretrain(build_recipe(tiny(data_root, train={"peak_tflops": 0.5})), tmp_path, quiet=True)
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * row["flops_per_token"] / 0.5e12, abs=1e-4)
    assert "mfu" in curve_of(tmp_path)[-1] and row["peak_flops"] == 0.5e12


def test_tensorboard_has_the_curve(data_root: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(build_recipe(tiny(data_root)), tmp_path, quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [e["loss"] for e in curve_of(tmp_path) if "loss" in e]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)


def test_quantised_rivals_are_rows(data_root: Path, tmp_path: Path) -> None:
    tree = tiny(data_root, train={"tokens": 32 * 8 * 30}, eval={"k_bits": [8, 1]})
    tree["attention"] = {"kind": "dense"}
    row = pretrain(build_recipe(tree), tmp_path, quiet=True)
    eight, one = row["quantized"]
    assert (eight["k_bytes"], one["k_bytes"], row["k_bytes"]) == (17.0, 3.0, 32)
    assert abs(eight["val"]["all"] / row["val"]["all"] - 1) < 1e-3
    assert one["val"]["all"] != row["val"]["all"]


@pytest.fixture(scope="module")
def scout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scout", ROOT / "benchmarks/scout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scout"] = module
    spec.loader.exec_module(module)
    return module


def test_scout_runs_a_queue_past_a_failure(
    scout: ModuleType, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(data_root)))
    jobs = [
        {"name": "bad", "recipe": "tiny.yaml", "set": {"model.heads": 0}},
        {
            "name": "one-dense",
            "recipe": "tiny.yaml",
            "set": {"attention": {"kind": "dense"}, "eval.k_bits": [4]},
        },
        {"name": "two", "recipe": "tiny.yaml"},
    ]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(jobs))
    arguments = [
        str(tmp_path / "queue.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--gpus",
        "cpu",
        "--set",
        "train.seed=1",
    ]
    assert scout.main(arguments) == 1
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["one-dense", "two"] and all(row["seed"] == 1 for row in rows)
    printed = capsys.readouterr().out
    assert "failed bad: exit 1: ValueError: model.heads" in printed and "one-dense-4bit" in printed
    assert scout.main([*arguments, "--budget", "0"]) == 0  # finished runs stay, nothing new is begun
    assert "not started: bad" in capsys.readouterr().out
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 2
    # A fresh folder: complete rows from elsewhere are skipped, incomplete ones and missing files are not.
    rows[1]["complete"] = False
    (tmp_path / "earlier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments[2] = str(tmp_path / "again")
    scout.main([*arguments, "--done", str(tmp_path / "earlier.jsonl"), str(tmp_path / "none.jsonl")])
    again = [json.loads(line) for line in (tmp_path / "again/rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in again] == ["two"]


def test_scout_estimates_beside_runs_without_training(scout: ModuleType, tmp_path: Path) -> None:
    state = scout.Scout(tmp_path, [], 100.0, 100.0, [])
    state.tokens = {"dense": 4000, "fit-0": 0, "fit-5": 2000}
    state.durations = {"fit-0": 9.0}
    assert state.estimate("fit-5") == 0.0  # nothing is known yet
    state.durations["dense"] = scout.START_S + 40.0
    assert state.estimate("fit-5") == pytest.approx(1.03 * (scout.START_S + 20.0))


def test_scout_starts_runs_from_the_models_of_others(scout: ModuleType, data_root: Path, tmp_path: Path) -> None:
    """It waits for the model, makes it again if an earlier lease had only the row, and skips what lacks one."""
    import yaml

    tree = tiny(data_root, train={"tokens": 8 * 32, "save_every": 0, "save_last": True})
    tree["attention"] = {"kind": "dense"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({key: value for key, value in tree.items() if key != "name"}))
    none = {"train.tokens": 0, "train.save_last": False}
    entries = [
        {"name": "dense", "recipe": "r.yaml"},
        {"name": "broken", "recipe": "r.yaml", "set": {"train.lr": "fast"}},
        {"name": "after", "recipe": "r.yaml", "start": "dense", "set": none},
        {"name": "never", "recipe": "r.yaml", "start": "broken", "set": none},
    ]
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "done.jsonl").write_text(json.dumps({"name": "dense", "complete": True}) + "\n")
    arguments = [str(tmp_path / "q.yaml"), "--out", str(tmp_path / "o"), "--gpus", "cpu", "--per-gpu", "2"]
    scout.main([*arguments, "--done", str(tmp_path / "done.jsonl")])
    rows = {row["name"]: row for row in scout.read_rows([tmp_path / "o/rows.jsonl"])}
    assert rows.keys() == {"dense", "after"} and rows["after"]["tokens"] == 0
    assert rows["after"]["val"]["all"] == pytest.approx(rows["dense"]["val"]["all"], rel=1e-5)
    status = json.loads((tmp_path / "o/status.json").read_text())
    assert list(status["failed"]) == ["broken"] and status["skipped"] == ["never"]
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(entries[::-1]))
    with pytest.raises(SystemExit, match="does not come before"):
        scout.main(arguments)


def test_scout_starts_only_what_its_estimate_lets_finish(scout: ModuleType, tmp_path: Path) -> None:
    driver = scout.Scout(tmp_path, [], 100.0, 900.0, [])
    assert driver.estimate("a-s0") == 0
    driver.running["a-s0"] = driver.elapsed()
    folder = tmp_path / "runs/a-s0"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"train": {"tokens": 1000}}))
    (folder / "log.jsonl").write_text('{"step": 1, "tokens": 200, "tokens_per_s": 10}\n')
    assert driver.estimate("b-s0") == pytest.approx(80, abs=1)
    driver.durations = {"a-s0": 10.0, "b-s0": 30.0, "c-s0": 20.0}
    assert driver.estimate("b-s1") == pytest.approx(30.9) and driver.estimate("d-s0") == pytest.approx(20.6)
    driver.tokens = {"a-s0": 100, "b-s0": 100, "c-s0": 100, "short": 40}
    driver.durations = {"a-s0": 125.0, "b-s0": 75.0, "c-s0": 75.0}
    assert driver.estimate("short") == pytest.approx(1.03 * (25 + 0.4 * 50))
    driver.budget = 25.0
    jobs: queue.Queue[dict] = queue.Queue()
    jobs.put({"name": "b-s1", "recipe": tmp_path / "none.yaml"})
    driver.worker("cpu", jobs)
    assert driver.skipped == ["b-s1"] and not driver.failed


@pytest.mark.parametrize("family", ["gpt2", "rotary", "hybrid"])
def test_a_step_is_one_graph(data_root: Path, family: str) -> None:
    tree = tiny(data_root, model={"family": family, "rotary_dims": None}, attention={"topk_q": 4})
    model = models.build_model(build_recipe(tree), 100)
    ids = torch.randint(0, 100, (2, 33))
    step = torch.compile(mean_loss, fullgraph=True, backend="aot_eager")
    for bf16 in (False, True):
        plain, compiled = (f(model, ids[:, :-1], ids[:, 1:], bf16) for f in (mean_loss, step))
        assert torch.allclose(plain, compiled, atol=1e-3 if bf16 else 1e-6)
