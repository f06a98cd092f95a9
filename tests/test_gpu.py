"""The grid on a CUDA device (pytest -m gpu): codes, attention and its gradients against float64."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sfa import SparseCode, sfa_attention, sfa_attention_varlen, topk_sparsify

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _exact_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)


def check_budget(ours, exact, comparator, name):
    eps = torch.finfo(ours.dtype).eps
    budget = 2 * (comparator.double() - exact).abs().max() + eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} over the budget {budget:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "topk"), [*itertools.product((32, 60, 64, 80, 96, 128, 256, 512), (1, 2, 7, 8, 16, 32))])
def test_codes_equal_the_reference(d, topk, dtype):
    x = torch.randn(1003, d, device="cuda").to(dtype)
    x[::3] = (x[::3] * 2).round() / 2  # many ties
    x[5, 3] = x[5, 9] = float("nan")
    x[6] = 0.0
    x[6, ::2] = -0.0
    x[7, 4] = float("-inf")
    for dims in (0, 3, (1, d // 2)):
        want = topk_sparsify(x, topk, dense_dims=dims, impl="reference")
        have = topk_sparsify(x, topk, dense_dims=dims, impl="triton")
        assert torch.equal(want.indices, have.indices)
        for a, b in ((want.values, have.values), (want.dense, have.dense)):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        dense = have.to_dense()
        cpu = have.map(lambda t: t.cpu()).to_dense()
        assert torch.equal(dense.cpu().nan_to_num(7.0), cpu.nan_to_num(7.0))


def test_codes_of_strided_views_and_padded_codes():
    qkv = torch.randn(2, 33, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    for i in range(3):
        view = qkv[:, :, i]
        assert torch.equal(topk_sparsify(view, 8).indices, topk_sparsify(view.contiguous(), 8, impl="reference").indices)
    values = torch.tensor([[1.0, 2.0, 0.0, 0.0]], device="cuda")
    indices = torch.tensor([[3, 9, 9, 9]], device="cuda", dtype=torch.uint8)
    assert SparseCode(values, indices, dim=16).to_dense()[0, 9] == 2.0


def test_more_than_two_to_the_31_elements():
    x = torch.randn(2**31 // 128 + 1000, 128, device="cuda", dtype=torch.bfloat16)
    code = topk_sparsify(x, 8, impl="triton")
    for part in (slice(0, 64), slice(-64, None)):
        assert torch.equal(code.indices[part], topk_sparsify(x[part], 8, impl="reference").indices)
    tail = code.map(lambda t: t[-64:]).to_dense()
    assert torch.equal(code.to_dense()[-64:], tail)


GRID = [
    # sq, sk, hq, hkv, d, dv, options
    (1, 1, 1, 1, 64, 64, {"causal": True}),
    (1, 239, 8, 2, 128, 128, {"causal": True}),
    (3, 63, 4, 4, 32, 64, {"causal": True}),
    (63, 3, 4, 1, 64, 32, {"causal": True}),
    (113, 113, 8, 1, 96, 96, {"causal": True, "topk": 7}),
    (128, 128, 4, 4, 60, 80, {"causal": True, "topk": 2}),
    (239, 239, 4, 2, 80, 80, {"window_size": (17, 0)}),
    (239, 113, 4, 2, 128, 64, {"window_size": (30, 9)}),
    (1000, 1000, 4, 2, 128, 128, {"causal": True, "dense_dims": 16}),
    (1000, 1000, 2, 2, 256, 256, {"causal": True, "topk": 16}),
    (128, 239, 4, 4, 64, 64, {"topk": (None, 8)}),
    (128, 239, 4, 4, 64, 64, {"topk": (8, None), "dense_dims": [1, 33]}),
    (63, 63, 4, 4, 64, 64, {"topk": 64, "causal": True}),
    (63, 64, 4, 4, 64, 64, {"topk": 1, "mask": True, "causal": True}),
    (63, 64, 4, 4, 64, 64, {"topk": 1, "nonoverlap": "drop"}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_attention_grid(case, impl, dtype):
    sq, sk, hq, hkv, d, dv, options = case
    options = {"topk": 8, **options}
    q, k, v = (
        torch.randn(2, n, h, width, device="cuda", dtype=dtype) for n, h, width in ((sq, hq, d), (sk, hkv, d), (sk, hkv, dv))
    )
    if options.pop("mask", False):
        options["attn_mask"] = torch.rand(2, 1, 1, sk, device="cuda") > 0.4
    grad = torch.randn(2, sq, hq, dv, device="cuda", dtype=dtype)
    topk, dims = options.pop("topk"), options.pop("dense_dims", 0)
    pair = topk if isinstance(topk, tuple) else (topk, topk)

    def side(x, entry):
        return x if entry is None else topk_sparsify(x, entry, dense_dims=dims)

    def run(to, backend=None, **kw):
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        # Top-k of the low-precision rows, then the computation in dtype `to` on the same codes.
        sides = [side(x, entry) for x, entry in zip(leaves[:2], pair)]
        if backend is None:
            out, lse = sfa_attention(*sides, leaves[2], return_lse=True, **options, **kw)
        else:
            rows = [x.to_dense() if isinstance(x, SparseCode) else x for x in sides]
            out, lse = backend(*rows, leaves[2]), None
        out.backward(grad.to(to))
        return out.detach(), lse, *[x.grad for x in leaves]

    exact = run(torch.float64, impl="reference")
    ours = run(dtype, impl=impl)

    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    i, j = torch.arange(sq, device="cuda")[:, None] + sk - sq, torch.arange(sk, device="cuda")[None]
    seen = (j >= i - (left if left >= 0 else sq + sk)) & (j <= i + (right if right >= 0 else sq + sk))
    seen = seen & options["attn_mask"] if "attn_mask" in options else seen[None, None]

    def math(q, k, v):
        mask = seen
        if options.get("nonoverlap") == "drop":
            mask = seen & ((q != 0).float().transpose(1, 2) @ (k != 0).float().permute(0, 2, 3, 1) > 0)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)

    comparator = run(dtype, backend=math)
    for name, a, e, c in zip(("out", "dq", "dk", "dv"), (ours[0], *ours[2:]), (exact[0], *exact[2:]), (comparator[0], *comparator[2:])):
        check_budget(a, e, c.nan_to_num(0.0), name)
    lse, exact_lse = ours[1].double(), exact[1]
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    finite = exact_lse != -torch.inf
    assert ((lse - exact_lse).abs()[finite] <= 1e-5 * (1 + exact_lse.abs()[finite])).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_gradient(dtype):
    q, k, v = (torch.randn(1, 65, 4, 64, device="cuda", dtype=dtype) for _ in range(3))
    weight = torch.randn(1, 4, 65, device="cuda", dtype=torch.float64)

    def grads(to, impl):
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        out, lse = sfa_attention(*leaves, topk=8, causal=True, return_lse=True, impl=impl)
        (out.double().sum() + (lse.double() * weight).sum()).backward()
        return [x.grad.double() for x in leaves]

    for ours, reference, exact in zip(grads(dtype, "sdpa"), grads(dtype, "reference"), grads(torch.float64, "reference")):
        budget = 2 * (reference - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_with_empty_sequences(dtype):
    cu_q = torch.tensor([0, 5, 5, 40, 41], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 9, 30, 30, 65], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(n, h, 64, device="cuda", dtype=dtype) for n, h in ((41, 4), (65, 2), (65, 2)))
    kwargs = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "topk": 8, "causal": True, "return_lse": True}
    results = []
    for to, impl in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "sdpa")):
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        out, lse = sfa_attention_varlen(*leaves, impl=impl, **kwargs)
        out.double().pow(2).sum().backward()
        results.append((out.detach(), *[x.grad for x in leaves], lse))
    exact, reference, ours = results
    for a, e, c in zip(ours[:4], exact[:4], reference[:4]):
        budget = 2 * (c.double() - e).abs().max() + 2 * torch.finfo(dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= budget
    assert torch.equal(ours[4] == -torch.inf, exact[4] == -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_rows_stay_with_those_who_see_them(dtype):
    q, k, v = (torch.randn(1, 64, 2, 64, device="cuda", dtype=dtype) for _ in range(3))
    leaves = [x.clone() for x in (q, k, v)]
    leaves[0][0, 3, 0], leaves[1][0, 40, 1], leaves[2][0, 50, 0] = float("nan"), float("inf"), float("nan")
    leaves = [x.requires_grad_() for x in leaves]
    out = sfa_attention(*leaves, topk=8, causal=True)
    clean = sfa_attention(q, k, v, topk=8, causal=True)
    untouched = torch.ones(64, 2, dtype=torch.bool, device="cuda")
    untouched[3, 0] = untouched[40:, 1] = untouched[50:, 0] = False
    torch.testing.assert_close(out[0][untouched], clean[0][untouched])
    assert out[0][~untouched].isnan().any(-1).all()
    (out.nan_to_num(0.0) * untouched[None, :, :, None]).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_compile_on_the_device():
    q, k, v = (torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def call(q, k, v):
        return sfa_attention(q, k, v, topk=8, causal=True)

    eager, compiled = call(q, k, v), torch.compile(call, fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, eager)
    want = torch.autograd.grad(eager.float().pow(2).sum(), (q, k, v))
    have = torch.autograd.grad(compiled.float().pow(2).sum(), (q, k, v))
    for a, b in zip(have, want):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
