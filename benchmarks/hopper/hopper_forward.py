"""Forward attention over rows on Hopper: the launcher of ``forward.cu``, compiled at first use with NVRTC.

Not part of ``auto``. Takes bf16 rows that top-k masked (or any others), full or causal, head dims 64, 128 and 256.
q and k in e4m3 or int8 (`quantise`) multiply at twice the rate; `compress` makes q a 2:4 sparse operand, exactly.
"""

import ctypes
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from flash_sfa.impl import nvrtc

SOURCE = Path(__file__).with_name("forward.cu")
LOG2E = 1.4426950408889634
# Heads whose k and v fit into this many bytes are worked on together, so that they stay in L2.
_L2 = 24 * 2**20
_SCORES = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.int8: 2}
_POINTERS = ("out", "lse", "counter", "q_scale", "k_scale", "q_values", "q_where", "q_more")


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for: the macros of forward.cu."""

    D: int
    DV: int
    WGS: int
    BN: int
    STAGES: int
    QSTAGES: int
    CAUSAL: int
    SCORES: int = 0
    LAZY: int = 8
    SKIP: int = 0
    PINGPONG: int = 1
    ACROSS: int = 0
    CLUSTER: int = 1
    SPARSE: int = 0
    QREGS: int = 0
    CODE: int = 0

    def macros(self) -> list[tuple[str, str]]:
        return [(f"HF_{name}", str(value)) for name, value in asdict(self).items()]

    @property
    def queries(self) -> int:
        return 64 * self.WGS

    @property
    def shared(self) -> int:
        """Bytes: a tile of q, the stages of k and v, barriers, and room to align."""
        size = 1 if self.SCORES else 2
        tiles = self.QSTAGES * self.queries * self.D * size + self.STAGES * self.BN * (self.D * size + self.DV * 2)
        return tiles + 1024 + 128 + 32 * self.STAGES


class _Params(ctypes.Structure):
    """As ``struct Params`` in forward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("sq", "sk", "hq", "hkv", "heads", "m_tiles", "together")),
    ]


def configure(d: int, dv: int, causal: bool, *, scores: int = 0, **overrides: int) -> Config:
    """The configuration for a call: a tile of q and two of k and v fill the shared memory."""
    wide = max(d, dv)
    chosen = {
        "WGS": 3 if wide == 64 else 2,
        "BN": 64 if wide == 256 else 128,
        "STAGES": 2,
        "QSTAGES": 1 if wide == 256 and not scores else 2,
    }
    return Config(D=d, DV=dv, CAUSAL=int(causal), SCORES=scores, **(chosen | overrides))


def quantise(q: Tensor, k: Tensor, tile: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k -> rows in e4m3 or int8, scales of q (b, hq, sq) a row, scales of k (b, hkv, tiles) a tile of keys."""
    b, sk, hkv, d = k.shape
    tiles = -(-sk // tile)
    most = 127.0 if dtype == torch.int8 else 448.0
    q_scale = q.float().abs().amax(-1).clamp_min(1e-30) / most
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, 0, 0, tiles * tile - sk)).view(b, tiles, tile, hkv, d)
    k_scale = padded.abs().amax((2, 4)).clamp_min(1e-30) / most
    k_8 = (padded / k_scale[:, :, None, :, None]).view(b, tiles * tile, hkv, d)[:, :sk]
    q_8 = q.float() / q_scale[..., None]
    if dtype == torch.int8:
        q_8, k_8 = q_8.round(), k_8.round()
    scales = (q_scale.transpose(1, 2).contiguous(), k_scale.transpose(1, 2).contiguous())
    return q_8.to(dtype), k_8.to(dtype).contiguous(), *scales


def compress(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (b, sq, hq, d) -> the 2:4 sparse operand in two sets: of each four features the first two kept, and the others.

    Values (b, hq, sq, 2, 4, d / 32, 2, 2): for lane t of four quads t and t + 4 of every 32 features; where
    (b, hq, sq, 2, d / 32) int32, four bits a quad; and a byte (b, hq, sq / 64 rounded up), which 32 features of some
    row in 64 need the second set.
    """
    b, sq, h, d = q.shape
    x = q.transpose(1, 2).reshape(b, h, sq, d // 4, 4)
    kept = x != 0
    rank = kept.cumsum(-1) - 1
    values, where = [], []
    for first in (0, 2):
        mine = kept & (rank >= first) & (rank < first + 2)
        place = torch.arange(4, device=q.device).expand_as(x)
        low = torch.where(mine, place, 9).amin(-1)  # 9: none
        high = torch.where(mine, place, -1).amax(-1)
        single = low == high
        # Places rise; a lone feature is paired with a zero after it, or before it if it is the last.
        i = torch.where(low == 9, 0, torch.where(single & (low == 3), 0, low))
        j = torch.where(low == 9, 1, torch.where(single & (low < 3), 3, high))
        pair = torch.stack([i, j], -1)
        values.append(torch.where(mine, x, 0).gather(-1, pair))
        bits = (i + 4 * j).view(b, h, sq, d // 32, 8) << torch.arange(0, 32, 4, device=q.device)
        where.append(bits.sum(-1))
    v = torch.stack(values, 3).view(b, h, sq, 2, d // 32, 2, 4, 2).permute(0, 1, 2, 3, 6, 4, 5, 7).contiguous()
    w = torch.stack(where, 3)
    w = torch.where(w >= 2**31, w - 2**32, w).to(torch.int32)
    blocks = -(-sq // 64)
    second = (values[1] != 0).any(-1).view(b, h, sq, d // 32, 8).any(-1)
    second = torch.nn.functional.pad(second, (0, 0, 0, blocks * 64 - sq)).view(b, h, blocks, 64, d // 32).any(3)
    more = (second << torch.arange(d // 32, device=q.device)).sum(-1).to(torch.uint8)
    return v, w, more


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, *, scales: tuple[Tensor, Tensor] | None = None,
    sparse: tuple[Tensor, Tensor, Tensor] | None = None, code: tuple[Tensor, Tensor] | None = None, **overrides: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, sq, hq, d), k (b, sk, hkv, d), v (b, sk, hkv, dv) -> out (b, sq, hq, dv) bf16, lse (b, hq, sq) fp32.

    Causal masks are aligned at the bottom right; a query that sees nothing gives 0 and -inf. ``scales`` belong to
    q and k in e4m3 or int8, as `quantise` returns them; ``sparse`` is what `compress` makes of q, with SPARSE in
    ``overrides``; ``code`` are values and indices of q (b, sq, hq, CODE), with CODE, then q lends only its shape.
    Rows of q, k, v start at multiples of 16 bytes. ``softmax_scale`` > 0.
    """
    (b, sq, hq, d), (_, sk, hkv, _), dv = q.shape, k.shape, v.shape[-1]
    config = configure(d, dv, causal, scores=_SCORES.get(q.dtype, 0), **overrides)
    width = 0 if code is None else code[0].shape[-1]
    _check(q, k, v, softmax_scale, scales, sparse is not None, width, config)
    out = torch.empty(b, sq, hq, dv, dtype=torch.bfloat16, device=v.device)
    lse = torch.empty(b, hq, sq, dtype=torch.float32, device=v.device)
    if out.numel() == 0:
        return out, lse
    if sk == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    m_tiles = -(-sq // (config.queries * config.CLUSTER))
    counter = torch.zeros(1, dtype=torch.int32, device=v.device)
    fit = max(1, _L2 // (sk * (d + dv) * 2)) * (hq // hkv)
    q_scale, k_scale = scales if scales is not None else (lse, lse)
    q_values, q_where, q_more = sparse if sparse is not None else (*code, lse) if code is not None else (lse, lse, lse)
    params = _Params(
        out=out.data_ptr(), lse=lse.data_ptr(), counter=counter.data_ptr(), q_scale=q_scale.data_ptr(),
        k_scale=k_scale.data_ptr(), q_values=q_values.data_ptr(), q_where=q_where.data_ptr(),
        q_more=q_more.data_ptr(), scale=softmax_scale * LOG2E, sq=sq, sk=sk, hq=hq, hkv=hkv, heads=b * hq,
        m_tiles=m_tiles, together=min(fit, b * hq),
    )  # fmt: skip
    maps = [_tensor_map(q, config.queries), *(_tensor_map(x, config.BN // config.CLUSTER) for x in (k, v))]
    _launch(config, v.device, b * hq * m_tiles, maps, params)
    return out, lse


def _launch(
    config: Config, device: torch.device, work: int, maps: list[ctypes.Array[ctypes.c_uint64]], params: _Params
) -> None:
    kernels, processors = _load(config, device)
    grid, threads = min(processors // config.CLUSTER, work) * config.CLUSTER, 128 * (config.WGS + 1)
    kernels.launch("hopper_forward", (grid, 1, 1), threads, *maps, params, shared=config.shared)


def _check(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, scales: tuple[Tensor, Tensor] | None, sparse: bool,
    width: int, config: Config,
) -> None:  # fmt: skip
    wanted = (torch.bfloat16,) if scales is None else (torch.float8_e4m3fn, torch.int8)
    for name, x, dtypes in (("q", q, wanted), ("k", k, (q.dtype,)), ("v", v, (torch.bfloat16,))):
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
        if x.dim() != 4 or x.shape[-1] not in (64, 128, 256):
            raise ValueError(f"{name} must be (batch, length, heads, 64, 128 or 256), got {tuple(x.shape)}")
        steps = [stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(step <= 0 or step % 16 for step in steps):
            raise ValueError(f"rows of {name} must start at multiples of 16 bytes, got strides {x.stride()}")
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if bool(config.SPARSE) != sparse or width != config.CODE:
        raise ValueError(f"SPARSE goes with sparse and CODE is the width of code, got {config} and a width of {width}")
    if config.CODE and (config.CODE % 8 or not config.QREGS or config.QSTAGES != 1 or scales is not None):
        raise ValueError(f"codes need a width in multiples of 8, bf16, QREGS=1 and QSTAGES=1, got {config}")
    if softmax_scale <= 0.0:
        raise ValueError(f"softmax_scale must be above 0, got {softmax_scale}")
    if config.shared > 227 * 1024:
        raise ValueError(f"tiles need {config.shared} bytes of shared memory, 232448 are there: {config}")


def _tensor_map(x: Tensor, rows: int) -> ctypes.Array[ctypes.c_uint64]:
    """A CUtensorMap over (feature, row, head, sequence) with boxes of 128 bytes by ``rows``."""
    b, s, h, d = x.shape
    size = x.element_size()
    box = min(128 // size, d)
    # The driver wants the map at a multiple of 64 bytes.
    memory = (ctypes.c_uint64 * 24)()
    at = -(-ctypes.addressof(memory) // 64) * 64 - ctypes.addressof(memory)
    tensor_map = (ctypes.c_uint64 * 16).from_buffer(memory, at)
    # A stride of a dimension of size 1 is not used, but checked.
    steps = [(x.stride(i) if x.shape[i] > 1 else d) * size for i in (1, 2, 0)]
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    nvrtc.driver().call(
        "cuTensorMapEncodeTiled", tensor_map, 0 if size == 1 else 9, u32(4), ctypes.c_void_p(x.data_ptr()),
        (u64 * 4)(d, s, h, b), (u64 * 3)(*steps), (u32 * 4)(box, rows, 1, 1), (u32 * 4)(1, 1, 1, 1),
        0, 3 if box * size == 128 else 2, 2, 0,
    )  # fmt: skip
    return tensor_map


def compile_kernel(config: Config, log: TextIO | None = None) -> bytes:
    """A cubin for sm_90a; needs cuda-core and NVRTC, but no GPU. What the compiler says goes to ``log``."""
    return nvrtc.compile_file(SOURCE, config.macros(), "sm_90a", log)


@functools.cache
def _load(config: Config, device: torch.device) -> tuple[nvrtc.Kernels, int]:
    """The kernel on a device, and how many multiprocessors that has."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        raise NotImplementedError(f"the kernel is for Hopper, {torch.cuda.get_device_name(device)} is not")
    name = "hopper_forward"
    kernels = nvrtc.Kernels(SOURCE, config.macros(), (name,), device, arch="sm_90a", shared={name: config.shared})
    return kernels, torch.cuda.get_device_properties(device).multi_processor_count
