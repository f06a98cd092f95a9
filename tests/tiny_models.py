"""Tiny random Transformers models, by the name that docs/transformers.md gives them."""

import torch
import transformers as hf

from flash_sfa.integrations.transformers import register_dense

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
NO_GROUPS = SMALL | {"num_key_value_heads": 4}
MIXED = ["sliding_attention", "full_attention"]


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


def gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None)
    )


def causal(config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_config(config)


MODELS = {
    "GPT-2": gpt2,
    "GPT-NeoX": lambda: causal(hf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})),
    "Llama": lambda: causal(hf.LlamaConfig(**SMALL)),
    "Mistral": lambda: causal(hf.MistralConfig(**SMALL, sliding_window=8)),
    "Qwen2": lambda: causal(hf.Qwen2Config(**SMALL)),
    "Qwen3": lambda: causal(hf.Qwen3Config(**SMALL, head_dim=16)),
    "Qwen3-MoE": lambda: causal(
        hf.Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "Gemma 2 without score caps": lambda: causal(
        hf.Gemma2Config(
            **SMALL, head_dim=16, sliding_window=8, layer_types=MIXED, attn_logit_softcapping=None,
            query_pre_attn_scalar=16,
        )
    ),
    "Gemma 3": lambda: causal(
        hf.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8, layer_types=MIXED, query_pre_attn_scalar=16)
    ),
    "Phi-3": lambda: causal(hf.Phi3Config(**SMALL)),
    "OLMo": lambda: causal(hf.OlmoConfig(**SMALL)),
    "SmolLM3": lambda: causal(hf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0])),
    "Cohere2": lambda: causal(hf.Cohere2Config(**SMALL, sliding_window=8, layer_types=MIXED)),
    "GLM-4": lambda: causal(hf.Glm4Config(**SMALL, head_dim=16)),
    "StableLM": lambda: causal(hf.StableLmConfig(**SMALL)),
    "MiMo-V2-Flash": mimo,
}  # fmt: skip

BERT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
ENCODERS = {"BERT": lambda: hf.BertModel(hf.BertConfig(**BERT))}

MLA = NO_GROUPS | {"num_hidden_layers": 1}
REFUSED = {
    "Gemma 2 with score caps": lambda: causal(hf.Gemma2Config(**SMALL, head_dim=16, sliding_window=8)),
    "DeepSeek-V2 (MLA)": lambda: causal(hf.DeepseekV2Config(**MLA, first_k_dense_replace=1)),
    "DeepSeek-V3 (MLA)": lambda: causal(hf.DeepseekV3Config(**MLA, first_k_dense_replace=1)),
    "gpt-oss (sinks)": lambda: causal(
        hf.GptOssConfig(**SMALL, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    ),
    "GPT-J": lambda: causal(hf.GPTJConfig(vocab_size=99, n_embd=64, n_layer=1, n_head=2, rotary_dim=8)),
    "BART": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, forced_eos_token_id=None,
        )
    ),
}  # fmt: skip


def build(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return {**MODELS, **ENCODERS, **REFUSED}[name]().eval()


def prompt(rows: int = 3, length: int = 11, pad: bool = True) -> dict[str, torch.Tensor]:
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
