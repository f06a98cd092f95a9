"""The correctness grid: every implementation against an independent float64 oracle, on any device."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sfa import SparseCode, sfa_attention, topk_sparsify

# (sq, sk, hq, hkv, d, dv, options)
GRID = [
    (1, 1, 1, 1, 64, 64, {"causal": True}),
    (1, 239, 8, 2, 128, 128, {"causal": True}),
    (3, 63, 4, 4, 32, 64, {"causal": True}),
    (63, 3, 4, 1, 64, 32, {"causal": True}),
    (113, 113, 8, 1, 96, 96, {"causal": True, "topk": 7}),
    (128, 128, 4, 4, 60, 80, {"causal": True, "topk": 2}),
    (239, 239, 4, 2, 80, 80, {"window_size": (17, 0)}),
    (239, 113, 4, 2, 128, 64, {"window_size": (30, 9)}),
    (113, 239, 2, 2, 64, 64, {"window_size": (0, 3), "causal": True}),
    (239, 239, 4, 2, 128, 128, {"causal": True, "dense_dims": 16}),
    (128, 128, 2, 2, 256, 256, {"causal": True, "topk": 16}),
    (63, 63, 2, 1, 320, 64, {"causal": True, "topk": 16}),
    (128, 239, 4, 4, 64, 64, {"topk": (None, 8)}),
    (128, 239, 4, 4, 64, 64, {"topk": (8, None), "dense_dims": [1, 33]}),
    (63, 63, 4, 4, 64, 64, {"topk": (16, 4), "softmax_scale": 0.5}),
    (63, 63, 4, 4, 64, 64, {"topk": 64, "causal": True}),
    (63, 64, 4, 4, 64, 64, {"topk": 1, "mask": (2, 1, 1, 64), "causal": True}),
    (63, 64, 4, 2, 64, 64, {"topk": 8, "mask": (4, 63, 64), "window_size": (40, -1)}),
    (63, 64, 4, 4, 64, 64, {"topk": 1, "nonoverlap": "drop"}),
    (63, 64, 4, 2, 64, 64, {"topk": 2, "nonoverlap": "drop", "causal": True}),
    (63, 64, 4, 2, 64, 64, {"topk": 2, "nonoverlap": "drop", "dense_dims": (5,)}),
]


def oracle(codes_q, codes_k, v, *, visible, scale, nonoverlap, d):
    """softmax over shared features, from the (feature, value) pairs themselves.

    Written apart from the package: rows come from one-hot features, never from its expand.
    """
    rows, kept = [], []
    for features, values in (codes_q, codes_k):
        hot = torch.nn.functional.one_hot(features, d).to(values.dtype)
        rows.append((hot * values[..., None]).sum(-2))
        kept.append(hot.amax(-2))
    group = rows[0].shape[2] // rows[1].shape[2]
    q, k, v, kq, kk = rows[0], *(x.repeat_interleave(group, 2) for x in (rows[1], v)), kept[0], kept[1]
    counted = visible
    if nonoverlap == "drop":
        counted = visible & (torch.einsum("bihd,bjhd->bhij", kq, kk.repeat_interleave(group, 2)) > 0)
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(~counted, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None].masked_fill(lse[..., None] == -torch.inf, 0.0)).exp()
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def pairs(x):
    """The (feature, value) pairs of a code or of dense rows."""
    if isinstance(x, SparseCode):
        always = torch.tensor(x.dense_dims, dtype=torch.long, device=x.device).expand(*x.shape[:-1], -1)
        return torch.cat([x.indices.long(), always], -1), torch.cat([x.values, x.dense], -1)
    return torch.arange(x.shape[-1], device=x.device).expand(x.shape), x


def check_budget(ours, exact, comparator, name, floor=0.0):
    """max|ours - exact| <= 2 max|comparator - exact| + eps max|exact|, above a floor of fp32 rounding.

    dq and dk are sums of differences dp - delta that may cancel exactly in one order of summation and not in
    another; the floor is the fp32 rounding of those terms. Probabilities recomputed from a saved fp32 lse carry
    its rounding, |lse| eps, into dv.
    """
    if ours.dtype == torch.float64:  # the oracle rounds as much as we do
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-11)
        return
    eps = torch.finfo(ours.dtype).eps
    budget = 2 * (comparator.double() - exact).abs().max() + eps * exact.abs().max() + floor
    error = (ours.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} over the budget {budget:.2e}"


def visible_pairs(sq, sk, causal, window_size, device):
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    for i in range(sq):
        at = i + sk - sq
        if left >= 0:
            seen[i, : max(0, at - left)] = False
        if right >= 0:
            seen[i, max(0, at + right + 1) :] = False
    return seen


def check_case(case, impl, dtype, device):
    """out, lse and all gradients of one grid entry; impl "auto" must not be worse than its budget either."""
    sq, sk, hq, hkv, d, dv, options = case
    torch.manual_seed(0)
    options = dict(options)
    b = 2
    q = torch.randn(b, sq, hq, d, device=device).to(dtype)
    k = torch.randn(b, sk, hkv, d, device=device).to(dtype)
    v = torch.randn(b, sk, hkv, dv, device=device).to(dtype)
    grad = torch.randn(b, sq, hq, dv, device=device).to(dtype)
    topk, dims = options.pop("topk", 8), options.pop("dense_dims", 0)
    pair = topk if isinstance(topk, tuple) else (topk, topk)
    scale = options.get("softmax_scale", d**-0.5)
    visible = visible_pairs(sq, sk, options.get("causal", False), options.get("window_size", (-1, -1)), device)
    shape = options.pop("mask", None)
    if shape is not None:
        options["attn_mask"] = torch.rand(shape, device=device) > 0.4
        visible = visible & options["attn_mask"]
    visible = visible.expand(b, hq, sq, sk)

    def run(to, attend):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        # Codes come from the low-precision rows, so that every side computes with the same numbers.
        sides = [
            x.to(to) if entry is None else topk_sparsify(x, entry, dense_dims=dims).to(to)
            for x, entry in zip(leaves[:2], pair)
        ]
        wide = [*leaves[:2], leaves[2].to(to)]
        out, lse = attend(*sides, wide[2])
        parts = [p for s in sides for p in ((s.values, s.dense) if isinstance(s, SparseCode) else (s,))]
        grads = torch.autograd.grad(out, [*parts, wide[2]], grad.to(to), allow_unused=True)
        return out.detach(), lse.detach() if lse is not None else None, grads

    def theirs(q, k, v):
        mode = options.get("nonoverlap", "zero")
        return oracle(pairs(q), pairs(k), v, visible=visible, scale=scale, nonoverlap=mode, d=d)

    def ours(q, k, v):
        return sfa_attention(q, k, v, return_lse=True, impl=impl, **options)

    def math(q, k, v):
        mask = visible
        rows = [x.to_dense() if isinstance(x, SparseCode) else x for x in (q, k)]
        if options.get("nonoverlap") == "drop":
            kept = [torch.zeros_like(r).scatter(-1, pairs(x)[0], 1.0).float() for r, x in zip(rows, (q, k))]
            other = kept[1].repeat_interleave(hq // hkv, 2)
            mask = visible & (torch.einsum("bihd,bjhd->bhij", kept[0], other) > 0)
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (*rows, v)), attn_mask=mask, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2), None

    exact, have, comparator = run(torch.float64, theirs), run(dtype, ours), run(dtype, math)
    assert have[0].dtype == dtype
    check_budget(have[0], exact[0], comparator[0].nan_to_num(0.0), "out")
    biggest = max(x.abs().max().double() for x in (q, k))
    eps32 = torch.finfo(torch.float32).eps
    floor = eps32 * scale * biggest * grad.abs().max() * v.abs().max() * dv**0.5
    for i, (a, e, c) in enumerate(zip(have[2], exact[2], comparator[2])):
        if a is not None and a.numel():
            last = i == len(have[2]) - 1
            size = exact[1].nan_to_num(0.0, 0.0, 0.0).abs().max()
            rounding = eps32 * size * e.abs().max() if last else floor
            check_budget(a, e, c.nan_to_num(0.0), "dv" if last else f"gradient {i}", rounding)
    lse, want = have[1], exact[1]
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(lse == -torch.inf, want == -torch.inf)
    seen = want != -torch.inf
    assert ((lse.double() - want).abs()[seen] <= 1e-5 * (1 + want.abs()[seen])).all()
    empty = (~seen).transpose(1, 2)
    assert not have[0][empty].any()
