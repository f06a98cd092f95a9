"""Sparse Feature Attention for Hugging Face Transformers models, through its public registries.

``enable_sfa(model, topk=8)`` is all most users need: attention layers score with top-k features, ``generate()``
keeps a key cache of top-k codes, and the setting is saved with the model in ``config.sfa``.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.generation import GenerationMode
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from ..api import sfa_attention, sfa_attention_varlen
from ..checks import is_int
from ..codes import SparseCode, autocast_dtype
from ..impl.reference import visible_pairs, visible_pairs_varlen
from .settings import check_setting, key_topk, layer_setting, query_topk, same_for_all, text_config
from .sparse_cache import NewKeys, SFACache, SFALayer, StaticSFALayer, cached_step, codes_of, take_rows

__all__ = [
    "SFACache", "SFALayer", "disable_sfa", "enable_sfa", "register_dense", "register_narrow", "register_sfa",
]  # fmt: skip

# Names that a model with config.sfa may attend by without a warning.
_OURS: set[str] = set()
_REFUSED = {
    "softcap": "a cap on the scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "an additive position bias (position_bias)",
}


_DROPOUT = "dropout over a sparse cache; call model.eval() first"


def register_sfa(name: str = "sfa") -> None:
    """Register the attention and mask functions under ``name``; calling it again changes nothing.

    From then on a model that is made from a config with ``config.sfa`` but other attention warns: it is a dense model
    then. ``from_pretrained(path, attn_implementation="sfa")`` loads it as it was trained.

    Args:
        name: what ``attn_implementation`` will be called. It must not contain "flash" or "/": Transformers takes
            such names for its own flash attention and for kernels on its hub.

    Raises:
        ValueError: a name that Transformers would misread.

    Example:
        >>> from flash_sfa.integrations.transformers import register_sfa
        >>> register_sfa()
    """
    _register(name, _sfa_forward)
    _OURS.add(name)
    _watch_loading()


def register_dense(name: str = "sfa_dense") -> None:
    """Register plain dense attention (torch SDPA, v of any width) for models that refuse "sdpa"."""
    _register(name, _dense_forward)
    _OURS.add(name)


def register_narrow(name: str = "sfa_narrow") -> None:
    """Register dense attention on the first r = ``config.sfa_narrow`` features of q and k, scale r ** -0.5.

    The rival of equal key bytes for models whose q, k and v share one width.
    """
    _register(name, _narrow_forward)
    _OURS.add(name)


def enable_sfa(
    model: Any,
    *,
    topk: Any,
    dense_dims: int | Sequence[int] | str = 0,
    layers: Sequence[int] | str | None = None,
) -> Any:
    """Make a Transformers model attend by top-k features, and ``generate()`` keep a sparse key cache.

    The setting is written to ``config.sfa`` and saved with the model. After loading such a checkpoint, call
    ``enable_sfa(model, **model.config.sfa)`` again: Transformers does not save which attention it used. Calling
    it on an enabled model changes the setting. Of a multimodal model only the language model changes; its setting
    is in ``model.config.get_text_config().sfa``.

    Args:
        model: any model that routes attention through Transformers' AttentionInterface.
        topk: features kept a row; or a pair (topk_q, topk_k) with None for a dense side; or a list with an entry for
            every layer: an int, a pair, or a list of ints with one for each of its heads. Those are key heads, whose
            topk their group of query heads shares, or query heads: then a key keeps what the widest of its group does.
        dense_dims: features always kept, as in ``topk_sparsify``; "rotary" takes the rotated features of a model
            with partial rotary embeddings.
        layers: the layers to change, by number; None for all; "global" for those without a window in a model that
            has both kinds. The others stay dense.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a wrong setting.
        NotImplementedError: a model that does not route attention through the interface, attends to a compressed
            (MLA) cache, caps its scores (softcap), or has cross-attention, as encoder-decoders do. Attention sinks and
            additive position biases are refused by the first forward pass that asks for them.

    Whatever raises leaves the model as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flash_sfa.integrations.transformers import enable_sfa
        >>> config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model = enable_sfa(LlamaForCausalLM(config), topk=8)
        >>> model.config.sfa["topk"]
        8
    """
    part = _text_model(model)
    config = part.config
    setting = check_setting(config, topk, dense_dims, layers)

    register_sfa()
    before = [(c, c._attn_implementation, getattr(c, "sfa", None)) for c in _configs(model)]
    try:
        part.set_attn_implementation("sfa")
        if config._attn_implementation != "sfa":
            raise NotImplementedError(f"{type(part).__name__} stays {config._attn_implementation!r}")
    except BaseException:
        _restore(before)
        raise
    _restore([entry for entry in before if entry[0] is not config])  # Transformers switches sub-configs as well
    config.sfa = setting
    if getattr(model, "_sfa_previous", None) is None:
        model._sfa_previous = [entry for entry in before if entry[0] is config]
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = partial(_prepare_cache, model)  # a bound method would not unpickle
    return model


def disable_sfa(model: Any) -> Any:
    """Undo ``enable_sfa``: the attention implementation, config and cache of before.

    Raises:
        ValueError: ``enable_sfa`` was not called on this model, also where it was loaded with attention "sfa".
    """
    previous = getattr(model, "_sfa_previous", None)
    if previous is None:
        raise ValueError(f"SFA is not enabled on this {type(model).__name__}: enable_sfa was not called on it")
    _restore(previous)
    del model._sfa_previous
    model.__dict__.pop("_prepare_cache_for_generation", None)
    return model


def _prepare_cache(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """What ``generate()`` calls to make its cache: a sparse one where Transformers would make a dynamic or static one.

    A static one becomes a sparse cache with room for max_cache_length tokens a row, the last argument: a static one
    where one token a row follows another, in all layers by SFA.
    """
    given = model_kwargs.get("past_key_values")
    if isinstance(given, SFACache):
        _check_reuse(given, model_kwargs.get("attention_mask"))
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if given is not None or made is None or text_config(self.config)._attn_implementation != "sfa":
        return
    if isinstance(made, QuantizedCache) or getattr(made, "offloading", False):
        raise NotImplementedError(
            f"cache_implementation={generation_config.cache_implementation!r} keeps dense keys, which SFA does not "
            "read; leave it out, or pass past_key_values=SFACache(model.config, v_dtype=torch.int8)"
        )
    if type(made) is StaticCache:
        longest = max(kwargs.get("max_cache_length", args[-1] if args else 0), generation_config.max_cache_len or 0)
        mode = kwargs.get("generation_mode", args[0] if args else None)
        one_by_one = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        cache = SFACache(self.config, max_length=longest)
        if (
            one_by_one
            and generation_config.prefill_chunk_size is None
            and len(cache.sparse_layers()) == len(cache.layers)
        ):
            cache = SFACache(self.config, max_length=longest, static=True)
        model_kwargs["past_key_values"] = cache
    elif type(made) is DynamicCache:
        model_kwargs["past_key_values"] = SFACache(self.config)
    if getattr(generation_config, "is_assistant", False):
        model_kwargs["past_key_values"].activate_past_recording()


def _check_reuse(cache: SFACache, mask: Tensor | None) -> None:
    """Refuse a filled cache for a prompt that does not continue what it holds, as far as shapes and padding tell."""
    filled = int(cache.get_seq_length())
    if not filled or mask is None:
        return
    layers = [layer for layer in cache.sparse_layers() if layer.ids]
    rows = len(layers[0].ids) if layers else mask.shape[0]
    if mask.shape[0] != rows or mask.shape[1] <= filled:
        raise ValueError(
            f"past_key_values holds {filled} tokens of {rows} rows, and the prompt has {mask.shape[1]} of "
            f"{mask.shape[0]}: a filled cache serves the conversation it was filled by; use a new SFACache"
        )
    for layer in layers:
        if layer.start == 0 and mask[:, :filled].sum(1).tolist() != layer.counts():
            raise ValueError(
                "past_key_values was filled by a prompt with other padding: a filled cache serves the conversation it "
                "was filled by; use a new SFACache"
            )


def _watch_loading() -> None:
    """Warn when a model is made whose config asks for SFA while its attention is another, once for each config."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_warn_if_dense)
        _watching = True


_watching = False
_warned: Any = None


def _warn_if_dense(module: nn.Module, name: str, child: nn.Module | None) -> None:
    global _warned
    if not isinstance(module, PreTrainedModel):
        return
    config = module.__dict__.get("config")
    if getattr(config, "sfa", None) is None or config._attn_implementation in _OURS:
        return
    if _warned is None or _warned() is not config:
        _warned = weakref.ref(config)
        warnings.warn(
            f"config.sfa says that this {type(module).__name__} attends by top-k features ({config.sfa}), but it is "
            f"made with attn_implementation={config._attn_implementation!r}, which is dense: another model than "
            "the one that was trained. Call enable_sfa(model, **model.config.sfa), or load it with "
            "attn_implementation='sfa'.",
            stacklevel=2,
        )


def _register(name: str, forward: Callable[..., tuple[Tensor, None]]) -> None:
    if "flash" in name or "/" in name:
        raise ValueError(f"name must not contain 'flash' or '/', which Transformers treats specially, got {name!r}")
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass: None (causal, aligned bottom right), (b, 1, 1, kv) key padding, or in full.

    The lean forms are for the plain causal rule over a cache without gaps; everything else gets the full mask.
    A padding mask that pads nothing becomes None on the CPU only: looking at its values elsewhere would wait for the
    device at every forward. So leave out a mask of ones on a GPU. Nothing here waits for the device, except that
    Transformers looks at the padding mask of a bidirectional model.

    A mask of which padding, causality and the layer's window say everything is marked: over a sparse cache it is not
    needed, since the cache knows them. One that is not marked is applied as it is.
    """
    plain = mask_function is causal_mask_function and local_size is None and kv_offset == 0
    if plain and attention_mask is None and q_length == kv_length == 1:
        return None
    whole = attention_mask is None or attention_mask.shape[-1] >= kv_length
    if plain and whole and is_int(q_offset) and q_offset + q_length == kv_length and not torch.compiler.is_compiling():
        if attention_mask is None:
            return None
        padding = attention_mask[:, :kv_length].bool()
        return None if padding.device.type == "cpu" and bool(padding.all()) else _marked(padding[:, None, None])
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip
    known = not torch.compiler.is_compiling() and any(_same_rule(mask_function, rule) for rule in _KNOWN)
    return mask if mask is None or not known else _marked(mask)


_KNOWN = causal_mask_function, sliding_window_causal_mask_function(1)


def _same_rule(fn: Any, other: Any) -> bool:
    """Whether two mask functions are one rule, built of the same code, whatever the numbers in it."""
    if fn is other:
        return True
    if getattr(fn, "__code__", None) is not other.__code__:
        return False
    parts = [_functions_in(f) for f in (fn, other)]
    return len(parts[0]) == len(parts[1]) and all(_same_rule(a, b) for a, b in zip(*parts))


def _functions_in(fn: Any) -> list[Any]:
    """The functions that a function was built of: what its closure holds, also in tuples."""
    cells = [cell.cell_contents for cell in fn.__closure__ or ()]
    flat = [x for cell in cells for x in (cell if isinstance(cell, tuple) else (cell,))]
    return [x for x in flat if callable(x)]


def _marked(mask: Tensor) -> Tensor:
    mask._sfa_plain = True  # type: ignore[attr-defined]
    return mask


def _sfa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: (b, heads, n, d) in, (b, n, heads, dv) out."""
    _refuse(kwargs)
    setting = layer_setting(module.config, _layer_of(module))
    if setting is None:
        return _dense_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    topk, dense_dims = setting
    if attention_mask is not None and attention_mask.is_floating_point() and not torch.compiler.is_compiling():
        attention_mask = _visible(attention_mask)
    if isinstance(key, NewKeys):
        if (key.layer.topk, key.layer.dense_dims) != setting:
            raise ValueError(
                f"the cache was made for topk={key.layer.topk!r} and dense_dims={key.layer.dense_dims!r}, and the "
                f"layer has topk={topk!r} and dense_dims={dense_dims!r} now; use a new SFACache"
            )
        if value is not key.v:
            raise NotImplementedError("a model that changes values between its cache and its attention function")
        causal, window = _visibility(module, query, None, sliding_window, kwargs)
        if not causal or _packed(kwargs, query):
            raise NotImplementedError(
                "a sparse cache serves causal attention over one document a row; pass use_cache=False"
            )
        return _cached_forward(query, key, attention_mask, window, scaling, dropout), None
    heads = key.shape[1]
    causal, window = _visibility(module, query, attention_mask, sliding_window, kwargs)
    q, k, v = _swap(query), _swap(key), _swap(value)
    options: dict[str, Any] = {
        "dense_dims": dense_dims, "causal": causal, "window_size": window, "softmax_scale": float(scaling),
        "dropout_p": float(dropout),
    }  # fmt: skip
    rows: tuple[Any, Any, Tensor] = q, k, v
    if isinstance(topk, list):
        rows = codes_of(q, query_topk(topk, q.shape[2]), dense_dims), codes_of(k, key_topk(topk, heads), dense_dims), v
    else:
        options["topk"] = topk
    if _packed(kwargs, query) and query.shape[2] == key.shape[2]:
        # The mask, if any, repeats what cu_seq_lens say.
        packed: list[Any] = [x.map(_first) if isinstance(x, SparseCode) else x[0] for x in rows]
        options["causal"], options["window_size"] = _visibility(module, query, None, sliding_window, kwargs)
        cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
        cu_k = cu_q if cu_k is None else cu_k
        out = sfa_attention_varlen(
            *packed, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k.int(),
            max_seqlen_q=kwargs.get("max_length_q"), max_seqlen_k=kwargs.get("max_length_k"), **options,
        )[None]  # fmt: skip
        return out, None
    return sfa_attention(*rows, attn_mask=attention_mask, **options), None


def _visible(mask: Tensor) -> Tensor:
    """A float mask of one's own as bool: 0 shows, its dtype's smallest number and -inf hide. Waits for the device."""
    seen = mask == 0
    if not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
        raise NotImplementedError(
            "a float attention mask must be 0 where a key is visible and its dtype's smallest number or -inf where "
            "not; a bias on the scores is not supported"
        )
    return seen


def _layer_of(module: nn.Module) -> int:
    """The layer's number; modules that do not know theirs can only have one setting for all."""
    index: int | None = getattr(module, "layer_idx", None)
    if index is None:
        if not same_for_all(module.config):
            raise NotImplementedError(
                f"{type(module).__name__} does not know its layer's number: config.sfa must be the same for all layers"
            )
        return 0
    return index


def _cached_forward(
    query: Tensor, key: NewKeys, mask: Tensor | None, window: tuple[int, int], scaling: float, dropout: float
) -> Tensor:
    """Attention of new tokens over a sparse cache, storing them: prefill from codes, later steps by decoding.

    Rows of the batch end at their last real token; queries that are padding give whatever they give.
    """
    layer, n, past = key.layer, query.shape[2], key.past
    if isinstance(layer, StaticSFALayer) and layer.state is not None and n == 1:
        return _static_step(query, key, layer, mask, scaling, dropout)
    if not key.stored and past != layer.length:
        raise ValueError("the cache changed between a layer's update and its attention; run one forward pass at a time")
    if past and dropout > 0.0:
        raise NotImplementedError(_DROPOUT)
    if layer.window is not None:
        window = (layer.window - 1, 0)
    q, topk = _swap(query), query_topk(layer.topk, query.shape[1])
    v = _swap(key.v)
    plain = mask is None or getattr(mask, "_sfa_plain", False)
    real = layer.padding_of(mask, query.shape[0], n) if (plain or past == 0) and not key.stored else None
    options: dict[str, Any] = {"window_size": window, "softmax_scale": float(scaling)}
    if past == 0:
        if plain and real is None:
            mask = None
        lean = mask is None or mask.shape[-2] == 1 < n
        if not lean:
            options["window_size"] = (-1, -1)
        rows = codes_of(q, topk, layer.dense_dims)
        prefill = sfa_attention(
            rows, key.new_code(), v, attn_mask=mask, causal=lean, dropout_p=float(dropout), **options
        )
        _store(key, v, real)
        return prefill
    _store(key, v, real)
    if not plain and mask is not None:
        rows = codes_of(q, topk, layer.dense_dims)
        code, all_v = layer.gather(mask.shape[-1])
        lean = mask.shape[-2] == 1 < n  # says of keys alone, so causality and window still hold
        options["window_size"] = window if lean else (-1, -1)
        return sfa_attention(rows, code, all_v.to(v.dtype), attn_mask=mask, causal=lean, **options)
    order = None if real is None else _right_aligned(real, v.device)
    if order is not None:
        q = take_rows(q, order)
    out = layer.attend(q, window, float(scaling))
    return out if order is None else take_rows(out, order.argsort(dim=1))


def _static_step(
    query: Tensor, key: NewKeys, layer: StaticSFALayer, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """A step of one token over a static cache: what torch.compile and CUDA graphs see of it never changes."""
    if dropout > 0.0:
        raise NotImplementedError(_DROPOUT)
    if mask is not None and mask.shape[-1] > 1:  # Transformers makes it for the new token alone
        raise NotImplementedError("a mask of your own (4-D) over a static sparse cache; leave static out")
    dtype = autocast_dtype(key.v)
    q, k, v = (_swap(x).to(dtype) for x in (query, key.k, key.v))
    rows = (None, None) if key.stored else (k, v)
    window = -1 if layer.window is None else layer.window - 1
    out: Tensor = cached_step(q, *rows, layer.state, v.shape[3], window, float(scaling))
    if not key.stored:
        layer.positions.add_(1)  # type: ignore[union-attr]
        key.stored = True
    return out


def _store(key: NewKeys, v: Tensor, real: Tensor | None) -> None:
    """Append the new rows once: layers that share keys call the attention function again with the same ones."""
    if not key.stored:
        key.layer.append(key.to_store(), v, real)
        key.stored = True


def _right_aligned(real: Tensor, device: torch.device) -> Tensor | None:
    """The order (b, n) that puts real tokens last, or None if they are there already."""
    if bool((real[:, 1:] >= real[:, :-1]).all()):
        return None
    return real.long().argsort(dim=1, stable=True).to(device)


def _packed(kwargs: dict[str, Any], query: Tensor) -> bool:
    return kwargs.get("cu_seq_lens_q") is not None and query.shape[0] == 1


def _dense_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Plain attention through torch SDPA, with the same mask rules."""
    _refuse(kwargs)
    if isinstance(key, NewKeys):
        raise TypeError("the cache holds top-k codes but this layer is dense; use a new cache")
    nq, nk = query.shape[2], key.shape[2]
    if _packed(kwargs, query) and nq == nk:
        # The mask, if any, repeats what cu_seq_lens say.
        causal, window = _visibility(module, query, None, sliding_window, kwargs)
        cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
        attention_mask = visible_pairs_varlen(
            cu_q, cu_q if cu_k is None else cu_k, nq, nk, (window[0], 0 if causal else window[1])
        )[None, None]
    causal, window = _visibility(module, query, attention_mask, sliding_window, kwargs)
    if causal and window[0] < 0 and attention_mask is None and nq == nk:
        mask = None
    elif causal or window != (-1, -1):
        right = 0 if causal else window[1]
        mask = visible_pairs(nq, nk, (window[0], right), query.device)
        mask = mask if attention_mask is None else mask & attention_mask
        causal = False
    else:
        mask = attention_mask
    dtype = autocast_dtype(value)
    out = F.scaled_dot_product_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=mask, dropout_p=dropout, is_causal=causal,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _narrow_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    r = module.config.sfa_narrow
    return _dense_forward(module, query[..., :r], key[..., :r], value, attention_mask, scaling=r**-0.5, **kwargs)


def _visibility(
    module: nn.Module, query: Tensor, mask: Tensor | None, sliding_window: int | None, kwargs: dict[str, Any]
) -> tuple[bool, tuple[int, int]]:
    """(causal, window) that hold besides the mask. A mask with a row for every query says everything itself."""
    if mask is not None and (mask.shape[-2] > 1 or query.shape[2] == 1):
        return False, (-1, -1)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    return bool(causal), window


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the model asks for {what}, which sparse feature attention does not support")


def _text_model(model: Any) -> Any:
    """The part of a model that SFA changes: the outermost one that uses the text config, often all of it."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, not wrapped in another module, got {type(model).__name__}"
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder, whose cross-attention SFA does not cover")
    try:
        config = text_config(model.config)
    except ValueError as error:
        raise NotImplementedError(f"{name} has more than one text model: {error}") from None
    if getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_layers", None):
        raise NotImplementedError(f"{name} has cross-attention layers, which SFA does not cover")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(
            f"{name} caps its scores (softcap, attn_logit_softcapping={config.attn_logit_softcapping}), which sparse "
            "feature attention does not support"
        )
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(f"{name} caches a compressed latent (MLA), which has no per-head keys to sparsify")
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            if not _routes(part):
                raise NotImplementedError(
                    f"{type(part).__name__} does not route attention through Transformers' AttentionInterface"
                )
            return part
    raise NotImplementedError(f"{name} has no submodel that uses its text config, so SFA cannot tell what to change")


def _routes(part: Any) -> bool:
    """Whether the layers that use the config of this model ask Transformers' AttentionInterface for their attention.

    Not all models that do say so, and Transformers takes the answer of a whole file, vision towers included.
    """
    if part.is_backend_compatible():
        return True
    for kind in {type(module) for module in part.modules() if getattr(module, "config", None) is part.config}:
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward):
                return True
        except (OSError, TypeError):  # no source to read
            continue
    return False


def _configs(model: Any) -> list[Any]:
    """Every config that the model, its parts and their sub-configs use, each once."""
    found: dict[int, Any] = {}
    todo = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            todo += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _restore(before: list[tuple[Any, str | None, Any]]) -> None:
    """Put attention implementations and settings back, without Transformers' spreading them to sub-configs."""
    for config, implementation, sfa in before:
        config._attn_implementation_internal = implementation
        config.__dict__.pop("_attn_was_changed", None)
        if sfa is not None:
            config.sfa = sfa
        elif hasattr(config, "sfa"):
            del config.sfa


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _first(x: Tensor) -> Tensor:
    return x[0]
