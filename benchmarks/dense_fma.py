"""Launcher of dense_fma.cu: a dense FlashAttention without tensor cores, the kind of baseline that the paper used.

For benchmarks only; nothing in the package uses it but ``flash-sfa bench paper`` run from the repository.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from flash_sfa.impl import cuda_decode

SOURCE = Path(__file__).with_name("dense_fma.cu")
ROWS = 128


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")), ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("n", "h", "tiles")),
    ]  # fmt: skip


def keys_a_tile(d: int) -> int:
    return 64 if d == 256 else 128


def shared(d: int) -> int:
    return 4 * (ROWS * d + ROWS * keys_a_tile(d) + 2 * 4096)


def compile_kernel(d: int, causal: bool, arch: str) -> bytes:
    core = cuda_decode._cuda_core()
    if core is None:
        raise RuntimeError("cuda-core is not installed: pip install 'flash-sfa[cuda]'")
    macros = [("FMA_D", str(d)), ("FMA_BN", str(keys_a_tile(d))), ("FMA_CAUSAL", str(int(causal)))]
    options = core.ProgramOptions(arch=arch, std="c++17", define_macro=macros)
    return bytes(core.Program(SOURCE.read_text(), code_type="c++", options=options).compile("cubin").code)


@functools.cache
def _load(d: int, causal: bool, device: torch.device) -> ctypes.c_void_p:
    torch.zeros(1, device=device)
    image = compile_kernel(d, causal, "sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    driver, module, function = cuda_decode._driver(), ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuModuleLoadData", ctypes.byref(module), image)
    driver.call("cuModuleGetFunction", ctypes.byref(function), module, b"dense_fma")
    driver.call("cuFuncSetAttribute", function, 8, shared(d))
    return function


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q, k, v (b, n, h, d) bf16, contiguous, d 64, 128 or 256 -> out, scale d ** -0.5."""
    b, n, h, d = q.shape
    if d not in (64, 128, 256) or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k and v must have one shape with d 64, 128 or 256, got {q.shape}, {k.shape}, {v.shape}")
    if any(x.dtype != torch.bfloat16 or not x.is_contiguous() for x in (q, k, v)):
        raise ValueError("q, k and v must be contiguous bf16 tensors")
    out = torch.empty_like(q)
    tiles = -(-n // ROWS)
    params = _Params(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), scale=d**-0.5 * 1.4426950408889634, n=n,
        h=h, tiles=tiles,
    )  # fmt: skip
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    with torch.cuda.device(q.device):
        function = _load(d, causal, q.device)
        stream = torch.cuda.current_stream().cuda_stream
        cuda_decode._driver().call(
            "cuLaunchKernel", function, b * h * tiles, 1, 1, 256, 1, 1, shared(d), stream, arguments, None
        )
    return out
