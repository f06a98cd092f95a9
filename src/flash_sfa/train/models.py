"""Transformers models from recipes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.settings import stored_topk
from . import attention
from .attention import LayerAttention
from .recipe import IDEAS, Recipe


def make_config(recipe: Recipe, vocab_size: int) -> Any:
    """The Transformers configuration of a recipe; vocab_size is rounded up to model.vocab_multiple.

    Raises:
        ValueError, NotImplementedError: a shape the family does not have, with the reason.
    """
    import transformers

    m, at = recipe.model, recipe.attention
    vocab = vocab_size + -vocab_size % m.vocab_multiple
    kv_heads = m.kv_heads or m.heads
    dv = m.v_head_dim or m.head_dim
    if m.heads % kv_heads:
        raise ValueError(f"model.heads={m.heads} must be a multiple of model.kv_heads={kv_heads}")
    common = {
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": None,
        "use_cache": False,
    }
    if m.family == "gpt2":
        if m.heads * m.head_dim != m.width or dv != m.head_dim or kv_heads != m.heads or m.rotary_dims:
            raise NotImplementedError(
                "model.family gpt2 needs width = heads * head_dim, v_head_dim = head_dim, kv_heads = heads "
                f"and no rotary_dims, got width={m.width}, heads={m.heads}, kv_heads={kv_heads}, "
                f"head_dim={m.head_dim}, v_head_dim={dv}, rotary_dims={m.rotary_dims}"
            )
        return transformers.GPT2Config(
            **common,
            n_positions=m.context,
            n_embd=m.width,
            n_layer=m.layers,
            n_head=m.heads,
            n_inner=m.mlp,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    shape = {
        **common,
        "hidden_size": m.width,
        "intermediate_size": m.mlp or 8 * m.width // 3,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": m.context,
        "rms_norm_eps": 1e-6,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    if m.family == "rotary":
        d = at.qk_dim if at.kind == "narrow" and at.qk_dim is not None else m.head_dim
        rotary = d if m.rotary_dims is None else m.rotary_dims
        if rotary % 2 or not 0 <= rotary <= d:
            raise ValueError(f"model.rotary_dims must be even and in [0, {d}], got {rotary}")
        # The model takes int(d * factor); the half keeps rounding from dropping a feature.
        rope["partial_rotary_factor"] = (rotary + 0.5) / d if rotary < d else 1.0
        return transformers.MiMoV2FlashConfig(
            **shape,
            head_dim=d,
            v_head_dim=dv,
            layer_types=["full_attention"] * m.layers,
            mlp_layer_types=["dense"] * m.layers,
            attention_value_scale=None,
            rope_parameters={"full_attention": rope},
        )
    if dv != m.head_dim or m.rotary_dims is not None:
        raise NotImplementedError(f"model.family {m.family} has no v_head_dim and no rotary_dims of its own")
    if m.family == "hybrid":
        windowed = [int((i + 1) % m.global_every != 0) for i in range(m.layers)]
        return transformers.SmolLM3Config(
            **shape,
            head_dim=m.head_dim,
            no_rope_layers=windowed,
            use_sliding_window=True,
            sliding_window=m.window,
            layer_types=["sliding_attention" if w else "full_attention" for w in windowed],
            rope_parameters=rope,
        )
    if at.kind == "narrow":
        raise NotImplementedError("model.family qwen3 has one head_dim for q, k and v; use family rotary for narrow")
    return transformers.Qwen3Config(**shape, head_dim=m.head_dim, rope_parameters=rope)


def build_model(recipe: Recipe, vocab_size: int) -> Any:
    """A fresh Transformers model whose layers attend as the recipe says.

    Example:
        >>> from flash_sfa.train.models import build_model
        >>> from flash_sfa.train.recipe import build_recipe
        >>> shape = {"layers": 1, "width": 32, "heads": 2, "head_dim": 16, "context": 64}
        >>> model = build_model(build_recipe({"model": shape, "train": {"tokens": 65536}}), 100)
        >>> model.config.vocab_size
        128
    """
    import transformers

    attention.register()
    config = make_config(recipe, vocab_size)
    at = recipe.attention
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise NotImplementedError(f"{type(model).__name__} does not take a registered attention function")
    own = at.share or at.drop or at.shrink or at.split_signs or at.recent or at.map_dim or at.center
    if at.kind == "sfa" and not own and not recipe.model.alibi:  # what enable_sfa gives too
        layers = [i for i in range(recipe.model.layers) if _chosen(config, i)]
        model.config.sfa = {"topk": stored_topk((at.topk_q, at.topk_k)), "dense_dims": at.dense_dims, "layers": layers}
    for module in attention_modules(model):
        chosen = _chosen(config, module.layer_idx)
        module.sfa_train = (
            LayerAttention(
                kind=at.kind,
                qk_dim=at.qk_dim,
                v_dim=at.v_dim,
                topk_q=at.topk_q,
                topk_k=at.topk_k,
                dense_dims=tuple(range(at.dense_dims)),
                path=at.path,
                **{name: getattr(at, name) for name in IDEAS},
            )
            if chosen
            else LayerAttention()
        )
        module.sfa_train.alibi = recipe.model.alibi and chosen
        m = recipe.model
        if module.sfa_train.center:
            module.register_buffer("sfa_mean", torch.zeros(m.kv_heads or m.heads, at.map_dim or m.head_dim))
        if module.sfa_train.map_dim:
            attention.add_maps(module, m.heads, m.kv_heads or m.heads, m.head_dim, at.map_dim)
    return model


def load_weights(model: nn.Module, folder: Path, *, whole: bool = False) -> None:
    """Load the weights of a saved model of the same shapes; tied ones are stored once.

    What an idea adds to a model (sfa_...) may be missing, as in a dense model that training starts from; not if whole.

    Raises:
        ValueError: no such file, or weights that do not fit, with their names.
    """
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    try:
        missing, unknown = model.load_state_dict(load_file(file), strict=False)
    except RuntimeError as error:  # other shapes
        raise ValueError(f"{file}: {error}") from error
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()
    missing = [name for name in missing if name not in tied and (whole or "sfa_" not in name)]
    if missing or unknown:
        raise ValueError(f"{file} lacks {missing} and has {unknown} beside the model's weights")


def _chosen(config: Any, layer: int) -> bool:
    """Whether the recipe's attention applies to this layer: all layers, or the global ones of a hybrid."""
    return config.model_type != "smollm3" or not config.no_rope_layers[layer]


def attention_modules(model: nn.Module) -> list[Any]:
    """The attention modules in layer order."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in layer order: the members of the list that holds the attention modules."""
    inside = {id(module) for module in attention_modules(model)}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return [block for m in lists for block in m if any(id(part) in inside for part in block.modules())]


def extra_loss(model: nn.Module, recipe: Recipe) -> Tensor | float:
    """The sum of the losses that the attention of the last forward pass left (balance, distill, match)."""
    out: Tensor | float = 0.0
    at = recipe.attention
    if at.balance or at.distill or at.match:
        for module in attention_modules(model):
            if module.sfa_train.aux is not None:
                out = out + module.sfa_train.aux
                module.sfa_train.aux = None
    return out


def follow_progress(model: nn.Module, recipe: Recipe, progress: Tensor) -> None:
    """Let the layers whose attention changes over the run read how much of it is done."""
    if recipe.attention.anneal or recipe.attention.fade:
        for module in attention_modules(model):
            module.sfa_train.progress = progress


def count_parameters(model: Any, recipe: Recipe) -> tuple[int, int]:
    """(all, without embeddings and positions); parameters that no output depends on are left out of both.

    Those are the query, key and value columns beyond qk_dim and v_dim that a projection still has, and the rows
    of the output projection behind the latter.
    """
    total = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    dead = 0
    at, m = recipe.attention, recipe.model
    if at.kind == "narrow" and at.qk_dim is not None and m.family != "rotary":
        per_feature = m.width + (1 if m.family == "gpt2" else 0)
        heads = m.heads + (m.kv_heads or m.heads)
        chosen = sum(x.sfa_train.kind == "narrow" for x in attention_modules(model))
        dead = chosen * heads * (m.head_dim - at.qk_dim) * per_feature
        if at.v_dim is not None:
            dv = m.v_head_dim or m.head_dim
            dead += chosen * (dv - at.v_dim) * ((m.kv_heads or m.heads) * per_feature + m.heads * m.width)
    return total - dead, total - dead - embeddings
