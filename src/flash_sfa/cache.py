"""The sparse key-value cache: paged pools of key codes and values, shared between sequences until one writes.

Layout, per layer (``P`` pages of ``page_size`` tokens, head-major inside a page so that a kv head's codes are
contiguous):

    values  (P, hkv, page_size, w)   indices (P, hkv, page_size, w)   dense (P, hkv, page_size, r)
    v       (P, hkv, page_size, dv)  v_scale (P, hkv, page_size, 1 for 8-bit V, else 0)
    sums    (blocks, hkv, dv), fp32

Token t of a sequence lies in page ``table[t // page_size]`` at slot ``t % page_size``. ``sums`` holds the sum of
the stored V rows of every logical block of 128 tokens of a sequence, whatever the page size. Rows beyond a
sequence's length are never read.
"""

import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    check_dense_dims,
    check_head_dim,
    check_same,
    check_tensor,
    check_topk,
    is_int,
)
from .codes import SparseCode, autocast_dtype, topk_sparsify
from .impl import cuda_append
from .ops import index_dtype

BLOCK = 128
# 8-bit types of V and their largest magnitude.
_EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_POOLS = ("values", "indices", "dense", "v", "v_scale")
# Tables and lengths are kept on the host, whatever torch's default device is.
_HOST: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
_INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class _Sequence:
    """One sequence in one layer: pages and sum blocks are int32 numbers into the layer's pools."""

    length: int = 0
    pages: array = field(default_factory=lambda: array("i"))
    sums: array = field(default_factory=lambda: array("i"))
    # Reserved for the next tokens, the first to be taken last.
    spare_pages: list[int] = field(default_factory=list)
    spare_sums: list[int] = field(default_factory=list)
    reserved: int = 0  # tokens that `reserve` made room for, which a cut keeps


@dataclass
class _Live:
    """Lengths and tables of reserved sequences on the device: int32 views of one tensor that stays where it is."""

    ids: list[int]
    whole: Tensor
    lengths: Tensor  # (b,)
    failed: Tensor  # (1,), not 0 after an append that did not fit
    capacity: Tensor  # (b,), tokens that the pages hold
    done: Tensor  # (b,), thread blocks of an append that have ended
    pages: Tensor  # (b, .)
    sums: Tensor  # (b, .)
    pool_sums: Tensor  # where the sums are
    captured: bool = False  # a graph may have advanced the lengths unseen


@dataclass
class _Layer:
    values: Tensor
    indices: Tensor
    dense: Tensor
    v: Tensor
    v_scale: Tensor
    sums: Tensor
    refs: list[int]
    free_pages: list[int]
    free_sums: list[int]
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    version: int = 0  # counts the changes of sequences
    tables: tuple[Any, Any] = (None, None)  # what _tables returned, and for what
    live: _Live | None = None
    stale: list[_Live] = field(default_factory=list)  # tables that a captured graph may still read
    failed: Tensor | None = None  # (1,) on the device, not 0 after a replayed append that did not fit


class SparseKVCache:
    r"""Keys as top-k codes and values as rows, in pages, for many sequences and layers.

    A token costs, per kv head and layer, ``w * (itemsize + index bytes) + r * itemsize + dv * v_itemsize`` bytes
    and 1/128 of a running sum of V (fp32, dv entries): 24 + 256 + 4 bytes at d = dv = 128, topk = 8, bf16,
    0.555 of dense K + V. The cache is for inference: nothing that is stored carries a gradient.

    Args:
        num_layers: layers; each has its own pool, tables and lengths.
        num_kv_heads, head_dim, v_head_dim: shape of k and v; v_head_dim None means head_dim.
        topk, dense_dims: how k is sparsified, as in `topk_sparsify`.
        max_tokens: capacity of one layer over all sequences, in ceil(max_tokens / page_size) pages. A partly
            filled page counts whole.
        page_size: tokens a page; any size of at least 1.
        dtype: of the codes, and of the k, v and q that are given: float16, bfloat16, float32 (float64 for tests).
        v_dtype: how V is stored; None means dtype. int8 and float8_e4m3fn store a bf16 scale a token and kv head, the
            largest magnitude of the row over 127 or 448; other values that do not fit overflow to inf.
        device: None means torch's default device.

    ``seq_ids`` and ``lengths`` are lists of ints or integer tensors on any device; seq_ids=None means all live
    sequences in order of `alloc` and `fork`. An error changes nothing.

    Attributes:
        nbytes: stored bytes in use: used pages (a shared one once), running sums and tables.
        allocated_nbytes: the whole pools, and tables.
        dense_nbytes: the same tokens of all sequences as dense K + V in ``dtype``.

    Raises:
        TypeError, ValueError: an argument is wrong or the cache is full; nothing was written.
        NotImplementedError: a v_dtype of 8 bits other than int8 and float8_e4m3fn.

    Source: paged tables and sharing follow common practice; codes are those of arXiv 2603.22300; running sums ours.

    Example:
        >>> import torch
        >>> from flash_sfa import SparseKVCache
        >>> cache = SparseKVCache(num_kv_heads=2, head_dim=64, topk=8, max_tokens=256, dtype=torch.float32)
        >>> ids = cache.alloc(2)
        >>> cache.append(torch.randn(2, 5, 2, 64), torch.randn(2, 5, 2, 64), lengths=[5, 3])
        >>> cache.seq_lengths().tolist()
        [5, 3]
    """

    def __init__(
        self,
        *,
        num_layers: int = 1,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        topk: int,
        dense_dims: int | Sequence[int] = 0,
        max_tokens: int,
        page_size: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        v_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        self.num_layers = _positive(num_layers, "num_layers")
        self.num_kv_heads = _positive(num_kv_heads, "num_kv_heads")
        self.head_dim = _positive(head_dim, "head_dim")
        check_head_dim(self.head_dim, "k (head_dim)")
        self.v_head_dim = self.head_dim if v_head_dim is None else _positive(v_head_dim, "v_head_dim")
        self.topk = check_topk(topk)
        self.dense_dims = check_dense_dims(dense_dims, self.head_dim)
        self.max_tokens = _positive(max_tokens, "max_tokens")
        self.page_size = _positive(page_size, "page_size")
        self.dtype = _float_dtype(dtype, "dtype")
        self.v_dtype = self.dtype if v_dtype is None else _float_dtype(v_dtype, "v_dtype")
        self.width = min(self.topk, self.head_dim - len(self.dense_dims))
        self.num_pages = _ceil(self.max_tokens, self.page_size)
        self._ids: dict[int, None] = {}
        self._next_id = 0
        # Pools made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            _check_device(device)
            try:
                self._layers = [self._new_layer(device) for _ in range(self.num_layers)]
            except (RuntimeError, MemoryError, OverflowError) as error:
                raise ValueError(
                    f"max_tokens={self.max_tokens} in {self.num_layers} layers does not fit into memory: {error}"
                ) from error
        self.device = self._layers[0].v.device

    def _new_layer(self, device: Any) -> _Layer:
        page = (self.num_pages, self.num_kv_heads, self.page_size)
        blocks = _ceil(self.max_tokens, BLOCK)
        sum_dtype = torch.float64 if self.v_dtype == torch.float64 else torch.float32
        eight = self.v_dtype in _EIGHT_BITS
        return _Layer(
            values=torch.empty(*page, self.width, dtype=self.dtype, device=device),
            indices=torch.empty(*page, self.width, dtype=index_dtype(self.head_dim), device=device),
            dense=torch.empty(*page, len(self.dense_dims), dtype=self.dtype, device=device),
            v=torch.empty(*page, self.v_head_dim, dtype=torch.uint8 if eight else self.v_dtype, device=device),
            v_scale=torch.empty(*page, int(eight), dtype=torch.bfloat16, device=device),
            sums=torch.empty(blocks, self.num_kv_heads, self.v_head_dim, dtype=sum_dtype, device=device),
            refs=[0] * self.num_pages,
            free_pages=list(range(self.num_pages - 1, -1, -1)),
            free_sums=list(range(blocks - 1, -1, -1)),
        )

    def __repr__(self) -> str:
        return (
            f"SparseKVCache(num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"v_head_dim={self.v_head_dim}, topk={self.topk}, dense_dims={self.dense_dims}, "
            f"max_tokens={self.max_tokens}, page_size={self.page_size}, dtype={self.dtype}, v_dtype={self.v_dtype}, "
            f"device={self.device}, sequences={len(self._ids)})"
        )

    # Steps in CUDA graphs

    def reserve(self, n: int, *, seq_ids: Any = None) -> None:
        """Take the pages of the next n tokens of sequences in all layers, and keep their tables on the device.

        From then on an append to exactly these sequences, in this order, is one kernel on a GPU, that reads and
        advances the lengths on the device. Such a step (`append`, `sfa_attention_with_kvcache` with k and v) can be
        captured in a CUDA graph, which stores nothing, and then replayed while the sequences grow:

            cache.reserve(1000, seq_ids=ids)
            with torch.cuda.graph(graph):
                out = sfa_attention_with_kvcache(q, cache, k=k, v=v, seq_ids=ids)
            graph.replay()

        After a capture, calls outside of a graph read the lengths back, which waits for the device. `truncate`,
        `reorder` and an append outside of the graph may come between replays; after `fork` and `reorder`, and when the
        reserved tokens are used up, call reserve again before the next replay. A reserve with other sequences or beyond
        the largest n so far moves the tables: capture again. A replay that does not fit stores nothing, and the next
        call outside of a graph raises. A sequence that is truncated keeps what was reserved; `free` gives it back.

        Where the kernel is missing (CPU, float64), only the pages are taken.

        Args:
            n: tokens of each sequence from its present length on.
            seq_ids: as in `append`.

        Raises:
            TypeError, ValueError: n or seq_ids is wrong, or there are too few free pages: nothing is taken.
        """
        if not is_int(n):
            raise TypeError(f"n must be an int, got {n!r} of type {type(n).__name__}")
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        ids = self._check_ids(seq_ids)
        counts = [int(n)] * len(ids)
        plans = [self._plan(pool, ids, counts, number) for number, pool in enumerate(self._layers)]
        for pool, copied in zip(self._layers, plans):
            sequences = [pool.sequences[i] for i in ids]
            self._extend(pool, sequences, counts, copied, spare=True)
            for sequence in sequences if n else ():
                sequence.reserved = max(sequence.reserved, sequence.length + int(n))
            pool.version += 1
            if cuda_append.unsupported(self) is not None:
                continue
            cuda_append.load(cuda_append.configure(self, coded=False), self.device)  # compiled before any capture
            if pool.live is not None and pool.live.ids != ids:
                self._drop_live(pool)
            if pool.live is None:
                pool.live = self._new_live(pool, ids)
        self._push()

    def _new_live(self, pool: _Layer, ids: list[int]) -> _Live:
        b, sequences = len(ids), [pool.sequences[i] for i in ids]
        widths = [max((len(s) for s in tables), default=0) for tables in _reserved_tables(sequences)]
        sizes = [b, b, b, *(b * width for width in widths)]
        with torch.inference_mode(False):
            whole = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
            if pool.failed is None:
                pool.failed = torch.zeros(1, dtype=torch.int32, device=self.device)
        lengths, capacity, done, pages, sums = whole.split(sizes)
        tables = pages.view(b, widths[0]), sums.view(b, widths[1])
        return _Live(ids, whole, lengths, pool.failed, capacity, done, *tables, pool_sums=pool.sums)

    def _drop_live(self, pool: _Layer) -> None:
        """End a reservation on the device; graphs that still replay it store nothing."""
        if pool.live is not None and pool.live.captured:
            pool.live.capacity.zero_()
            pool.stale.append(pool.live)
        pool.live = None

    def _push(self) -> None:
        """Bring the reserved tables on the device up to date."""
        for pool in self._layers:
            if (live := pool.live) is None:
                continue
            if any(i not in pool.sequences for i in live.ids) or live.pool_sums is not pool.sums:
                self._drop_live(pool)
                continue
            sequences = [pool.sequences[i] for i in live.ids]
            pages, sums = _reserved_tables(sequences)
            widths = live.pages.shape[1], live.sums.shape[1]
            if any(len(table) > width for tables, width in zip((pages, sums), widths) for table in tables):
                self._drop_live(pool)
                live = pool.live = self._new_live(pool, live.ids)
            lengths = [s.length for s in sequences]
            # Nothing can follow in a page that others share, before it is copied.
            capacity = [
                s.length if self._shares_last_page(pool, s) else len(table) * self.page_size
                for s, table in zip(sequences, pages)
            ]
            rows = [*lengths, *capacity, *([0] * len(lengths))]
            for tables, width in ((pages, live.pages.shape[1]), (sums, live.sums.shape[1])):
                for table in tables:
                    rows += [*table, *([0] * (width - len(table)))]
            host = torch.tensor(rows, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")
            live.whole.copy_(host, non_blocking=True)

    def _shares_last_page(self, pool: _Layer, sequence: _Sequence) -> bool:
        return sequence.length % self.page_size != 0 and pool.refs[sequence.pages[-1]] > 1

    def _catch_up(self) -> None:
        """Read the lengths back that replayed graphs may have advanced; raises if one of them ran out of pages."""
        watched = [
            (number, pool, pool.live if pool.live is not None and pool.live.captured else None)
            for number, pool in enumerate(self._layers)
            if pool.stale or (pool.live is not None and pool.live.captured)
        ]
        if not watched or _capturing(self.device):
            return
        parts = [x for _, pool, live in watched for x in (pool.failed, None if live is None else live.lengths)]
        numbers = iter(torch.cat([x for x in parts if x is not None]).tolist())
        failed = []
        for number, pool, live in watched:
            if next(numbers) and pool.failed is not None:
                failed.append(number)
                pool.failed.zero_()
            for seq_id in () if live is None else live.ids:
                self._grow(pool, pool.sequences[seq_id], next(numbers))
        if failed:
            raise ValueError(
                f"a replayed append in layer {failed[0]} did not fit into the reserved pages and stored nothing; "
                "call reserve, and capture again if the graph is older than a reserve that moved the tables"
            )

    def _grow(self, pool: _Layer, sequence: _Sequence, length: int) -> None:
        """Take the tokens over that a graph has stored in reserved pages."""
        if length == sequence.length:
            return
        while len(sequence.pages) * self.page_size < length:
            sequence.pages.append(sequence.spare_pages.pop())
        while len(sequence.sums) * BLOCK < length:
            sequence.sums.append(sequence.spare_sums.pop())
        sequence.length = length
        pool.version += 1

    # Sequences

    def alloc(self, n: int) -> Tensor:
        """Start n empty sequences; their ids, int64 (n,) on the CPU. They take no page yet."""
        if not is_int(n):
            raise TypeError(f"n must be an int, got {n!r} of type {type(n).__name__}")
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        return torch.tensor([self._new_id() for _ in range(n)], **_HOST)

    def _new_id(self) -> int:
        seq_id = self._next_id
        self._next_id += 1
        self._ids[seq_id] = None
        for layer in self._layers:
            layer.sequences[seq_id] = _Sequence()
        return seq_id

    def fork(self, seq_id: int) -> int:
        """A new sequence with the tokens of seq_id in all layers; returns its id.

        Pages are shared until one side writes to them; running sums are copied.
        """
        (source,) = self._check_ids([seq_id], "seq_id")
        new_id = self._new_id()
        for layer in self._layers:
            _copy_sequences(layer, {new_id: source})
        self._push()
        return new_id

    def reorder(self, seq_ids: Any) -> None:
        """The i-th live sequence becomes a copy of seq_ids[i], in all layers; ids do not change.

        One entry a live sequence; repeats are allowed (beam search). Pages are shared as in `fork`.
        """
        sources = self._check_ids(seq_ids, repeats=True)
        if len(sources) != len(self._ids):
            raise ValueError(f"seq_ids must name one source for each of {len(self._ids)} live sequences, got {sources}")
        moved = {target: source for target, source in zip(self._ids, sources) if target != source}
        for layer in self._layers:
            _copy_sequences(layer, moved)
        self._push()

    def free(self, seq_ids: Any) -> None:
        """End sequences and give back the pages that no other sequence shares."""
        for seq_id in self._check_ids(seq_ids):
            del self._ids[seq_id]
            for layer in self._layers:
                sequence = layer.sequences.pop(seq_id)
                _release_pages(layer, [*sequence.pages, *sequence.spare_pages])
                layer.free_sums.extend([*sequence.sums, *sequence.spare_sums])
                layer.version += 1
        self._push()

    def seq_lengths(self, seq_ids: Any = None, *, layer: int = 0) -> Tensor:
        """Stored tokens of each sequence in a layer, int64 (n,) on the CPU."""
        ids = self._check_ids(seq_ids)
        sequences = self._layers[self._check_layer(layer)].sequences
        return torch.tensor([sequences[i].length for i in ids], **_HOST)

    def truncate(self, seq_ids: Any, lengths: Any) -> None:
        """Keep the first lengths[i] tokens of seq_ids[i] in all layers.

        A length above the current one of any layer raises. The running sum of a cut block is recomputed from
        its rows.
        """
        ids = self._check_ids(seq_ids)
        new = _check_ints(lengths, "lengths", len(ids))
        for number, layer in enumerate(self._layers):
            for seq_id, length in zip(ids, new):
                if length > (current := layer.sequences[seq_id].length):
                    raise ValueError(
                        f"lengths must not exceed the stored length, got {length} for sequence {seq_id} with "
                        f"{current} tokens in layer {number}"
                    )
        for layer in self._layers:
            for seq_id, length in zip(ids, new):
                self._cut(layer, layer.sequences[seq_id], length)
        self._push()

    def _cut(self, layer: _Layer, sequence: _Sequence, length: int) -> None:
        if length == sequence.length:
            return
        layer.version += 1
        pages, blocks = _ceil(length, self.page_size), _ceil(length, BLOCK)
        kept_pages, kept_blocks = _ceil(sequence.reserved, self.page_size), _ceil(sequence.reserved, BLOCK)
        for page in reversed(sequence.pages[pages:]):
            if layer.refs[page] == 1 and pages + len(sequence.spare_pages) < kept_pages:
                sequence.spare_pages.append(page)
            else:
                _release_pages(layer, [page])
        for block in reversed(sequence.sums[blocks:]):
            spare = blocks + len(sequence.spare_sums) < kept_blocks
            (sequence.spare_sums if spare else layer.free_sums).append(block)
        sequence.pages, sequence.sums, sequence.length = sequence.pages[:pages], sequence.sums[:blocks], length
        if length % BLOCK:
            start = length // BLOCK * BLOCK
            v, v_scale = (self._rows(x, sequence, start, length) for x in (layer.v, layer.v_scale))
            rows = self._loaded(v, v_scale)
            layer.sums[sequence.sums[-1]] = rows.sum(1, dtype=torch.float64).to(layer.sums.dtype)

    # Tokens

    @torch.no_grad()
    def append(
        self, k: Tensor | SparseCode, v: Tensor, *, layer: int = 0, seq_ids: Any = None, lengths: Any = None
    ) -> None:
        """Add tokens to the ends of sequences; row b goes to seq_ids[b].

        Args:
            k: (b, n, hkv, d) in the cache's dtype, sparsified here, or a SparseCode of the cache's topk and
                dense_dims. Under autocast k and v are cast to the autocast dtype first.
            v: (b, n, hkv, dv) in the cache's dtype, stored as v_dtype.
            layer: the layer to write to; other layers keep their lengths.
            lengths: (b,) leading tokens of each row that count; the others are never stored.

        Raises:
            TypeError, ValueError: an argument does not fit, or there are too few free pages: nothing is written.
        """
        pool = self._layers[self._check_layer(layer)]
        ids = self._check_ids(seq_ids)
        rows, v = self._check_rows(k, v, len(ids))
        n = v.shape[1]
        counts = [n] * len(ids) if lengths is None else _check_ints(lengths, "lengths", len(ids))
        if any(count > n for count in counts):
            raise ValueError(f"lengths must be in [0, {n}], the tokens a row holds, got {counts}")
        live = pool.live if pool.live is not None and pool.live.ids == ids else None
        if _capturing(self.device):
            self._capture(live, rows, v, layer, lengths)
            return
        copied = self._plan(pool, ids, counts, layer)
        if not any(counts):
            return

        sequences = [pool.sequences[i] for i in ids]
        if live is not None:
            self._append_live(live, rows, v, layer, sequences, counts, copied)
            return
        count, start = torch.tensor(counts, **_HOST), torch.tensor([s.length for s in sequences], **_HOST)
        row = torch.repeat_interleave(torch.arange(len(ids), **_HOST), count)
        offset = torch.arange(row.shape[0], **_HOST) - (count.cumsum(0) - count)[row]
        position = start[row] + offset

        rows = rows.map(_flatten_rows) if isinstance(rows, SparseCode) else rows.flatten(0, 1)
        v = v.flatten(0, 1)
        if any(c < n for c in counts):
            keep = _selector((row * n + offset).to(self.device))
            rows, v = (rows.map(keep) if isinstance(rows, SparseCode) else keep(rows)), keep(v)
        code = rows if isinstance(rows, SparseCode) else topk_sparsify(rows, self.topk, dense_dims=self.dense_dims)
        v, v_scale = self._stored(v)

        self._extend(pool, sequences, counts, copied)
        page_of = _lookup([s.pages for s in sequences], self.page_size, start, row, position)
        where = (
            page_of.to(self.device)[:, None],
            torch.arange(self.num_kv_heads, device=self.device),
            (position % self.page_size).to(self.device)[:, None],
        )
        for name, new in zip(_POOLS, (code.values, code.indices, code.dense, v, v_scale)):
            getattr(pool, name).index_put_(where, new)
        sum_of = _lookup([s.sums for s in sequences], BLOCK, start, row, position)
        _add_to_sums(pool.sums, self._loaded(v, v_scale), *torch.unique_consecutive(sum_of, return_counts=True))
        for sequence, added in zip(sequences, counts):
            sequence.length += added
        pool.version += 1
        self._push()

    def _append_live(
        self, live: _Live, k: Tensor | SparseCode, v: Tensor, layer: int, sequences: list[_Sequence],
        counts: list[int], copied: list[_Sequence],
    ) -> None:  # fmt: skip
        """Append to reserved sequences: in one kernel, which advances the lengths on the device."""
        pool = self._layers[layer]
        before = [_held(s) for s in sequences]
        self._extend(pool, sequences, counts, copied, zero=False)
        if pool.live is None:  # its sums have moved
            pool.live = self._new_live(pool, live.ids)
        if copied or pool.live is not live or before != [_held(s) for s in sequences]:
            self._push()
        some = None
        if any(count < v.shape[1] for count in counts):
            some = torch.tensor(counts, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")
            some = some.to(self.device, non_blocking=True)
        cuda_append.append(self, layer, k, v, pool.live, some)
        for sequence, added in zip(sequences, counts):
            sequence.length += added
        pool.version += 1

    def _capture(self, live: _Live | None, k: Tensor | SparseCode, v: Tensor, layer: int, lengths: Any) -> None:
        """Record an append in a CUDA graph: nothing is stored, and the host's lengths stay."""
        if live is None:
            raise ValueError("seq_ids must be the sequences of the last reserve() for an append in a CUDA graph")
        if lengths is not None:
            raise ValueError("lengths must be None for an append in a CUDA graph, where every replay appends all of k")
        live.captured = True
        cuda_append.append(self, layer, k, v, live, None)

    def _stored(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v (..., dv) as it is kept: bytes and a scale a row for 8 bits, else v_dtype and an empty scale."""
        if self.v_dtype not in _EIGHT_BITS:
            return v.to(self.v_dtype), v.new_empty(*v.shape[:-1], 0, dtype=torch.bfloat16)
        largest = _EIGHT_BITS[self.v_dtype]
        # bf16 for its range; that it is rounded costs nothing, as units are counted in the rounded scale.
        scale = (v.abs().amax(-1, keepdim=True).float() / largest).to(torch.bfloat16)
        # A row of zeros has scale 0; a row that is not finite has a scale that is not, so it stays visible.
        units = (v.float() / scale.float()).nan_to_num(0.0, 0.0, 0.0).clamp(-largest, largest)
        units = units.round() if self.v_dtype == torch.int8 else units
        return units.to(self.v_dtype).view(torch.uint8), scale

    def _loaded(self, v: Tensor, v_scale: Tensor) -> Tensor:
        """What `_stored` keeps, as numbers: fp32 for 8 bits, else v_dtype."""
        if self.v_dtype not in _EIGHT_BITS:
            return v
        return v.contiguous().view(self.v_dtype).float() * v_scale.float()

    def _check_rows(self, k: Any, v: Any, batch: int) -> tuple[Tensor | SparseCode, Tensor]:
        check_tensor(v, "v")
        if not isinstance(k, SparseCode):
            check_tensor(k, "k")
        for x, name, dim in ((k, "k", self.head_dim), (v, "v", self.v_head_dim)):
            wanted = f"(batch, seqlen, heads, head_dim) = ({batch}, n, {self.num_kv_heads}, {dim})"
            if len(x.shape) != 4 or x.shape[0] != batch or x.shape[2] != self.num_kv_heads or x.shape[3] != dim:
                raise ValueError(
                    f"{name} must be {wanted} for this cache and its {batch} sequences, got {tuple(x.shape)}"
                )
            if x.device != self.device:
                raise ValueError(f"{name} must be on the cache's device, {self.device}, got {x.device}")
        check_same("v", v.shape[1], "k", k.shape[1], "length")
        if isinstance(k, SparseCode) and (k.topk, k.dense_dims) != (self.width, self.dense_dims):
            raise ValueError(
                f"k must be a code of {self.width} entries a row (topk={self.topk}) and dense_dims={self.dense_dims}, "
                f"got {k.topk} entries and dense_dims={k.dense_dims}"
            )
        for x, name in ((k.values if isinstance(k, SparseCode) else k, "k"), (v, "v")):
            if autocast_dtype(x) != self.dtype:
                raise TypeError(f"{name} must have the cache's dtype, {self.dtype}, got {autocast_dtype(x)}")
        return k.to(self.dtype), v.to(self.dtype)

    def _plan(self, pool: _Layer, ids: list[int], counts: list[int], layer: int) -> list[_Sequence]:
        """The sequences whose last page must be copied before the write; raises if pages do not suffice."""
        copied: list[_Sequence] = []
        left: dict[int, int] = {}
        needed = 0
        for seq_id, count in zip(ids, counts):
            sequence = pool.sequences[seq_id]
            have = len(sequence.pages) + len(sequence.spare_pages)
            needed += max(0, _ceil(sequence.length + count, self.page_size) - have)
            if count and sequence.length % self.page_size:
                page = sequence.pages[-1]
                # The last of its owners to leave finds the page its own.
                if pool.refs[page] - left.get(page, 0) > 1:
                    left[page] = left.get(page, 0) + 1
                    copied.append(sequence)
        needed += len(copied)
        if needed > len(pool.free_pages):
            raise ValueError(
                f"the cache is full: this append needs {needed} pages of {self.page_size} tokens in layer {layer}, "
                f"{len(pool.free_pages)} of {self.num_pages} are free; nothing was written"
            )
        return copied

    def _extend(
        self, pool: _Layer, sequences: list[_Sequence], counts: list[int], copied: list[_Sequence], *,
        spare: bool = False, zero: bool = True,
    ) -> None:  # fmt: skip
        """Give the sequences own last pages where they will write, and the pages and zeroed sums they lack.

        spare: the pages and sums are only set aside.
        """
        blocks = [_ceil(s.length + count, BLOCK) for s, count in zip(sequences, counts)]
        lacking = sum(max(0, block - len(s.sums) - len(s.spare_sums)) for s, block in zip(sequences, blocks))
        if lacking > len(pool.free_sums):
            self._drop_live(pool)  # the sums move
        _grow_sums(pool, lacking)
        source = [s.pages[-1] for s in copied]
        for sequence in copied:
            pool.refs[sequence.pages[-1]] -= 1
            sequence.pages[-1] = _take_page(pool)
        if copied:
            source_index = _index(source, self.device)
            target_index = _index([s.pages[-1] for s in copied], self.device)
            for name in _POOLS:
                tensor = getattr(pool, name)
                tensor[target_index] = tensor[source_index]
        fresh: list[int] = []
        for sequence, count, block in zip(sequences, counts, blocks):
            pages, sums = _ceil(sequence.length + count, self.page_size), block
            if spare:
                while len(sequence.pages) + len(sequence.spare_pages) < pages:
                    sequence.spare_pages.insert(0, _take_page(pool))
                while len(sequence.sums) + len(sequence.spare_sums) < sums:
                    sequence.spare_sums.insert(0, pool.free_sums.pop())
                continue
            while len(sequence.pages) < pages:
                sequence.pages.append(sequence.spare_pages.pop() if sequence.spare_pages else _take_page(pool))
            while len(sequence.sums) < sums:
                fresh.append(sequence.spare_sums.pop() if sequence.spare_sums else pool.free_sums.pop())
                sequence.sums.append(fresh[-1])
        if fresh and zero:
            pool.sums[_index(fresh, self.device)] = 0

    def gather(self, layer: int, seq_id: int) -> tuple[SparseCode, Tensor]:
        """All tokens of one sequence: its key code (n, hkv, ...) and v (n, hkv, dv), as copies.

        v is in v_dtype; for 8 bits fp32, multiplied by its scale.
        """
        layer = self._check_layer(layer)
        (seq_id,) = self._check_ids([seq_id], "seq_id")
        return self._span(layer, seq_id, 0, self._layers[layer].sequences[seq_id].length)

    def _span(self, layer: int, seq_id: int, start: int, stop: int) -> tuple[SparseCode, Tensor]:
        """Tokens [start, stop) as `gather` gives them."""
        pool = self._layers[layer]
        sequence = pool.sequences[seq_id]
        values, indices, dense, v, v_scale = (
            self._rows(getattr(pool, name), sequence, start, stop).transpose(0, 1) for name in _POOLS
        )
        return SparseCode._make(values, indices, dense, self.head_dim, self.dense_dims), self._loaded(v, v_scale)

    def block_sums(self, layer: int, seq_id: int) -> Tensor:
        """The running sums of V of one sequence: (ceil(n / 128), hkv, dv), fp32 (float64 for float64), a copy."""
        pool = self._layers[self._check_layer(layer)]
        (seq_id,) = self._check_ids([seq_id], "seq_id")
        return pool.sums[_index(pool.sequences[seq_id].sums, self.device)]

    def used_pages(self, layer: int = 0) -> int:
        """Pages of a layer that hold tokens or are reserved; a page that sequences share counts once."""
        return self.num_pages - len(self._layers[self._check_layer(layer)].free_pages)

    def _rows(self, pool: Tensor, sequence: _Sequence, start: int, stop: int) -> Tensor:
        """Tokens [start, stop) of a sequence, head-major: (hkv, stop - start, ...)."""
        first = start // self.page_size
        pages = _index(sequence.pages[first : _ceil(stop, self.page_size)], self.device)
        rows = pool[pages].transpose(0, 1).flatten(1, 2)
        return rows[:, start - first * self.page_size : stop - first * self.page_size]

    def _tables(self, layer: int, ids: list[int]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Lengths (b,), pages (b, .) and sum blocks (b, .) of sequences, int32 on the device; the longest length.

        Of reserved sequences the length that the pages hold.
        """
        pool = self._layers[layer]
        if (live := pool.live) is not None and live.ids == ids:
            return live.lengths, live.pages, live.sums, live.pages.shape[1] * self.page_size
        key = (pool.version, tuple(ids))
        if pool.tables[0] != key:
            sequences = [pool.sequences[i] for i in ids]
            widths = [1, *(max((len(t) for t in tables), default=0) for tables in _tables_of(sequences))]
            sizes = [len(ids) * width for width in widths]
            host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")
            for tables, part, width in zip(
                ([array("i", [s.length]) for s in sequences], *_tables_of(sequences)), host.split(sizes), widths
            ):
                for row, table in zip(part.view(-1, width) if width else (), tables):
                    if table:
                        row[: len(table)] = torch.frombuffer(table, dtype=torch.int32)
            parts = host.to(self.device, non_blocking=True).split(sizes)
            lengths, pages, sums = (part.view(len(ids), width) for part, width in zip(parts, widths))
            longest = max((s.length for s in sequences), default=0)
            pool.tables = (key, (lengths.flatten(), pages, sums, longest))
        return pool.tables[1]  # type: ignore[no-any-return]

    # Bytes

    def _page_nbytes(self, pool: _Layer) -> int:
        return sum(getattr(pool, name).nbytes for name in _POOLS) // self.num_pages

    def _table_nbytes(self, pool: _Layer) -> int:
        return sum(t.itemsize * len(t) for s in pool.sequences.values() for t in (s.pages, s.sums))

    @property
    def nbytes(self) -> int:
        used = 0
        for number, pool in enumerate(self._layers):
            blocks = pool.sums.shape[0] - len(pool.free_sums)
            used += self.used_pages(number) * self._page_nbytes(pool) + self._table_nbytes(pool)
            used += blocks * pool.sums[:1].nbytes
        return used

    @property
    def allocated_nbytes(self) -> int:
        return sum(
            self.num_pages * self._page_nbytes(pool) + pool.sums.nbytes + self._table_nbytes(pool)
            for pool in self._layers
        )

    @property
    def dense_nbytes(self) -> int:
        self._catch_up()
        tokens = sum(s.length for pool in self._layers for s in pool.sequences.values())
        return tokens * self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    # Saving

    def _config(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
            "width": self.width,
            "dense_dims": list(self.dense_dims),
            "page_size": self.page_size,
            "dtype": str(self.dtype),
            "v_dtype": str(self.v_dtype),
        }

    def state_dict(self) -> dict[str, Any]:
        """A copy of the stored sequences as tensors, lists, ints and strings: used pages only, sharing kept."""
        self._catch_up()
        layers = []
        for pool in self._layers:
            sequences = [pool.sequences[i] for i in self._ids]
            used = sorted({page for s in sequences for page in s.pages})
            number = {page: i for i, page in enumerate(used)}
            where = _index(used, self.device)
            layers.append(
                {
                    "lengths": torch.tensor([s.length for s in sequences], **_HOST),
                    "tables": torch.tensor(
                        [number[p] for s in sequences for p in s.pages], dtype=torch.int32, device="cpu"
                    ),
                    "sums": pool.sums[_index([b for s in sequences for b in s.sums], self.device)],
                    **{name: getattr(pool, name)[where] for name in _POOLS},
                }
            )
        return {
            "config": self._config(),
            "seq_ids": torch.tensor(list(self._ids), **_HOST),
            "next_id": self._next_id,
            "layers": layers,
        }

    @torch.no_grad()
    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Replace all sequences by saved ones, ids included.

        The two caches must agree in all but max_tokens and device; pages that do not fit raise. An error
        changes nothing.
        """
        if not isinstance(sd, dict):
            raise TypeError(f"sd must be a dict from state_dict(), got {type(sd).__name__}")
        if missing := {"config", "seq_ids", "next_id", "layers"} - set(sd):
            raise ValueError(f"sd must be a dict from state_dict(); it lacks {sorted(missing)}")
        if sd["config"] != self._config():
            raise ValueError(f"sd was saved from a cache with {sd['config']}; this one has {self._config()}")
        ids = _check_ints(sd["seq_ids"], "seq_ids of sd")
        if len(set(ids)) != len(ids) or not is_int(sd["next_id"]) or sd["next_id"] <= max(ids, default=-1):
            raise ValueError(f"sd holds seq_ids {ids} with next_id {sd['next_id']}: repeated, or not below next_id")
        if len(sd["layers"]) != self.num_layers:
            raise ValueError(f"sd must hold {self.num_layers} layers, got {len(sd['layers'])}")
        loaded = [self._check_saved(pool, saved, ids) for pool, saved in zip(self._layers, sd["layers"])]

        for pool, saved, (sequences, refs) in zip(self._layers, sd["layers"], loaded):
            for name in _POOLS:
                getattr(pool, name)[: len(refs)] = saved[name].to(self.device)
            blocks = saved["sums"].shape[0]
            pool.free_sums = list(range(pool.sums.shape[0] - 1, -1, -1))
            _grow_sums(pool, blocks)
            pool.sums[:blocks] = saved["sums"].to(self.device)
            pool.free_sums = list(range(pool.sums.shape[0] - 1, blocks - 1, -1))
            pool.refs = refs + [0] * (self.num_pages - len(refs))
            pool.free_pages = list(range(self.num_pages - 1, len(refs) - 1, -1))
            pool.sequences = sequences
            pool.version += 1
            self._drop_live(pool)
        self._ids = dict.fromkeys(ids)
        self._next_id = int(sd["next_id"])

    def _check_saved(
        self, pool: _Layer, saved: dict[str, Any], ids: list[int]
    ) -> tuple[dict[int, _Sequence], list[int]]:
        """The sequences and page reference counts of one saved layer."""
        if missing := {"lengths", "tables", "sums", *_POOLS} - set(saved):
            raise ValueError(f"a layer of sd lacks {sorted(missing)}")
        lengths = _check_ints(saved["lengths"], "lengths of sd", len(ids))
        pages = [_ceil(length, self.page_size) for length in lengths]
        blocks = [_ceil(length, BLOCK) for length in lengths]
        table = _check_ints(saved["tables"], "tables of sd", sum(pages))
        used = len(set(table))
        if used > self.num_pages:
            raise ValueError(
                f"sd holds {used} pages of {self.page_size} tokens, this cache has {self.num_pages} "
                f"(max_tokens={self.max_tokens})"
            )
        if table and max(table) != used - 1:
            raise ValueError(f"tables of sd must number the pages 0 to {used - 1}, got up to {max(table)}")
        for name, rows in (*((name, used) for name in _POOLS), ("sums", sum(blocks))):
            mine, given = getattr(pool, name), saved[name]
            if not isinstance(given, Tensor) or given.dtype != mine.dtype or given.shape != (rows, *mine.shape[1:]):
                came = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"{name} of sd must be {mine.dtype} {(rows, *mine.shape[1:])}, got {came}")
        refs = [0] * used
        for page in table:
            refs[page] += 1
        sequences, page_at, sum_at = {}, 0, 0
        for seq_id, length, n_pages, n_blocks in zip(ids, lengths, pages, blocks):
            sequences[seq_id] = _Sequence(
                length,
                array("i", table[page_at : page_at + n_pages]),
                array("i", range(sum_at, sum_at + n_blocks)),
            )
            page_at, sum_at = page_at + n_pages, sum_at + n_blocks
        return sequences, refs

    # Checks

    def _check_layer(self, layer: Any) -> int:
        if not is_int(layer):
            raise TypeError(f"layer must be an int, got {layer!r} of type {type(layer).__name__}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        return int(layer)

    def _check_ids(self, seq_ids: Any, name: str = "seq_ids", *, repeats: bool = False) -> list[int]:
        self._catch_up()
        if seq_ids is None:
            return list(self._ids)
        ids = _check_ints(seq_ids, name, allow_negative=True)
        for seq_id in ids:
            if seq_id not in self._ids:
                raise ValueError(
                    f"{name} names {seq_id}, which is unknown or freed; live sequences are {_short(self._ids)}"
                )
        if not repeats and len(set(ids)) != len(ids):
            raise ValueError(f"{name} must not repeat a sequence, got {ids}")
        return ids


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def _positive(value: Any, name: str) -> int:
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    # Torch without CUDA raises AssertionError for a CUDA device.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device must name a device that torch can use here, got {device!r}: {error}") from error


def _float_dtype(dtype: Any, name: str) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {dtype!r} of type {type(dtype).__name__}")
    if name == "v_dtype" and dtype in _EIGHT_BITS:
        return dtype
    if name == "v_dtype" and dtype.itemsize == 1 and dtype != torch.bool:
        raise NotImplementedError(f"v_dtype={dtype} is not built; 8-bit values are int8 or float8_e4m3fn")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
    return dtype


def _short(ids: Iterable[int]) -> str:
    ids = list(ids)
    return str(ids) if len(ids) <= 16 else f"{ids[:16]} and {len(ids) - 16} more"


def _check_ints(values: Any, name: str, length: int | None = None, *, allow_negative: bool = False) -> list[int]:
    """A list of ints or an integer tensor (n,) as a list."""
    wanted = f"{name} must be a list of ints or an integer tensor (n,)"
    if isinstance(values, Tensor):
        if values.dtype not in _INT_DTYPES:
            raise TypeError(f"{wanted}, got {values.dtype}")
        if values.dim() != 1:
            raise ValueError(f"{wanted}, got shape {tuple(values.shape)}")
        ints = [int(value) for value in values.tolist()]
    elif isinstance(values, (list, tuple, range)):
        ints = []
        for value in values:
            wrong = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype not in _INT_DTYPES)
            try:
                if wrong:
                    raise TypeError
                ints.append(operator.index(value))
            except TypeError:
                raise TypeError(f"{wanted}, got an entry {value!r} of type {type(value).__name__}") from None
    else:
        raise TypeError(f"{wanted}, got {type(values).__name__}: {values!r}")
    if length is not None and len(ints) != length:
        raise ValueError(f"{name} must have {length} entries, got {len(ints)}")
    if not allow_negative and any(value < 0 for value in ints):
        raise ValueError(f"{name} must not be negative, got {ints}")
    return ints


def _index(numbers: Iterable[int], device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    host = torch.tensor(list(numbers), **_HOST, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _flatten_rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _selector(keep: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_select(0, keep)


def _release_pages(layer: _Layer, pages: Iterable[int]) -> None:
    for page in pages:
        layer.refs[page] -= 1
        if layer.refs[page] == 0:
            layer.free_pages.append(page)


def _copy_sequences(layer: _Layer, moved: dict[int, int]) -> None:
    """Make each target a copy of its source as the sources are now: pages shared, sums copied."""
    sources = [layer.sequences[source] for source in moved.values()]
    blocks = [block for source in sources for block in source.sums]
    device = layer.sums.device
    sums = layer.sums[_index(blocks, device)]
    for source in sources:
        for page in source.pages:
            layer.refs[page] += 1
    copies = [(s.length, s.pages[:], len(s.sums)) for s in sources]
    for target in moved:
        _release_pages(layer, layer.sequences[target].pages)
        layer.free_sums.extend(layer.sequences[target].sums)
    _grow_sums(layer, len(blocks))
    taken: list[int] = []
    for target, (length, pages, n_blocks) in zip(moved, copies):
        own = array("i", (layer.free_sums.pop() for _ in range(n_blocks)))
        taken.extend(own)
        old = layer.sequences[target]
        layer.sequences[target] = _Sequence(length, pages, own, old.spare_pages, old.spare_sums)
    layer.version += 1
    layer.sums[_index(taken, device)] = sums


def _grow_sums(layer: _Layer, needed: int) -> None:
    """Make room for running sums: forks copy them, so their number is not bound by the pages."""
    if needed <= len(layer.free_sums):
        return
    old = layer.sums.shape[0]
    new = max(2 * old, old + needed - len(layer.free_sums))
    with torch.inference_mode(False):
        sums = layer.sums.new_empty(new, *layer.sums.shape[1:])
    sums[:old] = layer.sums
    layer.sums = sums
    layer.free_sums[:0] = range(new - 1, old - 1, -1)


def _take_page(layer: _Layer) -> int:
    page = layer.free_pages.pop()
    layer.refs[page] = 1
    return page


def _reserved_tables(sequences: list[_Sequence]) -> tuple[list[list[int]], list[list[int]]]:
    """Pages and sum blocks of sequences, the reserved ones included."""
    pages = [[*s.pages, *reversed(s.spare_pages)] for s in sequences]
    return pages, [[*s.sums, *reversed(s.spare_sums)] for s in sequences]


def _held(sequence: _Sequence) -> int:
    """Pages and sum blocks of a sequence, the reserved ones included."""
    return sum(map(len, (sequence.pages, sequence.spare_pages, sequence.sums, sequence.spare_sums)))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tables_of(sequences: list[_Sequence]) -> tuple[list[array], list[array]]:
    return [s.pages for s in sequences], [s.sums for s in sequences]


def _lookup(tables: list[array], unit: int, start: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """tables[row][position // unit] for every new token, from the part of the tables at and beyond start."""
    begin = start // unit
    touched = [table[b:] for table, b in zip(tables, begin.tolist())]
    size = torch.tensor([len(part) for part in touched], **_HOST)
    flat = torch.tensor([entry for part in touched for entry in part], **_HOST)
    return flat[(size.cumsum(0) - size - begin)[row] + position // unit]


def _add_to_sums(sums: Tensor, v: Tensor, sum_of: Tensor, size: Tensor) -> None:
    """sums[sum_of[i]] += the next size[i] rows of v; every block occurs once, so the order is fixed."""
    first = size.cumsum(0) - size
    inside = torch.arange(int(size.max()), **_HOST)
    last = v.shape[0] - 1
    # In parts: the wider copy of V stays small however long the append is.
    for part in range(0, sum_of.shape[0], 64):
        blocks = slice(part, part + 64)
        rows = v[(first[blocks, None] + inside).clamp(max=last).to(v.device)]
        beyond = (inside >= size[blocks, None]).to(v.device)
        where = sum_of[blocks].to(v.device)
        added = rows.masked_fill(beyond[..., None, None], 0.0).sum(1, dtype=torch.float64)
        sums[where] = (sums[where] + added).to(sums.dtype)
