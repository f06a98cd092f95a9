"""SparseKVCache against a plain dense model of it, and its promises: sharing, exhaustion, bytes, isolation."""

import random

import pytest
import torch

from flash_sfa import SparseKVCache, topk_sparsify

HEADS, D, DV, TOPK = 2, 16, 12, 3


def make(max_tokens=4096, page_size=16, layers=1, dense_dims=0, dtype=torch.float32, **kwargs):
    return SparseKVCache(
        num_layers=layers, num_kv_heads=HEADS, head_dim=D, v_head_dim=DV, topk=TOPK, dense_dims=dense_dims,
        max_tokens=max_tokens, page_size=page_size, dtype=dtype, **kwargs,
    )  # fmt: skip


def kv(batch, n, dtype=torch.float32):
    return torch.randn(batch, n, HEADS, D, dtype=dtype), torch.randn(batch, n, HEADS, DV, dtype=dtype)


def snapshot(cache):
    state = cache.state_dict()
    pools = [p for layer in state["layers"] for p in layer["pools"]]
    plain = [{key: layer[key] for key in ("free", "shares", "tables", "lengths")} for layer in state["layers"]]
    return pools, (state["live"], state["next_id"], plain)


def unchanged(cache, before):
    pools, plain = snapshot(cache)
    return plain == before[1] and all(torch.equal(a, b) for a, b in zip(pools, before[0]))


def check_content(cache, model, layer):
    """model: {id: (k, v)} dense rows that each sequence should hold."""
    for i, (k, v) in model.items():
        code, stored_v, sums = cache.gather(i, layer=layer)
        assert torch.equal(stored_v, v)
        want = topk_sparsify(k, TOPK, dense_dims=cache.dense_dims)
        for a, b in ((code.values, want.values), (code.indices, want.indices), (code.dense, want.dense)):
            assert torch.equal(a, b)
        blocks = [part.sum(0) for part in v.split(128)] if len(v) else []
        assert sums.shape[0] == len(blocks)
        for a, b in zip(sums, blocks):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("page_size", [1, 16, 100, 128, 256])
@pytest.mark.parametrize("dense_dims", [0, (1, 9)])
def test_random_operations_match_a_dense_model(page_size, dense_dims):
    rng = random.Random(page_size)
    torch.manual_seed(page_size)
    layers = 2
    cache = make(max_tokens=2000, page_size=page_size, layers=layers, dense_dims=dense_dims)
    models = [{} for _ in range(layers)]
    live: list[int] = []
    empty = (torch.zeros(0, HEADS, D), torch.zeros(0, HEADS, DV))
    ran = dict.fromkeys(("append", "fork", "reorder", "truncate", "free", "full"), 0)
    for _ in range(120):
        op = rng.choice(["alloc", "append", "append", "append", "fork", "reorder", "truncate", "free"])
        if op == "alloc" and len(live) < 6:
            ids = cache.alloc(2).tolist()
            live += ids
            for model in models:
                model.update(dict.fromkeys(ids, empty))
        elif not live:
            continue
        elif op == "append":
            ids = rng.sample(live, rng.randint(1, len(live)))
            n = rng.choice([1, 1, 3, 40, 150])
            lengths = [rng.randint(0, n) for _ in ids]
            new = [kv(len(ids), n) for _ in range(layers)]
            before = snapshot(cache)
            try:
                for layer in range(layers):
                    cache.append(*new[layer], layer=layer, seq_ids=ids, lengths=lengths)
            except ValueError as error:
                assert "full" in str(error) and unchanged(cache, before)
                ran["full"] += 1
                continue
            ran[op] += 1
            for layer, (k, v) in enumerate(new):
                for b, (i, count) in enumerate(zip(ids, lengths)):
                    old = models[layer][i]
                    models[layer][i] = (torch.cat([old[0], k[b, :count]]), torch.cat([old[1], v[b, :count]]))
        elif op == "fork" and len(live) < 8:
            source = rng.choice(live)
            new_id = cache.fork(source)
            assert new_id not in live
            live.append(new_id)
            for model in models:
                model[new_id] = model[source]
            ran[op] += 1
        elif op == "reorder":
            sources = [rng.choice(live) for _ in live]
            cache.reorder(torch.tensor(sources))
            for model in models:
                model.update(dict(zip(live, [model[s] for s in sources])))
            ran[op] += 1
        elif op == "truncate":
            i = rng.choice(live)
            length = rng.randint(0, len(models[0][i][1]))
            cache.truncate([i], [length])
            for model in models:
                model[i] = (model[i][0][:length], model[i][1][:length])
            ran[op] += 1
        elif op == "free":
            i = rng.choice(live)
            cache.free([i])
            live.remove(i)
            for model in models:
                del model[i]
            ran[op] += 1
        for layer in range(layers):
            check_content(cache, models[layer], layer)
            assert cache.seq_lengths(layer=layer).tolist() == [len(models[layer][i][1]) for i in live]
    assert all(count > 0 for name, count in ran.items() if name != "full"), ran
    cache.free(live)
    assert all(len(layer.free) == layer.num_pages and set(layer.shares) == {0} for layer in cache.layers)
    assert cache.nbytes == 0


def test_fork_shares_pages_until_one_side_writes():
    cache = make(page_size=16)
    (a,) = cache.alloc(1).tolist()
    cache.append(*kv(1, 40))
    used = cache.nbytes
    b = cache.fork(a)
    page = cache.layers[0].page_nbytes
    sums = cache.gather(b)[2].nbytes
    assert cache.nbytes == used + sums + 4 * (3 + 1)  # no new page: sums and table only
    before = cache.gather(a)[1].clone()
    cache.append(*kv(1, 1), seq_ids=[b])  # copies the half-full last page
    assert cache.nbytes == used + sums + 4 * (3 + 1) + page
    assert torch.equal(cache.gather(a)[1], before)
    cache.append(*kv(1, 1), seq_ids=[a])  # the last page is its own now
    assert cache.nbytes == used + sums + 4 * (3 + 1) + page


def test_running_out_of_pages_writes_nothing():
    cache = make(max_tokens=64, page_size=16)
    cache.alloc(2)
    cache.append(*kv(2, 20))
    before = snapshot(cache)
    with pytest.raises(ValueError, match="full"):
        cache.append(*kv(2, 13))
    assert unchanged(cache, before)
    cache.append(*kv(2, 12))
    assert not cache.layers[0].free
    cache.free([0])
    cache.append(*kv(1, 30), seq_ids=[1])


def test_shared_last_page_needs_one_copy_not_two():
    cache = make(max_tokens=48, page_size=16)
    (a,) = cache.alloc(1).tolist()
    cache.append(*kv(1, 20))
    cache.fork(a)
    cache.append(*kv(2, 5))  # two sharers, one free page: one copies, the other keeps the original
    assert cache.seq_lengths().tolist() == [25, 25]


def test_sums_are_recomputed_after_truncate():
    cache = make(dtype=torch.float16, page_size=16)
    cache.alloc(1)
    k, v = kv(1, 200, torch.float16)
    v[0, 150:] = 60000.0  # in fp32 sums, subtracting these would leave an error of whole units
    cache.append(k, v)
    cache.truncate([0], [140])
    torch.testing.assert_close(cache.gather(0)[2][1], v[0, 128:140].float().sum(0), atol=1e-4, rtol=1e-4)


def test_bytes_in_full_pages_are_below_the_target():
    cache = SparseKVCache(num_kv_heads=4, head_dim=128, topk=8, max_tokens=1024, page_size=128)
    cache.alloc(1)
    cache.append(*(torch.randn(1, 512, 4, 128, dtype=torch.bfloat16) for _ in range(2)))
    assert cache.dense_nbytes == 512 * 4 * 512
    assert cache.nbytes / cache.dense_nbytes <= 0.56
    assert cache.allocated_nbytes >= 2 * cache.nbytes - 1e5
    store = cache.layers[0]
    held = sum(pool.nbytes for pool in (store.values, store.indices, store.dense, store.v))
    assert held == store.num_pages * store.page_nbytes  # the count is that of real storage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_dict_round_trip(dtype, tmp_path):
    cache = make(dtype=dtype, dense_dims=2, layers=2)
    cache.alloc(2)
    for layer in range(2):
        cache.append(*kv(2, 130, dtype), layer=layer, lengths=[130, 7])
    fork = cache.fork(0)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    other = make(dtype=dtype, dense_dims=2, layers=2)
    other.load_state_dict(torch.load(tmp_path / "cache.pt"))
    new = kv(3, 1, dtype)
    for c in (cache, other):
        c.append(*new)
    for i in (0, 1, fork):
        for a, b in zip(cache.gather(i)[1:], other.gather(i)[1:]):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another cache"):
        make(dtype=dtype).load_state_dict(cache.state_dict())


def test_instances_share_no_state_and_ids_are_fresh():
    a, b = make(), make()
    ids = a.alloc(3)
    assert ids.dtype == torch.int64 and len(set(ids.tolist())) == 3
    a.append(*kv(3, 5))
    assert b.alloc(1).tolist() == [0] and b.seq_lengths().tolist() == [0]
    a.free([1])
    assert a.seq_lengths().tolist() == [5, 5]
    assert not set(a.alloc(1).tolist()) & {0, 2}


def test_autocast_append_casts_first():
    cache = make(dtype=torch.bfloat16)
    cache.alloc(1)
    k, v = kv(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        cache.append(k, v)
    assert torch.equal(cache.gather(0)[0].indices, topk_sparsify(k[0].bfloat16(), TOPK).indices)


def test_codes_can_be_appended():
    cache = make(dense_dims=2)
    cache.alloc(1)
    k, v = kv(1, 9)
    cache.append(topk_sparsify(k, TOPK, dense_dims=2), v)
    check_content(cache, {0: (k[0], v[0])}, 0)
    with pytest.raises(ValueError, match="topk"):
        cache.append(topk_sparsify(k, TOPK + 1, dense_dims=2), v)


BAD_CALLS = [
    (ValueError, "seq_ids", lambda c: c.append(*kv(1, 2), seq_ids=[7])),
    (ValueError, "seq_ids", lambda c: c.append(*kv(2, 2), seq_ids=[0, 0])),
    (ValueError, "seq_ids", lambda c: c.append(*kv(1, 2), seq_ids=[2])),  # freed
    (TypeError, "seq_ids", lambda c: c.append(*kv(1, 2), seq_ids=[0.0])),
    (TypeError, "seq_ids", lambda c: c.append(*kv(1, 2), seq_ids=torch.tensor([0.0]))),
    (ValueError, "k must be", lambda c: c.append(*kv(3, 2))),
    (ValueError, "v must be", lambda c: c.append(kv(2, 2)[0], torch.randn(2, 2, HEADS, D))),
    (ValueError, "length", lambda c: c.append(kv(2, 2)[0], kv(2, 3)[1])),
    (TypeError, "k must have the cache's dtype", lambda c: c.append(*kv(2, 2, torch.float64))),
    (TypeError, "float", lambda c: c.append(kv(2, 2)[0].long(), kv(2, 2)[1])),
    (ValueError, "lengths", lambda c: c.append(*kv(2, 2), lengths=[3, 0])),
    (ValueError, "lengths", lambda c: c.append(*kv(2, 2), lengths=[1])),
    (TypeError, "lengths", lambda c: c.append(*kv(2, 2), lengths=[1.0, 1])),
    (ValueError, "layer", lambda c: c.append(*kv(2, 2), layer=1)),
    (TypeError, "layer", lambda c: c.append(*kv(2, 2), layer=True)),
    (ValueError, "lengths", lambda c: c.truncate([0], [6])),
    (ValueError, "lengths", lambda c: c.truncate([0], [-1])),
    (ValueError, "seq_ids", lambda c: c.fork(9)),
    (ValueError, "seq_ids", lambda c: c.reorder([0])),
    (ValueError, "seq_ids", lambda c: c.reorder([0, 5])),
    (ValueError, "seq_ids", lambda c: c.free([0, 0])),
    (ValueError, "n must", lambda c: c.alloc(-1)),
    (TypeError, "n must", lambda c: c.alloc(True)),
]


@pytest.mark.parametrize(("error", "words", "call"), BAD_CALLS)
def test_bad_calls_change_nothing(error, words, call):
    cache = make()
    cache.alloc(3)
    cache.free([2])
    cache.append(*kv(2, 5))
    before = snapshot(cache)
    with pytest.raises(error, match=words):
        call(cache)
    assert unchanged(cache, before)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ValueError, {"topk": 0}),
        (TypeError, {"topk": True}),
        (TypeError, {"topk": (3, 3)}),
        (ValueError, {"dense_dims": D}),
        (ValueError, {"page_size": 0}),
        (TypeError, {"max_tokens": 10.0}),
        (TypeError, {"dtype": torch.int8}),
        (NotImplementedError, {"v_dtype": torch.int8}),
    ],
)
def test_bad_settings(error, changes):
    settings = {"num_kv_heads": 1, "head_dim": D, "topk": 2, "max_tokens": 8, **changes}
    with pytest.raises(error, match=next(iter(changes))):
        SparseKVCache(**settings)
