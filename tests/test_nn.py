"""The attention layer: equal with and without a cache, trainable, and clear about bad input."""

import pytest
import torch

from flash_sfa import SparseFeatureAttention, SparseKVCache, sfa_attention

OPTIONS = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "own widths": {"head_dim": 12, "v_head_dim": 20, "num_kv_heads": 1},
    "dense_dims": {"dense_dims": [0, 8]},
    "dense q": {"topk": (None, 3)},
    "bias": {"bias": True},
}


def layer(**options):
    torch.manual_seed(0)
    return SparseFeatureAttention(64, 4, **{"topk": 3} | options).double()


def cache_for(module, **options):
    return SparseKVCache(
        num_kv_heads=module.num_kv_heads, head_dim=module.head_dim, v_head_dim=module.v_head_dim, topk=3,
        dense_dims=module.dense_dims, max_tokens=512, page_size=16, dtype=torch.float64, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_uncached(name):
    module = layer(**OPTIONS[name])
    cache = cache_for(module, num_layers=2)
    cache.alloc(2)
    x = torch.randn(2, 30, 64, dtype=torch.float64)
    whole = module(x)
    steps = [module(part, cache=cache, layer=1) for part in x.split([1, 20, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-12, atol=1e-12)
    assert cache.seq_lengths(layer=1).tolist() == [30, 30] and cache.seq_lengths().tolist() == [0, 0]


def test_it_is_sfa_between_projections():
    module = layer(num_kv_heads=2, causal=False, dense_dims=2)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 16)) for p in (module.q_proj, module.k_proj, module.v_proj))
    want = module.o_proj(sfa_attention(q, k, v, topk=3, dense_dims=2).flatten(-2))
    torch.testing.assert_close(module(x), want)
    assert not torch.allclose(want, layer(num_kv_heads=2, dense_dims=2)(x))


def test_gradients_reach_all_parameters_and_parameters_round_trip():
    module = layer(bias=True)
    module(torch.randn(2, 9, 64, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(p.weight.grad.abs().max() > 0 for p in (module.q_proj, module.k_proj, module.v_proj, module.o_proj))
    other = SparseFeatureAttention(64, 4, topk=3, bias=True).double()
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"topk": 0}, ValueError, "topk"),
        ({"topk": None}, ValueError, "topk"),
        ({"topk": (None, None)}, ValueError, "topk"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"head_dim": 1.5}, TypeError, "head_dim"),
        ({"dense_dims": 16}, ValueError, "dense_dims"),
        ({"causal": 1}, TypeError, "causal"),
        ({"bias": 1}, TypeError, "bias"),
    ],
)
def test_bad_construction(options, error, text):
    with pytest.raises(error, match=text):
        layer(**options)
    with pytest.raises(ValueError, match="embed_dim"):
        SparseFeatureAttention(65, 4, topk=3)


def test_bad_calls_append_nothing():
    module = layer()
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="x must be"):
        module(x[0])
    with pytest.raises(ValueError, match="x must be"):
        module(x[..., :8])
    with pytest.raises(TypeError, match="cache must be"):
        module(x, cache=3)
    cache = cache_for(module)
    cache.alloc(3)
    with pytest.raises(ValueError, match="3 sequences"):
        module(x, cache=cache)
    cache.free([2])
    with pytest.raises(TypeError, match="dtype"):
        layer().float()(x.float(), cache=cache)
    with pytest.raises(ValueError, match="topk=4 differs from the cache"):
        layer(topk=4)(x, cache=cache)
    with pytest.raises(ValueError, match="cache must have dense_dims"):
        layer(dense_dims=1)(x, cache=cache)
    assert cache.seq_lengths().tolist() == [0, 0]
