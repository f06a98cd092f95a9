"""The Transformers integration on tiny random models: same tokens with and without the sparse cache."""

import copy

import pytest
import torch
import transformers as hf

import flash_sfa.integrations.transformers as sfa_hf
from flash_sfa.integrations.transformers import (
    SFACache,
    disable_sfa,
    enable_sfa,
    register_dense,
    register_narrow,
)

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def mimo() -> hf.PreTrainedModel:
    config = hf.MiMoV2FlashConfig(
        **SMALL, head_dim=32, v_head_dim=16,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
        },
        layer_types=["full_attention"] * 2, mlp_layer_types=["dense"] * 2,
    )  # fmt: skip
    register_dense()
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="sfa_dense")


MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=8)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=99,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=None,
        )  # fmt: skip
    ),
    "mimo": mimo,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def head_dim(model):
    return sfa_hf._head_dim(model.config)


def prompt(rows=3, length=11, pad=True):
    ids = torch.randint(2, 99, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if pad:
        for row, zeros in enumerate((0, 3, 5)[:rows]):
            ids[row, :zeros], mask[row, :zeros] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **kwargs):
    torch.manual_seed(5)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(**inputs, **kwargs)


@torch.no_grad()
def test_full_topk_equals_dense(model):
    inputs = prompt(pad=False)
    dense = model(**inputs).logits
    tokens = generate(model, inputs)
    enable_sfa(model, topk=head_dim(model))
    torch.testing.assert_close(model(**inputs).logits, dense, atol=2e-5, rtol=1e-4)
    assert torch.equal(generate(model, inputs), tokens)
    enable_sfa(model, topk=3)
    assert (model(**inputs).logits - dense).abs().max() > 1e-3  # topk=3 is another model: the path ran
    disable_sfa(model)
    torch.testing.assert_close(model(**inputs).logits, dense, atol=0, rtol=0)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "sample", "beam", "chunked"],
)
def test_cached_equals_uncached(model, mode):
    enable_sfa(model, topk=4)
    inputs = prompt()
    cached = generate(model, inputs, **mode)
    mode = {key: value for key, value in mode.items() if key != "prefill_chunk_size"}
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **mode))


def test_generate_uses_the_sparse_cache(model, monkeypatch):
    enable_sfa(model, topk=4)
    seen = []
    forward = sfa_hf.sfa_attention
    monkeypatch.setattr(sfa_hf, "sfa_attention", lambda q, k, v, **kw: seen.append(type(k)) or forward(q, k, v, **kw))
    out = generate(model, prompt(), return_dict_in_generate=True)
    assert seen and set(seen) == {sfa_hf.SparseCode}
    cache = out.past_key_values
    assert isinstance(cache, SFACache)
    dense = hf.DynamicCache(config=model.config)
    disable_sfa(model)
    model(**prompt(), past_key_values=dense)
    layer, own = cache.layers[0], dense.layers[0]
    tokens, dense_tokens = layer.values.shape[-2], own.values.shape[-2]
    d = own.keys.shape[-1]
    per_token = sum(x.nbytes for x in (layer.keys, layer.key_indices, layer.key_dense)) / tokens
    assert per_token == own.keys.nbytes / dense_tokens * (4 * (4 + 1)) / (4 * d)


def test_continue_a_conversation():
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    inputs = prompt(rows=1, pad=False)
    cache = SFACache(model.config)
    first = generate(model, inputs, past_key_values=cache)
    longer = torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)
    second = generate(model, {"input_ids": longer}, past_key_values=cache)
    assert torch.equal(second, generate(model, {"input_ids": longer}, use_cache=False))


@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
def test_assisted_generation(mode):
    torch.manual_seed(0)
    model = enable_sfa(MODELS["qwen3"]().eval(), topk=4)
    inputs = prompt(rows=1, pad=False)
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    crops = []
    crop = sfa_hf._SparseKeys.crop
    sfa_hf._SparseKeys.crop = lambda self, n: crops.append(n) or crop(self, n)
    try:
        if mode == "prompt_lookup":
            assisted = generate(model, inputs, prompt_lookup_num_tokens=3)
        else:
            assisted = generate(model, inputs, assistant_model=enable_sfa(copy.deepcopy(model), topk=2))
    finally:
        sfa_hf._SparseKeys.crop = crop
    assert crops
    assert torch.equal(assisted, generate(model, inputs, use_cache=False))


@torch.no_grad()
def test_causal_and_padding(model):
    enable_sfa(model, topk=4)
    inputs = prompt(rows=2, pad=False)
    logits = model(**inputs).logits
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = 5
    assert torch.equal(model(**changed).logits[:, :-1], logits[:, :-1])

    padded = prompt(rows=2)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with_padding = model(**padded, position_ids=positions).logits[1, 3:]
    alone = model(input_ids=padded["input_ids"][1:, 3:]).logits[0]
    torch.testing.assert_close(with_padding, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mistral"])
@torch.no_grad()
def test_packing_equals_separate_documents(name, monkeypatch):
    torch.manual_seed(0)
    model = enable_sfa(MODELS[name]().eval(), topk=4)
    ids = prompt(rows=1, length=17, pad=False)["input_ids"]
    alone = torch.cat([model(input_ids=part).logits for part in (ids[:, :6], ids[:, 6:])], dim=1)
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)

    calls = []
    varlen = sfa_hf.sfa_attention_varlen
    monkeypatch.setattr(sfa_hf, "sfa_attention_varlen", lambda *a, **kw: calls.append(1) or varlen(*a, **kw))
    cu = torch.tensor([0, 6, 17], dtype=torch.int32)
    packed = model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=11,
        max_length_k=11,
    ).logits
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)
    assert len(calls) == 2


@torch.no_grad()
def test_setting_is_saved(tmp_path):
    torch.manual_seed(0)
    model = enable_sfa(MODELS["llama"]().eval(), topk=(None, 4), dense_dims=[0, 8], layers=[1])
    logits = model(**prompt()).logits
    model.save_pretrained(tmp_path)
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
    model = enable_sfa(mimo(), topk=4, dense_dims="rotary")
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
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.bfloat16
    torch.testing.assert_close(step.float(), whole.float(), atol=0.05, rtol=0.05)


@torch.no_grad()
def test_bidirectional_model():
    torch.manual_seed(0)
    model = hf.BertModel(
        hf.BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    ).eval()
    inputs = prompt(rows=2)
    dense = model(**inputs).last_hidden_state
    enable_sfa(model, topk=16)
    out = model(**inputs).last_hidden_state
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(out[seen], dense[seen], atol=2e-5, rtol=1e-4)


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
