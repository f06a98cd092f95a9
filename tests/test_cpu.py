"""impl="cpu" with numba: the kernels against float64, the layout by feature, what is read, and what it refuses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_sfa import (
    SparseCode,
    SparseKVCache,
    select_impl,
    sfa_attention,
    sfa_attention_varlen,
    sfa_attention_with_kvcache,
    topk_sparsify,
)
from flash_sfa.impl import cpu_numba
from oracle import (
    BF16,
    EXTRA,
    FP16,
    FP32,
    FP64,
    Case,
    check_budget,
    check_lse,
    make_inputs,
    members,
    oracle,
    pairwise,
    poisoned,
    torch_math,
    visible,
)
from oracle import members_of_code as kept_of

pytest.importorskip("numba")
if (reason := cpu_numba.missing()) is not None:  # installed, but broken: not a reason to skip
    pytest.fail(reason, pytrace=False)
from flash_sfa.impl import cpu_kernels

CASES = [
    case
    for case in (*EXTRA, *pairwise())
    if None not in case.pair and case.dense == "none" and "mask" not in case.sees and case.dtype != FP64
]
CASES += [
    Case((300, 300), (2, 1), 64, 64, 8, sees="causal", batch=1),
    Case((140, 300), (4, 4), 128, 128, 8, sees="causal", nonoverlap="drop", batch=1),
    Case((5, 700), (4, 4), 128, 128, 8, batch=1),
    Case((3, 520), (8, 2), 128, 96, 8, sees="causal", dtype=BF16, batch=2),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_grid_is_not_empty() -> None:
    assert len(CASES) >= 25
    assert sum(case.may_drop for case in CASES) >= 5
    assert {case.dtype for case in CASES} == {FP32, BF16, FP16}
    assert any(case.d > 256 for case in CASES) and any(case.sees == "window" for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid(case: Case) -> None:
    x = make_inputs(case)
    kept = [members(t, entry) for t, entry in zip((x.q, x.k), case.pair)]
    arguments = (x.q, x.k, x.v, *kept, visible(*case.lengths, case.window), x.grad)
    how: dict[str, Any] = {"drop": case.nonoverlap == "drop", "scale": case.scale}
    exact, comparator = oracle(*arguments, **how), torch_math(*arguments, **how)
    with poisoned():
        out, lse = sfa_attention(x.q, x.k, x.v, **case.options(None), return_lse=True, impl="cpu")
    assert out.dtype == case.dtype and lse.dtype == FP32
    check_lse(lse, exact.lse)
    check_budget("out", out, exact.out, comparator.out)


@pytest.mark.parametrize("sees", ["all", "causal", "window"])
def test_packed_sequences(sees: str) -> None:
    window = {"all": (-1, -1), "causal": (-1, 0), "window": (40, 3)}[sees]
    lengths_q, lengths_k = [5, 0, 263, 1, 20], [9, 30, 263, 0, 300]
    q, k, v = normal(sum(lengths_q), 4, 64, seed=1), normal(sum(lengths_k), 2, 64, seed=2), normal(602, 2, 48, seed=3)
    ends = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (lengths_q, lengths_k)]
    out, lse = sfa_attention_varlen(
        q, k, v, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], topk=8, window_size=window, return_lse=True, impl="cpu"
    )
    want, want_lse = sfa_attention_varlen(
        q.double(), k.double(), v.double(), cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], topk=8, window_size=window,
        return_lse=True, impl="reference",
    )  # fmt: skip
    check_lse(lse, want_lse)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    assert (lse[:, 268] == -torch.inf).all() and not out[268].any()


# Over the cache


def filled(lengths: list[int], *, hkv: int, d: int = 64, dv: int = 64, topk: int = 8, seed: int = 0, **options: Any):
    cache = SparseKVCache(
        num_kv_heads=hkv,
        head_dim=d,
        v_head_dim=dv,
        topk=topk,
        **{"dtype": FP32, "max_tokens": sum(lengths) + 400} | options,
    )
    for i, n in enumerate(lengths):
        ids = cache.alloc(1)
        for start in range(0, n, 133):
            count = min(133, n - start)
            k = normal(1, count, hkv, d, seed=seed + 97 * i + start, dtype=cache.dtype)
            cache.append(
                k, normal(1, count, hkv, dv, seed=seed + 10_000 + 97 * i + start, dtype=cache.dtype), seq_ids=ids
            )
    return cache


def check_step(cache: SparseKVCache, q: Tensor, *, causal: bool = True, **options: Any) -> dict[str, Tensor]:
    """A call over the cache against the oracle of each sequence; returns its stats."""
    assert cpu_numba.takes_cache(cache)
    with poisoned():
        out, lse, stats = sfa_attention_with_kvcache(
            q, cache, causal=causal, return_lse=True, return_stats=True, impl="cpu", **options
        )
    left, right = options.get("window_size", (-1, -1))
    drop = options.get("nonoverlap") == "drop"
    code = topk_sparsify(q, cache.topk)
    for row, seq_id in enumerate(cache._ids):
        keys, v = cache.gather(0, seq_id)
        if v.shape[0] == 0:
            assert not out[row].any() and (lse[row] == -torch.inf).all()
            continue
        keys, v, mine = keys.map(lambda x: x[None]), v.to(cache.dtype)[None], code.map(lambda x, row=row: x[row, None])
        seen = visible(q.shape[1], v.shape[1], (left, 0 if causal else right))
        arguments = (mine.to_dense(), keys.to_dense(), v, kept_of(mine), kept_of(keys), seen, torch.zeros_like(out[:1]))
        exact, comparator = oracle(*arguments, drop=drop), torch_math(*arguments, drop=drop)
        check_budget("out", out[row, None], exact.out, comparator.out)
        check_lse(lse[row, None], exact.lse)
    return stats


@pytest.mark.parametrize(
    ("dtype", "v_dtype", "page_size"),
    [
        (FP32, None, 128), (FP32, None, 16), (BF16, None, 100), (FP16, None, 256), (BF16, FP32, 128),
        (BF16, torch.int8, 48), (FP16, torch.float8_e4m3fn, 128), (FP32, torch.int8, 128),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("hq", "hkv", "sq"), [(2, 2, 1), (8, 2, 1), (8, 1, 3), (4, 4, 40)])
def test_cache(dtype: torch.dtype, v_dtype: Any, page_size: int, hq: int, hkv: int, sq: int) -> None:
    lengths = [400, 0, 129, 2]
    cache = filled(lengths, hkv=hkv, dtype=dtype, v_dtype=v_dtype, page_size=page_size)
    q = normal(len(lengths), sq, hq, 64, seed=5, dtype=dtype)
    check_step(cache, q)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (140, -1)}, {"window_size": (0, 0)}, {"window_size": (200, 3), "causal": False},
        {"nonoverlap": "drop"}, {"nonoverlap": "drop", "window_size": (9, -1)}, {"causal": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sq", [1, 7])
def test_cache_visibility_and_drop(options: dict[str, Any], sq: int) -> None:
    cache = filled([700, 129, 3], hkv=2, topk=4, page_size=64)
    check_step(cache, normal(3, sq, 4, 64, seed=5), **options)


def test_spans_of_a_long_sequence() -> None:
    """More key blocks than a span, and a sequence that starts in none of them."""
    n = 2 * cpu_numba._SPAN * 128 + 77
    cache = filled([0, 5], hkv=1, d=32, dv=32, topk=4, max_tokens=n + 400)
    k, v = normal(1, n, 1, 32, seed=1), normal(1, n, 1, 32, seed=2)
    cache.append(k, v, seq_ids=[0])
    assert len(cpu_numba._tasks(np.array([1]), np.array([n]), 1, 2)) == 3
    check_step(cache, normal(2, 1, 2, 32, seed=3))
    check_step(cache, normal(2, 1, 2, 32, seed=4), window_size=(200, 0))


def test_forks_and_cuts_are_followed() -> None:
    """Nothing about the tokens is kept between calls, so what the cache does to them shows at once."""
    cache = filled([300], hkv=2, page_size=64)
    q = normal(1, 1, 4, 64, seed=5)
    check_step(cache, q)
    cache.fork(0)
    cache.truncate([0], [100])
    cache.append(normal(1, 250, 2, 64, seed=8), normal(1, 250, 2, 64, seed=9), seq_ids=[0])
    check_step(cache, q.expand(2, 1, 4, 64))


def test_rows_without_overlap_are_not_read() -> None:
    cache = filled([1000], hkv=2, d=128, dv=32)
    q = normal(1, 1, 2, 128, seed=5)
    stats = check_step(cache, q)
    clean = sfa_attention_with_kvcache(q, cache, impl="cpu")
    _, plain = sfa_attention_with_kvcache(q, cache, impl="cpu", tolerance=1e-30, return_stats=True)
    assert torch.equal(stats["rows_read"], plain["rows_read"])
    assert (stats["rows_read"] < 500).all() and not stats["misplaced_weight"].any()
    keys, _ = cache.gather(0, 0)
    overlap = (kept_of(topk_sparsify(q, 8))[0, 0].float()[None] * kept_of(keys).float()).sum(-1) > 0
    pool, pages = cache._layers[0], cache._layers[0].sequences[0].pages
    for head in range(2):
        for token in (~overlap[:, head]).nonzero()[:, 0].tolist():
            pool.v[pages[token // 128], head, token % 128] = torch.nan
    # The running sums still hold the rows.
    assert torch.equal(sfa_attention_with_kvcache(q, cache, impl="cpu"), clean)


@pytest.mark.parametrize("nonoverlap", ["zero", "drop"])
@pytest.mark.parametrize("apart", [0, 1, 7, 129])
@pytest.mark.parametrize("score", [-100.0, -20.0, 20.0, 80.0])
def test_scores_far_from_zero(score: float, apart: int, nonoverlap: str) -> None:
    """Every key overlaps but `apart` of them: neither 0/0 nor cancellation, whoever carries the weight."""
    n = 400
    k = torch.zeros(1, n, 1, 16)
    k[..., 0] = score + 0.1 * normal(1, n, 1, seed=1)
    k[:, :apart] = k[:, :apart].roll(3, -1)
    v, q = normal(1, n, 1, 16, seed=2), torch.zeros(1, 1, 1, 16)
    q[..., 0] = 1.0
    options: dict[str, Any] = {"softmax_scale": 1.0, "nonoverlap": nonoverlap, "return_lse": True}
    want, want_lse = sfa_attention(q.double(), k.double(), v.double(), topk=1, impl="reference", **options)
    for rows in (1, 9):
        out, lse = sfa_attention(q.expand(1, rows, 1, 16), k, v, topk=1, impl="cpu", **options)
        torch.testing.assert_close(out.double(), want.expand(1, rows, 1, 16), rtol=2e-6, atol=2e-6)
        check_lse(lse, want_lse.expand(1, 1, rows))


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [2, 200])
def test_non_finite_values_stay_where_they_are_seen(which: str, value: float, rows: int) -> None:
    x = {"q": normal(1, rows, 2, 32, seed=1), "k": normal(1, 200, 1, 32, seed=2), "v": normal(1, 200, 1, 32, seed=3)}
    clean, clean_lse = sfa_attention(*x.values(), topk=4, causal=True, return_lse=True, impl="cpu")
    at = rows // 2 if which == "q" else 199 - rows // 2
    x[which][0, at, 0, 5] = 1e30
    x[which][0, at, 0, 5] = value
    out, lse = sfa_attention(*x.values(), topk=4, causal=True, return_lse=True, impl="cpu")
    touched = torch.zeros(1, rows, 2, dtype=torch.bool)
    if which == "q":
        touched[0, at, 0] = True
    else:
        touched[0, at - 200 + rows :] = True
    assert torch.equal(out[~touched], clean[~touched]) and torch.equal(out.isfinite().all(-1), ~touched)
    if which != "v":
        assert lse.transpose(1, 2)[touched].isnan().all()
    assert torch.equal(lse.transpose(1, 2)[~touched], clean_lse.transpose(1, 2)[~touched])


def test_threads_and_batch_do_not_change_a_bit() -> None:
    q, k, v = normal(3, 150, 4, 64, seed=1), normal(3, 700, 2, 64, seed=2), normal(3, 700, 2, 64, seed=3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sfa_attention(q, k, v, topk=8, causal=True, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = sfa_attention(q[1:2], k[1:2], v[1:2], topk=8, causal=True, impl="cpu")
    assert torch.equal(alone, results[0][1:2])


def test_without_openmp_a_pool_shares_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = normal(1, 300, 2, 64, seed=1), normal(1, 700, 2, 64, seed=2)
    wanted = sfa_attention(q, k, k, topk=8, impl="cpu")
    for openmp in (cpu_numba._openmp(), None):
        monkeypatch.setattr(cpu_numba, "_openmp", lambda openmp=openmp: openmp)
        assert torch.equal(sfa_attention(q, k, k, topk=8, impl="cpu"), wanted)
        covered: list[tuple[int, int]] = []
        cpu_numba._share(1000, lambda begin, end, covered=covered: covered.append((begin, end)), True)
        assert sorted(i for part in covered for i in range(*part)) == list(range(1000))
        with pytest.raises(ZeroDivisionError):
            cpu_numba._share(100, lambda begin, end: 1 // 0, True)


# Layout and top-k


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 128), d=st.integers(1, 40), w=st.integers(1, 9))
def test_by_feature_equals_a_dense_construction(data: Any, n: int, d: int, w: int) -> None:
    """Lists hold every entry once, in order; padding (a repeated index with value 0) included."""
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.integers(0, d, (n, w)), axis=1).astype(np.uint16)
    values = rng.standard_normal((n, w)).astype(np.float32)
    values[:, 1:][indices[:, 1:] == indices[:, :-1]] = 0.0
    offsets, ids = np.full(d + 1, -1, np.int32), np.full(128 * w, 255, np.uint8)
    listed = np.full(128 * w, np.nan, np.float32)
    cpu_kernels.by_feature(indices, values, n, offsets, ids, listed)
    assert offsets[0] == 0 and offsets[-1] == n * w and (np.diff(offsets) >= 0).all()
    dense, counts = np.zeros((n, d), np.float32), np.zeros((n, d), np.int64)
    for u in range(d):
        part = slice(offsets[u], offsets[u + 1])
        assert (np.diff(ids[part].astype(int)) >= 0).all()
        np.add.at(dense[:, u], ids[part], listed[part])
        np.add.at(counts[:, u], ids[part], 1)
    wanted, times = np.zeros((n, d), np.float32), np.zeros((n, d), np.int64)
    np.add.at(wanted, (np.arange(n)[:, None], indices), values)
    np.add.at(times, (np.arange(n)[:, None], indices), 1)
    assert np.array_equal(dense, wanted) and np.array_equal(counts, times)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    d=st.sampled_from([1, 5, 64, 300]), topk=st.integers(1, 20), dtype=st.sampled_from([FP32, BF16, FP16]),
    seed=st.integers(0, 2**31), steps=st.sampled_from([2, 8, 10_000]),
)  # fmt: skip
def test_top_rows_equal_topk_sparsify(d: int, topk: int, dtype: torch.dtype, seed: int, steps: int) -> None:
    """Ties, NaN of both signs, infinities and zeros of both signs included."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, d, generator=gen).mul(steps).round().div(steps)
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0])
    at = torch.rand(x.shape, generator=gen) < 0.1
    x = torch.where(at, odd[torch.randint(6, x.shape, generator=gen)], x).to(dtype)
    with poisoned():
        ours, wanted = cpu_numba.sparsify(x, topk), topk_sparsify(x, topk)
    assert torch.equal(ours.indices, wanted.indices) and ours.indices.dtype == wanted.indices.dtype
    assert ours.dtype == dtype and torch.equal(ours.values.isnan(), wanted.values.isnan())
    assert torch.equal(ours.values.nan_to_num(), wanted.values.nan_to_num())


def test_a_padded_code_counts_its_zeros_as_members() -> None:
    k = SparseCode(
        torch.tensor([[2.0, 0.0], [1.0, 3.0]])[None, :, None],
        torch.tensor([[1, 1], [0, 2]]).byte()[None, :, None],
        dim=8,
    )
    q = SparseCode(torch.tensor([0.0, 1.0])[None, None, None], torch.tensor([1, 3]).byte()[None, None, None], dim=8)
    v = torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    assert sfa_attention(q, k, v, nonoverlap="drop", impl="cpu").item() == 5.0
    assert sfa_attention(q, k, v, nonoverlap="zero", impl="cpu").item() == 6.0


# What is chosen, and what is refused


def test_auto_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1024, 1, 128)
    assert select_impl(x, x, x, topk=5, causal=True)["forward"] == "cpu"
    assert select_impl(x, x, x, topk=5, causal=True)["backward"] == "none"
    code = topk_sparsify(x, 5)
    assert select_impl(code, code, x)["forward"] == "cpu"
    for other in (
        select_impl(x[:, :512], x[:, :512], x[:, :512], topk=5),
        select_impl(x, x, x, topk=6),
        select_impl(x, x, x, topk=(None, 5)),
        select_impl(x, x, x, topk=5, dense_dims=4),
        select_impl(x.bfloat16(), x.bfloat16(), x.bfloat16(), topk=5),
        select_impl(x[..., :64], x[..., :64], x, topk=2),
        select_impl(x.requires_grad_(), x, x, topk=5),
    ):
        assert other["forward"] == "sdpa"
    with torch.no_grad():
        assert select_impl(x, x, x, topk=5)["forward"] == "cpu"
        monkeypatch.setattr(cpu_numba, "_kernels", lambda: (None, "it needs numba: gone"))
        assert select_impl(x, x, x, topk=5)["forward"] == "sdpa"
        with pytest.raises(NotImplementedError, match=r"impl='cpu'.*numba: gone"):
            sfa_attention(x[:, :9], x[:, :9], x[:, :9], topk=5, impl="cpu")


def test_without_numba_decode_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, q = filled([300], hkv=2), normal(1, 1, 4, 64, seed=5)
    out = sfa_attention_with_kvcache(q, cache, impl="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(cpu_numba, "attend", lambda *_: pytest.fail("the kernels ran"))
        with pytest.raises(pytest.fail.Exception):
            sfa_attention_with_kvcache(q, cache)
        patch.setattr(cpu_numba, "_kernels", lambda: (None, "gone"))
        plain = sfa_attention_with_kvcache(q, cache)
    torch.testing.assert_close(out, plain)


def test_no_backward() -> None:
    q = normal(1, 5, 2, 32).requires_grad_()
    with pytest.raises(NotImplementedError, match="impl='cpu' has no backward"):
        sfa_attention(q, q.detach(), q.detach(), topk=4, impl="cpu").sum().backward()
    cache = filled([300], hkv=2)
    query = normal(1, 1, 4, 64, seed=5).requires_grad_()
    sfa_attention_with_kvcache(query, cache, impl="cpu").sum().backward()  # the plain path has one
    assert query.grad is not None and query.grad.any()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({"attn_mask": torch.ones(1, 1, 1, 5, dtype=torch.bool)}, "attn_mask"),
    "dense side": ({"topk": (None, 4)}, "dense side"),
    "dense_dims": ({"dense_dims": 2}, "dense_dims"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p=0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    options, words = REFUSED[name]
    x = normal(1, 5, 2, 32)
    with pytest.raises(NotImplementedError, match=f"impl='cpu'.*{words}"):
        sfa_attention(x, x, x, **{"topk": 4} | options, impl="cpu")
    with pytest.raises(NotImplementedError, match="float64"):
        sfa_attention(x.double(), x.double(), x.double(), topk=4, impl="cpu")


def test_operator() -> None:
    code, v = topk_sparsify(normal(1, 9, 2, 32), 4), normal(1, 9, 2, 16)
    arguments = (code.values, code.indices, code.values, code.indices, v, None, None, 32, -1, 0, 0.2, False)
    torch.library.opcheck(torch.ops.flash_sfa.cpu.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_empty_inputs() -> None:
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        q, k = normal(1, sq, 2, 32), normal(1, sk, 2, 32)
        out, lse = sfa_attention(q, k, k, topk=4, return_lse=True, impl="cpu")
        assert out.shape == (1, sq, 2, 32) and not out.any() and (lse == -torch.inf).all()


def test_scores_of_minus_infinity_under_drop_are_not_nothing() -> None:
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 3, 1, 8), torch.ones(1, 3, 1, 4)
    q[..., 2], k[..., 2] = torch.inf, -1.0
    call = {"topk": 1, "nonoverlap": "drop", "return_lse": True}
    with torch.no_grad():
        for impl in ("reference", "cpu"):
            out, lse = sfa_attention(q, k, v, impl=impl, **call)
            assert out.isnan().all() and lse.isnan().all(), impl
