"""The append kernel against the plain append, and steps replayed while sequences grow.

On a GPU (-m gpu), and with the kernel's source compiled for the CPU.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from flash_sfa import SparseKVCache, sfa_attention_with_kvcache, topk_sparsify
from flash_sfa import cache as cache_module
from flash_sfa.impl import cuda_append

HERE = Path(__file__).parent
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HKV, D, DV = 2, 48, 40

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class HostKernel:
    graph = None  # a list while a graph is captured

    def __init__(self, config):
        folder = Path(tempfile.mkdtemp())
        library = folder / "append.so"
        macros = [f"-D{name}={value}" for name, value in config.macros()]
        subprocess.run(
            ["g++", "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-I", HERE, "-I",
             cuda_append.SOURCE.parent, '-DSFA_HOST="host_cuda.h"', *macros, "-o", library, HERE / "host_append.cpp"],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(library))
        shutil.rmtree(folder)

    def launch(self, name, grid, threads, params):
        def run():
            assert self.library.launch(*grid, ctypes.byref(params), ctypes.sizeof(params)) == 0

        assert name == "sfa_append"
        run() if HostKernel.graph is None else HostKernel.graph.append(run)


@functools.cache
def host_kernel(config):
    return HostKernel(config)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda"
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(cuda_append, "load", lambda config, device: host_kernel(config))
    monkeypatch.setattr(cuda_append, "unsupported", lambda cache: None)
    monkeypatch.setattr(cache_module, "_capturing", lambda device: HostKernel.graph is not None)
    return "cpu"


def captured(step, device):
    """A replay of step."""
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay
    HostKernel.graph = calls = []
    try:
        step()
    finally:
        HostKernel.graph = None
    assert calls
    return lambda: [call() for call in calls]


def normal(*shape, seed=0, dtype=FP32, device="cpu"):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(device)


def rows(b, n, seed, cache):
    hkv, device, dtype = cache.num_kv_heads, cache.device, cache.dtype
    return (
        normal(b, n, hkv, cache.head_dim, seed=seed, dtype=dtype, device=device),
        normal(b, n, hkv, cache.v_head_dim, seed=seed + 1000, dtype=dtype, device=device),
    )


def pair(device, *, b=3, **options):
    """Two equal caches with b sequences: one to be reserved, one plain."""
    options = {"num_kv_heads": HKV, "head_dim": D, "v_head_dim": DV, "topk": 5, "max_tokens": 4096, "page_size": 16,
               "dtype": FP32, "device": device} | options  # fmt: skip
    caches = SparseKVCache(**options), SparseKVCache(**options)
    for cache in caches:
        cache.alloc(b)
    return caches


def assert_equal(cache, plain):
    assert cache.seq_lengths().tolist() == plain.seq_lengths().tolist()
    for layer in range(cache.num_layers):
        for seq_id in plain._ids:
            (code, v), (want, want_v) = cache.gather(layer, seq_id), plain.gather(layer, seq_id)
            for name in ("values", "indices", "dense"):
                torch.testing.assert_close(getattr(code, name), getattr(want, name), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(v, want_v, rtol=0, atol=0, equal_nan=True)
            sums = cache.block_sums(layer, seq_id), plain.block_sums(layer, seq_id)
            torch.testing.assert_close(*sums, rtol=2e-7, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "v_dtype", "dense_dims", "page_size", "shape"),
    [
        (FP32, None, 0, 16, {}), (BF16, None, 0, 128, {}), (FP16, None, 3, 100, {}), (BF16, FP32, [40, 2], 16, {}),
        (BF16, torch.int8, 0, 16, {}), (FP16, torch.float8_e4m3fn, 0, 256, {}), (FP32, torch.int8, 2, 7, {}),
        (FP32, torch.float8_e4m3fn, 0, 16, {}), (FP16, BF16, 0, 16, {}), (FP32, FP16, 0, 16, {"topk": D}),
        (BF16, None, 0, 128, {"head_dim": 320, "v_head_dim": 33, "topk": 9}),
    ],
)  # fmt: skip
def test_the_kernel_stores_what_the_plain_append_stores(dtype, v_dtype, dense_dims, page_size, shape, device):
    cache, plain = pair(
        device, dtype=dtype, v_dtype=v_dtype, dense_dims=dense_dims, page_size=page_size, max_tokens=6000, **shape
    )
    cache.reserve(600)
    steps = [
        (1, None),
        (130, [130, 0, 7]),
        (1, None),
        (3, [3, 1, 0]),
        (200, None),
        (1, [0, 1, 1]),
        (57, None),
        (1, None),
    ]
    for seed, (n, lengths) in enumerate(steps):
        k, v = rows(3, n, seed, cache)
        if seed == 1:
            k[0, :3], v[0, 5], v[1, 2] = k[0, :3].round(), 0.0, v[1, 2] * 40  # ties, and 8-bit scales
        for each in (cache, plain):
            each.append(k, v, lengths=lengths)
        assert cache._layers[0].live.lengths.tolist() == cache.seq_lengths().tolist()
    assert_equal(cache, plain)


def test_codes_views_and_values_that_are_not_finite(device):
    cache, plain = pair(device, dtype=BF16, dense_dims=2)
    cache.reserve(40)
    both = normal(3, 4, HKV, D + DV, seed=1, dtype=BF16, device=device)
    both[0, 0, 0, 5:9], both[1, 1, 1, D + 3], both[2, 0, 0, 7] = torch.nan, torch.inf, -torch.inf
    both[1, 2, 0, :D:2], both[1, 2, 0, 1:D:2] = 0.0, -0.0
    k, v = both.split([D, DV], -1)
    code = topk_sparsify(normal(3, 5, HKV, D, seed=2, dtype=BF16, device=device), 5, dense_dims=2)
    for each in (cache, plain):
        each.append(k, v)
        each.append(code, v[:, :1].expand(-1, 5, -1, -1))
        each.append(k.transpose(0, 1)[:3], v.transpose(0, 1)[:3], lengths=[3, 2, 1])
    assert_equal(cache, plain)


def fill(caches, n, seed=0, **options):
    k, v = rows(3, n, seed, caches[0])
    for each in caches:
        for layer in range(each.num_layers):
            each.append(k, v + layer, layer=layer, **options)


def one_token_step(cache, device):
    """A captured append of a token to all layers, and a replay of it with the tokens of a seed."""
    k, v = rows(3, 1, 1, cache)
    values = [v.clone() for _ in range(cache.num_layers)]

    def step():
        for layer, mine in enumerate(values):
            cache.append(k, mine, layer=layer)

    replay = captured(step, device)

    def run(seed, plain=None):
        new_k, new_v = rows(3, 1, seed, cache)
        k.copy_(new_k)
        for layer, mine in enumerate(values):
            mine.copy_(new_v + layer)
            if plain is not None:
                plain.append(new_k, mine, layer=layer)
        replay()

    return run


def test_a_captured_step_is_replayed_while_sequences_grow(device):
    """Across pages and blocks of sums; nothing is stored at the capture, and the host catches up when it looks."""
    cache, plain = caches = pair(device, num_layers=2)
    fill(caches, 127, lengths=[127, 0, 30])
    cache.reserve(140)
    used = cache.used_pages()
    run = one_token_step(cache, device)
    assert cache.seq_lengths().tolist() == [127, 0, 30]
    for step in range(140):
        run(2 + step, plain)
        if step in (0, 77):
            assert_equal(cache, plain)
    assert cache.seq_lengths(layer=1).tolist() == [267, 140, 170] and cache.used_pages() == used
    assert_equal(cache, plain)
    fill(caches, 20, seed=9)  # beyond what was reserved: pages are taken as always
    assert_equal(cache, plain)


def test_a_replay_beyond_the_reserve_stores_nothing_and_the_next_call_says_so(device):
    cache, plain = caches = pair(device)
    fill(caches, 30, lengths=[30, 16, 3])
    cache.reserve(2)  # sequence 1 has 14 tokens more in its page
    run = one_token_step(cache, device)
    for step in range(2):
        run(step + 2, plain)
    pool = cache._layers[0]
    others = sorted(
        set(range(cache.num_pages)) - {p for s in pool.sequences.values() for p in [*s.pages, *s.spare_pages]}
    )
    before = [getattr(pool, name)[others].clone() for name in cache_module._POOLS]
    run(5)  # 0 is at 32, a full page
    k, v = rows(3, 1, 5, plain)
    plain.append(k, v, lengths=[0, 1, 1])
    with pytest.raises(ValueError, match="did not fit"):
        cache.seq_lengths()
    assert_equal(cache, plain)
    for name, x in zip(cache_module._POOLS, before):
        torch.testing.assert_close(getattr(pool, name)[others], x, rtol=0, atol=0, equal_nan=True)


def test_the_host_changes_sequences_between_replays(device):
    cache, plain = caches = pair(device, page_size=32)
    fill(caches, 100, lengths=[100, 40, 64])
    cache.reserve(120)
    run = one_token_step(cache, device)
    run(2, plain)
    for each in caches:
        each.truncate([0, 2], [90, 1])
    run(3, plain)
    assert_equal(cache, plain)
    for each in caches:
        each.reorder([0, 0, 2])
    live = cache._layers[0].live
    # The two share a page that is not full: nothing fits until it is copied.
    assert live.capacity[:2].tolist() == [91, 91]
    cache.reserve(60)
    assert cache._layers[0].live is live
    for step in range(5):
        run(4 + step, plain)
    assert_equal(cache, plain)
    for each in caches:
        assert each.fork(1) == 3
    cache.reserve(20, seq_ids=[0, 1, 2])
    run(20)
    k, v = rows(3, 1, 20, plain)
    plain.append(k, v, seq_ids=[0, 1, 2])
    assert_equal(cache, plain)
    fork, kept = cache.gather(0, 3)[1], plain.gather(0, 3)[1]
    torch.testing.assert_close(fork, kept, rtol=0, atol=0)
    state = cache.state_dict()
    plain.load_state_dict(state)
    assert_equal(cache, plain)
    for each in caches:
        each.free([0, 1, 2, 3])
        assert each.used_pages() == 0 and len(each._layers[0].free_sums) == each._layers[0].sums.shape[0]


def test_a_graph_older_than_the_tables_stores_nothing(device):
    cache, plain = caches = pair(device)
    fill(caches, 20)
    cache.reserve(10)
    run = one_token_step(cache, device)
    run(2, plain)
    cache.reserve(1000)
    run(3)
    with pytest.raises(ValueError, match="did not fit"):
        cache.append(*rows(3, 1, 4, cache))
    assert_equal(cache, plain)
    run = one_token_step(cache, device)
    run(5, plain)
    assert_equal(cache, plain)


def test_what_a_capture_needs(device):
    cache, _ = pair(device)
    k, v = rows(3, 1, 0, cache)
    for options, text in (({}, "reserve"), ({"lengths": [1, 1, 0]}, "lengths must be None")):
        with pytest.raises(ValueError, match=text):
            captured(lambda options=options: cache.append(k, v, **options), device)
        cache.reserve(5)
    with pytest.raises(ValueError, match="reserve"):
        captured(lambda: cache.append(k[:2], v[:2], seq_ids=[2, 1]), device)
    assert cache.seq_lengths().tolist() == [0, 0, 0]


# Without the kernel: only the pages


def test_reserve_takes_the_pages_and_an_append_uses_them():
    cache, plain = caches = pair("cpu", max_tokens=160, num_layers=2)
    fill(caches, 20)
    cache.reserve(13)
    assert cache.used_pages() == 9 and plain.used_pages() == 6
    with pytest.raises(ValueError, match="full"):
        cache.reserve(30)
    assert cache.used_pages() == 9
    cache.reserve(13)
    cache.reserve(0)
    assert cache.used_pages() == 9
    fill(caches, 13, seed=3)
    assert cache.used_pages() == plain.used_pages() == 9
    fork = cache.fork(0)
    cache.reserve(8, seq_ids=[fork])
    assert cache.used_pages() == 10  # its last page is its own now
    cache.free([fork])
    assert_equal(cache, plain)
    cache.free([1, 2])
    assert cache.used_pages() == 3 and cache._layers[0].live is None


def test_truncate_keeps_what_was_reserved():
    """As when rejected tokens are taken back between the replays of a graph."""
    cache, plain = caches = pair("cpu", max_tokens=1000)
    fill(caches, 15)
    cache.reserve(300)
    taken, sums = cache.used_pages(), len(cache._layers[0].free_sums)
    for seed in range(3):
        fill(caches, 150, seed=seed)
        for each in caches:
            each.truncate(None, [15] * 3)
        assert_equal(cache, plain)
        assert cache.used_pages() == taken > plain.used_pages() and len(cache._layers[0].free_sums) == sums
    fork = cache.fork(0)
    cache.truncate([0], [0])  # a page that others share is not kept
    assert cache.seq_lengths([fork]).tolist() == [15]
    cache.free(None)
    assert cache.used_pages() == 0


@pytest.mark.parametrize(
    ("n", "seq_ids", "error", "text"),
    [(1.0, None, TypeError, "n must be an int"), (-1, None, ValueError, "negative"), (1, [7], ValueError, "unknown")],
)
def test_bad_reserve(n, seq_ids, error, text):
    cache, _ = pair("cpu")
    with pytest.raises(error, match=text):
        cache.reserve(n, seq_ids=seq_ids)
    assert cache.used_pages() == 0


@pytest.mark.gpu
def test_a_whole_step_is_captured_and_replayed():
    cache, plain = caches = pair("cuda", head_dim=64, v_head_dim=64, topk=8, dtype=BF16)
    fill(caches, 300, lengths=[300, 1, 130])
    cache.reserve(400)
    k, v = rows(3, 1, 1, cache)
    q = normal(3, 1, 2 * HKV, 64, seed=5, dtype=BF16, device="cuda")
    sfa_attention_with_kvcache(q, plain, impl="cuda")  # compiles
    outs = []
    cache.append(k, v), plain.append(k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.append(k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain.append(k, v)
    replay = captured(lambda: outs.append(sfa_attention_with_kvcache(q, cache, k=k, v=v, impl="cuda")), "cuda")
    for step in range(300):
        new_k, new_v = rows(3, 1, step, cache)
        k.copy_(new_k), v.copy_(new_v)
        replay()
        want = sfa_attention_with_kvcache(q, plain, k=k, v=v, impl="cuda")
        torch.testing.assert_close(outs[0], want, rtol=2e-2, atol=2e-2)
    assert_equal(cache, plain)


def test_old_reservations_cost_nothing_to_read(device, monkeypatch):
    """However many reservations graphs were captured for, one number says whether a replay failed."""
    cache, _ = pair(device)
    for _ in range(5):
        ids = cache.alloc(1).tolist()
        cache.reserve(4, seq_ids=ids)
        captured(lambda ids=ids: cache.append(*rows(1, 1, 0, cache), seq_ids=ids), device)
    assert len(cache._layers[0].stale) == 4
    read, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self.numel()) or real(self))
    cache._catch_up()
    assert read == [2]  # whether an append failed, and the length of the one sequence that is reserved
