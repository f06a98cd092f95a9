"""The grid on a CUDA device (pytest -m gpu): codes, attention and its gradients against float64."""

import itertools

import pytest
import torch

from flash_sfa import SparseCode, sfa_attention, sfa_attention_varlen, topk_sparsify
from grid import GRID, check_case

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _exact_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)


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
        assert torch.equal(
            topk_sparsify(view, 8).indices, topk_sparsify(view.contiguous(), 8, impl="reference").indices
        )
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_attention_grid(case, impl, dtype):
    check_case(case, impl, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_gradient(dtype):
    q, k, v = (torch.randn(1, 65, 4, 64, device="cuda", dtype=dtype) for _ in range(3))
    weight = torch.randn(1, 4, 65, device="cuda", dtype=torch.float64)

    def grads(to, impl):
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        out, lse = sfa_attention(*leaves, topk=8, causal=True, return_lse=True, impl=impl)
        (out.double().sum() + (lse.double() * weight).sum()).backward()
        return [x.grad.double() for x in leaves]

    for ours, reference, exact in zip(
        grads(dtype, "sdpa"), grads(dtype, "reference"), grads(torch.float64, "reference")
    ):
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
