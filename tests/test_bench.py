"""flash-sfa bench without a GPU: refusals and the plot. What it measures needs a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sfa.bench import attention, decode
from flash_sfa.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
@pytest.mark.parametrize("kind", ["attention", "decode"])
def test_needs_a_gpu(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", kind]) == 2
    message = capsys.readouterr().err
    assert "CUDA device" in message and message.count("\n") == 1


def test_unknown_implementation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "check", lambda: pytest.fail("checked before the arguments were"))
    assert main(["bench", "attention", "--impls", "auto", "magic"]) == 2
    assert "magic" in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"bench": bench, "impl": impl, "head_dim": d, "seqlen_q": n, "ms_median": n / 1000 * factor, "topk": topk}
        for bench in ("attention_fwd", "attention_fwdbwd")
        for d in (64, 128)
        for n in (4096, 16384)
        for impl, factor, topk in (("dense_cudnn", 1.0, 0), ("dense_fa2", 2.0, 0), ("auto", 0.9, 8))
    ]
    rows.append({"bench": "attention_fwd", "impl": "triton", "head_dim": 64, "seqlen_q": 4096, "error": "no"})
    decode.plot({"mha_128": 3.1, "gqa_4": 0.9}, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes()[:4] == b"\x89PNG"
    attention.plot(rows, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes()[:4] == b"\x89PNG"
