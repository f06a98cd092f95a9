"""decode.cu compiles with NVRTC for each architecture, without a GPU: hardly a spill, and shared memory in bounds.

Needs cuda-core with NVRTC (the extra ``cuda``, 200 MB installed) and Triton's cuobjdump.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from flash_sfa.impl import cuda_append, cuda_decode, cuda_decode_all, nvrtc

BF16, FP32 = torch.bfloat16, torch.float32
# name: query rows a kv head, then what differs from d = dv = 128, topk 8, bf16, pages of 256
CACHES = {
    "mha": (1, {}),
    "mha_page16": (1, {"page_size": 16}),
    "d256": (1, {"head_dim": 256, "v_head_dim": 256}),
    "two_rows": (2, {}),
    "gqa4": (4, {}),
    "gqa8": (8, {}),
    "gqa4_d256": (4, {"head_dim": 256, "v_head_dim": 256}),
    "dense16": (1, {"dense_dims": tuple(range(16))}),
    "fp32": (8, {"dtype": FP32, "v_dtype": FP32}),
    "topk16": (1, {"width": 16}),
    "d512": (1, {"head_dim": 512, "v_head_dim": 512}),
    "int8": (1, {"v_dtype": torch.int8}),
    "gqa4_fp8": (4, {"v_dtype": torch.float8_e4m3fn}),
    "d1024": (2, {"head_dim": 1024}),
    "fp32_dv512": (6, {"head_dim": 64, "v_head_dim": 512, "dtype": FP32, "v_dtype": FP32}),
}


def shape(**options):
    return SimpleNamespace(
        **{"head_dim": 128, "v_head_dim": 128, "width": 8, "dense_dims": (), "page_size": 256, "dtype": BF16,
           "v_dtype": BF16} | options
    )  # fmt: skip


def compiled(config, arch):
    return nvrtc.compile_file(cuda_decode.SOURCE, config.macros(), arch)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("v_head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("head_dim", [64, 256, 1024])
def test_shared_memory_is_in_bounds(head_dim, v_head_dim, dtype):
    for rows in (1, 2, 3, 8, 16):
        for width in (2, 8, 16, 32):
            cache = shape(head_dim=head_dim, v_head_dim=v_head_dim, width=width, dtype=dtype, v_dtype=dtype)
            config = cuda_decode.configure(cache, rows)
            assert cuda_decode._shared_bytes(config) <= 48 * 1024, (config, width)


def resources(image, folder):
    """(kernel, registers, stack, shared memory) of the kernels of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernels.cubin"
    file.write_bytes(image)
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["mha", "d256", "dense16", "fp32", "d512"])
def test_append_compiles_without_spills(name, arch, tmp_path):
    _, options = CACHES[name]
    for coded in (False, True):
        config = cuda_append.configure(shape(**options), coded=coded)
        ((kernel, _, stack, shared),) = resources(
            nvrtc.compile_file(cuda_append.SOURCE, config.macros(), arch), tmp_path
        )
        assert kernel == "sfa_append" and int(stack) == 0 and int(shared) <= 48 * 1024


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
@pytest.mark.parametrize("name", CACHES)
def test_compiles_without_spills(name, arch, tmp_path):
    assert nvrtc.cuda_core() is not None, "cuda-core is part of the test extra"
    rows, options = CACHES[name]
    config = cuda_decode.configure(shape(**options), rows)
    found = resources(compiled(config, arch), tmp_path)
    assert {kernel for kernel, *_ in found} == {"sfa_decode", "sfa_combine"}
    (shared,) = (int(shared) for kernel, *_, shared in found if kernel == "sfa_decode")
    assert shared <= cuda_decode._shared_bytes(config) + 1024  # newer architectures count the driver's KiB
    for kernel, registers, stack, shared in found:
        print(f"{name} {arch} {kernel}: {registers} registers, {stack} bytes of stack, {shared} of shared memory")
        assert int(shared) <= 48 * 1024
        # Four and eight rows fill the registers; a few loop bounds may wait on the stack.
        assert int(stack) <= {4: 24 if arch == "sm_80" else 8, 8: 64}.get(rows, 0)


@pytest.mark.parametrize(
    ("name", "arch"),
    [("gqa4", "sm_90"), ("gqa8", "sm_80"), ("gqa4_d256", "sm_90"), ("dense16", "sm_90"), ("gqa4_fp8", "sm_80")],
)
def test_the_kernel_that_reads_every_row_compiles_without_spills(name, arch, tmp_path):
    rows, options = CACHES[name]
    config = cuda_decode_all.configure(shape(**options), rows)
    found = resources(nvrtc.compile_file(cuda_decode_all.SOURCE, config.macros(), arch), tmp_path)
    assert {kernel for kernel, *_ in found} == {"sfa_decode_all", "sfa_combine"}
    for kernel, registers, stack, shared in found:
        print(f"{name} {arch} {kernel}: {registers} registers, {stack} bytes of stack, {shared} of shared memory")
        assert int(stack) == 0 and int(shared) <= 48 * 1024


@pytest.mark.parametrize("dtype", [BF16, torch.int8], ids=str)
@pytest.mark.parametrize("v_head_dim", [64, 192, 256])
@pytest.mark.parametrize("head_dim", [64, 256, 1024])
def test_shared_memory_of_the_kernel_that_reads_every_row_is_in_bounds(head_dim, v_head_dim, dtype):
    for rows in (1, 2, 3, 8, 16):
        for width in (2, 7, 16, 64):
            for dims in ((), tuple(range(32))):
                cache = shape(head_dim=head_dim, v_head_dim=v_head_dim, width=width, v_dtype=dtype, dense_dims=dims)
                config = cuda_decode_all.configure(cache, rows)
                assert cuda_decode_all.shared_bytes(config) <= 99 * 1024, config
