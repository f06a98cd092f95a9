"""The models of docs/transformers.md, tiny and random: dense at topk = head_dim, and the rules of masks and caches."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf

from flash_sfa.integrations import settings
from flash_sfa.integrations import transformers as sfa_hf
from flash_sfa.integrations.transformers import SFACache, SFALayer, enable_sfa
from tiny_models import ENCODERS, MODELS, REFUSED, build, generate, prompt

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_feature_gives_the_dense_model(name):
    model, inputs = build(name), prompt(pad=False)
    dense, tokens = model(**inputs).logits, generate(model, inputs)
    enable_sfa(model, topk=settings.head_dim(model.config))
    torch.testing.assert_close(model(**inputs).logits, dense, **CLOSE)
    assert torch.equal(generate(model, inputs), tokens)
    enable_sfa(model, topk=2)
    assert (model(**inputs).logits - dense).abs().max() > 1e-4, "topk=2 is another model"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_generation_equals_uncached(name):
    model = enable_sfa(build(name), topk=4)
    out = generate(model, prompt(), return_dict_in_generate=True)
    assert all(isinstance(layer, SFALayer) for layer in out.past_key_values.layers)
    assert torch.equal(out.sequences, generate(model, prompt(), use_cache=False))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_future_and_padding_change_nothing(name):
    model = enable_sfa(build(name), topk=4)
    inputs = prompt(rows=2, pad=False)
    logits = model(**inputs, use_cache=False).logits
    inputs["input_ids"][:, -1] = 5
    # Exactly, but for experts: their matrix products depend on which tokens go together.
    budget = CLOSE if "MoE" in name else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[:, :-1], logits[:, :-1], **budget)

    padded = prompt(rows=2)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = model(input_ids=padded["input_ids"][1:, 3:], use_cache=False).logits[0]
    for cache in (None, SFACache(model.config)):
        with_padding = model(
            **padded, position_ids=positions, past_key_values=cache, use_cache=cache is not None
        ).logits[1, 3:]
        torch.testing.assert_close(with_padding, alone, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packing_equals_separate_documents(name, monkeypatch):
    model = enable_sfa(build(name), topk=4)
    ids = prompt(rows=1, length=17, pad=False)["input_ids"]
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in (ids[:, :6], ids[:, 6:])], dim=1)
    calls = []
    varlen = sfa_hf.sfa_attention_varlen
    monkeypatch.setattr(sfa_hf, "sfa_attention_varlen", lambda *a, **kw: calls.append(1) or varlen(*a, **kw))
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, alone, **CLOSE)
    cu = torch.tensor([0, 6, 17], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 11, "max_length_k": 11}
    packed = model(input_ids=ids, position_ids=positions, use_cache=False, **lengths).logits
    torch.testing.assert_close(packed, alone, **CLOSE)
    # StableLM keeps them to itself; the mask from the positions does then.
    assert len(calls) == (0 if name == "StableLM" else 2), "cu_seq_lens did not reach the attention function"


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders(name):
    model, inputs = build(name), prompt(rows=2)
    seen = inputs["attention_mask"].bool()
    dense = model(**inputs).last_hidden_state
    enable_sfa(model, topk=settings.head_dim(model.config))
    torch.testing.assert_close(model(**inputs).last_hidden_state[seen], dense[seen], **CLOSE)
    enable_sfa(model, topk=4)
    sparse = model(**inputs).last_hidden_state
    assert (sparse[seen] - dense[seen]).abs().max() > 1e-4
    inputs["input_ids"][~seen] = 7
    torch.testing.assert_close(model(**inputs).last_hidden_state[seen], sparse[seen], **CLOSE)


REASONS = {
    "Gemma 2 with score caps": "softcap",
    "DeepSeek-V2 (MLA)": "compressed latent",
    "DeepSeek-V3 (MLA)": "compressed latent",
    "gpt-oss (sinks)": "attention sinks",
    "GPT-J": "does not route attention",
    "BART": "encoder-decoder",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_say_why(name):
    model = build(name)
    with pytest.raises(NotImplementedError, match=REASONS[name]):
        enable_sfa(model, topk=4)(input_ids=torch.tensor([[5, 6, 7]]))


def test_the_table_names_every_model():
    page = (Path(__file__).parent.parent / "docs/transformers.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (works|encoder|refused)[^|]*\|", page, flags=re.M))
    want = {**dict.fromkeys(MODELS, "works"), **dict.fromkeys(ENCODERS, "encoder"), **dict.fromkeys(REFUSED, "refused")}
    assert rows == want


def test_windowed_models_may_change_their_global_layers_only():
    model = enable_sfa(build("Cohere2"), topk=4, layers="global")
    assert model.config.sfa["layers"] == [1]
    assert [type(layer) for layer in SFACache(model.config).layers] == [
        hf.cache_utils.DynamicSlidingWindowLayer,
        SFALayer,
    ]
    inputs = prompt()
    tokens = generate(model, inputs, max_new_tokens=20)
    assert torch.equal(tokens, generate(model, inputs, max_new_tokens=20, use_cache=False))
    with pytest.raises(ValueError, match="global"):
        enable_sfa(build("Llama"), topk=4, layers="global")
