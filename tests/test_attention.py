"""sfa_attention on the CPU: the grid against float64, and each rule of the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sfa import SparseCode, select_impl, sfa_attention, topk_sparsify
from flash_sfa.impl import sdpa
from grid import GRID, check_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLS = ["reference", "sdpa"]


def rand(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, impl, dtype):
    check_case(case, impl, dtype, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_long_rows(impl):
    check_case((1000, 1000, 2, 1, 64, 64, {"causal": True, "topk": 8}), impl, torch.float32, "cpu")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    sq=st.integers(1, 40),
    sk=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (3, 3)]),
    d=st.sampled_from([3, 8, 20, 33]),
    dv=st.sampled_from([1, 8, 17]),
    topk=st.sampled_from([1, 2, 5, 40, (None, 2), (3, None), (2, 4)]),
    dense_dims=st.sampled_from([0, 1, [2, 0]]),
    causal=st.booleans(),
    left=st.sampled_from([-1, 0, 3]),
    right=st.sampled_from([-1, 0, 5]),
    mask=st.sampled_from([None, (2, 1, 1, -1), (1, 1, -2, 1)]),
    nonoverlap=st.sampled_from(["zero", "drop"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_random_calls(sq, sk, heads, d, dv, topk, dense_dims, causal, left, right, mask, nonoverlap, dtype):
    options = {"topk": topk, "dense_dims": dense_dims, "causal": causal, "window_size": (left, right)}
    options["nonoverlap"] = nonoverlap
    if mask is not None:
        options["mask"] = tuple({-1: sk, -2: sq}.get(x, x) for x in mask)
    check_case((sq, sk, *heads, d, dv, options), "auto", dtype, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [True, False])
def test_full_topk_equals_dense_attention(impl, causal):
    q, k, v = (rand(2, 33, 4, 32) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    for topk in (32, 99):
        out = sfa_attention(q, k, v, topk=topk, causal=causal, impl=impl)
        torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_live_only_on_kept_coordinates(impl):
    q, k, v = rand(2, 17, 4, 32, grad=True), rand(2, 17, 2, 32, grad=True), rand(2, 17, 2, 32, grad=True)
    sfa_attention(q, k, v, topk=(5, 3), dense_dims=[7], causal=True, impl=impl).pow(2).sum().backward()
    for x, topk in ((q, 5), (k, 3)):
        kept = topk_sparsify(x, topk, dense_dims=[7]).to_dense() != 0
        assert not x.grad[~kept].any() and x.grad[kept].count_nonzero() > 0.5 * kept.sum()
    assert v.grad.count_nonzero() == v.numel()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [{"causal": True}, {"nonoverlap": "drop"}, {"window_size": (1, 0)}])
def test_gradcheck(impl, case):
    q, k, v = (rand(1, 5, 2, 6, dtype=torch.float64, grad=True) for _ in range(3))
    if impl == "sdpa" and "nonoverlap" in case:
        with pytest.raises(NotImplementedError):
            sfa_attention(q, k, v, topk=2, impl=impl, **case)
        return
    codes = [topk_sparsify(x.detach(), 2) for x in (q, k)]
    leaves = [c.values.clone().requires_grad_() for c in codes]

    def call(qv, kv, v):
        a, b = (SparseCode(x, c.indices, dim=6) for x, c in zip((qv, kv), codes))
        return sfa_attention(a, b, v, return_lse=True, impl=impl, **case)

    assert torch.autograd.gradcheck(call, (*leaves, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_future_token_changes_no_past_output(impl):
    q, k, v = (rand(1, 20, 2, 16) for _ in range(3))
    before = sfa_attention(q, k, v, topk=3, causal=True, impl=impl)
    k[:, 12:], v[:, 12:] = 99.0, -99.0
    after = sfa_attention(q, k, v, topk=3, causal=True, impl=impl)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("visibility", [{"causal": True}, {"window_size": (4, 2)}, {"mask": True}])
def test_non_finite_rows_spoil_only_those_who_see_them(impl, what, value, visibility):
    leaves = {name: rand(1, 20, 2, 16, grad=True) for name in "qkv"}
    visibility = dict(visibility)
    seen = torch.ones(20, 20, dtype=torch.bool).tril() if "causal" in visibility else None
    i = torch.arange(20)
    if "window_size" in visibility:
        seen = (i[None] >= i[:, None] - 4) & (i[None] <= i[:, None] + 2)
    if visibility.pop("mask", False):
        seen = torch.rand(20, 20) > 0.5
        visibility["attn_mask"] = seen
    clean = sfa_attention(*leaves.values(), topk=3, impl=impl, **visibility)
    with torch.no_grad():
        leaves[what][0, 7, 1, 2] = value
    out, lse = sfa_attention(*leaves.values(), topk=3, impl=impl, return_lse=True, **visibility)
    touched = torch.zeros(20, 2, dtype=torch.bool)
    touched[:, 1] = i == 7 if what == "q" else seen[:, 7]
    torch.testing.assert_close(out[0][~touched], clean[0][~touched])
    assert lse[0].T[~touched].isfinite().all()
    assert touched.any() and (~out[0][touched].isfinite()).any(-1).all()
    # Gradients of the untouched outputs stay finite.
    out[0][~touched].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing(impl):
    q, k, v = (rand(1, 6, 2, 8, grad=True) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    out, lse = sfa_attention(q, k, v, topk=2, attn_mask=mask, return_lse=True, impl=impl)
    assert not out[:, 2].any() and (lse[..., 2] == -torch.inf).all()
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).backward()
    assert not q.grad[:, 2].any() and all(x.grad.isfinite().all() for x in (q, k, v))
    for sq, sk in ((0, 5), (5, 0)):
        a, b = rand(1, sq, 2, 8, grad=True), rand(1, sk, 2, 8, grad=True)
        out, lse = sfa_attention(a, b, b, topk=2, return_lse=True, impl=impl)
        assert out.shape == (1, sq, 2, 8) and not out.any() and (lse == -torch.inf).all()
        out.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_of_a_fused_projection(impl):
    qkv = rand(2, 13, 3, 4, 16, grad=True)
    sfa_attention(*qkv.unbind(2), topk=3, causal=True, impl=impl).pow(2).sum().backward()
    apart = [x.detach().clone().contiguous().requires_grad_() for x in qkv.unbind(2)]
    sfa_attention(*apart, topk=3, causal=True, impl=impl).pow(2).sum().backward()
    torch.testing.assert_close(qkv.grad, torch.stack([x.grad for x in apart], 2), atol=1e-6, rtol=1e-5)


def test_codes_as_input():
    q, k, v = rand(1, 9, 4, 16), rand(1, 9, 2, 16), rand(1, 9, 2, 16)
    want = sfa_attention(q, k, v, topk=(4, 3), dense_dims=2)
    qc, kc = topk_sparsify(q, 4, dense_dims=2), topk_sparsify(k, 3, dense_dims=2)
    assert torch.equal(sfa_attention(qc, kc, v), want)
    assert torch.equal(sfa_attention(qc, kc, v, topk=(4, 3), dense_dims=2), want)
    for options in ({"topk": 5}, {"topk": (4, 4)}, {"dense_dims": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            sfa_attention(qc, kc, v, **options)
    assert torch.equal(sfa_attention(q, kc, v, topk=4, dense_dims=2), want)
    assert torch.equal(sfa_attention(qc, k, v, topk=(None, 3), dense_dims=2), want)
    torch.testing.assert_close(sfa_attention(q, kc, v), sfa_attention(q, k, v, topk=(None, 3), dense_dims=2))
    # Padding repeats the last index with value 0.
    wide = SparseCode(
        torch.cat([kc.values, torch.zeros_like(kc.values)], -1),
        torch.cat([kc.indices, kc.indices[..., -1:].expand_as(kc.indices)], -1),
        dim=16, dense=kc.dense, dense_dims=2,
    )  # fmt: skip
    assert torch.equal(sfa_attention(qc, wide, v), want)
    for nonoverlap in ("zero", "drop"):
        a = sfa_attention(topk_sparsify(q, 2), topk_sparsify(k, 1), v, nonoverlap=nonoverlap)
        padded = topk_sparsify(k, 1)
        padded = SparseCode(
            torch.cat([padded.values, torch.zeros_like(padded.values)], -1),
            padded.indices.expand(-1, -1, -1, 2),
            dim=16,
        )
        torch.testing.assert_close(sfa_attention(topk_sparsify(q, 2), padded, v, nonoverlap=nonoverlap), a)


def test_drop_counts_stored_zeros_as_members():
    one = torch.ones(1, 1, 1, 1)
    q = SparseCode(one, torch.tensor([[[[2]]]], dtype=torch.uint8), dim=4)
    k = SparseCode(torch.zeros(1, 2, 1, 1), torch.tensor([2, 3], dtype=torch.uint8).view(1, 2, 1, 1), dim=4)
    v = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    assert sfa_attention(q, k, v, nonoverlap="drop").item() == 1.0
    assert sfa_attention(q, k, v, nonoverlap="zero").item() == 3.0
    nothing = sfa_attention(q, k.map(lambda x: x[:, 1:]), v[:, 1:], nonoverlap="drop", return_lse=True)
    assert nothing[0].item() == 0.0 and nothing[1].item() == -torch.inf


def test_dropout():
    q, k, v = (rand(1, 64, 2, 16, grad=True) for _ in range(3))
    plain, lse = sfa_attention(q, k, v, topk=4, return_lse=True)
    torch.manual_seed(3)
    dropped, same_lse = sfa_attention(q, k, v, topk=4, dropout_p=0.5, return_lse=True)
    torch.testing.assert_close(same_lse, lse, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dropped, plain, atol=1e-2)
    torch.manual_seed(3)
    assert torch.equal(sfa_attention(q, k, v, topk=4, dropout_p=0.5), dropped)
    with torch.no_grad():
        mean = torch.stack([sfa_attention(q, k, v, topk=4, dropout_p=0.5) for _ in range(400)]).mean(0)
    assert (mean - plain).abs().max() < 0.12
    dropped.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="dropout_p"):
        sfa_attention(q, k, v, topk=4, dropout_p=0.5, impl="sdpa")


def test_autocast_decides_topk_in_the_autocast_dtype():
    q, k, v = (rand(1, 30, 2, 64, grad=True) for _ in range(3))
    q.data[..., 1] = q.data[..., 0] * (1 + 2**-12)  # equal in bf16, so the lower feature wins there
    with torch.autocast("cpu", torch.bfloat16):
        out = sfa_attention(q, k, v, topk=3, causal=True)
        code = topk_sparsify(q, 3)
    assert out.dtype == code.dtype == torch.bfloat16
    low = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, sfa_attention(*low, topk=3, causal=True))
    assert torch.equal(code.indices, topk_sparsify(low[0], 3).indices)
    assert not torch.equal(code.indices, topk_sparsify(q, 3).indices)
    out.sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.any()


def test_sdpa_saves_codes_not_dense_rows():
    n, heads, d, topk = 512, 2, 128, 8
    q, k, v = (rand(1, n, heads, d, grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sfa_attention(q, k, v, topk=topk, causal=True, impl="sdpa")
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    codes = 2 * n * heads * topk * (4 + 1)
    assert sum(storages.values()) <= codes + 2 * n * heads * d * 4 + n * heads * 4 + 4096
    assert max(x.numel() for x in saved) < n * n
    dense = 4 * n * heads * d * 4
    assert sum(storages.values()) <= 0.56 * dense


def test_double_backward_raises():
    q, k, v = (rand(1, 5, 2, 8, grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(sfa_attention(q, k, v, topk=2, impl="sdpa").pow(2).sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(grad.sum(), k)


def test_select_impl_tells_and_auto_follows(caplog):
    q, k, v = (rand(1, 5, 2, 8) for _ in range(3))
    assert select_impl(q, k, v, topk=2)["forward"] == "sdpa"
    for options in ({"nonoverlap": "drop"}, {"dropout_p": 0.1}):
        choice = select_impl(q, k, v, topk=2, **options)
        assert choice["forward"] == choice["backward"] == "reference" and "sdpa" in choice["reason"]
        assert torch.equal(
            sfa_attention(q, k, v, topk=2, **({} if "dropout_p" in options else options)),
            sfa_attention(q, k, v, topk=2, **({} if "dropout_p" in options else {**options, "impl": "reference"})),
        )
    assert select_impl(q, k, v, topk=2, nonoverlap="drop", dense_dims=1)["forward"] == "sdpa"
    assert select_impl(q, k, v, topk=2, impl="reference")["forward"] == "reference"
    with pytest.raises(ValueError, match="topk"):
        select_impl(q, k, v, topk=0)


def test_exact_implementations_accept_tolerance_and_deterministic():
    q, k, v = (rand(1, 5, 2, 8) for _ in range(3))
    want = sfa_attention(q, k, v, topk=2)
    for impl in IMPLS:
        torch.testing.assert_close(sfa_attention(q, k, v, topk=2, tolerance=0.5, deterministic=True, impl=impl), want)


@pytest.mark.parametrize("shape", [(2, 6, 3), (3, 2, 1)])
def test_large_cudnn_backward_goes_by_parts(shape, monkeypatch):
    """Halving over kv heads or the batch gives every part its own rows, and puts them back in order."""
    b, hq, hkv = shape
    q, k, v = rand(b, hq, 5, 8), rand(b, hkv, 5, 8), rand(b, hkv, 5, 8)
    out, lse, calls = rand(b, hq, 5, 8), rand(b, hq, 5), []

    def kernel(grad_out, q, k, v, out, lse, *args, **kwargs):
        assert q.shape[1] // k.shape[1] == hq // hkv and lse.shape == (*q.shape[:3], 1)
        calls.append(q.numel())
        return q + grad_out + out + lse, 2 * k, 3 * v

    monkeypatch.setattr(
        sdpa, "aten", type("", (), {"_scaled_dot_product_cudnn_attention_backward": staticmethod(kernel)})
    )
    whole = sdpa._cudnn_backward([q, q, k, v, out, lse], True, 1.0)
    monkeypatch.setattr(sdpa, "_CUDNN_ELEMENTS", q.numel() // 2)
    parts = sdpa._cudnn_backward([q, q, k, v, out, lse], True, 1.0)
    assert len(calls) > 2 and all(torch.equal(x, y) for x, y in zip(whole, parts))
