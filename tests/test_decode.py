"""Attention over the cache: equal to prefill, exact V skipping, the certified tolerance, and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_sfa import SparseKVCache, sfa_attention, sfa_attention_with_kvcache, topk_sparsify
from flash_sfa import decode as decode_module

D, DV, HQ, HKV = 32, 24, 4, 2
IMPLS = ("cpu", "reference", "sdpa")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def new_cache(**options):
    options = {"num_kv_heads": HKV, "head_dim": D, "v_head_dim": DV, "topk": 4, "max_tokens": 2048, "page_size": 16,
               "dtype": torch.float64} | options  # fmt: skip
    return SparseKVCache(**options)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(n, *, hkv=HKV, d=D, dv=DV, seed=0, **options):
    """A cache with one sequence of n tokens, and its k and v (1, n, hkv, .)."""
    cache = new_cache(num_kv_heads=hkv, head_dim=d, v_head_dim=dv, **options)
    cache.alloc(1)
    k, v = normal(1, n, hkv, d, seed=seed, dtype=cache.dtype), normal(1, n, hkv, dv, seed=seed + 1, dtype=cache.dtype)
    cache.append(k, v)
    return cache, k, v


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# Decode equals prefill

CASES = {
    "plain": {},
    "one entry": {"topk": 1},
    "whole rows": {"topk": D},
    "dense_dims": {"dense_dims": 5},
    "dense_dims list": {"dense_dims": [3, 30], "topk": 2},
    "drop": {"nonoverlap": "drop", "topk": 2},
    "window": {"window_size": (20, -1)},
    "long window": {"window_size": (150, 0)},
    "window of one": {"window_size": (0, 0)},
    "drop and window": {"nonoverlap": "drop", "topk": 1, "window_size": (9, -1)},
    "scale": {"softmax_scale": 2.0},
    "dense q": {"topk": (None, 4)},
    "pair": {"topk": (9, 4)},
}


# sdpa has no drop mode; test_what_cannot_be_done checks that it says so.
@pytest.mark.parametrize(
    ("name", "impl"),
    [(name, impl) for name in CASES for impl in IMPLS if not (impl == "sdpa" and "nonoverlap" in CASES[name])],
)
def test_decode_equals_prefill(name, impl):
    options = dict(CASES[name])
    topk, dense_dims = options.pop("topk", 4), options.pop("dense_dims", 0)
    cache = new_cache(topk=topk[1] if isinstance(topk, tuple) else topk, dense_dims=dense_dims)
    cache.alloc(2)
    q, k, v = normal(2, 300, HQ, D, seed=1), normal(2, 300, HKV, D, seed=2), normal(2, 300, HKV, DV, seed=3)
    whole, lse = sfa_attention(
        q, k, v, topk=topk, dense_dims=dense_dims, causal=True, return_lse=True, impl="reference", **options
    )
    at = 0
    for n in (1, 126, 1, 2, 1, 16, 123, 1, 1, 28):
        part = slice(at, at + n)
        out, part_lse = sfa_attention_with_kvcache(
            q[:, part], cache, k=k[:, part], v=v[:, part], topk=topk, return_lse=True, impl=impl, **options
        )
        close(out, whole[:, part])
        close(part_lse, lse[..., part])
        at += n
    assert at == 300 and cache.seq_lengths().tolist() == [300, 300]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"window_size": (3, 5)}, {"window_size": (140, 2)}, {"dense_dims": 3}])
def test_not_causal_and_ragged_with_empty_and_short_sequences(impl, options):
    options = dict(options)
    cache = new_cache(dense_dims=options.pop("dense_dims", 0))
    ids = cache.alloc(5)
    lengths = [0, 2, 129, 300, 1]
    k, v, q = normal(5, 300, HKV, D, seed=1), normal(5, 300, HKV, DV, seed=2), normal(5, 4, HQ, D, seed=3)
    cache.append(k, v, lengths=lengths)
    order = [3, 0, 1, 2, 4]
    for causal in (True, False):
        out, lse = sfa_attention_with_kvcache(
            q, cache, seq_ids=ids[order], causal=causal, return_lse=True, impl=impl, **options
        )
        for row, i in enumerate(order):
            n = lengths[i]
            want, want_lse = sfa_attention(
                q[row, None], k[i : i + 1, :n], v[i : i + 1, :n], topk=4, dense_dims=cache.dense_dims, causal=causal,
                return_lse=True, impl="reference", **options,
            )  # fmt: skip
            close(out[row], want[0])
            close(lse[row], want_lse[0])
        if causal:  # the first queries of a short sequence stand before its first token
            assert (lse[1] == -torch.inf).all() and (out[1] == 0).all()
            assert (lse[2, :, :2] == -torch.inf).all() and (out[2, :2] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hkv", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "v_dtype"),
    [
        (torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.int8), (torch.float16, torch.float8_e4m3fn), (torch.float32, torch.int8),
    ],
)  # fmt: skip
def test_error_budget_in_low_precision(dtype, v_dtype, hkv, impl):
    cache, k, v = filled(400, hkv=hkv, d=64, dv=64, topk=8, dtype=dtype, v_dtype=v_dtype, page_size=100)
    if v_dtype is not None and v_dtype.itemsize == 1:
        v = cache.gather(0, 0)[1][None]
    q = normal(1, 3, 8, 64, seed=7, dtype=dtype)
    out, lse = sfa_attention_with_kvcache(q, cache, return_lse=True, impl=impl)
    rows = [topk_sparsify(x, 8).to_dense() for x in (q, k)]
    exact, exact_lse = sfa_attention(
        *(x.double() for x in (*rows, v)), topk=64, causal=True, return_lse=True, impl="reference"
    )
    query, key, value = (x.transpose(1, 2) for x in (*rows, v.to(dtype)))
    mask = torch.ones(3, 400, dtype=torch.bool).tril(397)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
    budget = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert out.dtype == dtype and (out - exact).abs().max() <= budget
    assert lse.dtype == torch.float32 and ((lse - exact_lse).abs() <= 1e-5 * (1 + exact_lse.abs())).all()


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"causal": False, "window_size": (-1, 3)},
        {"window_size": (30, 0)},
        {"window_size": (5, 0)},
        {"dense_dims": 3},
        {"nonoverlap": "drop"},
    ],
)
def test_a_chunk_of_a_prompt_meets_the_cache_in_spans(impl, options, monkeypatch):
    if impl == "sdpa" and "nonoverlap" in options:
        impl = "reference"
    dense_dims = options.pop("dense_dims", 0)
    lengths = [70, 21, 20, 3, 0]
    cache = new_cache(dense_dims=dense_dims)
    cache.alloc(len(lengths))
    k, v = normal(5, 70, HKV, D, seed=1), normal(5, 70, HKV, DV, seed=2)
    cache.append(k, v, lengths=lengths)
    q = normal(5, 20, HQ, D, seed=3)
    want = sfa_attention_with_kvcache(q, cache, impl=impl, return_lse=True, return_stats=True, **options)
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append(v.shape[1])
        return sfa_attention(q, k, v, **kwargs)

    monkeypatch.setattr(decode_module, "_SPAN", 13)
    monkeypatch.setattr(decode_module, "sfa_attention", spy)
    with torch.no_grad():
        got = sfa_attention_with_kvcache(q, cache, impl=impl, return_lse=True, return_stats=True, **options)
    assert torch.allclose(got[0], want[0], atol=1e-12) and torch.allclose(got[1], want[1], atol=1e-12)
    assert torch.equal(got[2]["rows_read"], want[2]["rows_read"])
    if "window_size" in options and options["window_size"][0] >= 0:
        assert max(seen) == options["window_size"][0] + 20
    else:
        assert seen == [13, 13, 13, 31, 21, 20, 3]
    seen.clear()
    sfa_attention_with_kvcache(q.requires_grad_(), cache, impl=impl, **options)
    assert len(seen) == 4  # one span with a gradient


def test_a_code_as_query_and_a_step_under_autocast():
    cache, _, _ = filled(50)
    q = normal(1, 2, HQ, D, seed=5)
    close(
        sfa_attention_with_kvcache(topk_sparsify(q, 9), cache), sfa_attention_with_kvcache(q, cache, topk=(9, 4)), 0.0
    )
    cache, k, v = filled(50, dtype=torch.bfloat16)
    plain = sfa_attention_with_kvcache(q.bfloat16(), cache, k=k[:, :2], v=v[:, :2])
    cache.truncate([0], [50])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sfa_attention_with_kvcache(q.float(), cache, k=k[:, :2].float(), v=v[:, :2].float())
    assert torch.equal(out, plain)


def test_results_do_not_depend_on_the_batch_or_the_page_size():
    results = []
    for page_size, rows in ((16, [0]), (100, [0, 1, 2]), (256, [2, 0])):
        cache = new_cache(page_size=page_size, dtype=torch.float32)
        cache.alloc(3)
        k, v = normal(3, 280, HKV, D, seed=1).float(), normal(3, 280, HKV, DV, seed=2).float()
        cache.append(k, v, lengths=[280, 31, 150])
        q = normal(3, 2, HQ, D, seed=3).float()[rows]
        results.append(sfa_attention_with_kvcache(q, cache, seq_ids=rows)[rows.index(0)])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gradient_of_q_equals_the_reference():
    cache, _, _ = filled(200)
    grads = []
    for impl in IMPLS:
        q = normal(1, 3, HQ, D, seed=5).requires_grad_()
        out, lse = sfa_attention_with_kvcache(q, cache, return_lse=True, impl=impl)
        ((out * normal(1, 3, HQ, DV, seed=6)).sum() + lse.sum()).backward()
        grads.append(q.grad)
    assert grads[0].abs().max() > 0.01
    close(grads[0], grads[1])
    close(grads[2], grads[1])


def test_a_step_goes_to_the_sequences_that_it_names():
    cache, whole = new_cache(num_layers=2), new_cache()
    k, v, q = normal(3, 4, HKV, D, seed=1), normal(3, 4, HKV, DV, seed=2), normal(3, 4, HQ, D, seed=3)
    cache.alloc(3)
    whole.alloc(3)
    out = sfa_attention_with_kvcache(q[:2], cache, k=k[:2], v=v[:2], seq_ids=[2, 0], layer=1)
    assert cache.seq_lengths(layer=1).tolist() == [4, 0, 4] and cache.seq_lengths().tolist() == [0, 0, 0]
    want = sfa_attention_with_kvcache(q, whole, k=k, v=v)
    close(out, want[:2])


# Exact skipping of V rows


def overlaps(q, k):
    """(sq, hq, n) whether a query and a key keep a common feature."""
    kept_q, kept_k = (topk_sparsify(x, 4).to_dense()[0] != 0 for x in (q, k))
    kept_k = kept_k.repeat_interleave(HQ // HKV, dim=1)
    return (kept_q[:, :, None] & kept_k.transpose(0, 1)[None]).any(-1)


def poison_v(cache, seq_id, head, tokens):
    pool = cache._layers[0]
    for token in tokens:
        page = pool.sequences[seq_id].pages[token // cache.page_size]
        pool.v[page, head, token % cache.page_size] = torch.nan


@pytest.mark.parametrize("page_size", [16, 100, 256])
def test_rows_without_overlap_are_not_read_and_the_others_are(page_size):
    cache, k, _ = filled(300, page_size=page_size)
    q = normal(1, 1, HQ, D, seed=5)
    out, stats = sfa_attention_with_kvcache(q, cache, return_stats=True)
    needed = overlaps(q, k)[0].unflatten(0, (HKV, -1)).any(1)
    assert torch.equal(stats["rows_read"], needed.sum(-1)[None]) and needed.sum() < 0.8 * needed.numel()
    assert (stats["misplaced_weight"] == 0).all()
    assert stats["rows_read"].dtype == torch.int64 and stats["misplaced_weight"].dtype == torch.float32
    assert stats["misplaced_weight"].shape == (1, HQ, 1)
    for head in range(HKV):
        poison_v(cache, 0, head, (~needed[head]).nonzero()[:, 0].tolist())
    assert torch.equal(sfa_attention_with_kvcache(q, cache), out)
    # One row that is counted as read, in head 1: it is.
    poison_v(cache, 0, 1, needed[1].nonzero()[-1].tolist())
    spoiled = sfa_attention_with_kvcache(q, cache)
    assert spoiled[:, :, 2:].isnan().all() and torch.equal(spoiled[:, :, :2], out[:, :, :2])


def test_running_sums_stand_for_the_rows_that_are_not_read():
    cache, _, _ = filled(300)
    q = normal(1, 1, HQ, D, seed=5)
    out = sfa_attention_with_kvcache(q, cache)
    pool = cache._layers[0]
    pool.sums[pool.sequences[0].sums[1]] += 1.0
    assert ((sfa_attention_with_kvcache(q, cache) - out).abs() > 1e-4).all()


@pytest.mark.parametrize("window_size", [(40, 0), (200, 0)])
def test_a_window_reads_the_rows_of_its_edge_blocks_and_nothing_outside(window_size, monkeypatch):
    cache, k, _ = filled(300)
    q = normal(1, 1, HQ, D, seed=5)
    starts, rows = [], cache._rows
    monkeypatch.setattr(
        cache, "_rows", lambda pool, seq, start, stop: starts.append(start) or rows(pool, seq, start, stop)
    )
    out, stats = sfa_attention_with_kvcache(q, cache, window_size=window_size, return_stats=True)
    first = 300 - 1 - window_size[0]
    assert min(starts) == first // 128 * 128
    edge_end = -(-first // 128) * 128
    needed = overlaps(q, k)[0].unflatten(0, (HKV, -1)).any(1)
    needed[:, :first], needed[:, first:edge_end] = False, True
    assert torch.equal(stats["rows_read"], needed.sum(-1)[None])
    for head in range(HKV):
        poison_v(cache, 0, head, (~needed[head]).nonzero()[:, 0].tolist())
    assert torch.equal(sfa_attention_with_kvcache(q, cache, window_size=window_size), out)


def one_hot_cache(features, dtype):
    """Keys that keep one feature each, with value 1; V random."""
    n = len(features)
    cache = new_cache(num_kv_heads=1, topk=1, dtype=dtype)
    cache.alloc(1)
    k = torch.nn.functional.one_hot(torch.tensor(features), D).to(dtype)[None, :, None]
    v = normal(1, n, 1, DV, seed=3, dtype=dtype)
    cache.append(k, v)
    return cache, k, v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("s", [-100.0, -20.0, 0.0, 5.0, 80.0])
@pytest.mark.parametrize(
    "features", [[0] * 300, [0] * 299 + [1], [0] * 127 + [1] + [0] * 172, [0] * 100 + [1] * 28 + [0] * 128, [1] * 200]
)
@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_all_overlap_rows_stay_stable(features, s, dtype, tolerance):
    cache, k, v = one_hot_cache(features, dtype)
    q = torch.zeros(1, 2, 2, D, dtype=dtype)
    q[:, :, 0, 0], q[:, :, 1, 2] = s, s  # head 0 overlaps as features say, head 1 with nothing
    q[:, 1] += q[:, 1]
    for query in (q[:, :, :1], q):  # alone, and in a group with a query that overlaps with nothing
        options = {"softmax_scale": 1.0, "return_lse": True}
        out, lse = sfa_attention_with_kvcache(query, cache, tolerance=tolerance, impl="cpu", **options)
        exact, exact_lse = sfa_attention(
            query.double(), k.double(), v.double(), topk=1, causal=True, impl="reference", **options
        )
        plain = sfa_attention(query, k, v, topk=1, causal=True, impl="reference", **options)[0]
        # Against itself, float64 has no comparator error to allow for.
        eps = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
        budget = 2 * (plain - exact).abs().max() + eps * exact.abs().max() + tolerance * v.abs().max()
        assert (out - exact).abs().max() <= budget
        close(lse.double(), exact_lse, 1e-5 if dtype == torch.float32 else 1e-12)


def test_a_block_where_all_overlap_does_not_use_its_sum():
    cache, _, _ = one_hot_cache([0] * 256 + [1] * 3, torch.float64)
    q = torch.zeros(1, 1, 1, D, dtype=torch.float64)
    q[..., 0] = -20.0
    pool = cache._layers[0]
    pool.sums[pool.sequences[0].sums[:2].tolist()] = torch.nan
    assert sfa_attention_with_kvcache(q, cache).isfinite().all()


# Tolerance


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.sampled_from([1, 3, 113, 128, 239, 500]),
    sq=st.sampled_from([1, 2, 5]),
    hkv=st.sampled_from([1, 2, 4]),
    topk=st.sampled_from([1, 2, 8, D]),
    dense_dims=st.sampled_from([0, 3]),
    sharpness=st.sampled_from([0.1, 1.0, 10.0, 60.0]),
    window=st.sampled_from([(-1, -1), (50, -1), (200, 0), (30, 4)]),
    causal=st.booleans(),
    drop=st.booleans(),
    tolerance=st.sampled_from([1e-6, 1e-3, 0.05, 0.6, 0.99]),
    seed=st.integers(0, 2**16),
)
def test_the_tolerance_bound_holds(
    n, sq, hkv, topk, dense_dims, sharpness, window, causal, drop, tolerance, seed
):  # fmt: skip
    cache, _, v = filled(n, hkv=hkv, topk=topk, dense_dims=dense_dims, seed=seed)
    q = normal(1, sq, 4, D, seed=seed + 5)
    options = {
        "window_size": window, "causal": causal, "softmax_scale": sharpness * D**-0.5, "return_lse": True,
        "nonoverlap": "drop" if drop else "zero", "return_stats": True,
    }  # fmt: skip
    exact, exact_lse, _ = sfa_attention_with_kvcache(q, cache, impl="reference", **options)
    skipped, skipped_lse, base = sfa_attention_with_kvcache(q, cache, impl="cpu", **options)
    out, lse, stats = sfa_attention_with_kvcache(q, cache, impl="cpu", tolerance=tolerance, **options)
    close(skipped, exact)
    close(skipped_lse, exact_lse)
    close(lse, exact_lse)
    misplaced = stats["misplaced_weight"].double()
    assert (misplaced <= tolerance).all() and (stats["rows_read"] <= base["rows_read"]).all()
    largest = v[0].abs().amax((0, 2)).repeat_interleave(4 // hkv)  # a query head
    error = (out - exact).abs().amax((0, 3))  # (sq, hq)
    assert (error <= misplaced[0].T * (1 + 1e-6) * largest + 1e-12).all()


@pytest.mark.parametrize("dense_dims", [0, 4])
def test_tolerance_skips_rows_of_peaked_attention_and_does_not_touch_them(dense_dims):
    cache, _, v = filled(500, dense_dims=dense_dims, topk=16)
    q = normal(1, 2, HQ, D, seed=5)
    options = {"softmax_scale": 4.0 * D**-0.5, "return_stats": True}
    exact, base = sfa_attention_with_kvcache(q, cache, **options)
    out, stats = sfa_attention_with_kvcache(q, cache, tolerance=1e-2, **options)
    assert (base["rows_read"] >= 490).all() and (stats["rows_read"] < 400).all()
    assert (stats["misplaced_weight"] > 0).all() and (stats["misplaced_weight"] <= 1e-2).all()
    assert 0 < (out - exact).abs().max() <= 1e-2 * v.abs().max()
    # As many rows as the statistics say turn the output into NaN, one at a time: no other row is read.
    head, touched = 1, 0
    page = cache._layers[0].sequences[0].pages
    pool = cache._layers[0].v
    for token in range(500):
        place = (page[token // 16], head, token % 16)
        kept = pool[place].clone()
        pool[place] = torch.nan
        touched += bool(sfa_attention_with_kvcache(q, cache, tolerance=1e-2, **options)[0].isnan().any())
        pool[place] = kept
    assert touched == stats["rows_read"][0, head]


def test_a_tolerance_never_reads_more_than_the_exact_path():
    cache, k, _ = one_hot_cache([0] * 100 + [1] * 28, torch.float64)
    cache.truncate([0], [0])
    cache.append(k * (1 + normal(*k.shape).abs()), normal(1, 128, 1, DV))
    q = torch.zeros(1, 1, 1, D, dtype=torch.float64)
    q[..., 0] = 3.0
    for tolerance in (0.0, 1e-12):
        _, stats = sfa_attention_with_kvcache(
            q, cache, softmax_scale=1.0, tolerance=tolerance, return_stats=True, impl="cpu"
        )
        assert stats["rows_read"].item() == 100


def test_exact_implementations_tell_what_they_read():
    cache, _, _ = filled(300)
    q = normal(1, 2, HQ, D, seed=5)
    for impl in ("reference", "sdpa"):
        out, stats = sfa_attention_with_kvcache(q, cache, tolerance=0.3, return_stats=True, impl=impl)
        assert stats["rows_read"].tolist() == [[300, 300]] and (stats["misplaced_weight"] == 0).all()
        close(out, sfa_attention_with_kvcache(q, cache))


# Non-finite values


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_stay_where_they_are_seen(impl, what, value, tolerance):
    cache = new_cache()
    cache.alloc(2)
    k, v, q = normal(2, 200, HKV, D, seed=1), normal(2, 200, HKV, DV, seed=2), normal(2, 6, HQ, D, seed=3)
    cache.append(k, v)
    options = {"impl": impl, "tolerance": tolerance}
    clean = sfa_attention_with_kvcache(q, cache, **options)
    cache.truncate([0, 1], [0, 0])
    (k if what == "k" else v)[0, 197, 0, 3] = value
    cache.append(k, v)
    out = sfa_attention_with_kvcache(q, cache, **options)
    # Queries 0 to 2 of sequence 0 stand before token 197; head group 1 and sequence 1 do not hold it.
    if tolerance == 0.0:
        for part in ((1,), (0, slice(0, 3)), (0, slice(3, 6), slice(2, 4))):
            close(out[part], clean[part])
    assert out[1].isfinite().all() and out[0, :3].isfinite().all() and out[0, :, 2:].isfinite().all()
    assert not out[0, 3:, :2].isfinite().all()
    # Once cut off, it is gone, from the running sum too.
    cache.truncate([0], [197])
    assert sfa_attention_with_kvcache(q, cache, **options).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_non_finite_query_spoils_only_itself(impl):
    cache, _, _ = filled(200)
    q = normal(1, 3, HQ, D, seed=3)
    clean = sfa_attention_with_kvcache(q, cache, impl=impl)
    q[0, 1, 2, 5] = torch.nan
    out = sfa_attention_with_kvcache(q, cache, impl=impl)
    assert out[0, 1, 2].isnan().all()
    out[0, 1, 2] = clean[0, 1, 2]
    close(out, clean)
    if impl == "cpu":
        _, stats = sfa_attention_with_kvcache(q, cache, tolerance=0.9, return_stats=True)
        assert (stats["rows_read"] < 150).all() and (stats["misplaced_weight"] <= 0.9).all()


# Choice of implementation, and bad input


def test_auto_takes_cpu_for_short_queries(monkeypatch):
    calls = []
    attend = decode_module.cpu.attend
    monkeypatch.setattr(decode_module.cpu, "attend", lambda *args: calls.append(len(args[0])) or attend(*args))
    cache, _, _ = filled(100)
    for sq in (1, 16, 17):
        sfa_attention_with_kvcache(normal(1, sq, HQ, D), cache)
    assert calls == [1, 16]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"impl": "triton"}, "triton"),
        ({"impl": "cuda"}, "cuda"),
        ({"impl": "intersect"}, "intersect"),
        ({"impl": "sdpa", "nonoverlap": "drop"}, "drop"),
    ],
)
def test_what_cannot_be_done(options, text):
    cache, k, v = filled(5)
    with pytest.raises(NotImplementedError, match=text):
        sfa_attention_with_kvcache(normal(1, 5, HQ, D), cache, k=k, v=v, **options)
    assert cache.seq_lengths().tolist() == [5]


Q, K, V = normal(2, 3, HQ, D), normal(2, 3, HKV, D, seed=1), normal(2, 3, HKV, DV, seed=2)
BAD = {
    "cache": (TypeError, "cache", {"cache": [1]}),
    "rank": (ValueError, "q must be", {"q": Q[0]}),
    "batch": (ValueError, "q must have one row", {"q": Q[:1]}),
    "heads": (ValueError, "heads of q", {"q": Q[:, :, :3]}),
    "no heads": (ValueError, "heads of q", {"q": Q[:, :, :0]}),
    "dim": (ValueError, "head dim", {"q": Q[..., :8]}),
    "dtype": (TypeError, "dtype", {"q": Q.float()}),
    "integer": (TypeError, "q must be", {"q": Q.long()}),
    "device": (ValueError, "device", {"q": Q.to("meta")}),
    "not a tensor": (TypeError, "q must be", {"q": [1.0]}),
    "k without v": (ValueError, "k without v", {"v": None}),
    "v without k": (ValueError, "v without k", {"k": None}),
    "k shorter than q": (ValueError, "same length", {"k": K[:, :2], "v": V[:, :2]}),
    "k and v": (ValueError, "same length", {"v": V[:, :2]}),
    "k dtype": (TypeError, "k must have", {"k": K.float()}),
    "k heads": (ValueError, "k must be", {"k": K[:, :, :1]}),
    "k no tensor": (TypeError, "k must be", {"k": 3}),
    "layer": (ValueError, "layer", {"layer": 1}),
    "seq unknown": (ValueError, "unknown or freed", {"seq_ids": [0, 5]}),
    "seq freed": (ValueError, "unknown or freed", {"seq_ids": [0, 2]}),
    "seq repeated": (ValueError, "repeat", {"seq_ids": [1, 1]}),
    "topk differs": (ValueError, "differs from the cache", {"topk": 5}),
    "topk pair differs": (ValueError, "differs from the cache", {"topk": (4, 5)}),
    "topk dense k": (ValueError, "differs from the cache", {"topk": (4, None)}),
    "topk none": (ValueError, "both sides dense", {"topk": (None, None)}),
    "topk list": (TypeError, "topk", {"topk": [4, 4]}),
    "topk zero": (ValueError, "topk", {"topk": (0, 4)}),
    "topk float": (TypeError, "topk", {"topk": 4.0}),
    "topk bool": (TypeError, "topk", {"topk": True}),
    "topk of code": (ValueError, "differs from the code", {"q": topk_sparsify(Q, 3), "topk": 4}),
    "dense_dims of code": (ValueError, "dense_dims", {"q": topk_sparsify(Q, 4, dense_dims=1)}),
    "causal": (TypeError, "causal", {"causal": 1}),
    "window": (ValueError, "window_size", {"window_size": (-2, 0)}),
    "window type": (TypeError, "window_size", {"window_size": 3}),
    "scale": (TypeError, "softmax_scale", {"softmax_scale": "1"}),
    "nonoverlap": (ValueError, "nonoverlap", {"nonoverlap": "one"}),
    "tolerance": (ValueError, "tolerance", {"tolerance": -1e-3}),
    "tolerance one": (ValueError, "tolerance", {"tolerance": 1.0}),
    "return_lse": (TypeError, "return_lse", {"return_lse": 1}),
    "return_stats": (TypeError, "return_stats", {"return_stats": None}),
    "impl": (ValueError, "impl", {"impl": "fast"}),
    "full": (ValueError, "full", {"q": Q.repeat(1, 20, 1, 1), "k": K.repeat(1, 20, 1, 1), "v": V.repeat(1, 20, 1, 1)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(name):
    error, text, options = BAD[name]
    cache = new_cache(max_tokens=80)
    cache.alloc(3)
    cache.append(K[:, :2], V[:, :2], seq_ids=[0, 1])
    cache.free([2])
    options = {"q": Q, "cache": cache, "k": K, "v": V} | options
    before = [x.tolist() for i in (0, 1) for x in (cache.gather(0, i)[0].values, cache.gather(0, i)[1])]
    with pytest.raises(error, match=text):
        sfa_attention_with_kvcache(options.pop("q"), options.pop("cache"), **options)
    assert cache.seq_lengths().tolist() == [2, 2]
    assert before == [x.tolist() for i in (0, 1) for x in (cache.gather(0, i)[0].values, cache.gather(0, i)[1])]


def test_empty_batch_and_no_queries():
    cache, _, _ = filled(5)
    for impl in IMPLS:
        out, lse, stats = sfa_attention_with_kvcache(
            normal(0, 3, HQ, D), cache, seq_ids=[], return_lse=True, return_stats=True, impl=impl
        )
        assert out.shape == (0, 3, HQ, DV) and lse.shape == (0, HQ, 3) and stats["rows_read"].shape == (0, HKV)
        assert sfa_attention_with_kvcache(normal(1, 0, HQ, D), cache, impl=impl).shape == (1, 0, HQ, DV)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_cache_gives_zero_gradients(impl):
    cache = new_cache()
    cache.alloc(1)
    q = normal(1, 2, HQ, D).requires_grad_()
    out, lse = sfa_attention_with_kvcache(q, cache, return_lse=True, impl=impl)
    for result in (out, lse):
        (grad,) = torch.autograd.grad(result.sum(), q, retain_graph=True)
        assert (grad == 0).all()


# The same on a GPU

DEVICE = "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dense_dims", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gpu_cache_does_what_a_cpu_cache_does(dtype, dense_dims):
    torch.use_deterministic_algorithms(False)  # it would ask for cuBLAS settings
    caches = [new_cache(dtype=dtype, dense_dims=dense_dims, device=device) for device in ("cpu", DEVICE)]
    k, v, q = (normal(3, 300, heads, dim, seed=heads + dim, dtype=dtype) for heads, dim in ((2, D), (2, DV), (HQ, D)))
    for cache in caches:
        ids = cache.alloc(3).to(cache.device)
        cache.append(k.to(cache.device), v.to(cache.device), lengths=torch.tensor([300, 0, 131], device=cache.device))
        cache.reorder(ids[[0, 0, 2]])
        cache.truncate(ids[1:2], [200])
        cache.fork(ids[2])
        cache.append(k[:, :3].to(cache.device), v[:, :3].to(cache.device), seq_ids=[1, 3, 2])
    assert caches[0].seq_lengths().tolist() == caches[1].seq_lengths().tolist() == [300, 203, 134, 134]
    assert caches[0].nbytes == caches[1].nbytes
    for seq_id in range(4):
        (code, stored), (code_gpu, stored_gpu) = (cache.gather(0, seq_id) for cache in caches)
        assert torch.equal(code.values, code_gpu.values.cpu()) and torch.equal(code.indices, code_gpu.indices.cpu())
        assert torch.equal(stored, stored_gpu.cpu())
        close(caches[0].block_sums(0, seq_id), caches[1].block_sums(0, seq_id).cpu(), 1e-6)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for sq, options in ((1, {}), (3, {"window_size": (150, 0)}), (20, {}), (2, {"tolerance": 0.1, "impl": "cpu"})):
        rows = torch.cat([q, q[:1]])[:, :sq]
        (out, lse, stats), (gpu, gpu_lse, gpu_stats) = (
            sfa_attention_with_kvcache(
                rows.to(cache.device), cache, return_lse=True, return_stats=True, **({"impl": "cpu"} | options)
            )
            for cache in caches
        )
        close(gpu.cpu(), out, tol)
        close(gpu_lse.cpu(), lse, 1e-12 if dtype == torch.float64 else 1e-5)
        if "tolerance" not in options:  # there, rounding may move a row across the threshold
            assert torch.equal(gpu_stats["rows_read"].cpu(), stats["rows_read"])
        auto = sfa_attention_with_kvcache(rows.to(DEVICE), caches[1], window_size=options.get("window_size", (-1, -1)))
        close(auto.cpu(), out, 0.1 * v.abs().max().item() if "tolerance" in options else tol)


@pytest.mark.gpu
@pytest.mark.parametrize("v_dtype", [None, torch.int8])
def test_a_chunk_on_a_gpu_never_expands_all_keys(v_dtype, monkeypatch):
    monkeypatch.setattr(decode_module, "_SPAN", 4096)
    n, sq, d = 65536, 256, 128
    cache = SparseKVCache(
        num_kv_heads=8, head_dim=d, topk=8, max_tokens=n, page_size=256, v_dtype=v_dtype, device="cuda"
    )
    cache.alloc(1)
    for _ in range(n // 8192):
        k, v = (torch.randn(1, 8192, 8, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache.append(k, v)
    q = torch.randn(1, sq, 16, d, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        sfa_attention_with_kvcache(q, cache)  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = sfa_attention_with_kvcache(q, cache, return_lse=True)
        assert torch.cuda.max_memory_allocated() - before < n * 8 * d * 2  # the dense keys alone
        want, want_lse = sfa_attention_with_kvcache(q[:, -16:], cache, return_lse=True, impl="cuda")
    torch.testing.assert_close(out[:, -16:], want, atol=4e-3 * float(want.abs().max()), rtol=2**-6)
    torch.testing.assert_close(lse[..., -16:], want_lse, atol=1e-4, rtol=1e-5)
