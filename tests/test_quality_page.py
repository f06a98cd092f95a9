"""The generator of docs/quality.md on rows with known means."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_page", ROOT / "benchmarks/quality_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality_page"] = module
    spec.loader.exec_module(module)
    return module


def row(name: str, perplexity: float, seed: int = 0, **more: object) -> dict:
    import dataclasses

    from flash_sfa.train.recipe import build_recipe

    kind = more.pop("attention", {"kind": "dense"})
    config = dataclasses.asdict(build_recipe({"model": {"family": "hybrid"}, "attention": kind}))
    numbers = {"val": {"all": perplexity}, "test": {"wikitext2": 10 * perplexity}}
    return {
        **{"bench": "pretrain", "experiment": "decide", "name": name, "seed": seed, "config": config, "quantized": []},
        **{"complete": True, "k_bytes": 128.0, "tokens": 1e6, "params_non_embedding": 1e6, "tokens_per_s": 1e6},
        **{"commit": "0123456789", "device": "cpu", "torch": "2", "codes": {"overlap": 0.5}},
        **numbers,
        **more,
    }


def test_tables_from_rows(page: ModuleType, tmp_path: Path) -> None:
    sfa = {"kind": "sfa", "topk_k": 8}
    quantized = [{"bits": 4, "k_bytes": 36.0, "val": {"all": 101.0}, "test": {"wikitext2": 7.0}}]
    rows = [
        row("hybrid-dense-s0", 100.0, quantized=quantized),
        row("hybrid-dense-s1", 200.0, 1),
        row("hybrid-k8-s1", 206.0, 1, attention=sfa, k_bytes=24.0),
        row("hybrid-k8-s0", 110.0, attention=sfa, k_bytes=24.0),
        row("hybrid-k8-s0", 102.0, attention=sfa, k_bytes=24.0),  # the later one counts
        row("hybrid-k8-s2", 1.0, 2, attention=sfa, complete=False),
        row("hybrid-half-s0", 120.0, attention={"kind": "narrow", "qk_dim": 32, "v_dim": 32}),
        {"bench": "attention_fwd", "ms_median": 1.0},
    ]
    del rows[0]["experiment"]
    (tmp_path / "decide_cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = "Mine.\n\n<!-- rows: decide -->\nold\n<!-- end -->\n\nAlso mine.\n\n<!-- rows: niah -->\n<!-- end -->\n"
    (tmp_path / "q.md").write_text(text)
    for _ in range(2):
        assert page.main(["--page", str(tmp_path / "q.md"), "--results", str(tmp_path)]) == 0
        made = (tmp_path / "q.md").read_text()
        assert made.startswith("Mine.\n\n") and "\n\nAlso mine.\n" in made and "old" not in made
        assert "| hybrid-dense | 2 | 128 | 150.00 ± 70.71 | +0.0% | 1500 | 0.50 |" in made
        assert "| hybrid-k8 | 2 | 24 | 154.00 ± 73.54 | +2.5% ± 0.7 |" in made
        assert "| hybrid-dense, K in 4 bits | 1 | 36 | 101.00 | +1.0% | 7 | - |" in made
        assert "5 runs, 1M tokens" in made and "No rows of this experiment" in made
        assert "hybrid: hybrid-dense" in made  # half width is worse on the seed that both have
    assert 5_000 < (tmp_path / "quality_decide.png").stat().st_size < 300_000
    with pytest.raises(ValueError, match="end"):
        page.fill("<!-- rows: decide -->\n", [], tmp_path)


def test_needle_table(page: ModuleType) -> None:
    cells = [{"length": 64, "trials": 100, "hits": 90}, {"length": 128, "trials": 100, "hits": 0}]
    rows = [{"name": f"needle-k8-s{s}", "needle_by_length": cells, "quantized": []} for s in range(2)]
    assert "| needle-k8 | 2 | 90.0 ± 2.2 | 0.0 ± 0.5 |" in page.needle_table(rows)


def test_repository_page_has_whole_blocks(page: ModuleType, tmp_path: Path) -> None:
    text = (ROOT / "docs/quality.md").read_text()
    for name in ("scout", "decide", "ideas", "niah"):
        assert f"<!-- rows: {name} -->" in text
    page.fill(text, page.read(sorted((ROOT / "benchmarks/results").glob("*.jsonl"))), tmp_path)
