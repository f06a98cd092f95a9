"""The cache under random sequences of operations, against a plain dense model of it."""

import random

import pytest
import torch

from flash_sfa import SparseKVCache, topk_sparsify

D, DV, HKV, LAYERS = 8, 4, 2, 2
CAPACITY = 600


class Model:
    """What the cache means: for every sequence and layer, the dense rows of k and v."""

    def __init__(self):
        self.rows = {}

    def append(self, layer, ids, k, v, counts):
        for row, (seq_id, count) in enumerate(zip(ids, counts)):
            old_k, old_v = self.rows[seq_id][layer]
            self.rows[seq_id][layer] = (
                torch.cat([old_k, k[row, :count]]),
                torch.cat([old_v, v[row, :count]]),
            )

    def length(self, seq_id, layer):
        return len(self.rows[seq_id][layer][0])


def check(cache, model):
    assert list(cache._ids) == list(model.rows)
    for layer in range(LAYERS):
        assert cache.seq_lengths(layer=layer).tolist() == [model.length(i, layer) for i in model.rows]
        for seq_id, layers in model.rows.items():
            k, v = layers[layer]
            code, stored = cache.gather(layer, seq_id)
            want = topk_sparsify(k, cache.topk)
            assert torch.equal(code.values, want.values) and torch.equal(code.indices, want.indices)
            assert torch.equal(stored, v)
            sums = torch.stack([part.double().sum(0) for part in v.split(128)]) if len(v) else torch.zeros(0, HKV, DV)
            torch.testing.assert_close(cache.block_sums(layer, seq_id).double(), sums.double(), rtol=0, atol=1e-4)
        check_bookkeeping(cache, layer)


def check_bookkeeping(cache, layer):
    pool = cache._layers[layer]
    owners = [0] * cache.num_pages
    for sequence in pool.sequences.values():
        assert len(sequence.pages) == -(-sequence.length // cache.page_size)
        assert len(sequence.sums) == -(-sequence.length // 128)
        for page in sequence.pages:
            owners[page] += 1
    assert owners == pool.refs
    assert sorted(pool.free_pages) == [page for page, count in enumerate(owners) if count == 0]
    blocks = [block for sequence in pool.sequences.values() for block in sequence.sums]
    assert sorted(blocks + pool.free_sums) == list(range(pool.sums.shape[0]))


def pages_needed(cache, layer, ids, counts):
    """Fresh pages plus copies of shared last pages, counted independently of the cache's plan."""
    tables = {i: list(cache._layers[layer].sequences[i].pages) for i in cache._ids}
    needed = 0
    for seq_id, count in zip(ids, counts):
        length = int(cache.seq_lengths([seq_id], layer=layer))
        needed += -(-(length + count) // cache.page_size) - -(-length // cache.page_size)
        if count and length % cache.page_size:
            page = tables[seq_id].pop()
            needed += any(page in table for table in tables.values())
    return needed


def step(op, cache, model, rng, seen):
    live = list(model.rows)
    if op == "alloc" and len(live) < 6:
        for seq_id in cache.alloc(rng.randint(1, 2)).tolist():
            assert seq_id not in model.rows
            model.rows[seq_id] = [(torch.zeros(0, HKV, D), torch.zeros(0, HKV, DV))] * LAYERS
    elif op == "append" and live:
        ids = rng.sample(live, rng.randint(1, len(live)))
        n = rng.choice([1, 1, 3, 20, 150])
        k, v = torch.randn(len(ids), n, HKV, D), torch.randn(len(ids), n, HKV, DV)
        counts = [n] * len(ids) if rng.random() < 0.5 else [rng.randint(0, n) for _ in ids]
        layer = rng.randrange(LAYERS)
        free = cache.num_pages - cache.used_pages(layer)
        if pages_needed(cache, layer, ids, counts) > free:
            with pytest.raises(ValueError, match="full"):
                cache.append(k, v, layer=layer, seq_ids=ids, lengths=counts)
            seen["full"] = seen.get("full", 0) + 1
        else:
            cache.append(k, v, layer=layer, seq_ids=ids, lengths=counts)
            model.append(layer, ids, k, v, counts)
    elif op == "fork" and live and len(live) < 6:
        source = rng.choice(live)
        model.rows[cache.fork(source)] = list(model.rows[source])
    elif op == "reorder" and live:
        sources = [rng.choice(live) for _ in live]
        cache.reorder(sources)
        model.rows = {i: list(model.rows[s]) for i, s in zip(live, sources)}
    elif op == "truncate" and live:
        ids = rng.sample(live, rng.randint(1, len(live)))
        lengths = [rng.randint(0, min(model.length(i, layer) for layer in range(LAYERS))) for i in ids]
        cache.truncate(ids, torch.tensor(lengths))
        for seq_id, length in zip(ids, lengths):
            model.rows[seq_id] = [(k[:length], v[:length]) for k, v in model.rows[seq_id]]
    elif op == "free" and live:
        ids = rng.sample(live, rng.randint(1, min(2, len(live))))
        cache.free(ids)
        for seq_id in ids:
            del model.rows[seq_id]
    elif op == "save" and live:
        other = new_cache(cache.page_size)
        other.load_state_dict(cache.state_dict())
        assert other.nbytes == cache.nbytes
        return other
    else:
        return cache
    seen[op] = seen.get(op, 0) + 1
    return cache


def new_cache(page_size):
    return SparseKVCache(
        num_layers=LAYERS, num_kv_heads=HKV, head_dim=D, v_head_dim=DV, topk=3, max_tokens=CAPACITY,
        page_size=page_size, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("page_size", [1, 16, 100, 128, 256])
def test_random_operations_match_the_dense_model(page_size, seed):
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        rng, seen = random.Random(seed), {}
        torch.manual_seed(seed)
        cache, model = new_cache(page_size), Model()
        ops = ["alloc"] * 2 + ["append"] * 10 + ["fork"] * 2 + ["reorder"] + ["truncate"] * 2 + ["free"] + ["save"]
        for _ in range(250):
            cache = step(rng.choice(ops), cache, model, rng, seen)
            check(cache, model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert {"alloc", "append", "fork", "reorder", "truncate", "free", "full"} <= set(seen), seen
