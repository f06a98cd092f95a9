"""decode_all.cu against the reference in float64: on a GPU (-m gpu), and its source compiled for the CPU."""

from types import SimpleNamespace

import pytest
import torch

from flash_sfa import sfa_attention_with_kvcache, topk_sparsify
from flash_sfa.impl import cuda_decode, cuda_decode_all
from test_gpu_decode import BF16, FP16, FP32, attend, compare, device, filled, fresh_memory_is_nan, normal  # noqa: F401

INT8, FP8 = torch.int8, torch.float8_e4m3fn


def check(cache, q, **options):
    """The kernel within the budget, all visible rows read."""
    out, lse, rows = compare(cache, q, every_row=True, **options)
    if not {"window", "ROWS"} & {*options} and q.shape[1] * q.shape[2] // cache.num_kv_heads <= 8:
        lengths = cache.seq_lengths().to(rows.device)
        assert torch.equal(rows, lengths[:, None].expand_as(rows))
    return out, lse, rows


@pytest.mark.parametrize(
    ("dtype", "v_dtype", "group", "page_size"),
    [
        (BF16, None, 1, 16), (BF16, None, 4, 128), (BF16, None, 8, 256), (FP16, None, 4, 48), (BF16, INT8, 4, 16),
        (BF16, FP8, 8, 64), (BF16, FP16, 3, 80), (FP16, BF16, 16, 16), (FP16, FP8, 1, 256),
    ],
)  # fmt: skip
def test_ragged_lengths(dtype, v_dtype, group, page_size, device):  # noqa: F811
    cache = filled([300, 0, 1, 129, 400, 16], page_size=page_size, dtype=dtype, v_dtype=v_dtype, device=device)
    check(cache, normal(6, 1, 2 * group, 64, seed=3, dtype=dtype, device=device))


@pytest.mark.parametrize("sq", [3, 16])
@pytest.mark.parametrize("window", [(-1, 0), (40, 0), (130, 0), (-1, -1), (3, 5), (0, 0)])
@pytest.mark.parametrize(("group", "v_dtype"), [(1, BF16), (4, INT8), (3, BF16)], ids=str)
def test_several_queries_and_windows(sq, window, group, v_dtype, device):  # noqa: F811
    cache = filled([170, 2, 129], dtype=BF16, v_dtype=v_dtype, device=device)
    check(cache, normal(3, sq, 2 * group, 64, seed=3, dtype=BF16, device=device), window=window)


@pytest.mark.parametrize(
    ("d", "dv", "topk", "dense_dims", "dtype", "v_dtype", "topk_q", "group"),
    [
        (128, 128, 8, 0, BF16, None, None, 4), (128, 128, 8, 16, BF16, None, None, 1),
        (256, 256, 8, 0, BF16, None, None, 8), (128, 128, 8, 16, BF16, INT8, None, 1),
        (128, 192, 7, 0, FP16, FP8, 16, 3), (64, 192, 8, 3, BF16, None, None, 2),
        (60, 64, 5, [3, 1, 59], FP16, None, 2, 3), (320, 128, 9, 0, BF16, INT8, None, 4),
        (320, 64, 16, 5, BF16, None, 3, 1), (64, 64, 32, 0, BF16, None, "dense", 1),
        (64, 256, 8, [3, 9], BF16, FP8, "dense", 3), (1024, 64, 8, 0, FP16, None, None, 8),
        (32, 128, 32, 0, BF16, None, None, 4), (64, 64, 12, 12, BF16, INT8, None, 1),
        (64, 64, 1, 0, BF16, None, None, 5),
    ],
)  # fmt: skip
def test_shapes(d, dv, topk, dense_dims, dtype, v_dtype, topk_q, group, device):  # noqa: F811
    cache = filled([200, 31], d=d, dv=dv, topk=topk, dense_dims=dense_dims, dtype=dtype, v_dtype=v_dtype, device=device)
    q = normal(2, 2 if group == 3 else 1, 2 * group, d, seed=3, dtype=dtype, device=device)
    check(cache, q, topk_q=topk_q, coded=topk_q != "dense" and group % 2 == 0)


@pytest.mark.parametrize(
    ("settings", "span"),
    [({"UNROLL": 1}, 1), ({"UNROLL": 3}, 4), ({"AHEAD": 0}, 1), ({"WARPS": 1}, 1), ({"WARPS": 8}, 4), ({"ROWS": 2}, 4)],
)
def test_settings_and_splits(settings, span, device):  # noqa: F811
    cache = filled([700, 129], d=128, dv=128, dense_dims=2, dtype=BF16, device=device)
    q = normal(2, 1, 8, 128, seed=3, dtype=BF16, device=device)
    check(cache, q, span=span, max_splits=2 if span == 1 else 128, **settings)


@pytest.mark.parametrize("scale", [8.0, -0.3, 0.0])
@pytest.mark.parametrize(
    ("v_dtype", "size"), [(BF16, 1e30), (FP16, 50.0), (INT8, 1e20), (INT8, 1e-12), (FP8, 300.0)], ids=str
)
def test_large_scores_and_values(scale, v_dtype, size, device):  # noqa: F811
    """The maximum grows from block to block; rows of V are of very different sizes."""

    def change(k, v):
        k *= torch.linspace(0.01, 3, k.shape[1], device=k.device)[:, None, None]
        v *= size
        v[0, 3] = 0.0
        v[0, ::7] *= 2.0**-20

    cache = filled([700, 130], dtype=BF16, v_dtype=v_dtype, device=device, change=change)
    check(cache, normal(2, 1, 4, 64, seed=3, dtype=BF16, device=device), scale=scale, max_splits=1)


def test_the_second_half_of_a_weight_counts(device):  # noqa: F811
    """Rows of ones: the sum of the rounded weights is Z to more than 8 bits."""
    cache = filled([3, 5, 17], dtype=FP16, v_dtype=BF16, device=device, change=lambda k, v: v.fill_(1.0))
    out = attend(cache, normal(3, 1, 16, 64, seed=3, dtype=FP16, device=device), every_row=True)[0]
    assert (out == 1).all()


def test_rows_of_zeros_in_8_bits(device):  # noqa: F811
    cache = filled([300], dtype=BF16, v_dtype=INT8, device=device, change=lambda k, v: v.zero_())
    out, _, _ = check(cache, normal(1, 1, 8, 64, seed=3, dtype=BF16, device=device))
    assert (out == 0).all()


@pytest.mark.parametrize("what", ["k", "v", "q"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("group", "v_dtype"), [(1, None), (8, None), (4, INT8)], ids=str)
def test_non_finite_values_stay_where_they_are_seen(what, value, group, v_dtype, device):  # noqa: F811
    q = normal(2, 6, 2 * group, 64, seed=3, dtype=BF16, device=device)
    options = {"dtype": BF16, "v_dtype": v_dtype, "device": device}
    clean, clean_lse, _ = check(filled([150, 20], **options), q)
    if what == "q":
        q[0, 4, 0, 3] = value

    def change(k, v):
        if what != "q":
            (k if what == "k" else v)[0, 147, 0, 3] = value

    out, lse, _, _ = attend(filled([150, 20], **options, change=change), q, every_row=True)
    if what == "q":
        assert out[0, 4, 0].isnan().all() and lse[0, 0, 4].isnan()
        out[0, 4, 0], lse[0, 0, 4] = clean[0, 4, 0], clean_lse[0, 0, 4]
    else:  # queries 0 to 2 stand before token 147
        seen = out[0, 3:, :group]
        assert not seen.isfinite().all((1, 2)).any()
        if what == "v":
            assert lse.isfinite().all()
            assert v_dtype is not None or seen[..., [c for c in range(64) if c != 3]].isfinite().all()
        else:
            assert seen.isnan().all()
            lse[0, :group, 3:] = clean_lse[0, :group, 3:]
        out[0, 3:, :group] = clean[0, 3:, :group]
    torch.testing.assert_close(out, clean)
    torch.testing.assert_close(lse, clean_lse)


@pytest.mark.parametrize("v_dtype", [BF16, INT8, FP8], ids=str)
def test_what_nothing_sees_may_hold_anything(v_dtype, device):  # noqa: F811
    """Before a window, beyond the end, and in pages of others."""
    cache = filled([210, 77], dtype=BF16, v_dtype=v_dtype, page_size=32, device=device)
    q = normal(2, 2, 8, 64, seed=3, dtype=BF16, device=device)
    window = (50, 0)
    clean = check(cache, q, window=window)
    pool = cache._layers[0]
    pages = [s.pages for s in pool.sequences.values()]
    keep = torch.zeros(*pool.v.shape[:1], 32, dtype=torch.bool, device=device)
    for length, table in zip((210, 77), pages):
        for token in range(length - 2 - 50, length):
            keep[table[token // 32], token % 32] = True
    lost = ~keep[:, None].expand(-1, 2, -1)
    for x in (pool.values, pool.v_scale, *((pool.v,) if v_dtype == BF16 else ())):
        x[lost] = torch.nan
    pool.sums.fill_(torch.nan)
    if v_dtype != BF16:
        pool.v[lost] = 0x7F
    again = attend(cache, q, window=window, every_row=True)
    assert torch.equal(again[0], clean[0]) and torch.equal(again[1], clean[1])


@pytest.mark.parametrize("v_dtype", [BF16, INT8], ids=str)
def test_results_do_not_depend_on_the_batch_or_on_the_pages(v_dtype, device):  # noqa: F811
    results = []
    for page_size, rows in ((16, [0, 1, 2]), (80, [2, 0])):
        cache = filled([1200, 129, 300], page_size=page_size, dtype=BF16, v_dtype=v_dtype, device=device)
        q = normal(3, 1, 4, 64, seed=3, dtype=BF16, device=device)[rows]
        results.append(attend(cache, q, ids=rows, every_row=True)[0][rows.index(0)])
    assert torch.equal(results[0], results[1])


def test_pages_that_were_shared_and_moved(device):  # noqa: F811
    cache = filled([300, 200, 50], page_size=64, dtype=BF16, device=device)
    cache.fork(0)
    cache.reorder([1, 0, 2, 0])
    cache.truncate([0, 3], [131, 290])
    k, v = normal(2, 20, 2, 64, seed=8, dtype=BF16, device=device), normal(2, 20, 2, 64, dtype=BF16, device=device)
    cache.append(k, v, seq_ids=[2, 1])
    check(cache, normal(4, 1, 4, 64, seed=3, dtype=BF16, device=device))


@pytest.mark.parametrize(
    ("cache", "rows", "entries", "drop", "taken"),
    [
        ({}, 8, 8, False, True), ({}, 1, 8, False, False), ({}, 4, 8, False, False), ({}, 4, 16, False, True),
        ({}, 1, None, False, True), ({"dense_dims": (3,)}, 1, 8, False, True), ({}, 8, 8, True, False),
        ({}, 4, None, True, True), ({"head_dim": 256}, 4, 8, False, False), ({"head_dim": 256}, 16, 8, False, True),
        ({"width": 16}, 2, 16, False, True), ({"dtype": FP32}, 8, 8, False, False),
        ({"v_dtype": INT8}, 4, 8, False, True), ({"v_dtype": INT8}, 2, 8, False, True),
        ({"v_dtype": INT8}, 1, 8, False, False), ({"v_dtype": FP32}, 8, 8, False, False),
        ({"v_head_dim": 96}, 8, 8, False, False), ({"v_head_dim": 320}, 8, 8, False, False),
        ({"page_size": 24}, 8, 8, False, False),
    ],
)  # fmt: skip
def test_which_calls_it_takes(cache, rows, entries, drop, taken):
    shape = {"dtype": BF16, "v_dtype": BF16, "head_dim": 128, "v_head_dim": 128, "width": 8, "page_size": 16}
    shape["dense_dims"] = ()
    assert cuda_decode_all.takes(SimpleNamespace(**shape | cache), rows, entries, drop=drop) == taken


@pytest.mark.parametrize("group", [1, 4])
def test_the_call_goes_where_the_rule_says(group, device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_decode, "unsupported", lambda *args, **options: None)
    ran, load = [], cuda_decode_all.load
    monkeypatch.setattr(cuda_decode_all, "load", lambda *args: ran.append(1) or load(*args))
    cache = filled([200, 31], dtype=BF16, device=device)
    q = normal(2, 1, 2 * group, 64, seed=3, dtype=BF16, device=device)
    out, wanted = (sfa_attention_with_kvcache(q, cache, impl=impl) for impl in ("cuda", "reference"))
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    assert len(ran) == (group > 1)
    code = topk_sparsify(q, 8)
    assert torch.equal(sfa_attention_with_kvcache(code, cache, impl="cuda"), out)


@pytest.mark.gpu
@pytest.mark.parametrize("v_dtype", [BF16, INT8], ids=str)
def test_a_long_sequence(v_dtype):
    """100,000 tokens, all splits in use; against the plain PyTorch implementation."""
    cache = filled([100_000], d=128, dv=128, page_size=256, dtype=BF16, v_dtype=v_dtype, device="cuda")
    q = normal(1, 1, 8, 128, seed=3, dtype=BF16, device="cuda")
    out, lse, _, _ = attend(cache, q, span=4, every_row=True)
    wanted, wanted_lse = sfa_attention_with_kvcache(q, cache, impl="cpu", return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_it_is_captured_in_a_graph_and_does_not_wait():
    cache = filled([300, 0, 1000], dtype=BF16, device="cuda")
    q = normal(3, 1, 8, 64, dtype=BF16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(cache, q, every_row=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = sfa_attention_with_kvcache(q, cache, impl="cuda")
    for seed in (1, 2):
        q.copy_(normal(3, 1, 8, 64, seed=seed, dtype=BF16, device="cuda"))
        graph.replay()
        assert torch.equal(out, attend(cache, q, every_row=True, span=cuda_decode.SPAN)[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        sfa_attention_with_kvcache(q, cache, impl="cuda", return_lse=True, return_stats=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
