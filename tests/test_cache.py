"""The paged sparse cache: what is stored, shared, counted, refused and saved."""

import io

import pytest
import torch

from flash_sfa import SparseCode, SparseKVCache, topk_sparsify

D, DV, HKV = 32, 24, 2


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def new_cache(**options):
    options = {"num_kv_heads": HKV, "head_dim": D, "v_head_dim": DV, "topk": 4, "max_tokens": 512, "page_size": 16,
               "dtype": torch.float32} | options  # fmt: skip
    return SparseKVCache(**options)


def rows(b, n, *, d=D, dv=DV, hkv=HKV, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, n, hkv, dim, generator=g).to(dtype) for dim in (d, dv))


def contents(cache):
    """Everything that a caller can see, as plain data."""
    out = [cache.seq_lengths().tolist(), [cache.used_pages(i) for i in range(cache.num_layers)]]
    for layer in range(cache.num_layers):
        for seq_id in cache._ids:
            code, v = cache.gather(layer, seq_id)
            parts = (code.values, code.indices, code.dense, v, cache.block_sums(layer, seq_id))
            out.append((layer, seq_id, [part.tolist() for part in parts]))
    return out


def assert_holds(cache, seq_id, k, v, layer=0):
    """The sequence holds the codes of k (n, hkv, d) and v bit for bit, and the sums of v."""
    code, stored = cache.gather(layer, seq_id)
    want = topk_sparsify(k, cache.topk, dense_dims=cache.dense_dims)
    for got, expected in ((code.values, want.values), (code.indices, want.indices), (code.dense, want.dense)):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    v = v.to(cache.v_dtype)
    assert torch.equal(stored, v)
    exact = torch.stack([part.double().sum(0) for part in v.split(128)]) if len(v) else v.new_zeros(0, HKV, DV).double()
    torch.testing.assert_close(cache.block_sums(layer, seq_id).double(), exact, rtol=1e-5, atol=1e-4)


def test_fresh_memory_is_poisoned():
    assert new_cache()._layers[0].v.isnan().all()


@pytest.mark.parametrize("page_size", [1, 16, 100, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "v_dtype", "dense_dims"),
    [
        (torch.float32, None, 0),
        (torch.bfloat16, None, 3),
        (torch.float16, torch.bfloat16, [5, 1]),
        (torch.bfloat16, torch.float32, 0),
        (torch.float64, None, 2),
    ],
)
def test_append_stores_codes_values_and_sums(page_size, dtype, v_dtype, dense_dims):
    cache = new_cache(page_size=page_size, dtype=dtype, v_dtype=v_dtype, dense_dims=dense_dims, max_tokens=1024)
    ids = cache.alloc(3)
    k, v = rows(3, 290, dtype=dtype)
    counts = [140, 0, 290]
    cache.append(k, v, lengths=counts)
    cache.append(k[:, :1], v[:, :1])
    cache.append(k[1:2, :130], v[1:2, :130], seq_ids=ids[1:2])
    for row, count in enumerate(counts):
        parts = [slice(0, count), slice(0, 1), *([slice(0, 130)] if row == 1 else [])]
        assert_holds(cache, int(ids[row]), *(torch.cat([x[row, part] for part in parts]) for x in (k, v)))
    assert cache.seq_lengths().tolist() == [141, 131, 291]


EIGHT_BITS = {torch.int8: 1 / 254, torch.float8_e4m3fn: 1 / 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v_dtype", EIGHT_BITS, ids=str)
def test_eight_bit_values(v_dtype, dtype):
    """A row is off by half a step of its largest entry at most; sums and decoding use what is stored."""
    cache = new_cache(page_size=100, dtype=dtype, v_dtype=v_dtype, max_tokens=2048)
    (seq_id,) = cache.alloc(1).tolist()
    k, v = rows(1, 700, dtype=dtype)
    v[0, 5], v[0, 6] = 0.0, v[0, 6] * 100
    cache.append(k, v)
    stored = cache.gather(0, seq_id)[1]
    # A step of the values, and the rounding of the scale to 8 bits (bf16).
    limit = (EIGHT_BITS[v_dtype] + 2**-8) * v[0].float().abs().amax(-1, keepdim=True)
    assert ((stored - v[0].float()).abs() <= limit).all() and not stored[5].any()
    twin = cache.fork(seq_id)
    cache.truncate([twin], [300])
    for one, n in ((seq_id, 700), (twin, 300)):
        exact = torch.stack([part.double().sum(0) for part in stored[:n].split(128)])
        torch.testing.assert_close(cache.block_sums(0, one).double(), exact, rtol=1e-5, atol=1e-3)
    again = new_cache(page_size=100, dtype=dtype, v_dtype=v_dtype, max_tokens=2048)
    again.load_state_dict(cache.state_dict())
    assert contents(again) == contents(cache)
    page = HKV * 100 * (4 * (dtype.itemsize + 1) + DV + 2)
    assert cache._page_nbytes(cache._layers[0]) == page
    assert again.nbytes < 0.8 * again.dense_nbytes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("v_dtype", EIGHT_BITS, ids=str)
def test_eight_bit_values_keep_what_is_not_finite_visible(v_dtype, value):
    cache = new_cache(v_dtype=v_dtype)
    cache.alloc(1)
    k, v = rows(1, 3)
    v[0, 1, 0, 2] = value
    cache.append(k, v)
    stored = cache.gather(0, 0)[1]
    assert stored[1, 0].isnan().all()
    assert stored[[0, 2]].isfinite().all() and stored[1, 1:].isfinite().all()


def test_wide_heads_and_topk_above_the_width():
    cache = new_cache(head_dim=300, topk=400)
    cache.alloc(1)
    k, v = rows(1, 5, d=300)
    cache.append(k, v)
    code, _ = cache.gather(0, 0)
    assert code.indices.dtype == torch.int16 and code.topk == 300
    assert torch.equal(code.to_dense(), k[0])


def test_a_code_is_stored_as_it_is():
    a, b = new_cache(dense_dims=2), new_cache(dense_dims=2)
    k, v = rows(2, 40)
    for cache, keys in ((a, k), (b, topk_sparsify(k, 4, dense_dims=2))):
        cache.alloc(2)
        cache.append(keys, v, lengths=torch.tensor([40, 7]))
    assert contents(a) == contents(b)


def test_padding_is_never_stored():
    cache = new_cache()
    cache.alloc(2)
    k, v = rows(2, 20)
    k[0, 3:], v[0, 3:] = torch.nan, torch.nan
    cache.append(k, v, lengths=[3, 20])
    assert_holds(cache, 0, k[0, :3], v[0, :3])
    assert_holds(cache, 1, k[1], v[1])
    assert cache.used_pages() == 1 + 2


def test_autocast_decides_the_codes_in_its_dtype():
    cache, plain = new_cache(dtype=torch.bfloat16), new_cache(dtype=torch.bfloat16)
    k, v = rows(1, 50)
    cache.alloc(1)
    plain.alloc(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.append(k, v)
    plain.append(k.bfloat16(), v.bfloat16())
    assert contents(cache) == contents(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"cache's dtype.*bfloat16"):
        new_cache(dtype=torch.float32).append(*rows(0, 5))


def test_stored_rows_carry_no_gradient_and_inference_mode_does_not_stick():
    with torch.inference_mode():
        cache = new_cache()
        cache.alloc(1)
        cache.append(*rows(1, 140))
        for _ in range(5):
            cache.fork(0)
    k, v = (x.requires_grad_() for x in rows(1, 3))
    cache.append(k, v, seq_ids=[0])
    code, stored = cache.gather(0, 0)
    assert not code.values.requires_grad and not stored.requires_grad


def test_layers_have_their_own_lengths():
    cache = new_cache(num_layers=3)
    cache.alloc(2)
    k, v = rows(2, 30)
    cache.append(k, v, layer=2)
    cache.append(k[:, :4], v[:, :4], layer=0)
    assert [cache.seq_lengths(layer=i).tolist() for i in range(3)] == [[4, 4], [0, 0], [30, 30]]
    assert [cache.used_pages(i) for i in range(3)] == [2, 0, 4]


# Sharing


def test_fork_shares_pages_until_a_write():
    cache = new_cache(num_layers=2)
    cache.alloc(1)
    k, v = rows(1, 40)
    for layer in range(2):
        cache.append(k, v, layer=layer)
    page_bytes = cache._page_nbytes(cache._layers[0])
    before = cache.nbytes
    child = cache.fork(0)
    # 40 tokens: 3 pages and 1 sum block a layer; a fork adds int32 tables and its own sums only.
    assert cache.used_pages() == 3 and cache.nbytes - before == 2 * (4 * (3 + 1) + HKV * DV * 4)
    new_k, new_v = rows(1, 1, seed=1)
    before = cache.nbytes
    cache.append(new_k, new_v, seq_ids=[child])
    assert cache.used_pages() == 4 and cache.nbytes - before == page_bytes
    assert_holds(cache, 0, k[0], v[0])
    assert_holds(cache, child, torch.cat([k, new_k], 1)[0], torch.cat([v, new_v], 1)[0])
    assert_holds(cache, child, k[0], v[0], layer=1)
    # The parent now owns its last page alone: it writes in place.
    cache.append(*rows(1, 1, seed=2), seq_ids=[0])
    assert cache.used_pages() == 4


def test_the_last_writer_of_a_shared_page_keeps_it():
    cache = new_cache(max_tokens=3 * 16)
    cache.alloc(1)
    k, v = rows(1, 5)
    cache.append(k, v)
    cache.fork(0)
    cache.fork(0)
    more_k, more_v = rows(3, 2, seed=1)
    cache.append(more_k, more_v)  # three owners, two copies: exactly the pages there are
    assert cache.used_pages() == 3
    for row, seq_id in enumerate(cache._ids):
        assert_holds(cache, seq_id, torch.cat([k[0], more_k[row]]), torch.cat([v[0], more_v[row]]))


def test_full_pages_stay_shared():
    cache = new_cache()
    cache.alloc(1)
    cache.append(*rows(1, 32))
    child = cache.fork(0)
    cache.append(*rows(1, 1), seq_ids=[child])
    assert cache.used_pages() == 3


def test_reorder_copies_sequences_and_keeps_ids():
    cache = new_cache()
    ids = cache.alloc(3).tolist()
    k, v = rows(3, 20)
    counts = [5, 18, 20]
    cache.append(k, v, lengths=counts)
    cache.reorder([ids[1], ids[2], ids[1]])
    assert list(cache._ids) == ids and cache.used_pages() == 2 + 2
    more_k, more_v = rows(3, 3, seed=1)
    cache.append(more_k, more_v)
    for row, (seq_id, source) in enumerate(zip(ids, (1, 2, 1))):
        parts = [(x[source, : counts[source]], y[row]) for x, y in ((k, more_k), (v, more_v))]
        assert_holds(cache, seq_id, *(torch.cat(part) for part in parts))


def test_free_gives_pages_back_and_never_a_shared_one():
    cache = new_cache(max_tokens=64)
    cache.alloc(1)
    k, v = rows(1, 64)
    cache.append(k, v)
    child = cache.fork(0)
    cache.free([0])
    assert cache.used_pages() == 4
    assert_holds(cache, child, k[0], v[0])
    cache.free([child])
    assert cache.used_pages() == 0 and cache.nbytes == 0
    new = cache.alloc(1)
    assert int(new[0]) not in (0, child)
    cache.append(*rows(1, 64, seed=3))


def test_truncate_recomputes_the_sum_of_the_cut_block():
    cache = new_cache()
    cache.alloc(1)
    k, v = rows(1, 300)
    v[0, 150] = torch.nan
    cache.append(k, v)
    assert cache.block_sums(0, 0)[1].isnan().all()
    cache.truncate([0], [150])
    assert_holds(cache, 0, k[0, :150], v[0, :150])
    assert cache.used_pages() == 10
    cache.append(k[:, 200:], v[:, 200:])
    assert_holds(cache, 0, *(torch.cat([x[0, :150], x[0, 200:]]) for x in (k, v)))


def test_truncate_leaves_a_forked_sequence_alone():
    cache = new_cache()
    cache.alloc(1)
    k, v = rows(1, 40)
    cache.append(k, v)
    child = cache.fork(0)
    cache.truncate(torch.tensor([child]), torch.tensor([35]))
    cache.append(*rows(1, 2, seed=1), seq_ids=[child])
    assert_holds(cache, 0, k[0], v[0])


def test_running_out_of_pages_writes_nothing():
    cache = new_cache(max_tokens=70, num_layers=2)  # 5 pages of 16
    cache.alloc(2)
    k, v = rows(2, 40)
    cache.append(k, v, lengths=[30, 20], layer=1)
    before = contents(cache)
    with pytest.raises(ValueError, match="needs 2 pages of 16 tokens in layer 1, 1 of 5 are free"):
        cache.append(k[:, :16], v[:, :16], layer=1)
    # A copy of a shared page needs a page too.
    cache.fork(0)
    cache.append(k[:1, :16], v[:1, :16], layer=1, seq_ids=[1])
    shared = contents(cache)
    with pytest.raises(ValueError, match="full"):
        cache.append(k[:1, :1], v[:1, :1], layer=1, seq_ids=[0])
    assert contents(cache) == shared
    cache.free([2])
    cache.append(k[:1, :1], v[:1, :1], layer=1, seq_ids=[0])
    assert before[0] == [0, 0]


def test_instances_share_no_state():
    a, b = new_cache(), new_cache()
    a.alloc(2)
    a.append(*rows(2, 5))
    assert b.seq_lengths().tolist() == [] and b.nbytes == 0
    assert b.alloc(1).tolist() == [0]


# Bytes


@pytest.mark.parametrize("page_size", [128, 256])
def test_bytes_a_token_against_dense(page_size):
    cache = SparseKVCache(num_kv_heads=4, head_dim=128, topk=8, max_tokens=4096, page_size=page_size)
    cache.alloc(2)
    k = torch.randn(2, 2048, 4, 128, dtype=torch.bfloat16)
    cache.append(k, k)
    assert cache.dense_nbytes == 2 * 2048 * 4 * 512
    codes_and_v, sums, tables = 4 * (24 + 256), 4 * 4, 4 * (1 / page_size + 1 / 128)
    assert cache.nbytes == 4096 * (codes_and_v + sums + tables)
    assert cache.nbytes <= 0.56 * cache.dense_nbytes
    assert cache.allocated_nbytes == cache.nbytes


def test_a_partly_filled_page_counts_whole():
    cache = new_cache(dense_dims=2, dtype=torch.bfloat16)
    cache.alloc(1)
    cache.append(*rows(1, 1, dtype=torch.bfloat16))
    page = 16 * HKV * (4 * 2 + 4 * 1 + 2 * 2 + DV * 2)
    assert cache.nbytes == page + HKV * DV * 4 + 4 + 4
    assert cache.dense_nbytes == HKV * (D + DV) * 2
    pools = 32 * page + 4 * HKV * DV * 4
    assert cache.allocated_nbytes == pools + 8


# Saving


def test_state_dict_round_trip_keeps_contents_and_sharing():
    a = new_cache(num_layers=2, dense_dims=1)
    a.alloc(3)
    k, v = rows(3, 200)
    for layer in range(2):
        a.append(k, v, layer=layer, lengths=[200, 0, 33])
    a.free([1])
    a.fork(0)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b = new_cache(num_layers=2, dense_dims=1, max_tokens=400)
    b.alloc(1)
    b.append(*rows(1, 390, seed=5))
    b.load_state_dict(torch.load(file, weights_only=True))
    assert contents(a) == contents(b) and list(a._ids) == list(b._ids) and b.nbytes == a.nbytes
    for cache in (a, b):
        assert cache.alloc(1).tolist() == [4]
        cache.append(*rows(2, 30, seed=6), seq_ids=[3, 4])
        cache.truncate([0], [150])
    assert contents(a) == contents(b)


def test_a_saved_state_is_a_snapshot():
    cache = new_cache()
    cache.alloc(1)
    cache.append(*rows(1, 10))
    sd, before = cache.state_dict(), contents(cache)
    cache.truncate([0], [4])
    cache.append(*rows(1, 60, seed=1))
    cache.load_state_dict(sd)
    assert contents(cache) == before


def corrupted(name):
    cache = new_cache()
    cache.alloc(2)
    cache.append(*rows(2, 40))
    sd = cache.state_dict()
    layer = sd["layers"][0]
    if name == "missing key":
        del sd["next_id"]
    elif name == "other config":
        sd["config"]["width"] = 5
    elif name == "long lengths":
        layer["lengths"] = layer["lengths"] + 100
    elif name == "wrong dtype":
        layer["v"] = layer["v"].double()
    elif name == "wrong shape":
        layer["values"] = layer["values"][:, :, :3]
    elif name == "page number":
        layer["tables"][0] = 99
    elif name == "repeated ids":
        sd["seq_ids"][1] = 0
    elif name == "layers":
        sd["layers"] = sd["layers"] * 2
    return sd


@pytest.mark.parametrize(
    "name",
    ["missing key", "other config", "long lengths", "wrong dtype", "wrong shape", "page number", "repeated ids",
     "layers"],
)  # fmt: skip
def test_a_bad_state_changes_nothing(name):
    cache = new_cache()
    cache.alloc(1)
    cache.append(*rows(1, 20, seed=9))
    before = contents(cache)
    with pytest.raises((ValueError, TypeError)):
        cache.load_state_dict(corrupted(name))
    assert contents(cache) == before


def test_a_state_that_does_not_fit_changes_nothing():
    cache = new_cache(max_tokens=80)
    with pytest.raises(ValueError, match="sd holds 6 pages"):
        cache.load_state_dict(corrupted("none"))
    with pytest.raises(TypeError, match="sd must be a dict"):
        cache.load_state_dict([1])


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"topk": 0}, ValueError, "topk"),
        ({"topk": -1}, ValueError, "topk"),
        ({"topk": 2.0}, TypeError, "topk"),
        ({"topk": True}, TypeError, "topk"),
        ({"topk": [4]}, TypeError, "topk"),
        ({"topk": (4, 4)}, TypeError, "topk"),
        ({"topk": None}, TypeError, "topk"),
        ({"dense_dims": True}, TypeError, "dense_dims"),
        ({"dense_dims": 1.5}, TypeError, "dense_dims"),
        ({"dense_dims": torch.tensor([1])}, TypeError, "dense_dims"),
        ({"dense_dims": [1, 1]}, ValueError, "dense_dims"),
        ({"dense_dims": [D]}, ValueError, "dense_dims"),
        ({"dense_dims": D}, ValueError, "dense_dims"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_kv_heads": 1.0}, TypeError, "num_kv_heads"),
        ({"head_dim": 2**16}, ValueError, "head_dim"),
        ({"v_head_dim": -3}, ValueError, "v_head_dim"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"max_tokens": 10**15}, ValueError, "max_tokens"),
        ({"device": "nope"}, ValueError, "device"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"page_size": True}, TypeError, "page_size"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"dtype": "float32"}, TypeError, "dtype"),
        ({"v_dtype": torch.int32}, TypeError, "v_dtype"),
        ({"v_dtype": torch.uint8}, NotImplementedError, "v_dtype"),
        ({"v_dtype": torch.float8_e5m2}, NotImplementedError, "v_dtype"),
    ],
)
def test_bad_construction(options, error, text):
    with pytest.raises(error, match=text):
        new_cache(**options)


K, V = rows(2, 5)
CODE = topk_sparsify(K, 4)
CALLS = {
    "heads of k": (ValueError, "k must be", lambda c: c.append(K[:, :, :1], V)),
    "heads of v": (ValueError, "v must be", lambda c: c.append(K, V[:, :, :1])),
    "dim of k": (ValueError, "k must be", lambda c: c.append(K[..., :8], V)),
    "dim of v": (ValueError, "v must be", lambda c: c.append(K, K)),
    "batch": (ValueError, "k must be", lambda c: c.append(K[:1], V[:1])),
    "length": (ValueError, "same length", lambda c: c.append(K[:, :3], V)),
    "rank": (ValueError, "k must be", lambda c: c.append(K[0], V[0])),
    "dtype of k": (TypeError, "k must have the cache's dtype", lambda c: c.append(K.double(), V)),
    "dtype of v": (TypeError, "v must have the cache's dtype", lambda c: c.append(K, V.half())),
    "integer k": (TypeError, "k must be", lambda c: c.append(K.long(), V)),
    "integer v": (TypeError, "v must be", lambda c: c.append(K, V.int())),
    "no tensor": (TypeError, "v must be", lambda c: c.append(K, None)),
    "device": (ValueError, "device", lambda c: c.append(K.to("meta"), V.to("meta"))),
    "topk of code": (ValueError, "code of 4", lambda c: c.append(topk_sparsify(K, 3), V)),
    "dense of code": (ValueError, "dense_dims", lambda c: c.append(topk_sparsify(K, 4, dense_dims=1), V)),
    "dtype of code": (TypeError, "dtype", lambda c: c.append(topk_sparsify(K.half(), 4), V)),
    "dim of code": (
        ValueError, "k must be",
        lambda c: c.append(SparseCode(CODE.values, CODE.indices, dim=D + 1), V),
    ),
    "layer": (ValueError, "layer", lambda c: c.append(K, V, layer=2)),
    "negative layer": (ValueError, "layer", lambda c: c.append(K, V, layer=-1)),
    "bool layer": (TypeError, "layer", lambda c: c.append(K, V, layer=True)),
    "unknown id": (ValueError, "unknown or freed", lambda c: c.append(K, V, seq_ids=[0, 7])),
    "negative id": (ValueError, "unknown or freed", lambda c: c.append(K, V, seq_ids=[0, -1])),
    "freed id": (ValueError, "unknown or freed", lambda c: c.append(K, V, seq_ids=[0, 2])),
    "repeated id": (ValueError, "repeat", lambda c: c.append(K, V, seq_ids=torch.tensor([1, 1]))),
    "float ids": (TypeError, "seq_ids", lambda c: c.append(K, V, seq_ids=torch.tensor([0.0, 1.0]))),
    "bool ids": (TypeError, "seq_ids", lambda c: c.append(K, V, seq_ids=[False, True])),
    "int as ids": (TypeError, "seq_ids", lambda c: c.append(K, V, seq_ids=1)),
    "2-d ids": (ValueError, "seq_ids", lambda c: c.append(K, V, seq_ids=torch.tensor([[0, 1]]))),
    "lengths too long": (ValueError, "lengths", lambda c: c.append(K, V, lengths=[5, 6])),
    "negative length": (ValueError, "lengths", lambda c: c.append(K, V, lengths=[5, -1])),
    "number of lengths": (ValueError, "lengths", lambda c: c.append(K, V, lengths=[5])),
    "float lengths": (TypeError, "lengths", lambda c: c.append(K, V, lengths=[5.0, 1.0])),
    "full": (ValueError, "full", lambda c: c.append(*rows(2, 600))),
    "negative alloc": (ValueError, "n must", lambda c: c.alloc(-1)),
    "float alloc": (TypeError, "n must", lambda c: c.alloc(1.0)),
    "fork freed": (ValueError, "unknown or freed", lambda c: c.fork(2)),
    "fork list": (TypeError, "seq_id", lambda c: c.fork([0])),
    "free twice": (ValueError, "repeat", lambda c: c.free([0, 0])),
    "free freed": (ValueError, "unknown or freed", lambda c: c.free([1, 2])),
    "reorder short": (ValueError, "one source", lambda c: c.reorder([0])),
    "reorder unknown": (ValueError, "unknown or freed", lambda c: c.reorder([0, 2])),
    "truncate longer": (ValueError, "lengths", lambda c: c.truncate([0, 1], [1, 4])),
    "truncate negative": (ValueError, "lengths", lambda c: c.truncate([0], [-1])),
    "truncate number": (ValueError, "lengths", lambda c: c.truncate([0], [1, 1])),
    "lengths of freed": (ValueError, "unknown or freed", lambda c: c.seq_lengths([2])),
    "gather freed": (ValueError, "unknown or freed", lambda c: c.gather(0, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_change_nothing(name):
    error, text, call = CALLS[name]
    cache = new_cache(num_layers=2)
    cache.alloc(3)
    for layer in range(2):
        cache.append(*rows(3, 3, seed=3), layer=layer)
    cache.free([2])
    before, ids = contents(cache), list(cache._ids)
    with pytest.raises(error, match=text):
        call(cache)
    assert contents(cache) == before and list(cache._ids) == ids


def test_ids_as_tensors_and_lists():
    cache = new_cache()
    ids = cache.alloc(3)
    assert ids.dtype == torch.int64 and ids.shape == (3,)
    k, v = rows(2, 4)
    cache.append(k, v, seq_ids=[ids[2], ids[0]], lengths=torch.tensor([1, 4], dtype=torch.int32))
    assert cache.seq_lengths().tolist() == [4, 0, 1]
    assert cache.seq_lengths(ids[[2, 0]].to(torch.int32)).tolist() == [1, 4]
    assert cache.fork(ids[0]) == 3 and cache.seq_lengths().dtype == torch.int64
    cache.append(k[:0], v[:0], seq_ids=[])
    cache.append(k[:, :0], v[:, :0], seq_ids=[0, 1])
    assert cache.seq_lengths().tolist() == [4, 0, 1, 4]
