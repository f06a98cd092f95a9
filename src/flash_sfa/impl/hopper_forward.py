"""Forward attention over rows on Hopper (``hopper_forward.cu``): the forward of ``impl="cuda"``, compiled at first use.

Takes bf16 rows, masked by top-k or dense, full or causal, head dims 64, 128 and 256; what it cannot do, `unsupported`
tells. It has no backward of its own: cuDNN's and Triton's take its out and lse.
"""

import ctypes
import functools
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from .. import ops
from . import nvrtc
from .sdpa import whole_lines

logger = logging.getLogger("flash_sfa")

SOURCE = Path(__file__).with_name("hopper_forward.cu")
LOG2E = 1.4426950408889634
HEAD_DIMS = (64, 128, 256)
# Heads whose k and v fit into this many bytes are worked on together, so that they stay in L2.
_L2 = 24 * 2**20


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for: the macros of hopper_forward.cu."""

    D: int
    DV: int
    WGS: int
    BN: int
    STAGES: int
    QSTAGES: int
    CAUSAL: int

    def macros(self) -> list[tuple[str, str]]:
        return [(f"HF_{name}", str(value)) for name, value in asdict(self).items()]

    @property
    def queries(self) -> int:
        return 64 * self.WGS

    @property
    def shared(self) -> int:
        """Bytes: tiles of q, the stages of k and v, barriers, and room to align."""
        tiles = self.QSTAGES * self.queries * self.D + self.STAGES * self.BN * (self.D + self.DV)
        return tiles * 2 + 1024 + 128 + 32 * self.STAGES


class _Params(ctypes.Structure):
    """As ``struct Params`` in hopper_forward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "lse", "counter")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("sq", "sk", "hq", "hkv", "heads", "m_tiles", "together")),
    ]


@torch.compiler.assume_constant_result
def missing(index: int | None) -> str | None:
    """None if the kernel can be compiled and run on a CUDA device, else the reason. torch.compile keeps the answer."""
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(index) != (9, 0):
        return f"the kernel is for GPUs of compute capability 9.0, {torch.cuda.get_device_name(index)} is not one"
    if ops.triton_missing() is not None:
        return f"Triton, which mends what is not finite, is missing: {ops.triton_missing()}"
    return nvrtc.missing(index)


def unsupported(
    index: int, dtype: torch.dtype, d: int, dv: int, window: tuple[int, int], softmax_scale: float, *, masked: bool,
    packed: bool, can_drop: bool, dropout_p: float,
) -> str | None:  # fmt: skip
    """Why this implementation cannot do a call on the CUDA device of that index, or None."""
    if dtype != torch.bfloat16:
        return f"it needs torch.bfloat16, got {dtype}"
    if d not in HEAD_DIMS or dv not in HEAD_DIMS:
        return "head dims must be 64, 128 or 256" + _got("d, dv", d, dv)
    if masked:
        return "attn_mask is not supported"
    if packed:
        return "packed sequences (cu_seqlens) are not supported"
    if window[0] >= 0 or window[1] > 0:
        return "window_size must be unlimited, or causal" + _got("left, right", *window)
    if can_drop:
        return "nonoverlap='drop' is not supported"
    if dropout_p > 0.0:
        return "dropout_p must be 0" + _got("dropout_p", dropout_p)
    if softmax_scale <= 0.0:
        return "softmax_scale must be above 0" + _got("softmax_scale", softmax_scale)
    return missing(index)


def _got(names: str, *values: float) -> str:
    """What came, for a message; torch.compile cannot write numbers that it keeps dynamic."""
    return "" if torch.compiler.is_compiling() else f", got {names} = {', '.join(map(str, values))}"


def configure(d: int, dv: int, causal: bool) -> Config:
    """The configuration for a call: tiles of q and two of k and v fill the shared memory."""
    wide = max(d, dv)
    return Config(
        D=d, DV=dv, WGS=3 if wide == 64 else 2, BN=64 if wide == 256 else 128, STAGES=2,
        QSTAGES=1 if wide == 256 else 2, CAUSAL=int(causal),
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, bad: Tensor, causal: bool, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """q (b, sq, hq, d), k (b, sk, hkv, d), v (b, sk, hkv, dv), any strides -> out, lse (b, hq, sq); adds to ``bad``."""
    from . import triton_forward

    q, k, v = (whole_lines(x) for x in (q, k, v))
    out, lse = run(q, k, v, causal, softmax_scale)
    if out.numel() > 0 and k.numel() > 0:
        options = triton_forward.Options(-1, 0 if causal else -1, softmax_scale)
        triton_forward.rescue(q, k, v, out, lse, bad, options, first=q.shape[1] - 1)
    return out, lse


def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """out (b, sq, hq, dv) bf16 and lse (b, hq, sq) fp32 of finite rows that start at multiples of 16 bytes.

    Causal masks are aligned at the bottom right; a query that sees nothing gives 0 and -inf. Offsets are 64 bits wide;
    a length, and the tiles of queries of all heads together, must stay below 2^31.
    """
    (b, sq, hq, d), (_, sk, hkv, _), dv = q.shape, k.shape, v.shape[-1]
    out = torch.empty(b, sq, hq, dv, dtype=v.dtype, device=v.device)
    lse = torch.empty(b, hq, sq, dtype=torch.float32, device=v.device)
    if out.numel() == 0:
        return out, lse
    if sk == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    config = configure(d, dv, causal)
    m_tiles = -(-sq // config.queries)
    # The tiles that blocks have taken. Zeroed by a launch of its own, so a captured graph replays it.
    counter = torch.zeros(1, dtype=torch.int32, device=v.device)
    fit = max(1, _L2 // (sk * (d + dv) * 2)) * (hq // hkv)
    params = _Params(
        out=out.data_ptr(), lse=lse.data_ptr(), counter=counter.data_ptr(), scale=softmax_scale * LOG2E, sq=sq, sk=sk,
        hq=hq, hkv=hkv, heads=b * hq, m_tiles=m_tiles, together=min(fit, b * hq),
    )  # fmt: skip
    maps = [_tensor_map(q, config.queries), _tensor_map(k, config.BN), _tensor_map(v, config.BN)]
    _launch(config, v.device, b * hq * m_tiles, maps, params)
    return out, lse


def _launch(
    config: Config, device: torch.device, work: int, maps: list[ctypes.Array[ctypes.c_uint64]], params: _Params
) -> None:
    kernels, processors = _load(config, device)
    grid, threads = min(processors, work), 128 * (config.WGS + 1)
    kernels.launch("hopper_forward", (grid, 1, 1), threads, *maps, params, shared=config.shared)


def _tensor_map(x: Tensor, rows: int) -> ctypes.Array[ctypes.c_uint64]:
    """A CUtensorMap over (feature, row, head, sequence) with boxes of 64 features (128 bytes) by ``rows``."""
    b, s, h, d = x.shape
    # The driver wants the map at a multiple of 64 bytes.
    memory = (ctypes.c_uint64 * 24)()
    at = -(-ctypes.addressof(memory) // 64) * 64 - ctypes.addressof(memory)
    tensor_map = (ctypes.c_uint64 * 16).from_buffer(memory, at)
    # A stride of a dimension of size 1 is not used, but checked.
    steps = [(x.stride(i) if x.shape[i] > 1 else d) * 2 for i in (1, 2, 0)]
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    # 9: bf16; no interleaving, 3: swizzled by 128 bytes, 2: fetched into L2 by 128 bytes, zeros outside.
    nvrtc.driver().call(
        "cuTensorMapEncodeTiled", tensor_map, 9, u32(4), ctypes.c_void_p(x.data_ptr()), (u64 * 4)(d, s, h, b),
        (u64 * 3)(*steps), (u32 * 4)(64, rows, 1, 1), (u32 * 4)(1, 1, 1, 1), 0, 3, 2, 0,
    )  # fmt: skip
    return tensor_map


def compile_kernel(config: Config, log: TextIO | None = None) -> bytes:
    """A cubin for sm_90a; needs cuda-core and NVRTC, but no GPU. What the compiler says goes to ``log``."""
    return nvrtc.compile_file(SOURCE, config.macros(), "sm_90a", log)


@functools.cache
def _load(config: Config, device: torch.device) -> tuple[nvrtc.Kernels, int]:
    """The kernel on a device, and how many multiprocessors that has."""
    logger.info("loading the Hopper forward kernel on %s; compiled if it is not in the cache: %s", device, config)
    name = "hopper_forward"
    kernels = nvrtc.Kernels(SOURCE, config.macros(), (name,), device, arch="sm_90a", shared={name: config.shared})
    return kernels, torch.cuda.get_device_properties(device).multi_processor_count
