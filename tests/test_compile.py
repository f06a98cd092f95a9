"""torch.library operators pass opcheck; the public functions compile whole, forward and backward.

Backend "aot_eager" always; "inductor" as well where a C++ compiler is found.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from flash_sfa import SparseCode, fused, ops, sfa_attention, sfa_attention_varlen, topk_sparsify

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
BACKENDS = ("aot_eager", "inductor") if COMPILER else ("aot_eager",)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# ----------------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dims"), ((32, []), (32, [17, 1]), (300, [0, 1, 2])))
def test_opcheck_of_codes(d: int, dims: list[int], dtype: torch.dtype) -> None:
    x = rand(2, 3, d, dtype=dtype)
    for topk in (4, d):
        opcheck(ops.topk, (x, topk, dims, "reference"))
        opcheck(ops.topk_kept, (x.detach(), topk, dims))
    values, indices, dense = (t.detach() for t in ops.topk(x, 4, dims, "reference"))
    opcheck(ops.expand, (values.requires_grad_(), indices, dense.requires_grad_(), d, dims, "reference"))
    opcheck(ops.gather, (x, indices, dims, "reference"))
    opcheck(ops.topk, (x.transpose(0, 1), 4, dims, "reference"))


def attention_arguments(kind: str, dtype: torch.dtype) -> tuple:
    """Arguments of flash_sfa::attention: two codes, or one dense side, or packed sequences, or a mask and a window."""
    b, hq, hkv, d = (1, 4, 2, 32) if kind == "varlen" else (2, 4, 2, 32)
    q, k, v = rand(b, 9, hq, d, dtype=dtype), rand(b, 9, hkv, d, dtype=dtype), rand(b, 9, hkv, 16, dtype=dtype)
    dims = [3, 1] if kind == "dims" else []
    sides: list[Any] = []
    for x, is_dense in ((q, False), (k, kind == "dense side")):
        code = topk_sparsify(x.detach(), 5, dense_dims=dims)
        parts = (
            (x.detach(), None, None, None, None) if is_dense else (code.values, code.indices, code.dense, None, None)
        )
        if kind == "source":
            parts = (*ops.topk_kept(x.detach(), 5, dims), x.detach())
            sides += [*parts[:4], parts[4].requires_grad_()]
            continue
        sides += [part if part is None or not part.is_floating_point() else part.requires_grad_() for part in parts]
    mask = torch.rand(2, 1, 9, 9) > 0.5 if kind == "mask" else None
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32) if kind == "varlen" else None
    left = 3 if kind == "mask" else -1
    dims_k = [] if kind == "dense side" else dims
    return (*sides, v, mask, cu, cu, None, d, dims, dims_k, left, 0, 0.2, 9, 9, False, 0.0)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("kind", ("codes", "dims", "source", "dense side", "mask", "varlen"))
def test_opcheck_of_attention(kind: str, dtype: torch.dtype) -> None:
    arguments = attention_arguments(kind, dtype)
    for return_lse in (False, True):
        # Gradients are compared with those of the compiled graph by value: wide enough for bf16.
        opcheck(fused.attention, (*arguments, return_lse, "sdpa", "sdpa"), rtol=2e-2, atol=2e-2)
    out, lse, bad = fused.attention(*arguments, True, "sdpa", "sdpa")
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    del detached[8:10], detached[3:5]  # the expanded rows, the sources
    grads = torch.randn_like(out), torch.randn_like(lse), out.detach(), lse.detach(), bad
    source = kind == "source"
    opcheck(fused.attention_backward, (*grads, *detached, True, "sdpa", source, source))
    shapes = [x.shape for x in fused.attention_backward(*grads, *detached, True, "sdpa", source, source)]
    at = 4 if source else 0
    assert shapes[0] == arguments[at].shape and shapes[2] == arguments[5 + at].shape
    assert shapes[4] == arguments[10].shape


# ----------------------------------------------------------------------------------------------- compile

# aot_eager runs the same operators and must agree exactly; inductor may fuse what stands around them.
TOLERANCE: dict[str, dict[str, float]] = {
    "aot_eager": {"atol": 0.0, "rtol": 0.0},
    "inductor": {"atol": 1e-5, "rtol": 1e-5},
}


def compare(
    call: Callable[..., Any], inputs: list[Tensor], backend: str, *, compiled: Callable[..., Any] | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Outputs and gradients of a call, compiled whole, against eager."""
    compiled = compiled or torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    tolerance = TOLERANCE[backend]
    results = []
    for function in (call, compiled):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
        grads = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], weights)
        results.append([*outputs, *grads])
    for wanted, got in zip(*results):
        assert got.dtype == wanted.dtype and got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, **tolerance)
    return compiled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    (
        {"topk": 4, "causal": True, "return_lse": True},
        {"topk": (None, 3), "window_size": (3, 1), "dense_dims": [17, 1]},
        {"topk": 2, "nonoverlap": "drop", "return_lse": True, "attn_mask": torch.rand(9, 12) > 0.2},
    ),
    ids=("causal", "window", "drop"),
)
def test_attention(options: dict[str, Any], backend: str) -> None:
    dtype = torch.bfloat16 if "window_size" in options else torch.float32
    inputs = [rand(2, 9, 4, 32, dtype=dtype), rand(2, 12, 2, 32, dtype=dtype), rand(2, 12, 2, 16, dtype=dtype)]
    compare(lambda q, k, v: sfa_attention(q, k, v, **options), inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen(backend: str) -> None:
    inputs = [rand(9, 4, 32), rand(9, 2, 32), rand(9, 2, 16)]
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sfa_attention_varlen(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5, topk=4, causal=True,
            return_lse=True,
        )  # fmt: skip

    compare(call, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_lengths_do_not_recompile(backend: str) -> None:
    graphs = CompileCounterWithBackend(backend)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sfa_attention(q, k, v, topk=4, causal=True, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for n in (9, 17, 33):
        inputs = [rand(2, n, 4, 32), rand(2, n, 2, 32), rand(2, n, 2, 16)]
        compare(call, inputs, backend, compiled=compiled)
        counts.append(graphs.frame_count)
    assert counts[0] > 0 and counts == [counts[0]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_cross_the_boundary_both_ways(backend: str) -> None:
    q, k, v = rand(2, 9, 4, 32), rand(2, 9, 2, 32), rand(2, 9, 2, 16)

    def encode(x: Tensor) -> SparseCode:
        return topk_sparsify(2 * x, 4, dense_dims=[17, 1])

    def attend(q: SparseCode, k: SparseCode, v: Tensor) -> Tensor:
        return sfa_attention(q, k.map(lambda x: x[:, :7]), v[:, :7])

    def whole(encode: Callable[..., Any], attend: Callable[..., Any]) -> list[Tensor]:
        codes = encode(q), encode(k)
        assert isinstance(codes[0], SparseCode)
        assert (codes[0].dense_dims, codes[0].dim, codes[0].topk) == ((17, 1), 32, 4)
        out = attend(*codes, v)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    compiled = [torch.compile(f, fullgraph=True, backend=backend) for f in (encode, attend)]
    wanted = whole(encode, attend)
    for pair in (compiled, (encode, compiled[1]), (compiled[0], attend)):
        for a, b in zip(whole(*pair), wanted):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert wanted[1].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    inputs = [rand(2, 9, 4, 32), rand(2, 9, 2, 32), rand(2, 9, 2, 16)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sfa_attention(q, k, v, topk=4, causal=True)

    assert call(*inputs).dtype == torch.bfloat16
    compare(call, inputs, backend)


def test_bad_input_is_named_under_compile() -> None:
    x = torch.randn(2, 9, 4, 32)
    compiled = torch.compile(lambda q, k, v: sfa_attention(q, k, v, topk=0), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="topk"):
        compiled(x, x, x)


def test_export_keeps_the_operators() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sfa_attention(q, k, v, topk=4, causal=True)

    inputs = tuple(x.detach() for x in (rand(2, 9, 4, 32), rand(2, 9, 2, 32), rand(2, 9, 2, 16)))
    program = torch.export.export(Attend(), inputs)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"flash_sfa.topk_kept.default", "flash_sfa.attention.default"} <= called
    assert torch.equal(program.module()(*inputs), Attend()(*inputs))


def test_asking_for_triton_warns_of_nothing_under_compile() -> None:
    """On CUDA every compiled call asks."""

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if ops.triton_missing() is None else x - 1

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = torch.compile(ask, fullgraph=True, backend="eager")(torch.zeros(2))
    assert torch.equal(out, ask(torch.zeros(2)))
