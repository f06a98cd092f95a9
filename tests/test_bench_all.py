"""flash-sfa bench all, cpu and compare: the report from rows, regressions beyond the spread, and a tiny run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sfa.bench import cpu, report
from flash_sfa.cli import main


def row(impl: str, ms: float, **more: Any) -> dict[str, Any]:
    n, d = more.pop("n", 4096), more.pop("d", 128)
    spread = {"ms_median": ms, "ms_p20": 0.95 * ms, "ms_p80": 1.05 * ms}
    return {
        "bench": "attention_fwd", "impl": impl, "device": "chip", "dtype": "bfloat16", "batch": 1, "heads": 8,
        "kv_heads": 8, "seqlen_q": n, "seqlen_k": n, "head_dim": d, "v_head_dim": d, "causal": True, "codes": "random",
    } | spread | more  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def run_compare(a: Path, b: Path) -> int:
    return main(["bench", "compare", str(a), str(b)])


def test_compare_flags_only_what_is_beyond_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = [row("cpu", 10.0, topk=8), row("dense_sdpa", 20.0), row("cpu", 4.0, topk=4), row("limit_ours", 1.0)]
    a = write(tmp_path / "a.jsonl", old)
    # 4% slower lies within the spread, 4% faster too; a limit is computed, not measured.
    same = [row("cpu", 10.4, topk=8), row("dense_sdpa", 19.2), row("cpu", 4.0, topk=4), row("limit_ours", 9.0)]
    assert run_compare(a, write(tmp_path / "same.jsonl", same)) == 0
    assert "3 measurements in both: 0 slower, 0 faster, 3 within the spread" in capsys.readouterr().out
    worse = [row("cpu", 12.0, topk=8), row("dense_sdpa", 15.0), row("cpu", 4.0, topk=4), row("cpu", 9.0, topk=16)]
    assert run_compare(a, write(tmp_path / "worse.jsonl", worse)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["slower", "faster", "3 measurements in both"]
    assert "topk=8" in lines[0] and "1.20x the time" in lines[0] and "0.75x" in lines[1]
    assert "1 slower, 1 faster, 1 within the spread; only in A 0, only in B 1" in lines[2]
    assert run_compare(tmp_path / "worse.jsonl", a) == 1  # the dense row got slower that way round


def test_compare_reads_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a" / "x.jsonl", [row("cpu", 10.0)])
    write(tmp_path / "a" / "y.jsonl", [row("sdpa", 10.0), row("sdpa", 5.0)])  # measured twice: the last counts
    write(tmp_path / "b" / "rows.jsonl", [row("cpu", 10.0), row("sdpa", 5.0)])
    write(tmp_path / "b" / "cpu.jsonl", [row("cpu", 99.0)])  # rows.jsonl holds all
    assert run_compare(tmp_path / "a", tmp_path / "b") == 0
    assert "2 measurements in both: 0 slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("{bad\n", "line 1: not a row"), ("[1]\n", "not a row"), ("", "in both")],
)
def test_compare_refuses(text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.jsonl", [row("cpu", 1.0)]), tmp_path / "b.jsonl"
    if text is not None:
        b.write_text(text)
    assert run_compare(a, b) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_another_device_is_another_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / f"{d}.jsonl", [row("cpu", 1.0) | {"device": d}]) for d in "ab")
    assert run_compare(a, b) == 2
    assert "same device" in capsys.readouterr().err


def many_rows() -> list[dict[str, Any]]:
    rows = [
        row(impl, n / 1000 * factor, n=n, d=d, **({"topk": topk} if topk else {}))
        for n in (4096, 16384)
        for d in (64, 128)
        for impl, factor, topk in (("dense_cudnn", 1.0, 0), ("dense_fa2", 2.0, 0), ("auto", 0.5, 8), ("auto", 0.8, 16))
    ]
    rows.append(row("triton", 1.0) | {"error": "RuntimeError: <no>", "ms_median": None})
    rows.append({"bench": "machine", "impl": "torch", "device": "chip", "commit": "c", "copy_gb_s": 10.0,
                 "matmul_gflop_s": 100.0})  # fmt: skip
    return rows + report.cache_rows("cpu", "c")


def test_report_holds_its_pictures_and_every_row(tmp_path: Path) -> None:
    page = report.write_report(many_rows(), tmp_path / "report.html", ["paper: <gone>"], 12.0).read_text()
    for title in (
        "Latency against n",
        "Speed-up over (n, d, k)",
        "Roofline position",
        "Cache bytes",
        "Tokens that fit",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("src='data:image/png;base64,iVBOR") == 5
    assert not re.search(r"(src|href)='(?!data:)", page) and "http" not in page
    assert "&lt;gone&gt;" in page and "RuntimeError: &lt;no&gt;" in page
    assert page.count("<td>attention_fwd") == 17 and "<td>2.00</td>" in page and "<td>1.25</td>" in page
    assert "topk 8, V int8" in page


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    page = report.write_report(many_rows(), tmp_path / "report.html", [], 12.0).read_text()
    assert "matplotlib is not installed" in page and "<img" not in page and "<td>2.00</td>" in page


def test_speedups_and_bytes() -> None:
    rows = many_rows()
    ratios = {(r["seqlen_k"], r["head_dim"], r["topk"]): ratio for r, ratio in report.speedups(report.timed(rows))}
    assert (
        len(ratios) == 8 and ratios[4096, 64, 8] == pytest.approx(2.0) and ratios[4096, 64, 16] == pytest.approx(1.25)
    )
    sizes = {r["case"]: r["bytes_per_token_and_head"] for r in rows if r["bench"] == "cache"}
    assert sizes["dense bf16"] == 512 and 284 <= sizes["topk 8"] < 285 and 157 <= sizes["topk 8, V int8"] < 159
    square = row("auto", 1.0, n=4)
    assert report.flops(square) == 2 * 256 * 10 * 8 and report.dense_bytes(square) == 2 * 256 * 2 * 4 * 8


def test_all_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numba")
    cases = cpu.Case("decode", 300, 4, 2, d=64), cpu.Case("attention_fwd", 200, 2, 1, d=64, codes="skewed")
    monkeypatch.setattr(cpu, "QUICK", cases)
    monkeypatch.setattr(report, "machine_rows", lambda device, commit: [])
    assert main(["bench", "all", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]) == 0
    assert (tmp_path / "report.html").exists()
    rows = report.timed(report.read_rows(tmp_path))
    assert {(r["bench"], r["impl"]) for r in rows} == {
        (bench, impl) for bench in ("decode", "attention_fwd") for impl in ("dense_sdpa", "mask_sdpa", "cpu")
    }
    for r in rows:
        assert r["commit"] == "abc" and r["ms_p20"] <= r["ms_median"] <= r["ms_p80"] and "threads" in r["device"]
        if r["impl"] == "cpu":
            assert r["max_err"] <= 1.0 and 0.0 < r["overlap"] <= 1.0 and r["topk"] == 8
    assert main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0


def test_one_failing_bench_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def bench(words: list[str]) -> int:
        ran.append(words[0])
        if words[0] == "decode":
            raise RuntimeError("broken")
        return 0

    monkeypatch.setattr(report, "benches", lambda device: [["attention"], ["decode"], ["paper"]])
    monkeypatch.setattr(report, "bench", bench)
    monkeypatch.setattr(report, "machine_rows", lambda device, commit: [])
    assert main(["bench", "all", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert ran == ["attention", "decode", "paper"]
    assert "decode: RuntimeError: broken" in (tmp_path / "report.html").read_text()


def test_the_commands_of_a_gpu_exist() -> None:
    """Every command line of the GPU grid is one that the parser takes."""
    import argparse

    from flash_sfa.bench import command

    for words in report.benches("cuda"):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert parser.parse_args([*words, "--out", "x", "--commit", "y"]).kind == words[0]


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("numba")
    honest = cpu.sfa_attention
    monkeypatch.setattr(cpu, "QUICK", (cpu.Case("attention_fwd", 64, 1, 1, d=32),))
    monkeypatch.setattr(cpu, "sfa_attention", lambda *a, **o: honest(*a, **o) + 1e-4)
    assert main(["bench", "cpu", "--quick", "--out", str(tmp_path)]) == 2
    assert "wrong result" in capsys.readouterr().err
    assert not (tmp_path / "cpu.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "all", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main(["bench", "cpu", "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err
