"""The paper's algorithm on a GPU: posting lists of keys intersected with sparse queries; launcher of ``intersect.cu``.

Forward only. Keys are first laid out by feature (`by_feature`); then a thread walks the lists of its query row's
features and adds products to scores in shared memory. NVRTC compiles each configuration at its first use.
"""

import ctypes
import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codes import SparseCode
from . import nvrtc

SOURCE = Path(__file__).with_name("intersect.cu")
# Keys a page, and entries a group: the kernel reads whole groups.
PAGE, GROUP = 128, 4
MAX_TOPK, MAX_HEAD_DIM, MAX_V_HEAD_DIM = 32, 1024, 256
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Shared memory of a thread block, and of a multiprocessor, in bytes; by the lower compute capability, the first fits.
_SHARED = {(9, 0): (227 * 1024, 228 * 1024), (8, 0): (163 * 1024, 164 * 1024)}
_SMALL = (99 * 1024, 100 * 1024)
LOG2E = 1.4426950408889634


class FeaturePages(NamedTuple):
    r"""Keys by feature: for every page of keys and every feature, which keys keep it, with what value.

    ======= ====================== ============== ===========================================================
    part    shape                  dtype          meaning
    ======= ====================== ============== ===========================================================
    offsets (b, hkv, pages, d + 1) int16          list u of a page is entries offsets[u] to offsets[u + 1]
    ids     (b, hkv, pages, cap)   uint8          key number inside the page, ascending in a list
    values  (b, hkv, pages, cap)   as the code's  the key's value of the feature
    ======= ====================== ============== ===========================================================

    A page holds ``page`` keys, the last one fewer. With ``group`` > 1 lists are filled up to whole groups by entries
    (page, 0), so that a list starts at a multiple of ``group``; group = 1 stores 3 bytes an entry (16-bit values) and
    nothing else. cap = page * w + min(d, page * w) * (group - 1), rounded up to 16; entries beyond offsets[d] mean
    nothing. Entries that only fill a code up (its last index again, with value 0) are not stored.
    """

    offsets: Tensor
    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Config:
    """What the kernels are compiled for: the macros of intersect.cu."""

    D: int
    WQ: int
    WK: int
    DV: int
    DVC: int
    KIND: int
    DROP: int
    AHEAD: int
    WGMMA: int
    WARPS: int
    CTAS: int
    PAGE: int = PAGE
    GROUP: int = GROUP

    def macros(self) -> list[tuple[str, str]]:
        return [(f"SFA_{name}", str(value)) for name, value in asdict(self).items()]

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a thread block, as SHARED in intersect.cu."""
        size = 4 if self.KIND == 2 else 2
        cap = capacity(self.D, self.WK, self.PAGE, self.GROUP)
        tiles = self.WARPS * (self.PAGE + 1) * 128 + self.PAGE * (64 if self.DVC <= 64 else 128) * size
        entries = (cap + 4) * (8 if self.KIND == 2 else 4)
        queries = self.WQ * 32 * self.WARPS * (8 if self.KIND == 2 else 4)
        raw = self.AHEAD * (_offsets(self.D) * 2 + cap * (1 + size))
        return tiles + entries + -(-(self.D + 1) * 4 // 16) * 16 + queries + 16 + raw


def capacity(d: int, width: int, page: int, group: int) -> int:
    """Entries a page has room for."""
    return -(-(page * width + min(d, page * width) * (group - 1)) // 16) * 16


def _offsets(d: int) -> int:
    """Offsets that the kernels keep of a page: d + 1, rounded up to 16 bytes."""
    return -(-(d + 1) // 8) * 8


class _PageParams(ctypes.Structure):
    """As ``struct PageParams`` in intersect.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "indices", "offsets", "ids", "out")),
        *((name, ctypes.c_int) for name in ("sk", "hkv", "pages")),
    ]


class _Params(ctypes.Structure):
    """As ``struct Params`` in intersect.cu."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("q_values", "q_indices", "offsets", "ids", "k_values", "v", "out", "lse")
        ),
        *((name, ctypes.c_longlong) for name in ("v_batch", "v_row", "v_head")),
        ("scale", ctypes.c_float),
        *(
            (name, ctypes.c_int)
            for name in ("sign", "sq", "sk", "hq", "hkv", "left", "right", "pages", "tiles", "chunks")
        ),
    ]


def unsupported(
    device: torch.device, dtype: torch.dtype, d: int, dv: int, topk: tuple[int | None, int | None], *,
    dense_dims: bool, masked: bool, packed: bool, dropout_p: float,
) -> str | None:  # fmt: skip
    """Why this implementation cannot do a call, or None."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device}"
    # torch.compile cannot trace the search for cuda-core; there the first launch tells.
    if not torch.compiler.is_compiling() and (reason := nvrtc.missing(device.index)) is not None:
        return reason
    if dtype not in _KINDS:
        return f"{dtype} is not supported"
    if None in topk or dense_dims:
        return "every feature must be sparse: no dense side, no dense_dims"
    if max(n for n in topk if n is not None) > MAX_TOPK:
        return f"topk above {MAX_TOPK} is not supported, got {topk}"
    if d > MAX_HEAD_DIM or dv > MAX_V_HEAD_DIM:
        return f"head dims up to {MAX_HEAD_DIM} (q, k) and {MAX_V_HEAD_DIM} (v) are supported, got {d} and {dv}"
    if masked or packed or dropout_p > 0.0:
        return "attn_mask, packed sequences and dropout are not supported"
    return None


def configure(
    d: int, dv: int, topk_q: int, topk_k: int, dtype: torch.dtype, drop: bool, capability: tuple[int, int],
    **overrides: int,
) -> Config:  # fmt: skip
    """The configuration of a call: two thread blocks of four warps on a multiprocessor where they fit, else one."""
    most, total = next((s for c, s in _SHARED.items() if capability in (c, (10, 0))), _SMALL)
    chunks = -(-dv // (64 if dtype == torch.float32 else 128))
    dvc = -(-dv // chunks // 16) * 16
    config = Config(d, topk_q, topk_k, dv, dvc, _KINDS[dtype], int(drop), AHEAD=0, WGMMA=0, WARPS=4, CTAS=2)
    if 2 * (config.shared + 1024) > total:
        config = replace(config, WARPS=8, CTAS=1)
    while config.shared > most and config.WARPS > 1:
        config = replace(config, WARPS=config.WARPS - 1)
    # Lists of the next page come ahead where that costs neither a warp nor the second block.
    ahead = replace(config, AHEAD=1)
    if ahead.shared <= most and ahead.CTAS * (ahead.shared + 1024) <= total:
        config = ahead
    config = replace(config, **overrides)
    if "WGMMA" not in overrides:  # P V by warpgroups
        fits = config.KIND != 2 and config.WARPS % 4 == 0 and dvc in (64, 128)
        config = replace(config, WGMMA=int(fits and capability == (9, 0)))
    if config.shared > most:
        raise NotImplementedError(
            f"impl='intersect': tiles need {config.shared} bytes of shared memory, this GPU has {most} a block"
        )
    return config


def by_feature(code: SparseCode, *, page: int = PAGE, group: int = GROUP) -> FeaturePages:
    """The keys of a code (b, sk, hkv, d), without dense_dims, by feature; in plain torch on any device.

    Raises:
        ValueError: page not 32, 64, 128 or 256, group not 1, 2 or 4, group > 1 with a page of 256, dense_dims, or
            more than 2^15 - 1 entries a page.

    Example:
        >>> import torch
        >>> from flash_sfa import topk_sparsify
        >>> from flash_sfa.impl.intersect import by_feature
        >>> pages = by_feature(topk_sparsify(torch.tensor([3.0, 0.0, -2.0, 1.0]).view(1, 1, 1, 4), 2), group=1)
        >>> pages.offsets.tolist(), pages.values[..., :2].tolist()
        ([[[[0, 1, 1, 2, 2]]]], [[[[3.0, -2.0]]]])
    """
    if page not in (32, 64, 128, 256):
        raise ValueError(f"page must be 32, 64, 128 or 256, got {page}")
    if group not in (1, 2, 4) or (group > 1 and page == 256):
        raise ValueError(f"group must be 1, 2 or 4, and 1 for a page of 256, got {group} and page={page}")
    if code.dense_dims:
        raise ValueError(f"code must not have dense_dims, got {code.dense_dims}")
    values, indices = (x.transpose(1, 2) for x in (code.values, code.indices.long()))
    b, hkv, sk, w = values.shape
    d, pages, device = code.dim, -(-sk // page), values.device
    cap = capacity(d, w, page, group)
    if cap > 2**15 - 1:
        raise ValueError(f"page={page} with {w} entries a key is more than the int16 offsets of a page reach: {cap}")
    kept = torch.ones_like(indices, dtype=torch.bool)
    kept[..., 1:] = indices.diff(dim=-1) != 0
    key = torch.arange(sk, device=device)[:, None].expand(sk, w)
    # The list of every entry: (sequence, head, page, feature) as one number.
    base = (torch.arange(b * hkv, device=device).view(b, hkv, 1, 1) * pages + key // page) * d
    lists = (base + indices)[kept]
    counts = torch.bincount(lists, minlength=b * hkv * pages * d).view(b, hkv, pages, d)
    ends = (-(-counts // group) * group).cumsum(-1)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    order = lists.argsort(stable=True)
    firsts = (counts.flatten().cumsum(0) - counts.flatten())[lists[order]]
    starts = offsets[..., :-1].flatten()[lists[order]]
    to = lists[order] // d * cap + starts + torch.arange(len(order), device=device) - firsts
    ids = torch.full((b * hkv * pages * cap,), page % 256, dtype=torch.uint8, device=device)
    out = torch.zeros(b * hkv * pages * cap, dtype=values.dtype, device=device)
    ids[to] = (key % page).expand_as(indices)[kept][order].to(torch.uint8)
    out[to] = values[kept][order]
    shape = b, hkv, pages
    return FeaturePages(offsets.to(torch.int16), ids.view(*shape, cap), out.view(*shape, cap))


def build_pages(code: SparseCode, config: Config) -> FeaturePages:
    """`by_feature` by one kernel, for a code whose tensors are contiguous."""
    b, sk, hkv, w = code.values.shape
    device, pages = code.device, -(-sk // config.PAGE)
    shape = b, hkv, pages
    cap = capacity(config.D, w, config.PAGE, config.GROUP)
    offsets = torch.empty(*shape, _offsets(config.D), dtype=torch.int16, device=device)
    ids = torch.empty(*shape, cap, dtype=torch.uint8, device=device)
    values = torch.empty(*shape, cap, dtype=code.dtype, device=device)
    params = _PageParams(
        values=code.values.data_ptr(), indices=code.indices.data_ptr(), offsets=offsets.data_ptr(),
        ids=ids.data_ptr(), out=values.data_ptr(), sk=sk, hkv=hkv, pages=pages,
    )  # fmt: skip
    if b * hkv * pages > 0:
        load(config, device).launch("sfa_pages", (b * hkv * pages, 1, 1), config.PAGE, params)
    return FeaturePages(offsets[..., : config.D + 1], ids, values)


def forward(
    q: SparseCode, k: SparseCode, v: Tensor, window: tuple[int, int], softmax_scale: float, drop: bool,
    **overrides: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, sq, hq, d), k (b, sk, hkv, d) codes, v (b, sk, hkv, dv) -> out (b, sq, hq, dv), lse (b, hq, sq) fp32."""
    (b, sq, hq, wq), (_, sk, hkv, wk) = q.values.shape, k.values.shape
    dv, device = v.shape[-1], v.device
    lse = torch.empty(b, hq, sq, dtype=torch.float32, device=device)
    wide = -(-dv // 16) * 16
    out = torch.empty(b, sq, hq, wide, dtype=v.dtype, device=device)
    if out.numel() == 0:
        return out[..., :dv], lse
    if sk == 0:
        return out[..., :dv].zero_(), lse.fill_(-torch.inf)
    if wide != dv:
        v = torch.nn.functional.pad(v, (0, wide - dv))
    v = _aligned(v)
    q, k = (code.map(_contiguous) for code in (q, k))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    config = configure(q.dim, wide, wq, wk, v.dtype, drop, capability, **overrides)
    pages = build_pages(k, config)
    left, right = (min(w, 2**30) for w in window)
    tiles, chunks = -(-sq // (32 * config.WARPS)), -(-wide // config.DVC)
    params = _Params(
        q_values=q.values.data_ptr(), q_indices=q.indices.data_ptr(), offsets=pages.offsets.data_ptr(),
        ids=pages.ids.data_ptr(), k_values=pages.values.data_ptr(), v=v.data_ptr(), out=out.data_ptr(),
        lse=lse.data_ptr(), v_batch=v.stride(0), v_row=v.stride(1), v_head=v.stride(2),
        scale=(abs(softmax_scale) or 1.0) * LOG2E, sign=(softmax_scale > 0) - (softmax_scale < 0), sq=sq, sk=sk,
        hq=hq, hkv=hkv, left=left, right=right, pages=pages.ids.shape[2], tiles=tiles, chunks=chunks,
    )  # fmt: skip
    blocks = tiles * chunks * hq * b
    load(config, device).launch("sfa_intersect", (blocks, 1, 1), 32 * config.WARPS, params, shared=config.shared)
    return (out if wide == dv else out[..., :dv].contiguous()), lse


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _aligned(v: Tensor) -> Tensor:
    """v, copied if its rows do not start at multiples of 16 bytes."""
    steps = [stride * v.element_size() for size, stride in zip(v.shape[:-1], v.stride()) if size > 1]
    fits = v.stride(-1) == 1 and v.data_ptr() % 16 == 0 and all(step >= 0 and step % 16 == 0 for step in steps)
    return v if fits else v.contiguous()


@torch.library.custom_op("flash_sfa::intersect", mutates_args=())
def attention(
    q: Tensor, q_indices: Tensor, k: Tensor, k_indices: Tensor, v: Tensor, dim: int, left: int, right: int,
    softmax_scale: float, drop: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Code values and indices of q and k, and v -> out, lse."""
    codes = [
        SparseCode._make(x, i, x.new_empty(*x.shape[:-1], 0), dim, ()) for x, i in ((q, q_indices), (k, k_indices))
    ]
    return forward(codes[0], codes[1], v, (left, right), softmax_scale, drop)


@attention.register_fake
def _(q: Tensor, q_indices: Tensor, k: Tensor, k_indices: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, sq, hq = q.shape[:3]
    return v.new_empty(b, sq, hq, v.shape[-1]), v.new_empty(b, hq, sq, dtype=torch.float32)


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("impl='intersect' has no backward; use impl='auto' to train, or torch.no_grad()")


attention.register_autograd(_no_backward)


@functools.cache
def load(config: Config, device: torch.device) -> nvrtc.Kernels:
    name = "sfa_intersect"
    return nvrtc.Kernels(
        SOURCE, config.macros(), ("sfa_pages", name), device, arch=nvrtc.architecture(device) + "a" * config.WGMMA,
        shared={name: config.shared}, prefer_shared=(name,),
    )  # fmt: skip
