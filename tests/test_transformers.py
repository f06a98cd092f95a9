"""The Transformers integration on tiny random models: same tokens with and without the sparse cache."""

import copy
import warnings

import pytest
import torch
import transformers as hf

import flash_sfa.integrations.transformers as sfa_hf
import tiny_models
from flash_sfa.integrations import sparse_cache
from flash_sfa.integrations.transformers import (
    SFACache,
    disable_sfa,
    enable_sfa,
    register_narrow,
)
from tiny_models import SMALL, generate, prompt

MODELS = {
    "gpt2": tiny_models.MODELS["GPT-2"],
    "llama": tiny_models.MODELS["Llama"],
    "qwen3": tiny_models.MODELS["Qwen3"],
    "mistral": tiny_models.MODELS["Mistral"],
    "gemma3": tiny_models.MODELS["Gemma 3"],
    "mimo": tiny_models.MODELS["MiMo-V2-Flash"],
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beam sample": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    "chunked": {"prefill_chunk_size": 4},
    "chunks of one": {"prefill_chunk_size": 1},
    "static": {"cache_implementation": "static"},
}


def uncached(model, inputs, mode):
    mode = {k: v for k, v in mode.items() if k not in ("prefill_chunk_size", "cache_implementation")}
    return generate(model, inputs, use_cache=False, **mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("qwen3", mode) for mode in MODES),
        *((name, mode) for name in ("gpt2", "mimo") for mode in ("beam", "chunked")),
        *((name, "greedy") for name in MODELS if name != "qwen3"),
    ],
)
def test_cached_equals_uncached(name, mode):
    torch.manual_seed(0)
    model, mode = enable_sfa(MODELS[name]().eval(), topk=4), MODES[mode]
    assert torch.equal(generate(model, prompt(), **mode), uncached(model, prompt(), mode))


SETTINGS = {
    "dense query": {"topk": (None, 4)},
    "dense key": {"topk": (4, None)},
    "pair": {"topk": (6, 3)},
    "always on": {"topk": 3, "dense_dims": [0, 3]},
    "by layer": {"topk": [2, 7]},
    "by head": {"topk": [[2, 7], 3]},
    "by query head": {"topk": [(None, 3), [2, 3, 7, 1]]},
    "one layer": {"topk": 3, "layers": [1]},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_cached_equals_uncached(setting, tmp_path):
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), **setting)
    tokens = generate(model, prompt())
    assert torch.equal(tokens, generate(model, prompt(), use_cache=False))
    with torch.no_grad():
        logits = model(**prompt()).logits
        model.save_pretrained(tmp_path)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sfa")
        assert loaded.config.sfa == model.config.sfa
        assert torch.equal(loaded(**prompt()).logits, logits)
        assert torch.equal(enable_sfa(loaded, **loaded.config.sfa)(**prompt()).logits, logits)


@torch.no_grad()
def test_topk_of_a_head_and_of_a_layer():
    torch.manual_seed(0)
    model = MODELS["qwen3"]().eval()
    attend = model.model.layers[1].self_attn
    q, k, v = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 2))

    def out(topk):
        enable_sfa(model, topk=topk)
        return sfa_hf._sfa_forward(attend, q, k, v, None, scaling=0.25)[0]

    assert torch.equal(out([3, [2, 7]])[:, :, :2], out([9, 2])[:, :, :2])
    assert torch.equal(out([3, [2, 7]])[:, :, 2:], out([9, 7])[:, :, 2:])
    by_query = out([3, [2, 5, 7, 7]])
    assert torch.equal(by_query[:, :, :1], out([3, (2, 5)])[:, :, :1])
    assert torch.equal(by_query[:, :, 1:2], out([3, 5])[:, :, 1:2])


def test_a_cached_step_reads_codes_only(model, monkeypatch):
    enable_sfa(model, topk=4)
    prefills, steps = [], []
    forward, decode = sfa_hf.sfa_attention, sparse_cache.sfa_attention_with_kvcache
    monkeypatch.setattr(sfa_hf, "sfa_attention", lambda q, k, v, **kw: prefills.append(k) or forward(q, k, v, **kw))
    monkeypatch.setattr(
        sparse_cache, "sfa_attention_with_kvcache", lambda q, kv, **kw: steps.append(type(q)) or decode(q, kv, **kw)
    )
    out = generate(model, prompt(), return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, SFACache)
    assert len(prefills) == 2 and all(type(k).__name__ == "SparseCode" for k in prefills)
    assert len(steps) == 22
    assert [layer.counts() for layer in cache.layers] == [[22, 19, 17]] * 2
    stored = sum(layer.kv.seq_lengths().sum().item() for layer in cache.layers)
    assert stored == 2 * (22 + 19 + 17)
    heads = cache.layers[0].kv.num_kv_heads
    assert cache.key_nbytes() == stored * heads * 4 * (4 + 1)
    assert cache.value_nbytes() == stored * heads * cache.layers[0].kv.v_head_dim * 4
    assert cache.nbytes() >= cache.key_nbytes() + cache.value_nbytes()
    for layer in cache.layers:
        assert layer.keys is None and layer.values is None


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("mode", ["greedy", "beam sample", "chunked", "prompt_lookup"])
def test_windowed_layers_keep_their_window(name, mode, monkeypatch):
    monkeypatch.setattr(sparse_cache, "SLACK", 1)
    torch.manual_seed(0)
    model = enable_sfa(MODELS[name]().eval(), topk=4)
    inputs, kwargs = prompt(), MODES.get(mode, {})
    if mode == "prompt_lookup":
        inputs, kwargs = looked_up(), {"prompt_lookup_num_tokens": 3}
    cache = SFACache(model.config)
    tokens = generate(model, inputs, past_key_values=cache, max_new_tokens=30, **kwargs)
    kwargs = {} if mode == "prompt_lookup" else kwargs
    kwargs = {k: v for k, v in kwargs.items() if k != "prefill_chunk_size"}
    assert torch.equal(tokens, generate(model, inputs, max_new_tokens=30, use_cache=False, **kwargs))
    windowed = [layer for layer in cache.layers if layer.is_sliding]
    assert windowed and all(layer.start > 0 for layer in windowed), "nothing was given up"
    assert all(max(layer.counts()) <= 2 * (8 - 1 + 1) for layer in windowed)


def test_continue_a_conversation(model):
    enable_sfa(model, topk=4)
    inputs = prompt()
    cache = SFACache(model.config)
    first = generate(model, inputs, past_key_values=cache)
    more = torch.tensor([[7, 8, 9, 10]] * 3)
    turn = {
        "input_ids": torch.cat([first, more], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 16, dtype=torch.long)], dim=1),
    }
    second = generate(model, turn, past_key_values=cache)
    assert torch.equal(second, generate(model, turn, use_cache=False))
    # A turn padded in the middle of the rows.
    holes = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    turn["input_ids"] = torch.cat([second, more * holes], dim=1)
    turn["attention_mask"] = torch.cat([turn["attention_mask"], torch.ones(3, 12, dtype=torch.long), holes], dim=1)
    third = generate(model, turn, past_key_values=cache)
    assert cache.layers[0].kv.seq_lengths(cache.layers[0].ids).tolist() == cache.layers[0].counts()
    if model.config.model_type not in ("mistral", "gemma3_text"):  # whose window counts padding where there is no cache
        assert torch.equal(third, generate(model, turn, use_cache=False))


def looked_up():
    inputs = prompt(rows=1, pad=False)
    ids = inputs["input_ids"].repeat(1, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_assisted_generation(mode, name, monkeypatch):
    monkeypatch.setattr(sparse_cache, "SLACK", 1)
    torch.manual_seed(0)
    model = enable_sfa(MODELS[name]().eval(), topk=4)
    inputs = looked_up()
    crops = []
    crop = sparse_cache.SFALayer.crop
    monkeypatch.setattr(sparse_cache.SFALayer, "crop", lambda self, n: crops.append(n) or crop(self, n))
    if mode == "prompt_lookup":
        assisted = generate(model, inputs, prompt_lookup_num_tokens=3)
    else:
        assistant = enable_sfa(MODELS[name]().eval(), topk=2)
        # Drafts that are longer than what a windowed layer keeps beyond its window.
        draft = {"num_assistant_tokens": 12, "num_assistant_tokens_schedule": "constant"}
        assistant.generation_config.update(**draft, assistant_confidence_threshold=0.0)
        assisted = generate(model, inputs, assistant_model=assistant)
    assert any(n < 0 for n in crops)
    assert torch.equal(assisted, generate(model, inputs, use_cache=False))


def test_the_cache_grows_and_8_bit_values(monkeypatch):
    monkeypatch.setattr(sparse_cache, "_ROOM", 1)
    monkeypatch.setattr(sparse_cache, "_PAGE", 2)
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    caches = {
        name: SFACache(model.config, **options)
        for name, options in {
            "exact": {}, "sized": {"max_length": 40}, "int8": {"v_dtype": torch.int8}, "loose": {"tolerance": 0.05}
        }.items()
    }  # fmt: skip
    out = {
        name: generate(
            model,
            prompt(),
            past_key_values=cache,
            return_dict_in_generate=True,
            output_logits=True,
            max_new_tokens=30,
        )
        for name, cache in caches.items()
    }
    exact = out["exact"]
    assert torch.equal(exact.sequences, generate(model, prompt(), use_cache=False, max_new_tokens=30))
    assert torch.equal(out["sized"].sequences, exact.sequences)
    pages = {name: cache.layers[0].kv.num_pages for name, cache in caches.items()}
    assert pages["sized"] == 3 * 20 and pages["exact"] == 4 * 3 * 6, "it began with 6 pages a row and doubled twice"
    for name in ("int8", "loose"):
        # The second step is the first that reads the cache.
        gap = (out[name].logits[1] - exact.logits[1]).abs().max()
        assert 0 < gap < 0.05
    assert caches["int8"].value_nbytes() == caches["exact"].value_nbytes() // 64 * 18


@torch.no_grad()
def test_long_chunks_and_copies():
    """More than 16 new tokens over a filled cache go another way; a copy of a cache is a cache of its own."""
    torch.manual_seed(0)
    model = enable_sfa(MODELS["gemma3"]().eval(), topk=4)
    inputs = prompt(rows=2, length=70)
    whole = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, prefill_chunk_size=30), whole)
    cache = SFACache(model.config)
    first = {name: x[:, :40] for name, x in inputs.items()}
    generate(model, first, past_key_values=cache, max_new_tokens=1)
    twin = copy.deepcopy(cache)
    assert torch.equal(generate(model, inputs, past_key_values=cache), whole)
    assert twin.get_seq_length() == 40
    assert torch.equal(generate(model, inputs, past_key_values=twin), whole)


def test_the_cache_knows_its_window():
    """Also for a model that does not tell the attention function."""
    torch.manual_seed(0)
    model = enable_sfa(MODELS["mistral"]().eval(), topk=4)
    wanted = generate(model, prompt(), max_new_tokens=20)
    hf.AttentionInterface.register("sfa", lambda *a, sliding_window, **kw: sfa_hf._sfa_forward(*a, **kw))
    try:
        assert torch.equal(generate(model, prompt(), max_new_tokens=20), wanted)
    finally:
        sfa_hf.register_sfa()


@torch.no_grad()
def test_layers_that_share_keys_store_them_once():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    attend, cache = model.model.layers[0].self_attn, SFACache(model.config)
    for n in (5, 1, 20):
        q, k, v = (torch.randn(2, heads, n, 16) for heads in (4, 2, 2))
        key, value = cache.update(k, v, 0)
        with pytest.raises(NotImplementedError, match="changes values"):
            sfa_hf._sfa_forward(attend, q, key, value * 2, None, scaling=0.25)
        first, again = (sfa_hf._sfa_forward(attend, q, key, value, None, scaling=0.25)[0] for _ in range(2))
        assert torch.equal(first, again)
    assert cache.get_seq_length() == 26 and cache.layers[0].counts() == [26, 26]


@torch.no_grad()
def test_a_mask_of_ones_own_is_applied():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    ids = prompt(rows=2, pad=False)["input_ids"]
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    seen[6:, 2:4] = False
    whole = model(ids, attention_mask=seen[None, None].expand(2, 1, -1, -1), use_cache=False).logits
    assert (whole - model(ids, use_cache=False).logits).abs().max() > 1e-3
    for hidden in (torch.finfo(torch.float32).min, -torch.inf):
        added = torch.zeros(2, 1, 11, 11).masked_fill(~seen, hidden)
        assert torch.equal(model(ids, attention_mask=added, use_cache=False).logits, whole)
    cache = SFACache(model.config)
    model(ids[:, :7], attention_mask=seen[None, None, :7, :7].expand(2, 1, -1, -1), past_key_values=cache)
    for i, j in ((7, 10), (10, 11)):
        part = model(ids[:, i:j], attention_mask=seen[None, None, i:j, :j], past_key_values=cache).logits
        torch.testing.assert_close(part, whole[:, i:j], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_in_a_mask_of_ones_own_is_not_stored():
    """Left padding in a 4-D first mask, then steps with the 2-D one."""
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=16)
    ids = prompt(rows=2, pad=False)["input_ids"]
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :3] = False
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    seen = torch.ones(7, 7, dtype=torch.bool).tril() & real[:, None, None, :7]
    cache = SFACache(model.config)
    model(ids[:, :7], attention_mask=seen, position_ids=positions[:, :7], past_key_values=cache)
    assert cache.sparse_layers()[0].kv.seq_lengths().tolist() == [7, 4]
    step = model(ids[:, 7:8], attention_mask=real[:, :8].long(), position_ids=positions[:, 7:8], past_key_values=cache)
    alone = model(ids[1:, 3:8], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step.logits[1:], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_mask_of_keys_over_a_filled_cache_stays_causal():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    ids = prompt(rows=2, pad=False)["input_ids"]
    keys = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    keys[..., 2] = False
    whole = model(ids, attention_mask=keys, use_cache=False).logits
    cache = SFACache(model.config)
    model(ids[:, :2], past_key_values=cache)
    model(ids[:, 2:7], attention_mask=keys[..., :7], past_key_values=cache)
    part = model(ids[:, 7:], attention_mask=keys, past_key_values=cache).logits
    torch.testing.assert_close(part, whole[:, 7:], atol=2e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="a bias on the scores"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1, 1, 12), past_key_values=cache)


def test_modules_that_do_not_know_their_layer_take_one_setting():
    small = {"dim": 32, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}
    model = hf.DistilBertModel(hf.DistilBertConfig(**small)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        dense = model(ids).last_hidden_state
        sparse = enable_sfa(model, topk=4)(ids).last_hidden_state
        assert not torch.allclose(dense, sparse, atol=1e-4)
        for setting in ({"topk": 4, "layers": [1]}, {"topk": [4, 8]}):
            with pytest.raises(NotImplementedError, match="does not know its layer"):
                enable_sfa(model, **setting)(ids)


def test_an_enabled_model_can_be_pickled(tmp_path):
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    out = again.generate(**prompt(rows=2), max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, SFACache)
    assert again._prepare_cache_for_generation.args[0] is again
    assert torch.equal(out.sequences, model.generate(**prompt(rows=2), max_new_tokens=3))


@torch.no_grad()
def test_rows_of_a_cache_are_selected_and_repeated():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    inputs = prompt()
    ids, padding = inputs["input_ids"], inputs["attention_mask"]
    cache = SFACache(model.config)
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    model(ids[:, :10], attention_mask=padding[:, :10], past_key_values=cache, position_ids=positions[:, :10])
    rows = torch.tensor([2, 0, 2, 1])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(rows * 2 + 1)
    cache.reorder_cache(torch.tensor([0, 1, 2, 2]))
    rows = rows[[0, 1, 2, 2]]
    step = model(
        ids[rows, 10:], attention_mask=padding[rows], past_key_values=cache, position_ids=positions[rows, 10:]
    ).logits
    whole = model(ids[rows], attention_mask=padding[rows], position_ids=positions[rows], use_cache=False).logits
    torch.testing.assert_close(step[:, 0], whole[:, -1], atol=2e-5, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    assert torch.equal(generate(model, prompt(rows=2), past_key_values=cache), generate(model, prompt(rows=2)))


def test_refused_caches():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    cache = SFACache(model.config)
    generate(model, prompt(), past_key_values=cache)
    state = cache.key_nbytes()
    longer = prompt(length=30)
    with pytest.raises(ValueError, match="new SFACache"):
        generate(model, prompt(), past_key_values=cache)  # not longer than what the cache holds
    with pytest.raises(ValueError, match="new SFACache"):
        generate(model, prompt(rows=2, length=30), past_key_values=cache)
    longer["attention_mask"][:, :9] = 0
    with pytest.raises(ValueError, match="other padding"):
        generate(model, longer, past_key_values=cache)
    with pytest.raises(ValueError, match="3 rows and the input has 1"):
        model(torch.tensor([[5]]), past_key_values=cache)
    for name in ("offloaded", "quantized"):
        with pytest.raises((NotImplementedError, ImportError), match=f"{name}|quanto"):
            generate(model, prompt(), cache_implementation=name)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with pytest.raises(TypeError, match=r"SFACache.*enable_sfa"):
            model(torch.tensor([[5]] * 3), past_key_values=cache)
    enable_sfa(model, topk=5)
    with pytest.raises(ValueError, match="the cache was made for topk=4"):
        model(torch.tensor([[5]] * 3), past_key_values=cache)
    enable_sfa(model, topk=5, layers=[1])
    with pytest.raises(TypeError, match="this layer is dense"):
        model(torch.tensor([[5]] * 3), past_key_values=cache)
    assert cache.key_nbytes() == state, "a refused step left something behind"
    enable_sfa(model, topk=4)
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(NotImplementedError, match="dropout"):
        model(torch.tensor([[5]] * 3), past_key_values=cache)


def test_loading_without_sfa_warns(tmp_path):
    torch.manual_seed(0)
    model = enable_sfa(MODELS["llama"](), topk=4)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="attends by top-k features") as caught:
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sfa")
        disable_sfa(model).save_pretrained(tmp_path)
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_setting_is_saved(tmp_path):
    torch.manual_seed(0)
    model = enable_sfa(MODELS["llama"]().eval(), topk=(None, 4), dense_dims=[0, 8], layers=[1])
    logits = model(**prompt()).logits
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="sfa"):
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.sfa == {"topk": [None, 4], "dense_dims": [0, 8], "layers": [1]}
    assert (loaded(**prompt()).logits - logits).abs().max() > 1e-3  # not enabled yet: dense
    enable_sfa(loaded, **loaded.config.sfa)
    assert torch.equal(loaded(**prompt()).logits, logits)
    cache = SFACache(loaded.config)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "SFALayer"]
    assert torch.equal(generate(loaded, prompt()), generate(loaded, prompt(), use_cache=False))


def test_rotary_features_are_the_first():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["mimo"](), topk=4, dense_dims="rotary")
    assert model.config.sfa["dense_dims"] == 8
    keys = {}
    for at in (0, 9):
        cache = hf.DynamicCache(config=model.config)
        model(torch.tensor([[5]]), past_key_values=cache, position_ids=torch.tensor([[at]]))
        keys[at] = cache.layers[0].keys
    same = (keys[0] == keys[9]).all(0).all(0).all(0)
    assert same[8:].all() and not same[:8].all()


def test_autocast_training_step_and_cache():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"](), topk=4)
    inputs = prompt(pad=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(**inputs).logits[:, -1]
        cache = SFACache(model.config)
        model(input_ids=inputs["input_ids"][:, :-1], past_key_values=cache)
        step = model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache).logits[:, -1]
    assert cache.layers[0].kv.dtype == torch.bfloat16
    torch.testing.assert_close(step.float(), whole.float(), atol=0.05, rtol=0.05)


@torch.no_grad()
def test_compiles_in_one_graph():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["llama"]().eval(), topk=4)
    ids = prompt(pad=False)["input_ids"]
    eager = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_narrow_rival_is_a_dense_model_on_the_first_features():
    register_narrow()
    torch.manual_seed(0)
    model = MODELS["gpt2"]().eval()
    dense = model(**prompt(pad=False)).logits
    model.config.sfa_narrow = 16
    model.set_attn_implementation("sfa_narrow")
    torch.testing.assert_close(model(**prompt(pad=False)).logits, dense, atol=2e-5, rtol=1e-4)
    model.config.sfa_narrow = 5
    assert (model(**prompt(pad=False)).logits - dense).abs().max() > 1e-3
    assert torch.equal(generate(model, prompt()), generate(model, prompt(), use_cache=False))


def llava(text: hf.PreTrainedConfig | None = None) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text or hf.LlamaConfig(**SMALL), image_token_index=98, image_seq_length=4,
        vision_feature_select_strategy="default", pad_token_id=0,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval()


def image_prompt():
    inputs = prompt(rows=2, pad=False)
    inputs["input_ids"][inputs["input_ids"] == 98] = 7
    inputs["input_ids"][:, 2:6] = 98
    return inputs | {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


def state(model):
    """Every config in use with its attention, and what the instances hold themselves."""
    return (
        [(copy.deepcopy(c.to_dict()), c._attn_implementation, dict(vars(c))) for c in sfa_hf._configs(model)],
        sorted(vars(model)),
    )


@torch.no_grad()
def test_only_the_language_model_of_a_multimodal_model_changes():
    model, inputs = llava(), image_prompt()
    before, dense = state(model), model(**inputs).logits
    tokens = generate(model, inputs)
    enable_sfa(model, topk=16)
    config = model.config
    assert [c._attn_implementation for c in (config, config.vision_config, config.text_config)] == [
        "sdpa", "sdpa", "sfa",
    ]  # fmt: skip
    assert config.get_text_config().sfa["topk"] == 16 and not hasattr(config.vision_config, "sfa")
    torch.testing.assert_close(model(**inputs).logits, dense, atol=2e-5, rtol=1e-4)
    assert torch.equal(generate(model, inputs), tokens)

    enable_sfa(model, topk=2)
    assert (model(**inputs).logits - dense).abs().max() > 1e-3
    out = generate(model, inputs, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, SFACache)
    assert torch.equal(out.sequences, generate(model, inputs, use_cache=False))

    disable_sfa(model)
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, dense)


class TowerConfig(hf.LlamaConfig):
    """A text config that is the model's own and has a vision config below it, as in some older models."""

    sub_configs = {"vision_config": hf.CLIPVisionConfig}  # noqa: RUF012
    vision_config: dict | hf.PreTrainedConfig | None = None


class LlamaWithTower(hf.LlamaForCausalLM):
    config_class = TowerConfig

    def __init__(self, config):
        super().__init__(config)
        self.tower = hf.CLIPVisionModel(config.vision_config)


def test_a_vision_tower_below_a_flat_text_config_stays():
    """Transformers spreads the attention of such a model to all its sub-configs."""
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    model = LlamaWithTower(TowerConfig(**SMALL, vision_config=vision))
    before = state(model)
    model.set_attn_implementation("eager")
    assert model.tower.config._attn_implementation == "eager", "it does spread"
    model.set_attn_implementation("sdpa")
    assert state(model) == before
    enable_sfa(model, topk=4)
    assert model.config._attn_implementation == "sfa"
    assert model.tower.config is model.config.vision_config and vision._attn_implementation == "sdpa"
    disable_sfa(model)
    assert state(model) == before


def test_disable_restores_a_loaded_setting():
    model = MODELS["llama"]()
    model.config.sfa = {"topk": 3}
    before = state(model)
    disable_sfa(enable_sfa(enable_sfa(model, **model.config.sfa), topk=5))
    assert state(model) == before


def test_a_failure_half_way_is_rolled_back(monkeypatch):
    model = llava()
    before = state(model)

    def switches_and_fails(self, name):
        for config in (self.config, model.config, model.config.vision_config):
            config._attn_implementation_internal = name
        raise NotImplementedError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.language_model), "set_attn_implementation", switches_and_fails)
        with pytest.raises(NotImplementedError, match="half way"):
            enable_sfa(model, topk=4)
    assert state(model) == before
    enable_sfa(model, topk=4)
    enabled = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.language_model), "set_attn_implementation", switches_and_fails)
        with pytest.raises(NotImplementedError, match="half way"):
            enable_sfa(model, topk=5)
    assert state(model) == enabled
    disable_sfa(model)
    assert state(model) == before


GPTJ = {"vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
REFUSED = {
    "GPTJ": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPTJ)),
    "GPTJModel": lambda: llava(hf.GPTJConfig(**GPTJ)),
    # Its vision tower uses the interface, its text layers do not; Transformers would let it pass.
    "GitForCausalLM": lambda: hf.GitForCausalLM(
        hf.GitConfig(vocab_size=199, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                     vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                    "intermediate_size": 32, "image_size": 8, "patch_size": 4})
    ),
    "encoder-decoder": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, forced_eos_token_id=None)
    ),
    "cross-attention": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    ),
    "MLA": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 4}, first_k_dense_replace=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_refused_models_stay_as_they_are(words):
    model = REFUSED[words]()
    before = state(model)
    with pytest.raises(NotImplementedError, match=words):
        enable_sfa(model, topk=4)
    assert state(model) == before


@pytest.mark.parametrize("model", [None, "llama", torch.nn.Linear(2, 2), torch.nn.Sequential(MODELS["llama"]())])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=f"model must be .*, got {type(model).__name__}"):
        enable_sfa(model, topk=4)


def mask(*args, **kwargs):
    return sfa_hf._mask(2, *args, **kwargs)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_mask_does_not_wait_for_the_device(device):
    """A meta tensor has no values to look at, and CUDA is told to raise at a synchronisation."""
    padding = torch.ones(2, 9, dtype=torch.bool, device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        lean = mask(3, 9, q_offset=6, attention_mask=padding)
        full = mask(3, 9, q_offset=6, attention_mask=padding, local_size=4, device=padding.device)
        none = mask(3, 9, q_offset=6)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert (lean.shape, lean.dtype, lean.device.type) == ((2, 1, 1, 9), torch.bool, device)
    assert full.shape == (2, 1, 3, 9)
    assert none is None


def test_lean_masks_on_the_cpu():
    padding = torch.ones(2, 9, dtype=torch.long)
    assert mask(3, 9, q_offset=6, attention_mask=padding) is None
    padding[1, :2] = 0
    lean = mask(3, 9, q_offset=6, attention_mask=padding)
    assert torch.equal(lean, padding[:, None, None].bool())
    # A step of one token over a static cache, which counts on the device.
    assert mask(1, 1, q_offset=torch.tensor(7)) is None
    assert mask(1, 1, q_offset=torch.tensor(7), attention_mask=padding).shape == (2, 1, 1, 1)
    # A mask that is shorter than the keys hides the rest of them.
    assert mask(3, 9, q_offset=6, attention_mask=padding[:, :8].bool()).shape == (2, 1, 3, 9)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"topk": 0}, ValueError, "topk"),
        ({"topk": (None, None)}, ValueError, "topk"),
        ({"topk": 4.0}, TypeError, "topk"),
        ({"topk": 4, "dense_dims": 16}, ValueError, "dense_dims"),
        ({"topk": 4, "dense_dims": "rotary"}, ValueError, "rotary"),
        ({"topk": 4, "layers": [2]}, ValueError, "layers"),
        ({"topk": 4, "layers": [1, 1]}, ValueError, "layers"),
        ({"topk": 4, "layers": [-1]}, ValueError, "layers"),
        ({"topk": 4, "layers": range(2**62)}, ValueError, "layers"),
        ({"topk": 4, "layers": []}, ValueError, "layers"),
        ({"topk": 4, "layers": 1}, TypeError, "layers"),
        ({"topk": 4, "layers": "01"}, TypeError, "layers"),
        ({"topk": 4, "layers": (i for i in (0, 1))}, TypeError, "layers"),
        ({"topk": 4, "layers": {0}}, TypeError, "layers"),
        ({"topk": 4, "layers": ["0"]}, TypeError, "layers"),
        ({"topk": 4, "layers": [True]}, TypeError, "layers"),
        ({"topk": 4, "layers": torch.tensor([0])}, TypeError, "layers"),
    ],
)
def test_bad_settings_change_nothing(kwargs, error, words):
    model = MODELS["llama"]()
    before = model.config._attn_implementation
    with pytest.raises(error, match=words):
        enable_sfa(model, **kwargs)
    assert model.config._attn_implementation == before
    assert not hasattr(model.config, "sfa")


def test_refusals():
    with pytest.raises(ValueError, match="name"):
        sfa_hf.register_sfa("flash_sfa")
    with pytest.raises(ValueError, match="enable_sfa"):
        SFACache(hf.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="not enabled"):
        disable_sfa(MODELS["llama"]())
    model = enable_sfa(MODELS["llama"](), topk=4)
    q = torch.randn(1, 4, 3, 16)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            sfa_hf._sfa_forward(
                model.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None, scaling=1.0, **{name: 1.0}
            )
    model.config.sfa["tokp"] = 3
    with pytest.raises(ValueError, match="tokp"):
        model(**prompt())
