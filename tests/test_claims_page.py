"""The generator of docs/claims.md on rows with known ratios."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flash_sfa.bench.paper import accounting

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims_page", ROOT / "benchmarks/claims_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims_page"] = module
    spec.loader.exec_module(module)
    return module


def row(impl: str, n: int, ms: float, topk: int | None = None, d: int = 128, **more: Any) -> dict[str, Any]:
    kept = {} if topk is None else {"topk": topk, "edges": 0.51, **accounting(d, d, topk)}
    return {
        "bench": "paper", "impl": impl, "head_dim": d, "seqlen_q": n, "seqlen_k": n, "batch": 8, "heads": 8,
        "causal": False, "ms_median": ms, "device": "a GPU", "torch": "2", "commit": "abcdef012", **kept, **more,
    }  # fmt: skip


ROWS = [
    row("dense_fma", 4096, 8.0), row("dense_cudnn", 4096, 1.0), row("dense_fa2", 4096, 2.0),
    row("intersect", 4096, 9.0, 8), row("auto", 4096, 1.1, 8),
    row("dense_fma", 65536, 80.0), row("dense_cudnn", 65536, 10.0), row("dense_fa2", 65536, 20.0),
    row("intersect", 65536, 16.0, 8, flops=64 * 65536**2 * 264), row("auto", 65536, 8.0, 8),
    row("auto", 65536, 1.0, 8, causal=True), row("intersect", 65536, 1.0, 16), row("triton", 65536, 0.1, 8, d=64),
    {**row("dense_fa2", 131072, 0.0), "error": "no"},
    {"bench": "paper_cache", "head_dim": 128, "topk": 8, "edges": 0.5, "kv_dense": 512.0, "kv": 290.0,
     "kv_saved": 0.43, "device": "a GPU", "commit": "abcdef012", **accounting(128, 128, 8)},
    {"bench": "paper_cache", "head_dim": 128, "topk": 16, "edges": 2.01, "kv_dense": 512.0, "kv": 310.0,
     "kv_saved": 0.395, "device": "a GPU", "commit": "abcdef012", **accounting(128, 128, 16)},
]  # fmt: skip
ROWS[-3].pop("ms_median")


def test_ratios_and_crossovers(page: ModuleType) -> None:
    tables = page.build(ROWS, [])
    (line,) = (line for line in tables["kernels"].splitlines() if line.startswith("| 8 / 128 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    measured = ["64k", "5.00x", "0.62x", "1.25x", "from 64k", "never (up to 64k)", "from 64k"]
    assert cells == ["8 / 128", "2.37x", *measured]
    claims = tables["claims"]
    assert "5.00x | its kernel 0.62x, auto 1.25x | FMA: from 64k; fastest dense: never (up to 64k)" in claims
    assert "49% (edges counted)" in claims and "39.5% with sums and tables" in claims
    assert "| 16 / 128 | 2.00 | 2.01 | 49% | 512 | 304 | 310.0 | 40.6% | 39.5% |" in tables["counts"]
    assert "| dense_cudnn d=128, 64 heads | 1.000 | 10.000 |" in tables["times"] and "a GPU" in tables["times"]


def test_only_equal_shapes_are_compared(page: ModuleType) -> None:
    rows = [row("dense_fma", 4096, 8.0), row("intersect", 4096, 2.0, 8, heads=4)]
    assert page.Grid(rows).speed("intersect", 128, 4096, 8, ["dense_fma"]) is None
    rows.append(row("dense_fma", 4096, 5.0, heads=4))
    assert page.Grid(rows).speed("intersect", 128, 4096, 8, ["dense_fma"]) == 2.5
    assert page.Grid(rows).crossover("intersect", 128, 8, ["dense_fma"]) == "at all measured, from 4k"


def test_topk_that_was_timed_alone_is_added(page: ModuleType) -> None:
    alone = row("intersect", 4096, 3.0, 8, topk_inside=False, topk_ms=0.5)
    assert page.ms(alone) == 3.5 and page.ms(row("intersect", 4096, 3.0, 8, topk_ms=0.5)) == 3.0


def test_what_has_no_row_says_so(page: ModuleType) -> None:
    for name, table in page.build([], []).items():
        assert page.NONE in table and not re.search(r"\d\.\d\dx \|.*\d\.\d\dx \|", table), name


def test_the_page_is_what_the_rows_give(page: ModuleType) -> None:
    text = (ROOT / "docs/claims.md").read_text()
    assert page.fill(text, page.build(page.load("paper*.jsonl"), page.load("decode*.jsonl"))) == text
    with pytest.raises(SystemExit, match="counts"):
        page.fill(text.replace("rows: counts", "rows: other"), {"counts": ""})
