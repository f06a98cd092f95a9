"""Sparse Feature Attention for Hugging Face Transformers models, through its public registries.

``enable_sfa(model, topk=8)`` is all most users need: attention layers score with top-k features, ``generate()``
keeps a key cache of top-k codes, and the setting is saved with the model in ``config.sfa``.
"""

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ..api import sfa_attention, sfa_attention_varlen
from ..checks import check_dense_dims, check_topk_pair, is_int
from ..codes import SparseCode, autocast_dtype, topk_sparsify
from ..impl.reference import visible_pairs

if TYPE_CHECKING:

    class _Layer(DynamicLayer): ...

else:
    _Layer = object

Topk = int | tuple[int | None, int | None]
_KEYS = {"topk", "dense_dims", "layers"}
_REFUSED = {
    "softcap": "a cap on the scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "an additive position bias (position_bias)",
}


def register_sfa(name: str = "sfa") -> None:
    """Register the attention and mask functions under ``name``; calling it again changes nothing.

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


def register_dense(name: str = "sfa_dense") -> None:
    """Register plain dense attention (torch SDPA, v of any width) for models that refuse "sdpa"."""
    _register(name, _dense_forward)


def register_narrow(name: str = "sfa_narrow") -> None:
    """Register dense attention on the first r = ``config.sfa_narrow`` features of q and k, scale r ** -0.5.

    The rival of equal key bytes for models whose q, k and v share one width.
    """
    _register(name, _narrow_forward)


def enable_sfa(
    model: Any,
    *,
    topk: Topk,
    dense_dims: int | Sequence[int] | str = 0,
    layers: Sequence[int] | None = None,
) -> Any:
    """Make a Transformers model attend by top-k features, and ``generate()`` keep a sparse key cache.

    The setting is written to ``config.sfa`` and saved with the model. After loading such a checkpoint, call
    ``enable_sfa(model, **model.config.sfa)`` again: Transformers does not save which attention it used. Calling
    it on an enabled model changes the setting. Of a multimodal model only the language model changes; its setting
    is in ``model.config.get_text_config().sfa``.

    Args:
        model: any model that routes attention through Transformers' AttentionInterface.
        topk: features kept a row, or (topk_q, topk_k) with None for a dense side.
        dense_dims: features always kept, as in ``topk_sparsify``; "rotary" takes the rotated features of a model
            with partial rotary embeddings.
        layers: the layers to change, by number; None for all. The others stay dense.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a wrong setting.
        NotImplementedError: a model that does not route attention through the interface, attends to a compressed
            (MLA) cache, or has cross-attention, as encoder-decoders do. Score caps, attention sinks and additive
            position biases are refused by the first forward pass that asks for them.

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
    if isinstance(topk, list) and len(topk) == 2:  # a pair read back from config.json
        topk = tuple(topk)
    check_topk_pair(topk)
    head_dim = _head_dim(config)
    dims = _rotary_dims(config, head_dim) if dense_dims == "rotary" else dense_dims
    check_dense_dims(dims, head_dim)
    if layers is not None:
        _check_layers(layers, config.num_hidden_layers)

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
    config.sfa = {
        "topk": list(topk) if isinstance(topk, tuple) else topk,
        "dense_dims": dims if isinstance(dims, int) else list(dims),
        "layers": None if layers is None else list(layers),
    }
    if getattr(model, "_sfa_previous", None) is None:
        model._sfa_previous = [entry for entry in before if entry[0] is config]
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = MethodType(_prepare_cache, model)
    return model


def disable_sfa(model: Any) -> Any:
    """Undo ``enable_sfa``: the attention implementation, config and cache of before.

    Raises:
        ValueError: the model is not enabled.
    """
    previous = getattr(model, "_sfa_previous", None)
    if previous is None:
        raise ValueError(f"SFA is not enabled on this {type(model).__name__}")
    _restore(previous)
    del model._sfa_previous
    model.__dict__.pop("_prepare_cache_for_generation", None)
    return model


class SFACache(Cache):
    """A Transformers cache whose SFA layers keep keys as top-k codes; other layers are Transformers' own.

    Args:
        config: the config of a model that ``enable_sfa`` has set up.

    Raises:
        ValueError: the config has no ``sfa`` setting.

    Example:
        >>> # out = model.generate(ids, past_key_values=SFACache(model.config))
    """

    def __init__(self, config: Any) -> None:
        config = _text_config(config)
        if getattr(config, "sfa", None) is None:
            raise ValueError("config.sfa is not set; call enable_sfa(model, topk=...) first")
        layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
        super().__init__(layers=[_sparse_layer(layer, _setting(config, i)) for i, layer in enumerate(layers)])

    def key_nbytes(self) -> int:
        """Bytes of the stored keys, codes and indices included."""
        return sum(_nbytes(layer, "keys", "key_indices", "key_dense") for layer in self.layers)

    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.key_nbytes() + sum(_nbytes(layer, "values") for layer in self.layers)


class _SparseKeys(_Layer):
    """Mixin for a Transformers cache layer: ``keys`` holds code values, two more tensors the rest of the codes."""

    def __init__(self, *args: Any, topk: int, dense_dims: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.topk, self.dense_dims = topk, dense_dims
        self.key_indices: Tensor | None = None
        self.key_dense: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # Under autocast keys and values may come in different dtypes.
        self.values = value_states.new_empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[SparseCode, Tensor]:
        code = topk_sparsify(key_states, self.topk, dense_dims=self.dense_dims)
        value_states = value_states.to(autocast_dtype(value_states))
        indices, dense = code.indices, code.dense
        if self.key_indices is not None and self.key_dense is not None:
            indices = torch.cat([self.key_indices, indices], dim=-2)
            dense = torch.cat([self.key_dense, dense], dim=-2)
        values, v = super().update(code.values, value_states)
        self._keep(indices, dense, indices.shape[-2])
        return SparseCode._make(values, indices, dense, code.dim, code.dense_dims), v

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self.key_indices is not None and self.key_dense is not None:
            removed = before - self.get_seq_length()
            self._keep(self.key_indices, self.key_dense, self.key_indices.shape[-2] - removed)

    def _keep(self, indices: Tensor, dense: Tensor, end: int) -> None:
        """Of the rows up to ``end``, keep as many as the layer kept of its code values."""
        start = end - self.keys.shape[-2]
        self.key_indices, self.key_dense = indices[..., start:end, :], dense[..., start:end, :]

    def _change(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.key_indices is not None and self.key_dense is not None:
            self.key_indices, self.key_dense = fn(self.key_indices), fn(self.key_dense)

    def offload(self) -> None:
        super().offload()
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._change(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        self._change(Tensor.zero_)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices, ...])


class SFALayer(_SparseKeys, DynamicLayer):
    """A growing cache layer with keys as codes."""


class SFASlidingLayer(_SparseKeys, DynamicSlidingWindowLayer):
    """A sliding-window cache layer with keys as codes."""


def _sparse_layer(layer: Any, setting: tuple[Topk, Any] | None) -> Any:
    """The layer with sparse keys, if it is a plain growing or sliding layer and SFA is on for it."""
    if setting is None:
        return layer
    topk_k = check_topk_pair(setting[0])[1]
    if topk_k is None:
        return layer
    if type(layer) is DynamicLayer:
        return SFALayer(topk=topk_k, dense_dims=setting[1])
    if type(layer) is DynamicSlidingWindowLayer:
        sparse = SFASlidingLayer(layer.sliding_window, topk=topk_k, dense_dims=setting[1])
        sparse.record_past = layer.record_past
        return sparse
    return layer


def _prepare_cache(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """What ``generate()`` calls to make its cache: Transformers' own, with sparse keys where it is a dynamic one."""
    given = model_kwargs.get("past_key_values")
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if given is None and made is not None and type(made) is DynamicCache:
        sparse = SFACache(self.config)
        for layer, own in zip(sparse.layers, made.layers):
            if getattr(own, "record_past", False):
                layer.activate_past_recording()
        model_kwargs["past_key_values"] = sparse


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
    """
    plain = mask_function is causal_mask_function and local_size is None and kv_offset == 0
    whole = attention_mask is None or attention_mask.shape[-1] >= kv_length
    if plain and whole and is_int(q_offset) and q_offset + q_length == kv_length and not torch.compiler.is_compiling():
        if attention_mask is None:
            return None
        padding = attention_mask[:, :kv_length].bool()
        return None if padding.device.type == "cpu" and bool(padding.all()) else padding[:, None, None]
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip
    return mask


def _sfa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | SparseCode,
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
    setting = _setting(module.config, getattr(module, "layer_idx", 0))
    if setting is None:
        return _dense_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    topk, dense_dims = setting
    causal, window = _visibility(module, query, attention_mask, sliding_window, kwargs)
    options: dict[str, Any] = {
        "topk": check_topk_pair(topk)[0] if isinstance(key, SparseCode) else topk,
        "dense_dims": dense_dims, "causal": causal, "window_size": window,
        "softmax_scale": float(scaling), "dropout_p": float(dropout),
    }  # fmt: skip
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    rows: tuple[Any, Any, Tensor] = (
        _swap(query),
        key.map(_swap) if isinstance(key, SparseCode) else _swap(key),
        _swap(value),
    )
    if cu_q is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]:
        # The mask, if any, repeats what cu_seq_lens say.
        packed: list[Any] = [x.map(_first) if isinstance(x, SparseCode) else x[0] for x in rows]
        options["causal"], options["window_size"] = _visibility(module, query, None, sliding_window, kwargs)
        cu_k = cu_q if cu_k is None else cu_k
        out = sfa_attention_varlen(
            *packed, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k.int(),
            max_seqlen_q=kwargs.get("max_length_q"), max_seqlen_k=kwargs.get("max_length_k"), **options,
        )[None]  # fmt: skip
        return out, None
    return sfa_attention(*rows, attn_mask=attention_mask, **options), None


def _dense_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | SparseCode,
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
    if isinstance(key, SparseCode):
        raise TypeError("the cache holds top-k codes but this layer is dense; start with a new cache")
    nq, nk = query.shape[2], key.shape[2]
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


def _setting(config: Any, layer: int) -> tuple[Topk, Any] | None:
    """(topk, dense_dims) of a layer, or None where it stays dense."""
    sfa = getattr(config, "sfa", None)
    if not isinstance(sfa, dict):
        raise ValueError("config.sfa is not set; call flash_sfa.integrations.transformers.enable_sfa(model, topk=...)")
    if set(sfa) - _KEYS or "topk" not in sfa:
        raise ValueError(f"config.sfa must have 'topk' and may have 'dense_dims' and 'layers', got {sorted(sfa)}")
    layers = sfa.get("layers")
    if layers is not None and layer not in layers:
        return None
    topk = sfa["topk"]
    return tuple(topk) if isinstance(topk, list) else topk, sfa.get("dense_dims", 0)


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


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
        config = _text_config(model.config)
    except ValueError as error:
        raise NotImplementedError(f"{name} has more than one text model: {error}") from None
    if getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_layers", None):
        raise NotImplementedError(f"{name} has cross-attention layers, which SFA does not cover")
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


def _check_layers(layers: Any, count: int) -> None:
    if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
        raise TypeError(f"layers must be None or a sequence of ints, got {layers!r} of type {type(layers).__name__}")
    if len(layers) > count:
        raise ValueError(f"layers must be distinct layer numbers in [0, {count}), got {len(layers)} of them")
    for entry in layers:
        if not is_int(entry):
            raise TypeError(f"layers must hold ints, got {entry!r} of type {type(entry).__name__}")
    if any(not 0 <= entry < count for entry in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be distinct layer numbers in [0, {count}), got {list(layers)}")


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


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_dims(config: Any, head_dim: int) -> int:
    """The width of the rotated part of a head, which Transformers' partial-rotary models put first."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [entry for entry in rope.values() if isinstance(entry, dict)]
    factors = {entry.get("partial_rotary_factor") for entry in by_layer_type or [rope]}
    if factors == {None}:
        factors = {getattr(config, "partial_rotary_factor", None)}
    factor = factors.pop() if len(factors) == 1 else None
    if factor is None or factor >= 1.0:
        raise ValueError(
            "dense_dims='rotary' needs one partial_rotary_factor below 1 for all layers; "
            f"{type(config).__name__} has rope_parameters={rope}"
        )
    return 2 * -(-int(head_dim * factor) // 2)


def _nbytes(layer: Any, *names: str) -> int:
    tensors = (getattr(layer, name, None) for name in names)
    return sum(x.nbytes for x in tensors if x is not None)


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _first(x: Tensor) -> Tensor:
    return x[0]
