"""benchmarks/long_context.py: a cached tail changes nothing at tolerance 0, and reads fewer rows with one."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from flash_sfa.train.pretrain import pretrain
from flash_sfa.train.recipe import build_recipe
from test_train import data_root, text_file, tiny, tokenizer_dir  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "long_context.py"
    spec = importlib.util.spec_from_file_location("long_context", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["gpt2", "hybrid"])
def test_rows_of_a_trained_model(data_root: Path, tmp_path: Path, script: ModuleType, family: str) -> None:  # noqa: F811
    tree = tiny(data_root, model={"family": family, "rotary_dims": None, "global_every": 1}, train={"save_last": True})
    tree["attention"] = {"kind": "sfa", "topk_k": 2}
    recipe = build_recipe(tree)
    pretrain(recipe, tmp_path / "run", quiet=True)
    length, tail = recipe.model.context, 16
    script.main([
        str(tmp_path / "run"), "--data", str(data_root / "train"), "--length", str(length), "--tail", str(tail),
        "--rows", "1", "--tolerances", "0", "0.2", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl"),
    ])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    layers = [r for r in rows if r["kind"] == "layer"]
    whole, exact, loose = (r for r in rows if r["kind"] == "tolerance")
    assert layers and all(0 < r["overlap"] <= r["v_rows"] <= 1 and 0 < r["rows_999"] <= 1 for r in layers)
    assert exact["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert loose["v_rows_read"] < exact["v_rows_read"] <= max(r["v_rows"] for r in layers) + 0.05
    assert loose["loss"] != exact["loss"]
