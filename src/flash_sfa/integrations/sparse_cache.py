"""A Transformers cache whose SFA layers store keys as top-k codes in a paged `SparseKVCache`.

A layer does not store what ``update`` is given: it hands the new rows on to the attention function, which alone knows
which of them are padding. That function looks once, at prefill, and padding is never stored: each row of the batch is
a sequence of its own length, so later steps need no mask and wait for nothing.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..cache import SparseKVCache, _float_dtype, _positive
from ..checks import check_bool, check_dense_dims, check_fraction
from ..codes import SparseCode, autocast_dtype, topk_sparsify
from ..decode import sfa_attention_with_kvcache
from ..ops import index_dtype
from .settings import Topk, key_topk, layer_setting, query_topk, text_config

# Tokens beyond its window that a windowed layer keeps, so that rejected tokens can be cropped.
SLACK = 64
# Tokens a row that a growing cache has room for beyond its prompt.
_ROOM = 256
# Tokens a page.
_PAGE = 128


class SFACache(Cache):
    """A Transformers cache whose SFA layers keep keys as top-k codes; other layers are Transformers' own.

    It serves one batch of prompts, and grows as they do. Padding is not stored. Steps of a windowed layer keep the
    window only.

    Args:
        config: the config of a model that ``enable_sfa`` has set up.
        v_dtype: how V is stored in SFA layers: None for the model's dtype, or torch.int8 or torch.float8_e4m3fn.
        tolerance: misplaced weight allowed on cached steps, in [0, 1), as in `sfa_attention_with_kvcache`.
        max_length: tokens a row to make room for at once; None starts small and doubles.
        static: never grow beyond max_length, and count tokens on the device: ``generate()`` then compiles its steps on
            a GPU, and a step of one token can be captured in a CUDA graph. Windowed layers keep all tokens.

    Raises:
        ValueError: the config has no ``sfa`` setting; an argument is out of range; static without max_length.
        TypeError, NotImplementedError: a v_dtype that is no float type, or is not built; static with a layer that does
            not store codes.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flash_sfa.integrations.transformers import SFACache, enable_sfa
        >>> config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
        >>> model = enable_sfa(LlamaForCausalLM(config), topk=8)
        >>> cache = SFACache(model.config, v_dtype=torch.int8)
        >>> out = model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=4)
        >>> cache.get_seq_length()
        6
    """

    def __init__(
        self,
        config: Any,
        *,
        v_dtype: torch.dtype | None = None,
        tolerance: float = 0.0,
        max_length: int | None = None,
        static: bool = False,
    ) -> None:
        config = text_config(config)
        options = {
            "v_dtype": None if v_dtype is None else _float_dtype(v_dtype, "v_dtype"),
            "tolerance": check_fraction(tolerance, "tolerance"),
            "max_length": None if max_length is None else _positive(max_length, "max_length"),
        }
        if check_bool(static, "static") and max_length is None:
            raise ValueError("static=True needs max_length, the tokens a row that there is room for")
        padding = _Padding()
        own = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
        layers = []
        for i, layer in enumerate(own):
            setting = layer_setting(config, i)
            topk = None if setting is None else key_topk(setting[0])
            if setting is None or topk is None or not _plain(config, i, layer):
                if static:
                    raise NotImplementedError(
                        f"static=True needs SFA in every layer, and layer {i} keeps dense keys ({type(layer).__name__})"
                    )
                layers.append(layer)
                continue
            window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
            kind = StaticSFALayer if static else SFALayer
            layers.append(kind(setting[0], setting[1], window=window, padding=padding, options=options))
        super().__init__(layers=layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # once, not in every layer

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(int(tokens_to_remove))  # generate() gives a tensor

    @property
    def batch_size(self) -> int:
        """Rows of the batch that the SFA layers hold, or -1 before the first forward pass."""
        return max((len(layer.ids) for layer in self.sparse_layers()), default=0) or -1

    def sparse_layers(self) -> list["SFALayer"]:
        """The layers that store codes."""
        return [layer for layer in self.layers if isinstance(layer, SFALayer)]

    def key_nbytes(self) -> int:
        """Bytes of the keys of all stored tokens, codes and indices included."""
        own = (layer.keys for layer in self.layers if not isinstance(layer, SFALayer))
        return sum(layer.token_nbytes()[0] for layer in self.sparse_layers()) + sum(_nbytes(x) for x in own)

    def value_nbytes(self) -> int:
        """Bytes of the values of all stored tokens, scales included."""
        own = (layer.values for layer in self.layers if not isinstance(layer, SFALayer))
        return sum(layer.token_nbytes()[1] for layer in self.sparse_layers()) + sum(_nbytes(x) for x in own)

    def nbytes(self) -> int:
        """Bytes in use: pages (a part-filled one counts whole, a shared one once), running sums and tables."""
        own = sum(_nbytes(x.keys) + _nbytes(x.values) for x in self.layers if not isinstance(x, SFALayer))
        return own + sum(layer.kv.nbytes for layer in self.sparse_layers() if layer.kv is not None)


class _Padding:
    """Which tokens of the running forward pass are padding: looked up once for all layers."""

    def __init__(self) -> None:
        self.mask: weakref.ref[Tensor] | None = None
        self.real: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks anew; weak references cannot be saved."""
        return {"mask": None, "real": None}

    def look(self, mask: Tensor | None, rows: int, n: int) -> Tensor | None:
        """(rows, n) bool on the host, True for real tokens; None if all are. Waits for the device."""
        if mask is None:
            return None
        if self.mask is None or self.mask() is not mask:
            # A token is real if it may see itself; a mask of one row says so of every key.
            own = mask[:, 0, 0, -n:] if mask.shape[-2] == 1 else _diagonal(mask[:, 0], mask.shape[-1] - n)
            real = own.detach().bool().cpu()
            self.mask, self.real = weakref.ref(mask), None if bool(real.all()) else real.expand(rows, n)
        return self.real


class NewKeys:
    """What an SFA cache layer hands to the attention function as keys: the new rows, which are not stored yet."""

    def __init__(self, layer: "SFALayer", k: Tensor, v: Tensor, past: int) -> None:
        self.layer, self.k, self.v, self.past = layer, k, v, past
        self.code: SparseCode | None = None
        self.stored = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.k.shape[:2], self.past + self.k.shape[2], self.k.shape[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    def new_code(self) -> SparseCode:
        """Codes of the new tokens, (b, n, hkv, ...)."""
        if self.code is None:
            self.code = self.layer.sparsify(self.k.transpose(1, 2))
        return self.code

    def to_store(self) -> Tensor | SparseCode:
        """The new tokens as the layer takes them: as rows, unless their codes are known."""
        return self.layer.to_store(self.k.transpose(1, 2), self.v) if self.code is None else self.code

    def to_code(self) -> SparseCode:
        """Codes of all tokens, (b, hkv, past + n, ...), as copies; for rows of equal lengths."""
        new = self.new_code().map(_swap)
        if self.past == 0 or self.layer.kv is None:
            return new
        old = [self.layer.kv.gather(0, i)[0].map(_swap_first) for i in self.layer.ids]
        parts = [
            torch.cat([torch.stack([getattr(x, name) for x in old])[..., : self.past, :], getattr(new, name)], dim=-2)
            for name in ("values", "indices", "dense")
        ]
        return SparseCode._make(parts[0], parts[1], parts[2], new.dim, new.dense_dims)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(_NO_SFA)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(_NO_SFA)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise TypeError(_NO_SFA)


_NO_SFA = (
    "this cache (SFACache) stores keys as top-k codes, which only attn_implementation='sfa' reads; the model's "
    "attention is another one now. Call enable_sfa(model, ...) again, or start with a new cache of Transformers' own."
)


_OTHER_ROWS = "this cache holds {} rows and the input has {}: a cache serves one batch of prompts; use a new SFACache"


class SFALayer(CacheLayerMixin):
    """One layer of an `SFACache`: rows of the batch as sequences of a `SparseKVCache` with one layer.

    ``length`` counts positions as Transformers does, padding included; ``start`` of them have been given up by a
    windowed layer. ``real`` (rows, m) on the host tells which of the first m positions hold a token.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self, topk: Topk, dense_dims: Any, *, window: int | None, padding: _Padding, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.topk, self.dense_dims, self.window = topk, dense_dims, window
        self.padding, self.options = padding, options
        self.is_sliding = window is not None
        self.sliding_window = window
        self.record_past = False
        self.kv: SparseKVCache | None = None
        self._forget()

    def _forget(self) -> None:
        self.ids: list[int] = []
        self.length = self.start = 0
        self.real: Tensor | None = None

    # What Transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pools are made when the first tokens are stored."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[NewKeys, Tensor]:
        if self.ids and key_states.shape[0] != len(self.ids):
            raise ValueError(_OTHER_ROWS.format(len(self.ids), key_states.shape[0]))
        return NewKeys(self, key_states, value_states, self.length), value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.length if self.window is None else min(self.length, self.window - 1)
        return past + query_length, self.length - past

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def activate_past_recording(self) -> None:
        """Keep everything until the next `crop`, so that any number of tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back; a positive number is the length to keep, as in 5.14."""
        removed = max(0, self.length - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        length = max(0, self.length - removed)
        if removed and self.kv is not None:
            if self.start and length - self.start < min(length, (self.window or 1) - 1):
                raise ValueError(
                    f"cannot take back {removed} tokens: this windowed layer keeps {SLACK} beyond its window; call "
                    "activate_past_recording() on the cache before the forward pass"
                )
            self.kv.truncate(self.ids, self._counts(self.start, length))
            self.length = length
            self.real = None if self.real is None else self.real[:, :length]
        self._trim()

    def reset(self) -> None:
        if self.kv is not None:
            self.kv.free(self.ids)
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kv is None or not self.ids:
            return
        rows = beam_idx.tolist()
        source = dict(zip(self.ids, (self.ids[row] for row in rows)))
        self.kv.reorder([source[i] for i in sorted(self.ids)])
        self._take_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.ids)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        every = torch.arange(len(self.ids))
        self._select(every[indices.cpu()].tolist())

    def offload(self) -> None:
        raise NotImplementedError("a sparse cache cannot be offloaded to the CPU; it is a fraction of a dense one")

    def prefetch(self) -> None:
        self.offload()

    # What the attention function asks

    def sparsify(self, k: Tensor) -> SparseCode:
        """The codes that this layer stores of keys (b, n, hkv, d)."""
        return codes_of(k, key_topk(self.topk, k.shape[2]), self.dense_dims)  # type: ignore[return-value]

    def to_store(self, k: Tensor, v: Tensor) -> Tensor | SparseCode:
        """Keys (b, n, hkv, d) as a `SparseKVCache` takes them: as rows where it finds the same codes itself."""
        by_head = isinstance(key_topk(self.topk, k.shape[2]), list)
        return self.sparsify(k) if by_head or autocast_dtype(k) != autocast_dtype(v) else k

    def pool(self) -> SparseKVCache:
        """What the layer stores its tokens in."""
        if self.kv is None:
            raise ValueError("this cache layer holds no token yet")
        return self.kv

    def padding_of(self, mask: Tensor | None, rows: int, n: int) -> Tensor | None:
        """Which new tokens are real, looking only where padding may be: before a row's first token, or in a chunk."""
        if mask is not None and (n > 1 or mask.device.type == "cpu" or self.kv is None or 0 in self.counts()):
            return self.padding.look(mask, rows, n)
        return None

    def append(self, k: Tensor | SparseCode, v: Tensor, real: Tensor | None) -> None:
        """Store new tokens, keys or their codes (b, n, hkv, ...) and v (b, n, hkv, dv), but those that are not real.

        Nothing here waits for the device.
        """
        b, n = v.shape[:2]
        v = v.detach().to(autocast_dtype(v))
        k = _each(k, Tensor.detach).to(v.dtype)
        start = self.start
        if self.length == 0 and self._forgets() and n > self._keep():
            # Of a long prompt a windowed layer stores the end only.
            start = n - self._keep()
            k, v = _each(k, lambda x: x[:, start:]), v[:, start:]
        kept = real if real is None else real[:, start:] if start and self.length == 0 else real
        counts = [v.shape[1]] * b if kept is None else kept.sum(1).tolist()
        if kept is not None:
            order = _to_device((~kept).long().argsort(dim=1, stable=True), v.device)
            k, v = _each(k, lambda x: take_rows(x, order)), take_rows(v, order)
        if self.kv is None:
            self.kv = self._new_kv(k, v, b * self._room(n))
        if not self.ids:
            self.ids = self.kv.alloc(b).tolist()
            self.kv.reserve(0, seq_ids=self.ids)
        self._make_room(counts)
        self.kv.append(k, v, seq_ids=self.ids, lengths=None if kept is None else counts)
        if real is not None:
            before = torch.ones(b, self.length, dtype=torch.bool)
            if self.real is not None:
                before[:, : self.real.shape[1]] = self.real
            self.real = torch.cat([before, real], dim=1)
        self.start, self.length = start, self.length + n
        if self._forgets() and self.length - self.start > 2 * self._keep():
            self._trim()

    def attend(self, q: Tensor, window: tuple[int, int], softmax_scale: float) -> Tensor:
        """Attention of the last tokens, q (b, n, hq, d), over what is stored, which holds them already."""
        kv, topk = self.pool(), query_topk(self.topk, q.shape[2])
        if isinstance(topk, list):
            rows, pair = codes_of(q, topk, self.dense_dims), None
        else:
            rows, pair = q, (topk, kv.topk)
        out: Tensor = sfa_attention_with_kvcache(
            rows, kv, seq_ids=self.ids, topk=pair, tolerance=self.options["tolerance"], window_size=window,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        return out

    def counts(self) -> list[int]:
        """Tokens that are stored, for each row."""
        return self._counts(self.start, self.length)

    def gather(self, n: int) -> tuple[SparseCode, Tensor]:
        """Codes (b, n, hkv, ...) and V of the last n stored tokens of each row, as copies."""
        if self.kv is None or self.real is not None:
            raise NotImplementedError(
                "a mask of your own (4-D, or with other than causal and windowed visibility) over a cache with padding"
            )
        rows = [self.kv.gather(0, i) for i in self.ids]
        parts = [torch.stack([getattr(code, name)[-n:] for code, _ in rows]) for name in ("values", "indices", "dense")]
        code = rows[0][0]
        v = torch.stack([v[-n:] for _, v in rows]).to(self.kv.dtype)
        return SparseCode._make(parts[0], parts[1], parts[2], code.dim, code.dense_dims), v

    def token_nbytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values of all stored tokens."""
        if self.kv is None:
            return 0, 0
        kv = self.kv
        index = index_dtype(kv.head_dim).itemsize
        key = kv.width * (kv.dtype.itemsize + index) + len(kv.dense_dims) * kv.dtype.itemsize
        value = kv.v_head_dim * kv.v_dtype.itemsize + (2 if kv.v_dtype.itemsize == 1 else 0)
        rows = int(kv.seq_lengths(self.ids).sum()) * kv.num_kv_heads
        return rows * key, rows * value

    # Inside

    def _forgets(self) -> bool:
        """Whether tokens behind a window are given up."""
        return self.window is not None and not self.record_past

    def _keep(self) -> int:
        """Positions that a windowed layer keeps."""
        return (self.window or 1) - 1 + SLACK

    def _room(self, n: int) -> int:
        wanted = max(n, self.options["max_length"] or n + _ROOM)
        if self._forgets():
            wanted = min(wanted, 2 * self._keep() + n)
        return -(-wanted // _PAGE) * _PAGE

    def _new_kv(self, k: Tensor | SparseCode, v: Tensor, max_tokens: int) -> SparseKVCache:
        if isinstance(k, SparseCode):
            dim, dims, topk = k.dim, k.dense_dims, k.topk
        else:
            dim, dims = k.shape[3], check_dense_dims(self.dense_dims, k.shape[3])
            topk = min(key_topk(self.topk), dim - len(dims))  # type: ignore[type-var, assignment]
        return SparseKVCache(
            num_kv_heads=v.shape[2], head_dim=dim, v_head_dim=v.shape[3], topk=topk, dense_dims=dims,
            max_tokens=max_tokens, page_size=_PAGE, dtype=v.dtype, v_dtype=self.options["v_dtype"], device=v.device,
        )  # fmt: skip

    def _make_room(self, counts: list[int]) -> None:
        """Move to pools twice the size if the next tokens may not fit."""
        kv = self.kv
        if kv is None:
            return
        size = kv.page_size
        pool = kv._layers[0]
        rows = [pool.sequences[i] for i in self.ids]
        # A row that writes into a last page which it shares copies it.
        needed = sum(
            -(-(row.length + c) // size) - -(-row.length // size) + (c > 0 and kv._shares_last_page(pool, row))
            for row, c in zip(rows, counts)
        )
        used = kv.used_pages()
        if used + needed <= kv.num_pages:
            return
        bigger = SparseKVCache(
            num_kv_heads=kv.num_kv_heads, head_dim=kv.head_dim, v_head_dim=kv.v_head_dim, topk=kv.topk,
            dense_dims=kv.dense_dims, max_tokens=max(2 * kv.num_pages, used + needed) * size, page_size=size,
            dtype=kv.dtype, v_dtype=kv.v_dtype, device=kv.device,
        )  # fmt: skip
        bigger.load_state_dict(kv.state_dict())
        bigger.reserve(0, seq_ids=self.ids)
        self.kv = bigger

    def _trim(self) -> None:
        """Give up what lies behind the window, by moving the rest to a new pool."""
        start = self.length - self._keep()
        if self.window is None or self.kv is None or start - self.start < SLACK:
            return
        counts = self._counts(start, self.length)
        rows = [self.kv.gather(0, i) for i in self.ids]
        longest = max(counts)
        code = rows[0][0]
        parts = [
            torch.stack([_last(getattr(x, name), c, longest) for (x, _), c in zip(rows, counts)])
            for name in ("values", "indices", "dense")
        ]
        v = torch.stack([_last(v, c, longest) for (_, v), c in zip(rows, counts)]).to(self.kv.dtype)
        kept = SparseCode._make(parts[0], parts[1], parts[2], code.dim, code.dense_dims)
        self.kv = self._new_kv(kept, v, len(rows) * self._room(longest))
        self.ids = self.kv.alloc(len(rows)).tolist()
        self.kv.reserve(0, seq_ids=self.ids)
        self.kv.append(kept, v, seq_ids=self.ids, lengths=counts)
        self.start = start

    def _counts(self, start: int, stop: int) -> list[int]:
        """Tokens of each row at positions [start, stop)."""
        if self.real is None:
            return [stop - start] * len(self.ids)
        known = self.real[:, start:stop]
        return (known.sum(1) + (stop - start - known.shape[1])).tolist()  # type: ignore[no-any-return]

    def _select(self, rows: list[int]) -> None:
        if self.kv is None or not self.ids:
            return
        taken: set[int] = set()
        ids = []
        for row in rows:
            source = self.ids[row]
            ids.append(self.kv.fork(source) if source in taken else source)
            taken.add(source)
        self.kv.free([i for i in self.ids if i not in taken])
        self.ids = ids
        self.kv.reserve(0, seq_ids=ids)
        self._take_rows(rows)

    def _take_rows(self, rows: list[int]) -> None:
        self.real = None if self.real is None else self.real[rows]


class StaticSFALayer(SFALayer):
    """A layer with room for max_length positions, that counts them on the device.

    After the first forward pass a step of one token is the operator `cached_step`, which torch.compile does not look
    into and a CUDA graph can hold. Longer steps and everything else ask the device for the lengths and wait.
    """

    is_compileable = True
    is_croppable = False  # it can be cropped, but not at every step without waiting

    def _forget(self) -> None:
        self.state: Tensor | None = None
        self.tables: Any = None
        self.positions: Tensor | int = 0
        super()._forget()

    @property
    def length(self) -> int:  # type: ignore[override]
        return int(self.positions)

    @length.setter
    def length(self, n: int) -> None:
        if isinstance(self.positions, Tensor):
            self.positions.fill_(n)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[NewKeys, Tensor]:
        if self.state is None or key_states.shape[2] > 1:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[return-value]
        if key_states.shape[0] != len(self.ids):
            raise ValueError(_OTHER_ROWS.format(len(self.ids), key_states.shape[0]))
        return NewKeys(self, key_states, value_states, 0), value_states  # only the device knows what it holds

    def get_seq_length(self) -> Any:
        """An int at first, then a tensor on the device, as of Transformers' static layers."""
        return self.positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of new tokens only: what is stored is never padding, and a step of one token needs no mask."""
        return query_length, 0 if query_length == 1 or self.state is None else self.length

    def get_max_length(self) -> int:
        return self.options["max_length"]  # type: ignore[no-any-return]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.kv is not None:
            self._be_ready(self.length)

    def reset(self) -> None:
        if self.tables is not None:
            self.tables.capacity.zero_()  # graphs that still replay it store nothing
        self.kv = None
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select([])

    def append(self, k: Tensor | SparseCode, v: Tensor, real: Tensor | None) -> None:
        length = self.length + v.shape[1]
        self._check_fits(length)
        super().append(k, v, real)
        if not isinstance(self.positions, Tensor):
            with torch.inference_mode(False):
                self.positions = torch.tensor(0, device=v.device)
            torch._dynamo.mark_static_address(self.positions, guard=False)
        self.length = length
        self._be_ready(length)

    def _check_fits(self, length: int) -> None:
        if length > self.get_max_length():
            raise ValueError(
                f"{length} tokens a row do not fit into this static cache of max_length={self.get_max_length()}"
            )

    def _be_ready(self, length: int) -> None:
        """Take the pages of all steps to come."""
        kv = self.pool()
        kv.reserve(self.get_max_length() - length, seq_ids=self.ids)
        tables = kv._layers[0].live
        if self.state is None or tables is not self.tables:
            self.state, self.tables = self._new_state(kv, tables), tables
            _STATIC[self.state.data_ptr()] = self
        self._only_the_device_knows(True)

    def _new_state(self, kv: SparseKVCache, tables: Any) -> Tensor:
        """A tensor by whose address a captured step is known: one for all that its kernels were given."""
        key = None
        if tables is not None:
            pool = kv._layers[0]
            held = pool.values, pool.indices, pool.dense, pool.v, pool.v_scale, pool.sums, tables.whole, tables.failed
            options = self.topk, self.dense_dims, self.window, self.options["tolerance"], kv._config()
            key = (kv.device, *(x.data_ptr() for x in held), tables.pages.shape, tables.sums.shape, repr(options))
        if key in _STATES:
            return _STATES[key]
        with torch.inference_mode(False):
            state = torch.zeros(1, dtype=torch.int32, device=kv.device)
        torch._dynamo.mark_static_address(state, guard=False)
        if key is not None:
            _STATES[key] = state  # kept, so that no other state gets its address
        return state

    def _only_the_device_knows(self, yes: bool) -> None:
        """Whether lengths are read back before the host uses them: a graph may have been replayed."""
        if self.tables is not None:
            self.tables.captured = yes

    def step(self, q: Tensor, k: Tensor | None, v: Tensor | None, window: int, softmax_scale: float) -> Tensor:
        """Store a token a row, if it is given, and attend; the host's lengths may be behind."""
        self._only_the_device_knows(False)  # a step needs them nowhere, as its pages are taken
        try:
            if k is not None and v is not None:
                if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
                    self._check_fits(self._at_least() + 1)
                self.pool().append(self.to_store(k, v), v, seq_ids=self.ids)
            return self.attend(q, (window, 0), softmax_scale)
        finally:
            self._only_the_device_knows(True)

    def _at_least(self) -> int:
        """Positions that the host knows of, padding included; replayed graphs may have added some."""
        stored = self.pool()._layers[0].sequences[self.ids[0]].length
        return stored + (0 if self.real is None else int((~self.real[0]).sum()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the layer has a state of its own."""
        self.__dict__.update(state)
        if self.state is not None:
            self.state = self._new_state(self.pool(), self.tables)
            _STATIC[self.state.data_ptr()] = self

    def _forgets(self) -> bool:
        return False

    def _make_room(self, counts: list[int]) -> None:
        """There is room."""

    def _trim(self) -> None:
        """Everything stays."""

    def _select(self, rows: list[int]) -> None:
        raise NotImplementedError(
            "a static sparse cache keeps its rows; for beam search, or to select or repeat rows, leave static out"
        )


# Static layers by the address of their state, by which an operator in a compiled step finds its layer.
_STATIC: weakref.WeakValueDictionary[int, StaticSFALayer] = weakref.WeakValueDictionary()
# States on a GPU, by what a captured step reads and writes.
_STATES: dict[Any, Tensor] = {}


@torch.library.custom_op("flash_sfa::cached_step", mutates_args=())
def cached_step(
    q: Tensor, k: Tensor | None, v: Tensor | None, state: Tensor, v_head_dim: int, window: int, softmax_scale: float
) -> Tensor:
    """Store k (b, 1, hkv, d) and v (b, 1, hkv, dv), if given, in the layer of state, and attend from q (b, 1, hq, d).

    What it writes is no argument: nothing else in a compiled step reads or writes it.
    """
    layer = _STATIC.get(state.data_ptr())
    if layer is None:
        raise RuntimeError("a compiled step of a static sparse cache ran without the state that the cache made")
    return layer.step(q, k, v, window, softmax_scale)


@cached_step.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, state: Tensor, v_head_dim: int, window: int, softmax_scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:3], v_head_dim)


def codes_of(x: Tensor, topk: Any, dense_dims: Any) -> Tensor | SparseCode:
    """x (b, n, h, d) as codes with one topk, or one for each head; x itself for topk None.

    A head with fewer entries than the widest repeats its last feature with value 0.
    """
    if topk is None:
        return x
    if not isinstance(topk, list):
        return topk_sparsify(x, topk, dense_dims=dense_dims)
    heads = [topk_sparsify(x[:, :, i], t, dense_dims=dense_dims) for i, t in enumerate(topk)]
    width = max(code.topk for code in heads)
    values = torch.stack([pad(code.values, (0, width - code.topk)) for code in heads], dim=2)
    indices = [
        torch.cat([c.indices, c.indices[..., -1:].expand(*c.indices.shape[:-1], width - c.topk)], -1) for c in heads
    ]
    dense = torch.stack([code.dense for code in heads], dim=2)
    return SparseCode._make(values, torch.stack(indices, dim=2), dense, heads[0].dim, heads[0].dense_dims)


def _plain(config: Any, i: int, layer: Any) -> bool:
    """Whether a layer's visibility is causal, or causal in a window: others (chunks) keep Transformers' own layer."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[i] if kinds is not None else "chunked" if getattr(config, "attention_chunk_size", None) else ""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and "chunked" not in kind


def _each(x: Tensor | SparseCode, fn: Callable[[Tensor], Tensor]) -> Any:
    return x.map(fn) if isinstance(x, SparseCode) else fn(x)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device, not waited for."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _diagonal(mask: Tensor, offset: int) -> Tensor:
    return mask.diagonal(offset, dim1=-2, dim2=-1)


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x (b, n, ...) by order (b, n)."""
    return x.take_along_dim(order[(..., *[None] * (x.dim() - 2))], dim=1)


def _last(x: Tensor, count: int, length: int) -> Tensor:
    """The last count rows of x, then as many others as make length."""
    kept = x[x.shape[0] - count :]
    return torch.cat([kept, kept.new_zeros(length - count, *kept.shape[1:])])


def _nbytes(x: Tensor | None) -> int:
    return 0 if x is None else x.nbytes


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _swap_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)
