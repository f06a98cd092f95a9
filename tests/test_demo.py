"""The demo command: bad input, resume, interrupt, the report, the equality check, and the quick run."""

import base64
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sfa.cli import UsageError, main
from flash_sfa.demo import command, data, evaluate, models, train

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "layers": 2, "hidden": 32, "heads": 2, "head_dim": 16, "mlp": 32, "topk": 4, "rotary": 6,
    "context": 32, "batch": 2, "validation_windows": 4, "prompts": 2, "prompt_tokens": 12, "new_tokens": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the command with tiny models: ``tiny("--seed", "1")`` -> exit code; results go to tmp_path/run."""
    monkeypatch.setattr(models, "QUICK", TINY)
    monkeypatch.setattr(command, "usable_cores", lambda: 1)

    def call(*options: str) -> int:
        return main(["demo", "--quick", "--steps", "6", "--out", str(tmp_path / "run"), *options])

    return call


def losses(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            found.setdefault(record["variant"], []).append(record["loss"])
    return found


def test_key_bytes_are_equal_in_bf16_and_never_less_for_the_rival() -> None:
    for positions in models.VARIANTS:
        settings = models.Settings(positions=positions, variants=models.VARIANTS[positions])
        variants = models.make_variants(settings)
        rival = variants["narrow"]
        for variant in variants.values():
            if variant.topk is not None:
                assert variant.key_bytes(2) == rival.key_bytes(2) < variants["dense"].key_bytes(2)
                assert variant.key_bytes(4) <= rival.key_bytes(4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n\n ", "empty"),
        (b"To be, or not to be", "too short"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "not UTF-8"),
        (b"text with a zero \0 byte, " * 1000, "binary"),
        ("directory", "cannot be read"),
    ],
)
def test_a_bad_text_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, words: str
) -> None:
    path, out = tmp_path / "text", tmp_path / "run"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert main(["demo", "--quick", "--text", str(path), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"], ["--threads", "0"], ["--seed", "-1"], ["--variants", "dense,wrong"],
        ["--positions", "absolute", "--variants", "sfa-rope"], ["--resume"],
    ],
)  # fmt: skip
def test_bad_options_exit_2_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    out = tmp_path / "run"
    assert main(["demo", "--quick", "--out", str(out), *options]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_any_utf8_text_is_read_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    written = "žluťoučký kůň — 馬\n" * 200
    path.write_bytes(b"\xef\xbb\xbf" + written.encode())
    text = data.load_text(str(path), 32)
    assert data.decode(torch.cat([text.train, text.validation])) == written
    assert math.isclose(text.bytes_per_character, len(written.encode()) / len(written))
    assert data.decode(torch.tensor([0xC5, 65])) == "\ufffdA"
    with pytest.raises(UsageError):
        data.load_text(str(path), 4096)


def test_batches_depend_on_seed_and_step_only_and_leave_validation_out() -> None:
    text = data.load_text(None, 64)
    first = data.train_batch(text, 3, seed=1, batch=4, context=64)
    torch.manual_seed(123)
    assert torch.equal(first, data.train_batch(text, 3, seed=1, batch=4, context=64))
    assert not torch.equal(first, data.train_batch(text, 4, seed=1, batch=4, context=64))
    assert not torch.equal(first, data.train_batch(text, 3, seed=2, batch=4, context=64))
    windows = data.validation_windows(text, context=64, limit=5)
    assert windows.shape == (5, 65)
    assert torch.equal(windows[0], text.validation[:65].long())
    assert len(text.train) + len(text.validation) == 1115394


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, text: str) -> None:
        if self.inside:
            self.rows[-1][-1] += text


def read_page(folder: Path) -> tuple[dict[str, list[str]], _Page]:
    page = _Page()
    page.feed((folder / "report.html").read_text())
    return {row[0]: row[1:] for row in page.rows}, page


def test_a_run_writes_report_metrics_and_reloadable_checkpoints(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marked = tmp_path / "text.txt"
    marked.write_text("<script>alert('&')</script> | and so on.\n" * 200)
    assert tiny("--text", str(marked)) == 0
    folder = tmp_path / "run"
    shown = capsys.readouterr()
    assert str(folder / "report.html") in shown.out
    assert "tok/s" in shown.err and "loss=" in shown.err

    rows, page = read_page(folder)
    assert rows[""] == list(models.VARIANTS["rotary"])
    source = (folder / "report.html").read_text()
    assert "<script" not in source and "&lt;script&gt;" in source
    assert "http" not in source
    assert len(page.images) == 2
    for image, name in zip(page.images, ("losses.png", "cache.png"), strict=True):
        inline = base64.b64decode(image.removeprefix("data:image/png;base64,"))
        assert inline == (folder / name).read_bytes() and inline.startswith(b"\x89PNG")

    settings = models.Settings(**{**TINY, "text": str(marked)})
    variants = models.make_variants(settings)
    markdown = (folder / "report.md").read_text()
    rows_of_heads = settings.layers * settings.heads
    for i, (name, variant) in enumerate(variants.items()):
        for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
            keys = rows_of_heads * variant.key_bytes(itemsize)
            every = keys + rows_of_heads * settings.head_dim * itemsize
            assert rows[f"key bytes a token, {dtype} cache"][i] == f"{keys:,}", (name, dtype)
            assert rows[f"K + V bytes a token, {dtype} cache"][i] == f"{every:,}", (name, dtype)
        sparse = variant.topk is not None
        for label in ("pairs whose top-k features meet", "feature balance of q", "feature balance of k"):
            assert (rows[label][i] != "-") == sparse
            assert not sparse or 0 < float(rows[label][i]) <= 1
        assert f"- {name}: {variant.label}" in markdown
    assert all(cell.startswith("2 of 2") for cell in rows["greedy rows equal with and without"])
    assert {len(values) for values in losses(folder).values()} == {6}

    text = data.load_text(str(marked), settings.context)
    windows = data.validation_windows(text, context=settings.context, limit=settings.validation_windows)
    for name, shown_loss in zip(variants, rows["validation loss, nats a byte"], strict=True):
        loaded = models.load(folder / name)
        loss = train.validation_loss(loaded, windows, CPU)
        assert abs(loss - float(shown_loss)) < 1e-4, name
        assert (folder / name / "model.safetensors").exists()


def test_absolute_positions(tiny: Any, tmp_path: Path) -> None:
    assert tiny("--positions", "absolute") == 0
    rows, _ = read_page(tmp_path / "run")
    assert rows[""] == ["dense", "narrow", "sfa"]
    dense, narrow, sfa = (int(c.replace(",", "")) for c in rows["key bytes a token, bf16 cache"])
    assert sfa == narrow < dense
    counts = [int(c.replace(",", "")) for c in rows["parameters"]]
    assert counts[0] == counts[2] > counts[1]


def test_a_killed_run_resumes_to_the_same_losses(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--variants", "dense,sfa", "--seed", "7")
    assert tiny(*options) == 0
    expected = losses(tmp_path / "run")
    monkeypatch.setattr(train, "SAVE_EVERY_SECONDS", 0.0)
    real, calls = train.train_step, []

    def dies(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 6 + 4:  # in the second variant, after three steps
            raise SystemExit(9)
        return real(*args)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(SystemExit):
        tiny(*options)
    monkeypatch.setattr(train, "train_step", real)
    again = train.load_state(tmp_path / "run/state/sfa.pt")
    assert again is not None and again["step"] == 3
    assert main(["demo", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == expected


def test_resume_refuses_changes(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny("--variants", "narrow , dense") == 0
    run = ["demo", "--resume", "--out", str(tmp_path / "run")]
    before = (tmp_path / "run/run.json").read_bytes()
    for options, words in (
        (["--seed", "5"], "would change it"),
        (["--steps", "9"], "would change it"),
        (["--positions", "absolute"], "would change it"),
        (["--variants", "sfa"], "would change it"),
        (["--variants", "dense"], "would change it"),
        (["--variants", "dense,wrong"], "'wrong' is unknown"),
        (["--quick"], "would change it"),
    ):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(models, "QUICK", {**TINY, "context": 64})
            assert main([*run, *options]) == 2, options
        err = capsys.readouterr().err
        assert words in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "run/run.json").read_bytes() == before
    # The same choice, however it is written, changes nothing.
    assert tiny("--resume", "--variants", "dense, narrow") == 0


def test_ctrl_c_reports_what_finished_and_resumes(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = train.train_step, []

    def interrupted(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 6 + 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert tiny("--variants", "dense,narrow,sfa") == 130
    shown = capsys.readouterr().out
    assert "interrupted" in shown and "report.html" in shown
    rows, _ = read_page(tmp_path / "run")
    assert rows[""] == ["dense", "narrow"]
    assert rows["training, tokens/s"][1] == "stopped at step 2"
    assert rows["perplexity a byte"][1] == "-" != rows["perplexity a byte"][0]
    monkeypatch.setattr(train, "train_step", real)
    assert tiny("--resume") == 0
    assert read_page(tmp_path / "run")[0][""] == ["dense", "narrow", "sfa"]


def test_ctrl_c_before_the_first_step(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupted)
    assert tiny() == 130
    assert (tmp_path / "run/report.html").exists()


def test_a_cache_that_changes_tokens_fails_loudly(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = models.new_cache

    def broken(model: Any) -> Any:
        cache = real(model)
        update = cache.update

        def swapped(key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            return update(key, value.roll(1, dims=-1) * 30 if layer == 0 else value, layer, *args, **kwargs)

        cache.update = swapped
        return cache

    monkeypatch.setattr(evaluate, "new_cache", broken)
    assert tiny("--variants", "dense,sfa", "--steps", "6") == 1
    assert "FAILED: sfa" in capsys.readouterr().out
    rows, _ = read_page(tmp_path / "run")
    assert all(cell.startswith("FAILED") for cell in rows["greedy rows equal with and without"])
    assert main(["demo", "--resume", "--out", str(tmp_path / "run")]) == 1


def test_a_flip_at_the_boundary_is_told_from_a_wrong_code() -> None:
    variant = models.make_variants(models.Settings(**{**TINY, "topk": 2}))["sfa"]

    def verdict(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        rows = {(i, side): row for i, (row, _) in enumerate(layers) for side in "qk"}
        masks = {(i, s): evaluate.code_mask(other, variant) for i, (_, other) in enumerate(layers) for s in "qk"}
        return evaluate.only_boundary_flips(rows, masks, variant)

    def row(*magnitudes: float) -> torch.Tensor:
        return torch.tensor([0.0] * variant.dense_dims + [*magnitudes] + [0.0] * 6)[None, None, None]

    same, tied, far = row(1, 0.5, 0.3, 0.1), row(1, 0.5, 0.5 - 1e-6, 0.1), row(1, 0.5, 0.4, 0.1)
    tied_other, far_other = row(1, 0.5 - 1e-6, 0.5, 0.1), row(1, 0.4, 0.5, 0.1)
    assert not verdict([(same, same), (same, same)])
    assert verdict([(same, same), (tied, tied_other)])
    assert verdict([(tied, tied_other), (far, far_other)])
    assert not verdict([(far, far_other), (tied, tied_other)])
    assert not verdict([(same, same), (far, far_other)])


def test_statistics_of_known_codes() -> None:
    """Against counts by hand: a spy run on a real model, codes taken one pair at a time."""
    settings = models.Settings(**{**TINY, "layers": 1, "heads": 1})
    variant = models.make_variants(settings)["sfa-rope"]
    model = models.build(variant, settings, CPU).eval()
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), evaluate.spy(model, lambda layer, q, k: seen.append((q, k))):
        model(input_ids=tokens[:, :-1], use_cache=False)
    assert len(seen) == 1
    picks = {}
    for side, x in zip("qk", seen[0], strict=True):
        order = x[:, 0].abs().argsort(dim=-1, descending=True)[..., : variant.topk]
        picks[side] = [[set(r) for r in batch] for batch in order.tolist()]
    pairs = [bool(picks["q"][b][i] & picks["k"][b][j]) for b in range(2) for i in range(8) for j in range(i + 1)]
    found = evaluate.code_statistics(model, variant, tokens, CPU)
    assert math.isclose(found["overlap"], sum(pairs) / len(pairs))
    for side in "qk":
        every = [u for batch in picks[side] for r in batch for u in r]
        shares = [every.count(u) / len(every) for u in set(every)]
        entropy = -sum(p * math.log(p) for p in shares) / math.log(variant.qk_dim)
        assert math.isclose(found[f"balance_{side}"], entropy, rel_tol=1e-6)


def test_quick_from_the_command_line(tmp_path: Path) -> None:
    """The promise to a user: the whole command in under a minute, and a model that has learned something."""
    folder = tmp_path / "quick"
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flash_sfa.cli", "demo", "--quick", "--out", str(folder)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.perf_counter() - begin < 60
    assert "perplexity a byte" in done.stdout and str(folder / "report.html") in done.stdout
    rows, _ = read_page(folder)
    untrained = math.log(256)
    assert all(float(cell) < 0.75 * untrained for cell in rows["validation loss, nats a byte"])
    assert re.search(r"Cached greedy generation equals uncached generation: \d+ of 8 rows", done.stdout)
