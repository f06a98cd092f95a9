"""flash-sfa bench paper without a GPU: the grid, the paper's counts, resuming. What it measures needs a GPU."""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sfa import topk_sparsify
from flash_sfa.bench import paper
from flash_sfa.cli import UsageError, main
from flash_sfa.impl import nvrtc


def arguments(out: Path, **changes: Any) -> argparse.Namespace:
    given = {
        "out": out, "quick": False, "lengths": None, "dims": list(paper.SHAPES), "impls": [*paper.DENSE, *paper.SFA],
        "models": [], "batch": None, "repeats": 10, "seconds": None, "commit": "abc",
    }  # fmt: skip
    return argparse.Namespace(**(given | changes))


def test_the_grid_is_the_papers(tmp_path: Path) -> None:
    grid = list(paper.cases(arguments(tmp_path)))
    assert len(set(grid)) == len(grid)
    points = {(case.d, case.topk) for case in grid if case.impl == "intersect"}
    assert points == {(64, 8), (128, 4), (128, 8), (128, 16), (128, 32), (256, 4), (256, 8), (512, 32), (1024, 32)}
    assert {case.n for case in grid} == {1024, 4096, 8192, 16384, 32768, 65536, 131072}
    assert all(case.batch == (1 if case.n == 131072 else 8) for case in grid)
    for d in paper.SHAPES:  # every SFA case has a dense one of its shape
        dense = {(c.n, c.causal) for c in grid if c.d == d and c.impl in paper.DENSE}
        assert dense == {(c.n, c.causal) for c in grid if c.d == d and c.impl in paper.SFA}
    assert not any(case.d > 256 for case in grid if case.impl in ("triton", "dense_fma", "dense_cudnn"))
    assert 0 < len(list(paper.cases(arguments(tmp_path, quick=True)))) < len(grid) / 4


def test_the_accounting_gives_the_papers_savings() -> None:
    assert round(100 * paper.accounting(128, 128, 8)["paper_flops_saved"]) == 49
    assert round(100 * paper.accounting(128, 128, 16)["paper_kv_saved"]) == 41
    assert round(100 * paper.accounting(64, 64, 8)["paper_kv_saved"]) == 41
    assert paper.accounting(128, 128, 8)["paper_edges"] == 0.5
    assert paper.accounting(1024, 128, 32)["paper_kv"] == 32 * 4 + 256, "two bytes an index above d = 256"


def test_edges_and_overlap_are_counted() -> None:
    codes = [topk_sparsify(torch.randn(2, n, 2, 32), 4) for n in (30, 50)]
    members = [(code.to_dense() != 0).double().transpose(1, 2) for code in codes]
    common = members[0] @ members[1].transpose(-1, -2)
    assert paper.edges(*codes) == pytest.approx(float(common.mean()))
    assert paper.overlap(*codes) == pytest.approx(float((common[0, 0] > 0).double().mean()))


@pytest.mark.parametrize("causal", (False, True))
def test_dense_blocks_is_dense_attention(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 300, 2, 32) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=causal
    )
    torch.testing.assert_close(paper.dense_blocks(q, k, v, causal).double(), exact.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("d", (64, 128, 256))
def test_the_fma_baseline_compiles_without_spills(d: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = tmp_path / "dense_fma.cubin"
    fma = paper._dense_fma()
    file.write_bytes(nvrtc.compile_file(fma.SOURCE, fma.macros(d, True), "sm_90"))
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage and "dense_fma" in usage
    assert fma.shared(d) <= 227 * 1024
    assert b"HMMA" not in subprocess.run([tool, "-sass", file], capture_output=True, check=True).stdout


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> list[paper.Case]:
    measured: list[paper.Case] = []

    def measure(case: paper.Case, args: argparse.Namespace) -> dict[str, Any]:
        if case.impl == "dense_fa2":
            raise RuntimeError("not here")
        measured.append(case)
        return {
            "bench": "paper", "impl": case.impl, "device": "none", "commit": args.commit, "batch": case.batch,
            "seqlen_q": case.n, "seqlen_k": case.n, "head_dim": case.d, "v_head_dim": case.dv, "causal": case.causal,
            "ms_median": 1.0, "tflops": 1.0, **({} if case.topk is None else {"topk": case.topk}),
        }  # fmt: skip

    monkeypatch.setattr(paper, "measure", measure)
    monkeypatch.setattr(paper, "cache_rows", lambda args: iter([{"bench": "paper_cache", "commit": args.commit}]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return measured


def test_a_stopped_run_goes_on(tmp_path: Path, no_gpu_needed: list[paper.Case]) -> None:
    few = arguments(tmp_path, lengths=[1024], dims=[64])
    assert paper.run(few) == 0
    first = (tmp_path / "paper.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(no_gpu_needed) == 10 and len(rows) == 1 + 10 + 2, "rows of what does not run say so"
    assert sum("error" in row for row in rows) == 2
    assert paper.run(few) == 0 and (tmp_path / "paper.jsonl").read_text() == first, "nothing twice"
    assert paper.run(arguments(tmp_path, lengths=[1024, 4096], dims=[64])) == 0
    assert len(no_gpu_needed) == 20 and (tmp_path / "paper.jsonl").read_text().startswith(first)
    assert paper.run(arguments(tmp_path, lengths=[1024], dims=[64], commit="def")) == 0
    assert len(no_gpu_needed) == 30, "another commit is another measurement"
    assert paper.run(arguments(tmp_path, lengths=[8192], dims=[64], seconds=-1.0)) == 0 and len(no_gpu_needed) == 30


def test_a_wrong_result_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu_needed: list[paper.Case]
) -> None:
    def wrong(case: paper.Case, args: argparse.Namespace) -> dict[str, Any]:
        raise UsageError("wrong result")

    monkeypatch.setattr(paper, "measure", wrong)
    with pytest.raises(UsageError, match="wrong result"):
        paper.run(arguments(tmp_path, lengths=[1024], dims=[64]))


def test_models_of_the_papers_shapes() -> None:
    transformers = pytest.importorskip("transformers")
    for name, millions, topk in (("gpt2", 124, 8), ("qwen3", 596, 16)):
        config, kept = paper.model_config(name, 1024)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert kept == topk and round(sum(x.numel() for x in model.parameters()) / 1e6) == millions
    small = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=320)
    model = transformers.AutoModelForCausalLM.from_config(small)
    caches = []

    def new_cache() -> Any:
        caches.append(transformers.DynamicCache())
        return caches[-1]

    with torch.no_grad():
        row = paper.time_model(model, new_cache, torch.randint(50, (1, 300)), steps=3)
    assert row["prefill_ms"] > 0 and row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert [cache.get_seq_length() for cache in caches] == [257, 300, 303]


@pytest.mark.parametrize("words", (["--impls", "magic"], ["--dims", "100"], ["--models", "bert"]))
def test_unknown_names(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "paper", *words]) == 2
    assert words[1] in capsys.readouterr().err
