"""The Triton attention kernels against the reference in float64, on CPU through Triton's interpreter.

The interpreter must be chosen before the kernels are defined, so this file runs itself in a process with
TRITON_INTERPRET=1 and reads the outcome of every case from there. The grid on a GPU is in test_gpu_grid.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sfa.impl import reference
from own_process import outcomes_of, print_outcomes


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def close(name: str, ours: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


def check(
    lengths: tuple[int, int] = (37, 37), heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (16, 16), *,
    batch: int = 1, window: tuple[int, int] = (-1, 0), scale: float = 0.3, dtype: torch.dtype = torch.float32,
    key_mask: Tensor | None = None, drop: bool = False, cu: tuple[list[int], list[int]] | None = None,
    dropout_p: float = 0.0, strided: bool = False,
) -> None:  # fmt: skip
    """Out, lse and gradients, a gradient of lse included, of one call."""
    from flash_sfa.impl import triton_backward, triton_forward

    triton_forward.shared_memory = triton_backward.shared_memory = lambda device: 0  # type: ignore[assignment]
    torch.manual_seed(0)
    (sq, sk), (hq, hkv), (d, dv) = lengths, heads, dims
    if strided:
        q, k, v = rand(batch, sq, 3, hq, d, dtype=dtype).unbind(2)
    else:
        q = rand(batch, sq, hq, d, dtype=dtype)
        k, v = rand(batch, sk, hkv, d, dtype=dtype), rand(batch, sk, hkv, dv, dtype=dtype)
    grad_out, grad_lse = rand(batch, sq, hq, dv, dtype=dtype), rand(batch, hq, sq)
    seen = reference.visible_pairs(sq, sk, window, q.device)
    options: dict[str, Any] = {}
    if key_mask is not None:
        seen, options["key_mask"] = seen & key_mask, key_mask
    if cu is not None:
        cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in cu)
        seen = reference.visible_pairs_varlen(cu_q, cu_k, sq, sk, window)
        options |= {"cu_q": cu_q, "cu_k": cu_k, "max_q": int(cu_q.diff().max()), "max_k": int(cu_k.diff().max())}
    if drop:
        members = (torch.rand(batch, sq, hq, d) < 0.15).to(dtype), (torch.rand(batch, sk, hkv, d) < 0.15).to(dtype)
        kept_q, kept_k = (m.transpose(1, 2) for m in members)
        seen = seen & (kept_q @ kept_k.repeat_interleave(hq // hkv, 1).transpose(-1, -2) > 0)
        options |= {"members_q": members[0], "members_k": members[1]}
        assert 0 < seen.float().mean() < 0.5
    if dropout_p:
        options |= {"dropout_p": dropout_p, "seed": torch.tensor([7])}
    call = triton_forward.Options(*window, scale, **options)
    sequences = batch if cu is None else len(cu[0]) - 1
    bad = triton_forward.scan(q.device, [q], [k], sequences * hkv)
    out, lse = triton_forward.forward(q, k, v, bad, call)
    assert not bad.any() and len(bad) == 2 + sequences * hkv
    grads = triton_backward.backward(grad_out, grad_lse, q, k, v, out, lse, bad, call)
    wrt = [x.double().requires_grad_() for x in (q, k, v)]
    tolerance = 3e-6 if dtype == torch.float32 else 6e-3
    if dropout_p:
        check_dropout(call, q, k, v, grad_out, grads[2], out, seen)
        return
    exact_out, exact_lse = reference.attention(wrt[0], wrt[1], wrt[2], seen, scale)
    loss = (exact_out * grad_out).sum() + (exact_lse.masked_fill(exact_lse.isinf(), 0.0) * grad_lse).sum()
    exact = torch.autograd.grad(loss, wrt)
    close("out", out, exact_out, tolerance)
    close("lse", lse, exact_lse, 3e-6)
    for name, ours, wanted in zip(("dq", "dk", "dv"), grads, exact):
        close(name, ours, wanted, 5 * tolerance)


def check_dropout(
    call: Any, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, dv: Tensor, out: Tensor, seen: Tensor
) -> None:
    """With v = identity the output is the dropped matrix of probabilities: its zeros and its scale are the promise."""
    from flash_sfa.impl import triton_backward, triton_forward

    (b, _, hq, _), sk = q.shape, k.shape[1]
    eye = torch.eye(sk)[None, :, None].expand(b, sk, k.shape[2], sk).contiguous()
    bad = triton_forward.scan(q.device, [q], [k], b * k.shape[2])
    dropped, lse = triton_forward.forward(q, k, eye, bad, call)
    whole, _ = reference.attention(q, k, eye, seen, call.scale)
    zero = (dropped == 0) & (whole != 0)
    share = float(zero.sum() / (whole != 0).sum())
    assert abs(share - call.dropout_p) < 0.08, share
    close("kept", dropped, torch.where(zero, 0.0, whole / (1 - call.dropout_p)), 1e-5)
    assert not torch.equal(zero[:, :, 0], zero[:, :, 1]), "heads draw different numbers"
    p = dropped.transpose(1, 2)
    close(
        "out of the same seed", out.transpose(1, 2), p @ v.transpose(1, 2).repeat_interleave(hq // k.shape[2], 1), 1e-5
    )
    group = hq // k.shape[2]
    wanted = (p.transpose(-1, -2) @ grad_out.transpose(1, 2)).unflatten(1, (k.shape[2], group)).sum(2).transpose(1, 2)
    close("dv", dv, wanted, 1e-5)
    # dq by the definition: the dropped probabilities are linear in the whole ones.
    dq, dk, _ = triton_backward.backward(grad_out, None, q, k, v, out, lse, bad, call)
    wrt = [x.double().requires_grad_() for x in (q, k)]
    probs, _ = reference.attention(wrt[0], wrt[1], eye.double(), seen, call.scale)
    kept = torch.where(zero, 0.0, probs / (1 - call.dropout_p)).transpose(1, 2)
    values = v.double().transpose(1, 2).repeat_interleave(group, 1)
    exact = torch.autograd.grad(((kept @ values).transpose(1, 2) * grad_out).sum(), wrt)
    for name, ours, want in zip(("dq", "dk"), (dq, dk), exact):
        close(name, ours, want, 1e-5)


def check_non_finite(window: tuple[int, int], which: int) -> None:
    """Rows that do not see the value keep their result; gradients stay finite."""
    from flash_sfa.impl import triton_backward, triton_forward

    triton_forward.shared_memory = triton_backward.shared_memory = lambda device: 0  # type: ignore[assignment]
    torch.manual_seed(0)
    tensors = [rand(1, 70, 2, 16) for _ in range(3)]
    grad = rand(1, 70, 2, 16)
    call = triton_forward.Options(*window, 0.3)
    bad = triton_forward.scan(grad.device, tensors[:1], tensors[1:2], 2)
    clean, clean_lse = triton_forward.forward(*tensors, bad, call)
    assert not bad.any()
    tensors[which][0, 30, 1, 3] = torch.inf if which == 1 else torch.nan
    bad = triton_forward.scan(grad.device, tensors[:1], tensors[1:2], 2)
    assert bad.tolist() == ([0, 0, 0, 0] if which == 2 else [1, 1, 0, 0])
    out, lse = triton_forward.forward(*tensors, bad, call)
    seen = reference.visible_pairs(70, 70, window, grad.device)[:, 30]
    touched = torch.arange(70) == 30 if which == 0 else seen
    assert bad[0] == 1 and bad[3] == 1
    assert out[0, touched, 1].isnan().all()
    torch.testing.assert_close(out[0, ~touched], clean[0, ~touched])
    assert torch.equal(out[:, :, 0], clean[:, :, 0])
    torch.testing.assert_close(lse[0, 1, ~touched], clean_lse[0, 1, ~touched])
    assert bool(lse[0, 1, touched].isnan().all()) == (which < 2)
    for x in triton_backward.backward(grad, None, *tensors, out, lse, bad, call):
        assert x.isfinite().all()


def check_dead_rows() -> None:
    """A gradient that is not finite, of a row that sees nothing, goes nowhere."""
    from flash_sfa.impl import triton_backward, triton_forward

    triton_forward.shared_memory = triton_backward.shared_memory = lambda device: 0  # type: ignore[assignment]
    torch.manual_seed(0)
    q, k, v = rand(1, 40, 2, 16), rand(1, 30, 2, 16), rand(1, 30, 2, 16)
    grad = rand(1, 40, 2, 16)
    call = triton_forward.Options(-1, 0, 0.3)
    bad = triton_forward.scan(q.device, [q], [k], 2)
    out, lse = triton_forward.forward(q, k, v, bad, call)
    clean = triton_backward.backward(grad, None, q, k, v, out, lse, bad, call)
    grad[0, 2] = torch.nan
    assert (lse[0, :, 2] == -torch.inf).all()
    for ours, wanted in zip(triton_backward.backward(grad, None, q, k, v, out, lse, bad, call), clean):
        assert torch.equal(ours, wanted)


CASES: dict[str, Callable[[], None]] = {
    "causal": lambda: check(),
    "full": lambda: check((37, 50), window=(-1, -1)),
    "window": lambda: check((37, 60), window=(7, 3)),
    "window_short_keys": lambda: check((50, 20), window=(3, 0)),
    "one_key": lambda: check(window=(0, 0)),
    "gqa_odd_dims": lambda: check(heads=(4, 2), dims=(12, 20), batch=2),
    "wide": lambda: check((20, 40), dims=(80, 130), heads=(2, 2)),
    "strided": lambda: check(heads=(2, 2), strided=True),
    "key_mask": lambda: check((37, 40), window=(-1, -1), key_mask=(torch.arange(40) % 3 == 1)[None, None, None]),
    "key_mask_causal": lambda: check(batch=2, key_mask=torch.rand(2, 1, 1, 37) < 0.5),
    "drop": lambda: check(batch=2, heads=(4, 2), drop=True),
    "drop_window": lambda: check(window=(9, 2), drop=True),
    "negative_scale": lambda: check(scale=-0.2),
    "zero_scale": lambda: check(scale=0.0),
    "packed": lambda: check(cu=([0, 5, 5, 37], [0, 10, 13, 37])),
    "packed_window": lambda: check(cu=([0, 5, 5, 37], [0, 10, 13, 37]), window=(4, 1), heads=(4, 2)),
    "packed_full": lambda: check(cu=([0, 0, 30, 37], [0, 9, 9, 37]), window=(-1, -1)),
    "one_query": lambda: check((1, 40)),
    "no_keys": lambda: check((40, 0)),
    "one_key_stored": lambda: check((40, 1), window=(-1, -1)),
    "fp16": lambda: check((70, 70), dims=(64, 32), dtype=torch.float16),
    "dropout": lambda: check((30, 40), dims=(16, 8), dropout_p=0.3),
    "dropout_window": lambda: check((30, 40), heads=(2, 2), dims=(16, 8), dropout_p=0.5, window=(20, 4)),
    "dead_rows": check_dead_rows,
    "non_finite_q": lambda: check_non_finite((-1, 0), 0),
    "non_finite_k": lambda: check_non_finite((-1, 0), 1),
    "non_finite_v": lambda: check_non_finite((-1, 0), 2),
    "non_finite_v_window": lambda: check_non_finite((9, 3), 2),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_interpreter(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "ok"


if __name__ == "__main__":
    print_outcomes(CASES)
