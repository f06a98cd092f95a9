"""Steps of cached generation: nothing waits for the device, and static caches in compiled steps."""

import contextlib
import copy
import pickle
import shutil
import weakref

import pytest
import torch
import torch._dynamo as dynamo
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

import flash_sfa.integrations.transformers as sfa_hf
import tiny_models
from flash_sfa import cache as cache_module
from flash_sfa import decode
from flash_sfa.impl import cuda_append, cuda_decode
from flash_sfa.integrations import sparse_cache
from flash_sfa.integrations.transformers import SFACache, enable_sfa
from test_cache_append import host_kernel
from tiny_models import generate, prompt


def model_of(name, device="cpu", **setting):
    torch.manual_seed(0)
    return enable_sfa(tiny_models.MODELS[name]().eval(), **({"topk": 4} | setting)).to(device)


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor goes from the host to the device in a way that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            assert kwargs.get("device", "cpu") == "cpu" or kwargs.get("non_blocking"), "waits for the device"
        elif func is torch.ops.aten.copy_.default and args[1].device.type == "cpu" != args[0].device.type:
            assert kwargs.get("non_blocking") or args[2:], "waits for the device"
        return func(*args, **kwargs)


@pytest.fixture
def meta_kernels(monkeypatch):
    """The kernels for a device without values, where whatever looks at one raises; the launches."""
    launched = []

    class Kernels:
        def launch(self, name, *args, **kwargs):
            launched.append(name)

    monkeypatch.setattr(cuda_append, "unsupported", lambda cache: None)
    monkeypatch.setattr(cuda_append, "load", lambda *args: Kernels())
    monkeypatch.setattr(cuda_decode, "load", lambda *args: Kernels())
    monkeypatch.setattr(decode, "_choose", lambda *args: "cuda")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    # An operator on a meta tensor is its fake; this is what it does on a GPU.
    monkeypatch.setattr(sfa_hf, "cached_step", sparse_cache.cached_step._init_fn)
    return launched


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "static", "topk"),
    [("Qwen3", False, 4), ("Qwen3", True, [[2, 4], 4]), ("Mistral", False, [[2, 4], 4]), ("Mistral", True, 4)],
)
def test_a_step_does_not_wait_for_the_device(name, static, topk, meta_kernels, monkeypatch):
    """Over page ends, and where a window's tail is given up and the pools grow."""
    for constant, value in (("_PAGE", 8), ("_ROOM", 8), ("SLACK", 4)):
        monkeypatch.setattr(sparse_cache, constant, value)
    model = model_of(name, "meta", topk=topk)
    cache = SFACache(model.config, max_length=100 if static else None, static=static)
    ids = torch.zeros(2, 20, dtype=torch.long, device="meta")
    with monkeypatch.context() as patch:  # the first pass may look at the padding
        patch.setattr(sparse_cache._Padding, "look", lambda *args: None)
        model(ids, past_key_values=cache)
    meta_kernels.clear()
    steps = 40 if static else 60  # static layers share the address of their state on meta, so their pages
    with NoWaiting():
        for i in range(steps):
            seen = torch.ones(2, 21 + i, dtype=torch.long, device="meta")
            at = torch.zeros(2, 1, dtype=torch.long, device="meta")
            model(ids[:, :1], attention_mask=seen, position_ids=at, past_key_values=cache)
    if static:
        count = len(meta_kernels)
        cache.reset()
        with monkeypatch.context() as patch:
            patch.setattr(sparse_cache._Padding, "look", lambda *args: None)
            model(ids, past_key_values=cache)
        with NoWaiting():
            model(ids[:, :1], attention_mask=seen, position_ids=at, past_key_values=cache)
        del meta_kernels[count:]
    layers = len(cache.layers)
    assert meta_kernels.count("sfa_decode") == meta_kernels.count("sfa_combine") == layers * steps
    appends = meta_kernels.count("sfa_append")
    if name == "Mistral" and not static:
        assert cache.layers[0].start > 0 and appends > layers * steps, "it moved the rest of its tokens"
    else:
        assert appends == layers * steps
    if not static:
        assert cache.get_seq_length() == 20 + steps


@pytest.fixture
def host_append(monkeypatch):
    """The append kernel's source compiled for the CPU; counts its launches. Nothing may be appended another way."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    calls = []
    append = cuda_append.append
    monkeypatch.setattr(cuda_append, "load", lambda config, device: host_kernel(config))
    monkeypatch.setattr(cuda_append, "unsupported", lambda cache: None)
    monkeypatch.setattr(cuda_append, "append", lambda *args: calls.append(type(args[2]).__name__) or append(*args))
    monkeypatch.setattr(cache_module, "_lookup", lambda *args: pytest.fail("an append without its kernel"))
    monkeypatch.setattr(sparse_cache, "_PAGE", 4)
    return calls


MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize(
    ("name", "mode"), [*(("Qwen3", mode) for mode in MODES), ("Mistral", "greedy"), ("Gemma 3", "static")]
)
def test_every_token_is_stored_by_the_append_kernel(name, mode, host_append, monkeypatch):
    """Rows are reserved anew after beams were reordered, pools grew and a window moved."""
    monkeypatch.setattr(sparse_cache, "SLACK", 2)
    monkeypatch.setattr(sparse_cache, "_ROOM", 1)
    model, mode = model_of(name), MODES[mode]
    tokens = generate(model, prompt(), max_new_tokens=30, **mode)
    kinds = set(host_append)
    assert kinds == {"SparseCode", "Tensor"}, "codes that the first pass knows, later rows"
    mode = {k: v for k, v in mode.items() if k == "num_beams"}
    assert torch.equal(tokens, generate(model, prompt(), max_new_tokens=30, use_cache=False, **mode))


@torch.no_grad()
def test_replayed_steps_are_seen_when_the_host_looks(host_append):
    """A replay runs the kernels, and no Python: here the append is launched behind the layer's back."""
    model = model_of("Qwen3", topk=[4, [2, 3]])
    ids = prompt(rows=2)["input_ids"]
    seen = prompt(rows=2)["attention_mask"]
    cache = SFACache(model.config, static=True, max_length=40)
    model(ids, attention_mask=seen, past_key_values=cache)
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        for layer in each.layers:
            assert any(layer.state is state for state in sparse_cache._STATES.values()), "its address may be reused"
            assert layer._new_state(layer.kv, layer.tables) is layer.state, "captured anew for nothing"
            q, stored = torch.randn(2, 1, 4, 16), [layer.kv.gather(0, i)[1] for i in layer.ids]
            for step in range(9):  # over the ends of pages
                k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
                if step in (4, 8):
                    layer.step(q, k, v, -1, 0.25)
                else:
                    cuda_append.append(layer.kv, 0, layer.to_store(k, v), v, layer.kv._layers[0].live, None)
                stored = [torch.cat([rows, new]) for rows, new in zip(stored, v)]
                if step in (0, 8):
                    assert layer.kv.seq_lengths().tolist() == [len(rows) for rows in stored] == [12 + step, 9 + step]
                    assert all(torch.equal(layer.kv.gather(0, i)[1], rows) for i, rows in zip(layer.ids, stored))
    assert cache.layers[0].state is not twin.layers[0].state


class Counted:
    """aot_eager, counting the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return dynamo.backends.debugging.aot_eager(graph, inputs)

    def __deepcopy__(self, memo):  # Transformers copies its CompileConfig
        return self


def compiled(backend):
    config = hf.CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("name", ["Qwen3", "GPT-2", "Gemma 3", "MiMo-V2-Flash"])
def test_static_generation_compiles_once(name):
    """Tokens equal those without a cache, also of other prompts in the same graph."""
    dynamo.reset()
    model, backend = model_of(name), Counted()
    for inputs, mode in (
        (prompt(), {}),
        (prompt(), {"max_new_tokens": 30}),
        (prompt(length=25), {"do_sample": True}),
        (prompt(length=7, pad=False), {}),
    ):
        tokens = generate(model, inputs, **compiled(backend), **mode)
        assert torch.equal(tokens, generate(model, inputs, use_cache=False, **mode))
        # Transformers 5.23 makes no mask for a prompt without padding, which is another graph.
        assert backend.graphs == 1 or (backend.graphs == 2 and bool(inputs["attention_mask"].all()))


@pytest.mark.parametrize(
    "options", [{"topk": [[2, 4], [4, 3, 2, 1]]}, {"topk": (None, 4), "dense_dims": [0, 3]}], ids=str
)
def test_settings_of_a_compiled_static_cache(options):
    dynamo.reset()
    model, backend = model_of("Qwen3", **options), Counted()
    assert torch.equal(generate(model, prompt(), **compiled(backend)), generate(model, prompt(), use_cache=False))
    assert backend.graphs == 1


def test_a_static_cache_of_ones_own_takes_its_room_at_once(monkeypatch):
    monkeypatch.setattr(sparse_cache, "_PAGE", 2)
    dynamo.reset()
    model, backend = model_of("Mistral"), Counted()
    options = {name: x for name, x in compiled(backend).items() if name == "compile_config"}
    cache = SFACache(model.config, static=True, max_length=45, v_dtype=torch.int8)
    first = generate(model, prompt(), past_key_values=cache, **options)
    kv = cache.layers[0].kv
    assert kv.v_dtype == torch.int8 and cache.is_compileable
    assert kv.num_pages == 3 * 23
    # Each row has its 45 tokens less its padding, whether stored or not.
    assert kv.used_pages() == sum(-(-(45 - pad) // 2) for pad in (0, 3, 5))
    more = torch.tensor([[7, 8, 9, 10]] * 3)
    turn = {
        "input_ids": torch.cat([first, more], dim=1),
        "attention_mask": torch.cat([prompt()["attention_mask"], torch.ones(3, 16, dtype=torch.long)], dim=1),
    }
    second = generate(model, turn, past_key_values=cache, max_new_tokens=10, **options)
    assert backend.graphs == 1 and cache.layers[0].kv is kv and int(cache.get_seq_length()) == 36
    again = SFACache(model.config, v_dtype=torch.int8)
    generate(model, prompt(), past_key_values=again)
    assert torch.equal(second, generate(model, turn, past_key_values=again, max_new_tokens=10))
    with pytest.raises(ValueError, match="max_length=45"):
        model(torch.cat([second, second], dim=1), past_key_values=cache)
    cache.crop(-100)
    assert int(cache.get_seq_length()) == 0
    cache.reset()
    assert torch.equal(generate(model, prompt(), past_key_values=cache, **options), first) and backend.graphs == 1
    cache.reset()
    cache.crop(-1)  # of nothing


@pytest.mark.parametrize(
    ("mode", "static"), [({}, True), ({"num_beams": 2}, False), ({"prefill_chunk_size": 4}, False)]
)
def test_static_generation_takes_its_room_at_once(mode, static, monkeypatch):
    monkeypatch.setattr(sparse_cache, "_PAGE", 2)
    model = model_of("Qwen3")
    out = generate(model, prompt(), cache_implementation="static", return_dict_in_generate=True, **mode)
    cache = out.past_key_values
    assert isinstance(cache, SFACache) and cache.is_compileable == static
    rows = 3 * mode.get("num_beams", 1)
    assert [layer.kv.num_pages for layer in cache.layers] == [rows * 11] * 2, "for 11 + 12 - 1 tokens"


def test_what_a_static_cache_cannot_do():
    model = model_of("Qwen3")
    cache = SFACache(model.config, static=True, max_length=40)
    with pytest.raises(NotImplementedError, match="beam search"):
        generate(model, prompt(), past_key_values=cache, num_beams=2)
    cache = SFACache(model.config, static=True, max_length=40)
    generate(model, prompt(), past_key_values=cache)
    seen = torch.ones(3, 1, 1, 23, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="mask of your own"):
        model(torch.tensor([[5]] * 3), attention_mask=seen, past_key_values=cache)
    with pytest.raises(ValueError, match="3 rows and the input has 2"):
        model(torch.tensor([[5]] * 2), past_key_values=cache)
    with pytest.raises(ValueError, match="static=True needs max_length"):
        SFACache(model.config, static=True)
    with pytest.raises(TypeError, match="static"):
        SFACache(model.config, static=1, max_length=4)
    enable_sfa(model, topk=4, layers=[1])
    with pytest.raises(NotImplementedError, match="layer 0 keeps dense keys"):
        SFACache(model.config, static=True, max_length=40)
    out = generate(model, prompt(), cache_implementation="static", return_dict_in_generate=True)
    assert not out.past_key_values.is_compileable
    assert torch.equal(out.sequences, generate(model, prompt(), use_cache=False))


@torch.no_grad()
def test_a_static_step_without_a_mask_counts_its_own_positions():
    model = model_of("GPT-2")
    ids = prompt(rows=2, pad=False)["input_ids"]
    cache = SFACache(model.config, static=True, max_length=20)
    model(ids[:, :5], past_key_values=cache)
    parts = [model(ids[:, 5:6], past_key_values=cache).logits, model(ids[:, 6:9], past_key_values=cache).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (9, 10)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits[:, 5:], atol=2e-5, rtol=1e-4)
    twin = copy.deepcopy(cache)
    cache.crop(-3)
    for each, past in ((twin, 11), (cache, 8)):
        assert int(each.get_seq_length()) == past and each.layers[0].counts() == [past] * 2
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    step = model(longer[:, 11:], past_key_values=twin).logits
    torch.testing.assert_close(step, model(longer, use_cache=False).logits[:, 11:], atol=2e-5, rtol=1e-4)
    again = model(ids[:, 8:9], past_key_values=cache).logits
    torch.testing.assert_close(again, parts[1][:, 2:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_static_step_beyond_max_length_changes_nothing():
    model = model_of("GPT-2")
    ids, left = prompt(rows=2)["input_ids"][:, :9], torch.ones(2, 9, dtype=torch.long)
    left[1, :3] = 0
    cache = SFACache(model.config, static=True, max_length=10)
    model(ids, attention_mask=left, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="max_length=10"):
            model(ids[:, :1], past_key_values=cache)
        assert int(cache.get_seq_length()) == 10 and cache.layers[0].kv.seq_lengths().tolist() == [10, 7]


@torch.no_grad()
def test_a_growing_cache_fills_its_room_before_it_moves(monkeypatch):
    monkeypatch.setattr(sparse_cache, "_PAGE", 8)
    model = model_of("Llama")
    cache = SFACache(model.config, max_length=32)
    ids = prompt(rows=3, pad=False)["input_ids"][:, :9]
    model(ids, past_key_values=cache)
    pools = [layer.kv for layer in cache.layers]
    for _ in range(32 - 9):
        model(ids[:, :1], past_key_values=cache)
    assert [layer.kv for layer in cache.layers] == pools and pools[0].used_pages() == 12
    model(ids[:, :1], past_key_values=cache)
    assert cache.layers[0].kv is not pools[0] and cache.get_seq_length() == 33


def test_padding_does_not_keep_the_mask():
    padding = sparse_cache._Padding()
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    padding.look(mask, 2, 4)
    assert pickle.loads(pickle.dumps(padding)).mask is None
    seen = weakref.ref(mask)
    del mask
    assert seen() is None


def test_generation_with_another_attention_takes_transformers_cache():
    model = model_of("Llama")
    model.set_attn_implementation("sdpa")
    out = generate(model, prompt(), return_dict_in_generate=True)
    assert type(out.past_key_values) is hf.DynamicCache
    enable_sfa(model, topk=4)
    out = generate(model, prompt(), return_dict_in_generate=True)
    assert type(out.past_key_values) is SFACache
