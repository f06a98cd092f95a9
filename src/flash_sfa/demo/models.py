"""What is compared: the settings of a run, its variants, and the Transformers models built from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, MiMoV2FlashConfig
from transformers.cache_utils import Cache, DynamicLayer

from ..integrations.transformers import SFACache, enable_sfa, register_dense, register_narrow
from .data import VOCABULARY

DENSE, NARROW = "sfa_dense", "sfa_narrow"
VARIANTS = {"rotary": ("dense", "narrow", "sfa-rope", "sfa"), "absolute": ("dense", "narrow", "sfa")}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run. ``steps`` is 0 until it is calibrated."""

    positions: str = "rotary"
    variants: tuple[str, ...] = VARIANTS["rotary"]
    seed: int = 0
    steps: int = 0
    max_steps: int = 2000
    train_seconds: float = 160.0
    layers: int = 4
    hidden: int = 128
    heads: int = 2
    head_dim: int = 64
    mlp: int = 352
    topk: int = 8
    rotary: int = 12
    context: int = 256
    batch: int = 4
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    validation_windows: int = 240
    prompts: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 128
    text: str | None = None
    text_sha256: str = ""


QUICK = {
    "max_steps": 200, "train_seconds": 12.0, "layers": 2, "context": 128, "batch": 4, "learning_rate": 3e-3,
    "validation_windows": 64, "prompts": 2, "prompt_tokens": 32, "new_tokens": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One attention under test. qk_dim: features of a query or key row; rotary: how many of them rotate."""

    name: str
    label: str
    qk_dim: int
    rotary: int
    topk: int | None = None
    dense_dims: int = 0
    narrow: int | None = None

    def key_bytes(self, itemsize: int) -> int:
        """Bytes of one stored key row: an entry of a code costs its value and a one-byte index."""
        if self.topk is not None:
            return self.topk * (itemsize + 1) + self.dense_dims * itemsize
        return (self.narrow or self.qk_dim) * itemsize


def make_variants(settings: Settings) -> dict[str, Variant]:
    """The variants of a run, dense first.

    In bfloat16 (2 bytes a value, 1 an index) the two sparse variants store the same key bytes, and the
    narrow rival at least as many; in float32 the rival stores more than either.
    """
    d, r, topk = settings.head_dim, settings.rotary, settings.topk
    budget = 3 * topk + 2 * r
    narrow = 2 * -(-budget // 4)  # 2 bytes a value; even, for rotary pairs
    wide_topk = budget // 3
    dense_label = f"dense, {d} features"
    narrow_label = f"dense, {narrow} features in q and k, all of v"
    if settings.positions == "absolute":
        every: tuple[Variant, ...] = (
            Variant("dense", dense_label, d, 0),
            Variant("narrow", narrow_label, d, 0, narrow=narrow),
            Variant("sfa", f"top-{wide_topk} of {d}", d, 0, topk=wide_topk),
        )
    else:
        every = (
            Variant("dense", dense_label, d, d),
            Variant("narrow", narrow_label, narrow, narrow),
            Variant("sfa-rope", f"top-{wide_topk} of {d} after RoPE (as the paper)", d, d, topk=wide_topk),
            Variant(
                "sfa", f"{r} always-on rotary features + top-{topk} of {d - r} unrotated", d, r, topk=topk,
                dense_dims=r,
            ),
        )  # fmt: skip
    return {variant.name: variant for variant in every if variant.name in settings.variants}


def _config(variant: Variant, settings: Settings) -> Any:
    if settings.positions == "absolute":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=settings.heads * settings.head_dim,
            n_head=settings.heads,
            n_layer=settings.layers,
            n_inner=settings.mlp,
            n_positions=2 * settings.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    else:
        config = MiMoV2FlashConfig(
            vocab_size=VOCABULARY,
            hidden_size=settings.hidden,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            head_dim=variant.qk_dim,
            v_head_dim=settings.head_dim,
            layer_types=["full_attention"] * settings.layers,
            mlp_layer_types=["dense"] * settings.layers,
            max_position_embeddings=2 * settings.context,
            rope_parameters={
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": variant.rotary / variant.qk_dim,
                }
            },
            attention_value_scale=None,
            tie_word_embeddings=True,
            bos_token_id=None,
        )
    if variant.narrow is not None:
        config.sfa_narrow = variant.narrow
    return config


def build(variant: Variant, settings: Settings, device: torch.device) -> Any:
    """A fresh model of the variant; the seed decides its weights."""
    register_dense(DENSE)
    register_narrow(NARROW)
    torch.manual_seed(settings.seed)
    name = DENSE if variant.narrow is None else NARROW
    model = AutoModelForCausalLM.from_config(_config(variant, settings), attn_implementation=name)
    if variant.topk is not None:
        enable_sfa(model, topk=variant.topk, dense_dims=variant.dense_dims)
    model.generation_config.pad_token_id = 0
    return model.to(device)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """A model from a variant's checkpoint folder, with the attention it was trained with."""
    register_dense(DENSE)
    register_narrow(NARROW)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=DENSE)
    if getattr(model.config, "sfa", None) is not None:
        enable_sfa(model, **model.config.sfa)
    elif getattr(model.config, "sfa_narrow", None) is not None:
        model.set_attn_implementation(NARROW)
    return model.to(device).eval()


def parameters(model: Any, variant: Variant, settings: Settings) -> int:
    """Parameters that take part: GPT-2's narrow rival carries q and k columns that nothing reads."""
    count: int = sum(parameter.numel() for parameter in model.parameters())
    if variant.narrow is not None:
        unread = settings.head_dim - variant.narrow
        width = settings.heads * settings.head_dim
        count -= 2 * settings.layers * settings.heads * unread * (width + 1)
    return count


class _NarrowLayer(DynamicLayer):
    """Stores only the features of a key that the narrow rival reads."""

    width: int

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(key_states[..., : self.width], value_states, *args, **kwargs)  # type: ignore[no-any-return]


def new_cache(model: Any) -> Any:
    """An empty cache of the kind the model's attention wants."""
    config = model.config
    if getattr(config, "sfa", None) is not None:
        return SFACache(config)
    if getattr(config, "sfa_narrow", None) is None:
        return DynamicCache(config=config)
    layers = []
    for _ in range(config.num_hidden_layers):
        layer = _NarrowLayer()
        layer.width = config.sfa_narrow
        layers.append(layer)
    return Cache(layers=layers)


def cache_bytes(cache: Any) -> tuple[int, int]:
    """(bytes of keys, bytes of keys and values) of a filled cache: of its stored tokens, or the storage behind them."""
    if isinstance(cache, SFACache):
        return cache.key_nbytes(), cache.key_nbytes() + cache.value_nbytes()

    def stored(*names: str) -> int:
        tensors = (getattr(layer, name, None) for layer in cache.layers for name in names)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    keys = stored("keys")
    return keys, keys + stored("values")
