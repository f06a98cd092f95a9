"""``config.sfa``: what it may hold, how it is checked, and what it says of a layer.

``{"topk": ..., "dense_dims": ..., "layers": ...}``. topk is an int; a pair, stored as {"q": 16, "k": 8} or, with
None for a dense side, [None, 8]; or a list with an entry for every layer: an int, a pair, or a list of ints for its
heads.
"""

from collections.abc import Sequence
from typing import Any

from ..checks import check_dense_dims, check_topk, check_topk_pair, is_int

Pair = tuple[int | None, int | None]
Topk = int | Pair | list[int]
KEYS = {"topk", "dense_dims", "layers"}


def text_config(config: Any) -> Any:
    """The config of the language model."""
    return config.get_text_config(decoder=True)


def layer_setting(config: Any, layer: int) -> tuple[Topk, Any] | None:
    """(topk, dense_dims) of a layer, or None where it stays dense."""
    sfa = getattr(config, "sfa", None)
    if not isinstance(sfa, dict):
        raise ValueError("config.sfa is not set; call flash_sfa.integrations.transformers.enable_sfa(model, topk=...)")
    if set(sfa) - KEYS or "topk" not in sfa:
        raise ValueError(f"config.sfa must have 'topk' and may have 'dense_dims' and 'layers', got {sorted(sfa)}")
    layers = sfa.get("layers")
    if layers is not None and layer not in layers:
        return None
    topk = sfa["topk"]
    if not is_int(topk):
        topk = topk_by_layer(topk, config.num_hidden_layers)[layer]
    return topk, sfa.get("dense_dims", 0)


def same_for_all(config: Any) -> bool:
    """Whether config.sfa says the same of every layer."""
    first, *others = (layer_setting(config, i) for i in range(config.num_hidden_layers))
    return all(other == first for other in others)


def topk_by_layer(topk: Any, layers: int) -> list[Topk]:
    """topk in any of its forms, for each layer.

    Raises:
        TypeError, ValueError: it has another form, or not an entry for every layer.
    """
    if not isinstance(topk, list) or (len(topk) == 2 and None in topk):
        return [_entry(topk)] * layers
    if len(topk) != layers:
        raise ValueError(
            f"topk as a list must have an entry for each of the {layers} layers, got {len(topk)}: {topk!r}; "
            "a pair is a tuple (topk_q, topk_k)"
        )
    return [_heads(entry) if isinstance(entry, list) and None not in entry else _entry(entry) for entry in topk]


def _entry(topk: Any) -> int | Pair:
    if isinstance(topk, dict):
        if set(topk) != {"q", "k"}:
            raise ValueError(f"topk as a dict must be {{'q': ..., 'k': ...}}, got {topk!r}")
        topk = (topk["q"], topk["k"])
    elif isinstance(topk, list):
        topk = tuple(topk)
    check_topk_pair(topk)
    return topk  # type: ignore[no-any-return]


def _heads(topk: list[Any]) -> list[int]:
    if not topk:
        raise ValueError("topk of a layer as a list must have an entry for each head, got none")
    return [check_topk(t, "topk of a head") for t in topk]


def stored_topk(topk: Any) -> Any:
    """topk as it is written to config.json: without tuples."""
    if isinstance(topk, list):
        return [stored_topk(entry) for entry in topk]
    if isinstance(topk, tuple):
        return list(topk) if None in topk else {"q": topk[0], "k": topk[1]}
    return topk


def key_topk(topk: Topk, heads: int | None = None) -> int | list[int] | None:
    """topk of the keys: None where they stay dense. By query head, a key keeps what the widest of its group keeps."""
    if isinstance(topk, tuple):
        return topk[1]
    if isinstance(topk, list) and heads is not None:
        _check_heads(topk, heads)
        group = len(topk) // heads
        return [max(topk[i * group : (i + 1) * group]) for i in range(heads)]
    return topk


def query_topk(topk: Topk, heads: int) -> int | list[int] | None:
    """topk of the queries: None where they stay dense."""
    if isinstance(topk, tuple):
        return topk[0]
    if isinstance(topk, list):
        group = heads // len(topk)
        return [t for t in topk for _ in range(group)]
    return topk


def _check_heads(topk: list[int], heads: int) -> None:
    if len(topk) % heads:
        raise ValueError(
            f"topk of a layer as a list must have an entry for each key or query head, got {len(topk)} for {heads} "
            "key heads"
        )


def check_setting(config: Any, topk: Any, dense_dims: Any, layers: Any) -> dict[str, Any]:
    """The setting as it goes into ``config.sfa``.

    Raises:
        TypeError, ValueError: an entry is wrong.
    """
    count = config.num_hidden_layers
    by_layer = topk_by_layer(topk, count)
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    for entry in by_layer:
        if isinstance(entry, list) and len(entry) not in (keys, queries):
            raise ValueError(
                f"topk of a layer as a list must have an entry for each of its {keys} key or {queries} query heads, "
                f"got {len(entry)}"
            )
    dim = head_dim(config)
    dims = _rotary_dims(config, dim) if dense_dims == "rotary" else dense_dims
    check_dense_dims(dims, dim)
    if layers == "global":
        layers = _global_layers(config)
    elif layers is not None:
        _check_layers(layers, count)
    return {
        "topk": stored_topk(topk),
        "dense_dims": dims if isinstance(dims, int) else list(dims),
        "layers": None if layers is None else list(layers),
    }


def _check_layers(layers: Any, count: int) -> None:
    if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
        raise TypeError(
            f"layers must be None, 'global' or a sequence of ints, got {layers!r} of type {type(layers).__name__}"
        )
    if not 1 <= len(layers) <= count:
        raise ValueError(f"layers must be distinct layer numbers in [0, {count}), got {len(layers)} of them")
    for entry in layers:
        if not is_int(entry):
            raise TypeError(f"layers must hold ints, got {entry!r} of type {type(entry).__name__}")
    if any(not 0 <= entry < count for entry in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be distinct layer numbers in [0, {count}), got {list(layers)}")


def _global_layers(config: Any) -> list[int]:
    kinds = getattr(config, "layer_types", None) or []
    chosen = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if not chosen or len(chosen) == len(kinds):
        raise ValueError(
            "layers='global' needs a model with windowed and global layers; "
            f"{type(config).__name__} has layer_types={kinds or None}"
        )
    return chosen


def head_dim(config: Any) -> int:
    """Features of a query or key row."""
    try:
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    except (AttributeError, ValueError, TypeError) as error:  # Gemma 4: a width for each kind of layer
        raise NotImplementedError(f"{type(config).__name__} has no one head_dim for all layers: {error}") from None


def _rotary_dims(config: Any, dim: int) -> int:
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
    return 2 * -(-int(dim * factor) // 2)
