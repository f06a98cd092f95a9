"""The Triton kernels compile for Ampere, Hopper and Blackwell, without a GPU, without spills.

The launchers run on CPU tensors with the launch itself replaced, so what is compiled is what they would launch.
The work is done in a process of its own: the interpreter, which other tests use, excludes the compiler.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from own_process import outcomes_of

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = 99 * 1024


def _calls() -> dict[str, Callable[[Any], object]]:
    def x(d: int, dtype: torch.dtype = torch.bfloat16, n: int = 4096) -> torch.Tensor:
        return torch.empty(n, d, dtype=dtype)

    def code(d: int, w: int, r: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
        return x(w, dtype), x(w, torch.uint8 if d <= 256 else torch.int16), x(r, dtype)

    qkv = torch.empty(2, 512, 3, 12, 32, dtype=torch.float16)
    return {
        "topk_128_8": lambda t: t.topk(x(128), 8, ()),
        "topk_96_4_some_short": lambda t: t.topk(x(96, n=5), 4, (5, 1)),
        "topk_32_8_prefix_transposed": lambda t: t.topk(qkv[:, 1:, 1].transpose(1, 2), 8, (0, 1, 2, 3)),
        "topk_kept_128_8": lambda t: t.topk_kept(x(128), 8, ()),
        "topk_kept_64_16_some": lambda t: t.topk_kept(x(64), 16, (5, 1)),
        "topk_kept_256_8_prefix": lambda t: t.topk_kept(x(256), 8, tuple(range(16))),
        "keep_128_8": lambda t: t.keep(x(128), code(128, 8, 0)[1], ()),
        "topk_one_row": lambda t: t.topk(x(64, n=1), 2, ()),
        "topk_fp32_some": lambda t: t.topk(x(128, torch.float32), 8, (3, 1)),
        "expand_128_8": lambda t: t.expand(*code(128, 8, 0), 128, ()),
        "expand_61_7_some": lambda t: t.expand(*code(61, 7, 2), 61, (4, 1)),
        "gather_fp32_some": lambda t: t.gather(x(128, torch.float32), code(128, 8, 0)[1], (5, 1)),
    }


def _attention_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """name -> (head dim, dtype and pass, options); see attention_launches."""
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for d in (64, 128, 256):
        for part in ("forward", "backward"):
            calls[f"{part}_{d}"] = (f"{d} bfloat16 {part}", {})
    for part in ("rescue_forward", "rescue_backward"):
        calls[f"{part}_64"] = (f"64 bfloat16 {part}", {})
    calls["forward_fp32_128"] = ("128 float32 forward", {})
    calls["backward_fp32_64"] = ("64 float32 backward", {})
    calls["forward_window_mask_96"] = ("96 float16 forward", {"left": 9, "mask": True})
    calls["backward_packed_128"] = ("128 float16 backward", {"packed": True})
    calls["forward_drop_128"] = ("128 bfloat16 forward", {"drop": True})
    calls["backward_dropout_64"] = ("64 bfloat16 backward", {"dropout": True})
    return calls


def attention_launches(what: str, options: dict[str, Any], arch: int) -> list[tuple[Any, dict[str, Any]]]:
    """The launches of a forward or backward call, with the tiles that a GPU of this architecture would get."""
    from flash_sfa.impl import triton_backward, triton_forward

    launches: list[tuple[Any, dict[str, Any]]] = []

    def launch(kernel: Any, x: Any, programs: int, tiles: Any, **arguments: Any) -> None:
        sizes = {"BM": tiles.m, "BN": tiles.n, "num_warps": tiles.warps, "num_stages": tiles.stages}
        launches.append((kernel, arguments | sizes))

    width, name, part = what.split()
    triton_forward.launch = triton_backward.launch = launch
    limit = SHARED_LIMIT if arch == 80 else 227 * 1024
    triton_forward.shared_memory = triton_backward.shared_memory = lambda device: limit  # type: ignore[assignment]
    x = torch.empty(2, 512, 4, int(width), dtype=getattr(torch, name))
    lse, bad, cu = torch.empty(2, 4, 512), torch.empty(10, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    call = triton_forward.Options(
        options.get("left", -1), 0, 0.1,
        key_mask=torch.empty(2, 1, 1, 512, dtype=torch.bool) if "mask" in options else None,
        cu_q=cu if "packed" in options else None, cu_k=cu if "packed" in options else None, max_q=9, max_k=9,
        members_q=x if "drop" in options else None, members_k=x if "drop" in options else None,
        dropout_p=0.1 if "dropout" in options else 0.0, seed=torch.empty(1, dtype=torch.int64),
    )  # fmt: skip
    rescuing = part.startswith("rescue")
    if part.endswith("forward"):
        triton_forward._run(x, x, x, x, lse, bad, call, None, rescuing)
    else:
        triton_backward._run(x, None, x, x, x, x, lse, bad, x, x, x, call, tiles=None, rescuing=rescuing)
    return launches


CALLS = _calls()
ATTENTION_CALLS = _attention_calls()
EVERYWHERE = ("forward_128", "backward_128")  # to save time the others are compiled for Hopper only
ATTENTION = [(name, arch) for name in ATTENTION_CALLS for arch in (ARCHITECTURES if name in EVERYWHERE else (90,))]
POINTERS = {
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
}  # fmt: skip


def compiled(kernel: Any, arguments: dict[str, Any], arch: int) -> dict[str, int]:
    """Shared memory, registers and stack bytes of a launch, specialised as Triton's launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
    return {"shared": built.metadata.shared, "registers": int(registers), "stack": int(stack)}


def compile_all() -> dict[str, Any]:
    from flash_sfa.impl import triton_codes

    results: dict[str, Any] = {}
    for name, call in CALLS.items():
        launches = []
        triton_codes._launch = lambda kernel, n_rows, tile, warps, out=launches, **arguments: out.append(
            (kernel, arguments | {"n_rows": n_rows, "R": tile, "SHORT": n_rows < tile, "num_warps": warps})
        )
        call(triton_codes)
        for arch in ARCHITECTURES:
            try:
                results[f"{name}-{arch}"] = [compiled(kernel, dict(arguments), arch) for kernel, arguments in launches]
            except Exception as error:
                results[f"{name}-{arch}"] = f"{type(error).__name__}: {error}"
    for name, (what, options) in ATTENTION_CALLS.items():
        for arch in (arch for other, arch in ATTENTION if other == name):
            try:
                launches = attention_launches(what, options, arch)
                results[f"{name}-{arch}"] = [compiled(kernel, dict(arguments), arch) for kernel, arguments in launches]
            except Exception as error:
                results[f"{name}-{arch}"] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return outcomes_of(__file__, interpret=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_spills(name: str, arch: int, built: dict[str, Any]) -> None:
    kernels = built[f"{name}-{arch}"]
    assert isinstance(kernels, list), kernels
    assert len(kernels) == 1
    for kernel in kernels:
        assert kernel["stack"] == 0
        assert kernel["shared"] <= SHARED_LIMIT


@pytest.mark.parametrize(("name", "arch"), ATTENTION)
def test_attention_compiles(name: str, arch: int, built: dict[str, Any]) -> None:
    kernels = built[f"{name}-{arch}"]
    assert isinstance(kernels, list), kernels
    assert len(kernels) == (3 if "backward" in name else 1)
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= (SHARED_LIMIT if arch == 80 else 227 * 1024)


def test_tiles_fit_their_warps() -> None:
    """With 64 rows and 8 warps Triton 3.6 reads past its shared memory on Hopper (found by compute-sanitizer)."""
    from flash_sfa.impl import triton_backward, triton_forward

    rows = {
        "_FORWARD": "m",
        "_FORWARD_SMALL": "m",
        "_KEYS": "n",
        "_KEYS_SMALL": "n",
        "_QUERIES": "m",
        "_QUERIES_SMALL": "m",
    }
    for name, own in rows.items():
        table = getattr(triton_forward, name, None) or getattr(triton_backward, name)
        for (_, itemsize, _), tiles in table.items():
            assert itemsize == 4 or getattr(tiles, own) < 64 or getattr(tiles, own) >= 16 * tiles.warps, (name, tiles)


if __name__ == "__main__":
    print(json.dumps(compile_all()))
