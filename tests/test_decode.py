"""Attention over the cache: equal to prefill, reads what it says, and its tolerance is a bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sfa import SparseFeatureAttention, SparseKVCache, sfa_attention, sfa_attention_with_kvcache, topk_sparsify


def fill(k, v, topk, *, dense_dims=0, page_size=16, lengths=None, dtype=None):
    b, n, heads, d = k.shape
    cache = SparseKVCache(
        num_kv_heads=heads, head_dim=d, v_head_dim=v.shape[-1], topk=topk, dense_dims=dense_dims,
        max_tokens=b * (n + page_size) + page_size, page_size=page_size, dtype=dtype or k.dtype,
    )  # fmt: skip
    cache.alloc(b)
    cache.append(k, v, lengths=lengths)
    return cache


def exact(q, k, v, topk, *, dense_dims=0, window=(-1, -1), causal=True, nonoverlap="zero"):
    """One sequence in float64 by the plain formula, on the codes of the given dtype."""
    topk_q, topk_k = topk if isinstance(topk, tuple) else (topk, topk)
    q = q[None].double() if topk_q is None else topk_sparsify(q[None], topk_q, dense_dims=dense_dims).to(torch.float64)
    k = topk_sparsify(k[None], topk_k, dense_dims=dense_dims).to(torch.float64)
    out, lse = sfa_attention(
        q, k, v[None].double(), causal=causal, window_size=window, nonoverlap=nonoverlap, return_lse=True,
        impl="reference",
    )  # fmt: skip
    return out[0], lse[0]


@pytest.mark.parametrize("impl", ["cpu", "reference", "sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sq", "group", "options"),
    [
        (1, 1, {}),
        (1, 4, {}),
        (5, 2, {}),
        (16, 2, {"window": (140, -1)}),
        (3, 1, {"window": (20, 7), "causal": False}),
        (2, 2, {"dense_dims": 4}),
        (2, 1, {"dense_dims": (3, 17)}),
        (2, 2, {"topk": (None, 4)}),
        (2, 2, {"topk": (9, 4)}),
        (4, 2, {"nonoverlap": "drop"}),
        (40, 1, {}),
    ],
)
def test_decode_equals_the_plain_formula(impl, dtype, sq, group, options):
    torch.manual_seed(0)
    options = dict(options)
    topk = options.pop("topk", 4)
    lengths = [300, 0, 131, 2]
    k, v = torch.randn(4, 300, 2, 32).to(dtype), torch.randn(4, 300, 2, 24).to(dtype)
    q = torch.randn(4, sq, 2 * group, 32).to(dtype)
    cache = fill(k, v, 4, dense_dims=options.get("dense_dims", 0), lengths=lengths)
    kwargs = {"topk": topk, "causal": options.get("causal", True), "window_size": options.get("window", (-1, -1))}
    if impl == "sdpa" and "nonoverlap" in options:
        with pytest.raises(NotImplementedError, match="drop"):
            sfa_attention_with_kvcache(q, cache, impl=impl, nonoverlap="drop", **kwargs)
        return
    out, lse = sfa_attention_with_kvcache(
        q, cache, return_lse=True, impl=impl, nonoverlap=options.get("nonoverlap", "zero"), **kwargs
    )
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    for b, n in enumerate(lengths):
        want, want_lse = exact(q[b], k[b, :n], v[b, :n], topk, **options)
        assert (out[b].double() - want).abs().max() <= 4 * eps * (1 + v[b].double().abs().max())
        assert torch.equal(lse[b] == -torch.inf, want_lse == -torch.inf)
        seen = want_lse != -torch.inf
        assert ((lse[b].double() - want_lse)[seen].abs() <= 1e-5 * (1 + want_lse[seen].abs())).all()


@pytest.mark.parametrize("shift", [-20.0, -100.0])
def test_rows_that_all_overlap_with_very_negative_scores(shift):
    """Subtracting the zero-overlap term there would leave 0 / 0."""
    torch.manual_seed(0)
    n, d = 300, 16
    k = torch.zeros(1, n, 1, d)
    k[..., 3] = 4.0
    k[..., 5] = torch.rand(1, n, 1) * 0.1
    q = torch.zeros(1, 1, 1, d)
    q[..., 3] = shift
    q[..., 5] = 1.0
    v = torch.randn(1, n, 1, 8)
    cache = fill(k, v, 2)
    out, lse = sfa_attention_with_kvcache(q, cache, return_lse=True, impl="cpu")
    want, want_lse = exact(q[0], k[0], v[0], 2)
    assert want_lse.max() < shift / 2
    torch.testing.assert_close(out[0].double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), want_lse, atol=1e-4, rtol=1e-5)
    # The same with one block that has a token without overlap: its weight e^0 dwarfs the others.
    k[0, 200] = 0.0
    k[0, 200, 0, 9:11] = 1.0
    cache = fill(k, v, 2)
    out = sfa_attention_with_kvcache(q, cache, impl="cpu")
    torch.testing.assert_close(out[0].double(), exact(q[0], k[0], v[0], 2)[0], atol=1e-5, rtol=1e-5)


def test_only_the_counted_rows_of_v_are_read():
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 384, 2, 64), torch.randn(1, 384, 2, 16), torch.randn(1, 1, 4, 64)
    cache = fill(k, v, 4, page_size=384)
    out, stats = sfa_attention_with_kvcache(q, cache, return_stats=True, impl="cpu")
    rows = stats["rows_read"]
    assert rows.dtype == torch.int64 and rows.shape == (1, 2) and (rows < 384).all() and (rows > 0).all()
    assert stats["misplaced_weight"].shape == (1, 4, 1) and not stats["misplaced_weight"].any()
    code = topk_sparsify(k, 4)
    kept_q = topk_sparsify(q, 4)
    for h in range(2):
        features = kept_q.indices[0, 0, 2 * h : 2 * h + 2].flatten()
        needed = torch.isin(code.indices[0, :, h], features).any(-1)
        assert int(rows[0, h]) == int(needed.sum())
        cache.layers[0].v[:384][~needed, h] = torch.nan  # poison what must not be read
    assert torch.equal(sfa_attention_with_kvcache(q, cache, impl="cpu"), out)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 400),
    sq=st.integers(1, 4),
    group=st.sampled_from([1, 2, 4]),
    sharp=st.sampled_from([0.3, 3.0, 30.0]),
    tolerance=st.sampled_from([1e-4, 1e-2, 0.2, 0.9]),
    dense_dims=st.sampled_from([0, 3]),
    nonoverlap=st.sampled_from(["zero", "drop"]),
    left=st.sampled_from([-1, 0, 100, 200]),
)
def test_tolerance_is_a_bound(seed, n, sq, group, sharp, tolerance, dense_dims, nonoverlap, left):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(1, sq, 2 * group, 16) * sharp, draw(1, n, 2, 16), draw(1, n, 2, 8)
    cache = fill(k, v, 3, dense_dims=dense_dims)
    kwargs = {"window_size": (left, -1), "nonoverlap": nonoverlap}
    want, want_lse = exact(q[0], k[0], v[0], 3, dense_dims=dense_dims, window=(left, -1), nonoverlap=nonoverlap)
    out, lse, stats = sfa_attention_with_kvcache(
        q, cache, tolerance=tolerance, return_lse=True, return_stats=True, impl="cpu", **kwargs
    )
    bound = tolerance * v.abs().amax((0, 1, 3)).repeat_interleave(group)
    assert ((out[0] - want).abs().amax((0, 2)) <= bound + 1e-9).all()
    assert stats["misplaced_weight"].max() <= tolerance * (1 + 1e-6)
    torch.testing.assert_close(lse[0], want_lse, atol=1e-9, rtol=1e-9)
    _, exact_stats = sfa_attention_with_kvcache(q, cache, return_stats=True, impl="cpu", **kwargs)
    assert (stats["rows_read"] <= exact_stats["rows_read"]).all()


def test_tolerance_leaves_rows_unread():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 32) * 8, torch.randn(1, 1024, 1, 32), torch.randn(1, 1024, 1, 8)
    cache = fill(k, v, 4, dense_dims=8)
    _, none = sfa_attention_with_kvcache(q, cache, return_stats=True)
    out, some = sfa_attention_with_kvcache(q, cache, tolerance=1e-2, return_stats=True)
    assert none["rows_read"].item() == 1024 and some["rows_read"].item() < 500
    assert 0 < some["misplaced_weight"].item() <= 1e-2
    assert (out[0].double() - exact(q[0], k[0], v[0], 4, dense_dims=8)[0]).abs().max() <= 1e-2 * v.abs().max()


@pytest.mark.parametrize("impl", ["cpu", "reference", "sdpa"])
def test_non_finite_values_stay_in_their_sequence_and_future(impl):
    torch.manual_seed(0)
    k, v, q = torch.randn(2, 140, 1, 16), torch.randn(2, 140, 1, 8), torch.randn(2, 2, 1, 16)
    clean = sfa_attention_with_kvcache(q, fill(k, v, 3), impl=impl)
    k[0, 10, 0, 0], v[0, 139, 0, 0] = torch.nan, torch.inf
    out = sfa_attention_with_kvcache(q, fill(k, v, 3), impl=impl)
    assert torch.equal(out[1], clean[1]) and not out[0].isfinite().all()
    k[0, 10, 0, 0] = 0.0
    out = sfa_attention_with_kvcache(q, fill(k, v, 3), impl=impl)
    assert out[0, 0].isfinite().all()  # the first query does not see token 139
    out = sfa_attention_with_kvcache(q, fill(k, v, 3), window_size=(20, -1), impl=impl)
    assert out[0, 0].isfinite().all()


def test_appending_in_the_call_and_prefill():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 50, 4, 16), torch.randn(2, 50, 2, 16), torch.randn(2, 50, 2, 16)
    whole = sfa_attention(q, k, v, topk=3, causal=True)
    cache = SparseKVCache(num_kv_heads=2, head_dim=16, topk=3, max_tokens=200, page_size=16, dtype=torch.float32)
    cache.alloc(2)
    parts, start = [], 0
    for n in (30, 1, 1, 18):
        part = slice(start, start + n)
        parts.append(sfa_attention_with_kvcache(q[:, part], cache, k=k[:, part], v=v[:, part]))
        start += n
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)


def test_subsets_and_results_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    k, v, q = torch.randn(3, 200, 2, 16), torch.randn(3, 200, 2, 8), torch.randn(3, 1, 4, 16)
    cache = fill(k, v, 3, lengths=[200, 31, 150])
    every = sfa_attention_with_kvcache(q, cache)
    one = sfa_attention_with_kvcache(q[2:], cache, seq_ids=torch.tensor([2]))
    assert torch.equal(one[0], every[2])


@pytest.mark.parametrize("dense_dims", [0, 3])
def test_module_cached_equals_uncached(dense_dims):
    torch.manual_seed(0)
    module = SparseFeatureAttention(32, 4, num_kv_heads=2, v_head_dim=12, topk=3, dense_dims=dense_dims)
    x = torch.randn(2, 11, 32)
    whole = module(x)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    cache = SparseKVCache(
        num_layers=2, num_kv_heads=2, head_dim=8, v_head_dim=12, topk=3, dense_dims=dense_dims, max_tokens=64,
        page_size=4, dtype=torch.float32,
    )  # fmt: skip
    cache.alloc(2)
    parts = [
        module(x[:, :7], cache=cache, layer=1),
        *(module(x[:, i : i + 1], cache=cache, layer=1) for i in range(7, 11)),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)
    assert cache.seq_lengths(layer=0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="num_heads"):
        SparseFeatureAttention(32, 4, num_kv_heads=3, topk=3)


BAD = [
    (ValueError, "impl", {"impl": "fast"}),
    (NotImplementedError, "triton", {"impl": "triton"}),
    (NotImplementedError, "drop", {"impl": "sdpa", "nonoverlap": "drop"}),
    (ValueError, "nonoverlap", {"nonoverlap": "maybe"}),
    (ValueError, "tolerance", {"tolerance": -0.1}),
    (ValueError, "tolerance", {"tolerance": 1.0}),
    (ValueError, "window_size", {"window_size": (-2, 0)}),
    (ValueError, "given together", {"k": torch.randn(1, 1, 1, 16)}),
    (ValueError, "given together", {"v": torch.randn(1, 1, 1, 8)}),
    (ValueError, "length", {"k": torch.randn(1, 2, 1, 16), "v": torch.randn(1, 2, 1, 8)}),
    (TypeError, "dtype", {"k": torch.randn(1, 1, 1, 16).half(), "v": torch.randn(1, 1, 1, 8)}),
    (ValueError, "topk", {"topk": 4}),
    (ValueError, "topk", {"topk": (3, 4)}),
    (ValueError, "topk", {"topk": (3, None)}),
    (TypeError, "topk", {"topk": [3, 3]}),
    (ValueError, "seq_ids", {"seq_ids": [5]}),
    (ValueError, "layer", {"layer": 3}),
    (TypeError, "causal", {"causal": 1}),
    (ValueError, "q must be", {"q": torch.randn(1, 1, 1, 8)}),
    (ValueError, "q must be", {"q": torch.randn(2, 1, 1, 16)}),
    (TypeError, "dtype", {"q": torch.randn(1, 1, 1, 16).double()}),
    (TypeError, "q must be", {"q": torch.zeros(1, 1, 1, 16).long()}),
]


@pytest.mark.parametrize(("error", "words", "changes"), BAD)
def test_refusals(error, words, changes):
    cache = fill(torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 8), 3)
    before = cache.state_dict()
    arguments = {"q": torch.randn(1, 1, 1, 16), "k": torch.randn(1, 1, 1, 16), "v": torch.randn(1, 1, 1, 8), **changes}
    if "given together" in words:
        arguments["v" if "k" in changes else "k"] = None
    with pytest.raises(error, match=words):
        sfa_attention_with_kvcache(arguments.pop("q"), cache, **arguments)
    assert (
        cache.seq_lengths().tolist() == [5] and cache.state_dict()["layers"][0]["free"] == before["layers"][0]["free"]
    )
    with pytest.raises(TypeError, match="cache"):
        sfa_attention_with_kvcache(torch.randn(1, 1, 1, 16), {})
