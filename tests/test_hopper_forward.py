"""The forward kernel of impl="cuda": against float64 on a GPU (-m gpu), and its source compiled for the CPU.

On the CPU g++ compiles hopper_forward.cu against host_hopper.h, which runs every thread of two blocks as a fiber. The
kernel also compiles for sm_90a without a GPU, without spills and without products that wait for each other. What mends
non-finite rows is Triton; those cases run in a process of their own, in Triton's interpreter.
"""

import ctypes
import functools
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import test_attention_rules as rules
from flash_sfa import api, env, fused, ops, select_impl, sfa_attention, sfa_attention_varlen, topk_sparsify
from flash_sfa.impl import hopper_forward, nvrtc, reference, sdpa
from oracle import BF16, Case, check_budget, check_case, check_lse, poisoned
from own_process import outcomes_of, print_outcomes

HERE = Path(__file__).parent


def rows(seed: int, *shape: int, topk: int, spread: float = 1.0) -> Tensor:
    """Rows with topk features; on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device) * spread
    kept = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.abs().topk(topk, -1).indices, True)
    return (x * kept).to(BF16)


def exact_and_rough(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse in float64, and out of PyTorch's own attention in bf16 (math backend)."""
    seen = reference.visible_pairs(q.shape[1], k.shape[1], (-1, 0 if causal else -1), q.device)
    wide = [x.double() for x in (q, k, v)]
    out, lse = reference.attention(wide[0], wide[1], wide[2], seen, q.shape[-1] ** -0.5)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    empty = ~seen.any(-1, keepdim=True)
    with sdpa_kernel(SDPBackend.MATH):
        rough = scaled_dot_product_attention(q, k, v, attn_mask=seen | empty, enable_gqa=True).masked_fill(empty, 0.0)
    return out, lse, rough.transpose(1, 2)


def check_rows(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The kernel alone, with the budget of the other implementations."""
    with poisoned():
        out, lse = hopper_forward.run(q, k, v, causal, q.shape[-1] ** -0.5)
    exact, exact_lse, rough = exact_and_rough(q, k, v, causal)
    check_budget("out", out, exact, rough)
    check_lse(lse, exact_lse)
    return out, lse


# ----------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize(
    ("d", "dv", "causal"), [(64, 64, 1), (128, 128, 1), (256, 256, 0), (64, 256, 1), (256, 128, 1)]
)
def test_compiles_without_spills(d: int, dv: int, causal: int, tmp_path: Path) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    config, log, file = hopper_forward.configure(d, dv, bool(causal)), io.StringIO(), tmp_path / "forward.cubin"
    file.write_bytes(hopper_forward.compile_kernel(config, log))
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"Function hopper_forward:\s+REG:(\d+) STACK:(\d+)", usage)
    assert int(stack) == 0
    # What a block of three or four warpgroups can start with; they share the registers out among themselves then.
    assert int(registers) <= 65536 // (128 * (config.WGS + 1))
    # The assembler says so if it waits for each product before the next.
    assert "serialized" not in log.getvalue(), log.getvalue()


def test_tiles_fit_into_shared_memory() -> None:
    for d in hopper_forward.HEAD_DIMS:
        for dv in hopper_forward.HEAD_DIMS:
            assert hopper_forward.configure(d, dv, True).shared <= 227 * 1024, (d, dv)


# ------------------------------------------------------------------------------------------------ choice


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of compute capability 9.0 with NVRTC, without memory: tensors have only shapes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "a GPU")
    monkeypatch.setattr(nvrtc, "missing", lambda index: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch


def on_gpu(n: int = 64, d: int = 64, dtype: torch.dtype = BF16, h: int = 4) -> Tensor:
    return torch.empty(1, n, h, d, dtype=dtype, device="cuda")


def chosen(*qkv: Tensor, **options: Any) -> tuple[str, str]:
    choice = select_impl(*qkv, **({"topk": 8} | options))
    return choice["forward"], choice["backward"]


def test_choice(hopper: pytest.MonkeyPatch) -> None:
    for d in (64, 128, 256):
        assert chosen(on_gpu(d=d), on_gpu(d=d, h=2), on_gpu(h=2), causal=True) == ("cuda", "sdpa")
    q = on_gpu()
    assert chosen(q, q, q, topk=(None, 8)) == chosen(q, q, q, topk=(4, None)) == ("cuda", "sdpa")
    # cuDNN's backward: no gradient of lse, not deterministic, causal over equal lengths only.
    assert chosen(q, q, q, return_lse=True) == chosen(q, q, q, deterministic=True) == ("cuda", "triton")
    k = on_gpu(80)
    assert chosen(q, k, k, causal=True) == ("cuda", "triton") and chosen(q, k, k) == ("cuda", "sdpa")
    assert chosen(q, q, q, impl="sdpa") == ("sdpa", "sdpa")
    assert chosen(q, q, q, impl="sdpa", return_lse=True) == ("sdpa", "triton")
    for wide in (on_gpu(d=96), on_gpu(dtype=torch.float16)):
        assert chosen(wide, wide, wide) == ("sdpa", "sdpa")
    assert chosen(q, q, q, window_size=(9, 0)) == ("triton", "triton")
    assert chosen(q, q, q, nonoverlap="drop") == ("triton", "triton")
    assert chosen(q, q, q, dropout_p=0.1) == ("triton", "triton")


@pytest.mark.parametrize(
    "which", ["no NVRTC", "another GPU", "no Triton"]
)  # fmt: skip
def test_auto_does_without_the_kernel(which: str, hopper: pytest.MonkeyPatch) -> None:
    q = on_gpu()
    assert "and sfa_attention" in env._cuda_attention()
    if which == "no NVRTC":
        hopper.setattr(nvrtc, "missing", lambda index: "cuda-core is not installed")
    elif which == "another GPU":
        hopper.setattr(torch.cuda, "get_device_capability", lambda index=None: (10, 0))
    else:
        hopper.setattr(ops, "triton_missing", lambda: "ImportError")
    assert chosen(q, q, q, causal=True) == ("sdpa", "sdpa")
    told = env._cuda_attention()
    match = {"no NVRTC": "cuda-core", "another GPU": "capability 9.0", "no Triton": "Triton"}[which]
    with pytest.raises(NotImplementedError, match=f"impl='cuda': .*{match}"):
        select_impl(q, q, q, topk=8, impl="cuda")
    assert match in told and "and sfa_attention" not in told


@pytest.mark.parametrize(
    ("match", "d", "dtype", "options"),
    [
        ("bfloat16, got torch.float32", 64, torch.float32, {}),
        ("head dims must be 64, 128 or 256, got d, dv = 80, 80", 80, BF16, {}),
        ("attn_mask", 64, BF16, {"attn_mask": True}),
        ("window_size", 64, BF16, {"window_size": (8, 0)}),
        ("window_size", 64, BF16, {"window_size": (-1, 2)}),
        ("nonoverlap='drop'", 64, BF16, {"nonoverlap": "drop"}),
        ("dropout_p must be 0, got dropout_p = 0.5", 64, BF16, {"dropout_p": 0.5}),
        ("softmax_scale must be above 0, got softmax_scale = -1.0", 64, BF16, {"softmax_scale": -1.0}),
        ("cu_seqlens", 64, BF16, {"packed": True}),
    ],
)
def test_refusals(match: str, d: int, dtype: torch.dtype, options: dict[str, Any], hopper: pytest.MonkeyPatch) -> None:
    q = on_gpu(d=d, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"impl='cuda': .*{match}"):
        if options.pop("packed", False):
            cu, q = torch.empty(2, dtype=torch.int32, device="cuda"), torch.empty(9, 2, 64, dtype=BF16, device="cuda")
            sfa_attention_varlen(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, topk=8, impl="cuda")
        if "attn_mask" in options:
            options["attn_mask"] = torch.empty(1, 1, 1, 64, dtype=torch.bool, device="cuda")
        sfa_attention(q, q, q, topk=8, impl="cuda", **options)


def test_the_choice_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile asks once whether the kernel can run here, bakes in the answer, and writes no dynamic number."""

    def told(x: Tensor, right: int, scale: float) -> Tensor:
        options: dict[str, Any] = {"masked": False, "packed": False, "can_drop": False, "dropout_p": 0.0}
        reason = hopper_forward.unsupported(99, BF16, x.shape[0], 64, (-1, right), scale, **options)
        return x + ("no NVIDIA GPU" in (reason or ""))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled = torch.compile(told, fullgraph=True, backend="eager", dynamic=True)
    for n, right, scale, want in (
        (64, 0, 0.1, 1),
        (128, 0, 0.2, 1),
        (80, 0, 0.1, 0),
        (64, 4, 0.1, 0),
        (64, 0, -1.0, 0),
    ):
        assert compiled(torch.zeros(n), right, scale)[0] == told(torch.zeros(n), right, scale)[0] == want


# ------------------------------------------------------------------------------------------------ on the CPU


class HostDriver:
    """Tensor maps as host_hopper.h reads them."""

    def call(self, name: str, tensor_map: Any, kind: int, rank: Any, address: Any, sizes: Any, strides: Any, box: Any,
             steps: Any, *others: int) -> None:  # fmt: skip
        assert (name, kind, rank.value, box[0], others) == ("cuTensorMapEncodeTiled", 9, 4, 64, (0, 3, 2, 0))
        assert address.value % 16 == 0 and all(stride % 16 == 0 for stride in strides) and box[1] <= 256
        for i, x in enumerate([address.value, *sizes, *strides, box[1]]):
            tensor_map[i] = x


@functools.cache
def library(config: hopper_forward.Config) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    macros = [f"-D{name}={value}" for name, value in config.macros()]
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-I", HERE, "-I", hopper_forward.SOURCE.parent,
         '-DHF_HOST="host_hopper.h"', *macros, "-o", folder / "forward.so", HERE / "host_hopper.cpp"],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(folder / "forward.so"))
    shutil.rmtree(folder)
    return loaded


def host_launch(late: int) -> Callable[..., None]:
    def launch(config: hopper_forward.Config, device: Any, work: int, maps: Any, params: Any) -> None:
        pointers = [ctypes.byref(x) for x in (*maps, params)]
        problem = library(config).launch(*pointers, ctypes.sizeof(params), config.shared, late)
        assert problem == 0, "the threads wait for each other" if problem == 2 else "Params differ"

    return launch


@pytest.fixture(params=[0, 1], ids=["loads_land_at_once", "loads_land_late"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hopper_forward, "_launch", host_launch(request.param))
    monkeypatch.setattr(nvrtc, "driver", HostDriver)


@pytest.mark.parametrize(
    ("dims", "causal", "lengths", "heads", "spread"),
    [
        ((64, 64), True, (200, 321), (4, 2), 1.0),
        ((64, 64), True, (1, 1), (1, 1), 1.0),
        ((64, 64), False, (70, 300), (2, 2), 1.0),
        ((128, 128), True, (300, 300), (2, 2), 1.0),
        ((128, 128), True, (400, 200), (1, 1), 1.0),
        ((128, 128), True, (300, 700), (2, 1), 4.0),
        ((256, 256), True, (200, 300), (1, 1), 1.0),
        ((64, 128), True, (130, 150), (2, 1), 1.0),
        ((256, 64), False, (130, 150), (1, 1), 1.0),
    ],
)
def test_on_the_cpu(
    dims: tuple[int, int], causal: bool, lengths: tuple[int, int], heads: tuple[int, int], spread: float, host: None
) -> None:
    q = rows(0, 2, lengths[0], heads[0], dims[0], topk=8, spread=spread)
    k = rows(1, 2, lengths[1], heads[1], dims[0], topk=16, spread=spread)
    check_rows(q, k, rows(2, 2, lengths[1], heads[1], dims[1], topk=dims[1]), causal)


def test_nothing_to_do(host: None) -> None:
    x = rows(0, 2, 5, 2, 64, topk=8)
    with poisoned():
        out, lse = hopper_forward.run(x, x[:, :0], x[:, :0], True, 0.1)
        assert not out.any() and (lse == -torch.inf).all()
        for q in (x[:0], x[:, :0]):
            out, lse = hopper_forward.run(q, x[:0] if len(q) == 0 else x, x[:0] if len(q) == 0 else x, True, 0.1)
            assert out.shape == q.shape and lse.shape == (q.shape[0], 2, q.shape[1])


def test_rows_of_any_strides_are_read(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place where they start at multiples of 16 bytes, else from a copy."""
    from flash_sfa.impl import triton_forward

    monkeypatch.setattr(triton_forward, "rescue", lambda *arguments, first: None)
    qkv = rows(3, 1, 90, 3, 2, 64, topk=64)
    fused_qkv = qkv.unbind(2)
    odd = [torch.nn.functional.pad(x, (3, 5))[..., 3:67] for x in fused_qkv]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in fused_qkv]
    wanted = check_rows(*fused_qkv, True)
    for q, k, v in (fused_qkv, odd, swapped):
        out, lse = hopper_forward.forward(q, k, v, torch.zeros(0), True, 0.125)
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


def operator_arguments(device: str, n: int = 70) -> tuple[Any, ...]:
    """Arguments of flash_sfa::attention up to dropout_p: codes of q and k, causal."""
    q, k, v = (torch.randn(1, n, h, 64, device=device).to(BF16) for h in (2, 1, 1))
    sides: list[Any] = []
    for x in (q, k):
        code = topk_sparsify(x, 8)
        sides += [code.values.requires_grad_(), code.indices, code.dense, None, None]
    return (*sides, v.requires_grad_(), None, None, None, None, 64, [], [], -1, 0, 0.125, n, n, False, 0.0)


def test_the_operator(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by this kernel, backward by another implementation, in one operator."""
    from flash_sfa.impl import triton_forward

    monkeypatch.setattr(triton_forward, "rescue", lambda *arguments, first: None)
    torch.manual_seed(0)
    arguments = operator_arguments("cpu")
    torch.library.opcheck(fused.attention, (*arguments, False, "cuda", "sdpa"), rtol=3e-2, atol=3e-2)
    wrt = arguments[0], arguments[5], arguments[10]
    results = []
    for impl in ("cuda", "sdpa"):
        out, lse, _ = fused.attention(*arguments, False, impl, "sdpa")
        results.append((out, lse, *torch.autograd.grad(out, wrt, out.detach())))
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{"topk": 8}, {"topk": (None, 4), "causal": True, "dense_dims": 4}], ids=str)
def test_a_whole_call(options: dict[str, Any], host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """sfa_attention as on a GPU, eager and compiled; PyTorch on the CPU in place of cuDNN, and nothing to mend."""
    from flash_sfa.impl import triton_forward

    monkeypatch.setattr(triton_forward, "rescue", lambda *arguments, first: None)
    monkeypatch.setattr(api, "_cuda_problem", lambda *arguments: None)
    monkeypatch.setattr(sdpa, "cudnn_takes", lambda *arguments: True)
    monkeypatch.setattr(sdpa, "_mends", lambda *arguments: False)
    qkv = [torch.randn(2, 70, h, 64, generator=torch.Generator().manual_seed(h)).to(BF16) for h in (4, 2, 2)]
    results = []
    for impl, compiled in (("sdpa", False), ("cuda", False), ("cuda", True)):
        wrt = [x.clone().requires_grad_() for x in qkv]
        call: Any = functools.partial(sfa_attention, **options, impl=impl)
        if compiled:
            torch.compiler.reset()
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        out = call(*wrt)
        results.append(
            [out.detach(), *torch.autograd.grad(out, wrt, torch.linspace(-1, 1, 64).to(BF16).expand_as(out))]
        )
    for wanted, ours, traced in zip(*results):
        assert torch.equal(ours, traced)
        assert (ours - wanted).abs().max() <= 2e-2 * max(1.0, float(wanted.abs().max()))
    assert not torch.equal(results[0][0], results[1][0]), "another kernel ran"


# ------------------------------------------------------------------- with what mends, in Triton's interpreter


RESCUE: list[Any] = []


def rescue_in_fp32(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *others: Any, first: int) -> None:
    """`triton_forward.rescue` without bf16, which Triton's interpreter multiplies wrong."""
    wide = out.float()
    RESCUE[0](q.float(), k.float(), v.float(), wide, *others, first=first)
    out.copy_(wide)


def mended(lengths: tuple[int, int], which: int | None, causal: bool) -> None:
    """Rows that do not see the value keep their result; Triton's backward takes out and lse."""
    from flash_sfa.impl import triton_backward, triton_forward

    triton_forward.shared_memory = triton_backward.shared_memory = lambda device: 0  # type: ignore[assignment]
    hopper_forward._launch, nvrtc.driver = host_launch(0), HostDriver  # type: ignore[assignment]
    if not RESCUE:
        RESCUE.append(triton_forward.rescue)
    triton_forward.rescue = rescue_in_fp32  # type: ignore[assignment]
    (sq, sk), window = lengths, (-1, 0 if causal else -1)
    tensors = [rows(i, 1, n, 2, 64, topk=8) for i, n in enumerate((sq, sk, sk))]
    grad = rows(5, 1, sq, 2, 64, topk=64)
    seen = reference.visible_pairs(sq, sk, window, grad.device)
    clean, clean_lse = hopper_forward.run(*tensors, causal, 0.3)
    if which is not None:
        tensors[which][0, 30, 1, 3] = torch.inf if which == 1 else torch.nan
    bad = triton_forward.scan(grad.device, tensors[:1], tensors[1:2], 2)
    with poisoned():
        out, lse = hopper_forward.forward(*tensors, bad, causal, 0.3)
    touched = torch.zeros(sq, dtype=torch.bool)
    if which is not None:
        touched = torch.arange(sq) == 30 if which == 0 else seen[:, 30]
        assert out[0, touched, 1].isnan().all() and bad[3] == 1
        assert bool(lse[0, 1, touched].isnan().all()) == (which < 2)
    assert bool(bad[0]) == (which is not None)
    torch.testing.assert_close(out[0, ~touched], clean[0, ~touched], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse[0, 1, ~touched], clean_lse[0, 1, ~touched])
    assert torch.equal(out[:, :, 0], clean[:, :, 0])
    options = triton_forward.Options(*window, 0.3)
    wide = [x.float() for x in (*tensors, out)]
    grads = triton_backward.backward(grad.float(), None, *wide, lse, bad, options)
    assert all(x.isfinite().all() for x in grads)
    if which is None:
        wrt = [x.double().requires_grad_() for x in tensors]
        exact, _ = reference.attention(wrt[0], wrt[1], wrt[2], seen, 0.3)
        for ours, wanted in zip(grads, torch.autograd.grad(exact, wrt, grad.double())):
            torch.testing.assert_close(ours.double(), wanted, atol=1e-2, rtol=1e-2)


MENDED: dict[str, Callable[[], None]] = {
    "finite": lambda: mended((70, 90), None, True),
    "more_queries": lambda: mended((90, 70), None, True),
    "q": lambda: mended((70, 70), 0, True),
    "k": lambda: mended((70, 70), 1, True),
    "v": lambda: mended((70, 70), 2, True),
    "v_more_queries": lambda: mended((90, 40), 2, True),
    "k_full": lambda: mended((40, 70), 1, False),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__, interpret=True)


@pytest.mark.parametrize("name", MENDED)
def test_interpreter(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "ok", outcomes[name]


# ------------------------------------------------------------------------------------------------- on a GPU

LENGTHS = [(1, 1), (3, 63), (113, 128), (128, 113), (239, 1000), (1000, 239), (1000, 1000)]
DIMS = [(64, 64), (128, 128), (256, 256), (64, 256), (256, 64), (128, 64), (64, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", DIMS)
def test_rows(dims: tuple[int, int], causal: bool, lengths: tuple[int, int], heads: tuple[int, int]) -> None:
    q = rows(0, 2, lengths[0], heads[0], dims[0], topk=8)
    k = rows(1, 2, lengths[1], heads[1], dims[0], topk=16)
    v = rows(2, 2, lengths[1], heads[1], dims[1], topk=dims[1])
    out, lse = check_rows(q, k, v, causal)
    again = check_rows(q, k, v, causal)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
def test_peaked_dense_rows_and_views(d: int) -> None:
    check_rows(*rows(1, 1, 2500, 3, 4, d, topk=d, spread=4.0).unbind(2), True)


@pytest.mark.gpu
def test_a_future_token_changes_nothing() -> None:
    q, k, v = (rows(i, 1, 700, 2, 128, topk=n) for i, n in enumerate((8, 8, 128)))
    out, lse = hopper_forward.run(q, k, v, True, 0.1)
    k[:, 500], v[:, 500] = 100.0, -100.0
    other, other_lse = hopper_forward.run(q, k, v, True, 0.1)
    assert torch.equal(out[:, :500], other[:, :500]) and torch.equal(lse[..., :500], other_lse[..., :500])
    assert not torch.equal(out[:, 500:], other[:, 500:])


GRID = [
    Case((63, 63), (4, 4), 64, 64, 8, sees="causal"),
    Case((239, 239), (4, 2), 128, 128, 8, "first", sees="causal"),
    Case((128, 1000), (2, 1), 128, 64, (None, 8), sees="causal"),
    Case((1000, 239), (2, 2), 64, 128, 16, sees="causal"),
    Case((113, 128), (8, 1), 256, 256, (8, None), "named"),
    Case((239, 113), (4, 1), 256, 64, 2, layout="strided"),
    Case((1, 239), (2, 2), 128, 256, "d", sees="causal"),
    Case((128, 128), (8, 2), 64, 64, 1, layout="strided", sees="causal", scale=0.5),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case) -> None:
    """Out, lse (so Triton's backward) and all gradients against the oracle."""
    check_case(Case(**{**vars(case), "dtype": BF16}), "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GRID if case.lengths[0] > 1], ids=str)
def test_gradients_of_cudnn(case: Case) -> None:
    """cuDNN's backward of our forward equals its backward of its own, where it takes the call."""
    case = Case(**{**vars(case), "dtype": BF16})
    (sq, sk), (hq, hkv) = case.lengths, case.heads
    qkv = [torch.randn(2, n, h, w, device="cuda", dtype=BF16)
           for n, h, w in ((sq, hq, case.d), (sk, hkv, case.d), (sk, hkv, case.dv))]  # fmt: skip
    grad = torch.randn(2, sq, hq, case.dv, device="cuda", dtype=BF16)
    results = []
    for impl in ("cuda", "sdpa"):
        wrt = [x.clone().requires_grad_() for x in qkv]
        out = sfa_attention(*wrt, **case.options(None), impl=impl)
        results.append([out.detach(), *torch.autograd.grad(out, wrt, grad)])
    for ours, wanted in zip(*results):
        assert (ours - wanted).abs().max() <= 2e-2 * max(1.0, float(wanted.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("sees", ("all", "causal"))
def test_gradient_through_lse(sees: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "Case", lambda *a, **o: Case(a[0], a[1], 64, 128, *a[4:], **o))
    rules.test_gradient_through_lse(sees, "cuda", BF16, "cuda")


@pytest.mark.gpu
def test_deterministic_gradients() -> None:
    q, k, v = (torch.randn(2, 700, 4, 128, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))
    options: dict[str, Any] = {"topk": 8, "causal": True, "deterministic": True}
    assert select_impl(q, k, v, **options)["forward"] == "cuda"
    runs = [torch.autograd.grad(sfa_attention(q, k, v, **options), (q, k, v), q.detach()) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@pytest.mark.gpu
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("causal", (True, False))
def test_non_finite_values_stay_where_they_are_seen(causal: bool, which: int, value: float) -> None:
    inputs = [torch.randn(2, n, h, 64, device="cuda", dtype=BF16) for n, h in ((400, 4), (700, 2), (700, 2))]
    options: dict[str, Any] = {"topk": 8, "causal": causal, "impl": "cuda", "return_lse": True}
    clean, _ = sfa_attention(*inputs, **options)
    inputs[which][1, 350, 1, 5] = value
    wrt = [x.requires_grad_() for x in inputs]
    out, lse = sfa_attention(*wrt, **options)
    touched = torch.zeros(2, 400, 4, dtype=torch.bool, device="cuda")
    if which == 0:
        touched[1, 350, 1] = True
    else:
        touched[1, 50 if causal else 0 :, 2:] = True  # query 50 sees keys up to 350
    assert torch.equal(out.isfinite().all(-1), ~touched)
    torch.testing.assert_close(out[~touched], clean[~touched], atol=2e-2, rtol=2e-2)
    if which < 2:
        assert torch.equal(lse.isnan().transpose(1, 2), touched)
    for grad in torch.autograd.grad(out, wrt, torch.ones_like(out)):
        assert grad.isfinite().all()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """q, k, v and out of one call above 2^31 elements each: first and last heads, first and last rows."""
    n, h, d = 131072, 129, 128
    q, k, v = (torch.randn(1, n, h, d, device="cuda", dtype=BF16) for _ in range(3))
    assert q.numel() > 2**31
    out, lse = hopper_forward.run(q, k, v, True, 0.05)
    for head in (0, h - 1):
        for first in (0, n - 256):  # whole tiles of queries, so to the bit
            here = slice(first, first + 256), slice(head, head + 1)
            few = q[:, *here], *(x[:, : first + 256, here[1]] for x in (k, v))
            small, small_lse = hopper_forward.run(*(x.contiguous() for x in few), True, 0.05)
            assert torch.equal(out[:, *here], small)
            assert torch.equal(lse[:, here[1], here[0]], small_lse)


@pytest.mark.gpu
def test_compiled_and_captured() -> None:
    q, k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))

    def call(*qkv: Tensor) -> Tensor:
        return sfa_attention(*qkv, topk=8, causal=True)

    assert select_impl(q, k, v, topk=8, causal=True)["forward"] == "cuda"
    compiled = torch.compile(call, fullgraph=True)
    wanted = call(q, k, v)
    got = compiled(q, k, v)
    assert torch.equal(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), wanted.detach()), torch.autograd.grad(wanted, (q, k, v), wanted.detach()),
        atol=2e-2, rtol=2e-2,
    )  # fmt: skip
    fixed = [x.detach().clone() for x in (q, k, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call(*fixed)
    for _ in range(3):
        for x in fixed:
            x.normal_()
        graph.replay()
        assert torch.equal(out, call(*fixed))


@pytest.mark.gpu
def test_opcheck() -> None:
    arguments = operator_arguments("cuda")
    for return_lse, backward in ((False, "sdpa"), (True, "triton")):
        torch.library.opcheck(fused.attention, (*arguments, return_lse, "cuda", backward), rtol=3e-2, atol=3e-2)


if __name__ == "__main__":
    print_outcomes(MENDED)
