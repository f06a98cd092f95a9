"""``flash-sfa env``: what is installed, what the device is, which implementations work and why others do not.

Every package is imported on its own and may be missing or broken; the report says so and goes on.
"""

import argparse
import json
import platform
from importlib import import_module
from typing import Any

from .version import __version__

PACKAGES = ("torch", "numpy", "triton", "transformers", "accelerate", "matplotlib")


def _import(name: str) -> tuple[Any, str | None]:
    try:
        return import_module(name), None
    except BaseException as error:  # a broken extension may raise anything, even SystemExit
        if isinstance(error, KeyboardInterrupt):
            raise
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _devices(torch: Any) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"type": "cpu", "name": platform.processor() or platform.machine()}]
    if torch is None or not torch.cuda.is_available():
        return devices
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "type": "cuda",
                "name": p.name,
                "compute_capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "shared_memory_per_block_kib": getattr(p, "shared_memory_per_block_optin", 0) // 1024,
                "multiprocessors": p.multi_processor_count,
            }
        )
    return devices


def _implementations(torch: Any, errors: dict[str, str | None], has_cuda: bool) -> dict[str, str]:
    """Name -> "available: ..." or "not available: reason"."""
    if torch is None:
        missing = f"not available: torch does not import ({errors['torch']})"
        return dict.fromkeys(("reference", "sdpa", "cpu", "triton", "cuda", "intersect"), missing)
    if errors["triton"] is not None:
        triton = f"not available: triton does not import ({errors['triton']})"
    elif not has_cuda:
        triton = "not available: no CUDA device"
    else:
        triton = "available for topk_sparsify and attention"
    return {
        "reference": "available",
        "sdpa": "available",
        "cpu": _cpu(),
        "triton": triton,
        "cuda": _cuda_attention(),
        "intersect": _cuda("sfa_attention, forward only"),
    }


def _cpu() -> str:
    """State of the CPU kernels; decoding falls back on plain PyTorch inside impl="cpu"."""
    from .impl import cpu_numba

    reason = cpu_numba.missing()
    if reason is None:
        return "available for sfa_attention (forward only) and sfa_attention_with_kvcache"
    return f"available for sfa_attention_with_kvcache, in plain PyTorch; for the faster kernels {reason}"


def _cuda(task: str) -> str:
    """State of the CUDA kernels, which need NVRTC."""
    try:
        from .impl import nvrtc

        reason = nvrtc.missing(None)
    except Exception as error:  # a broken installation may raise anything
        reason = f"{type(error).__name__}: {error}"
    return f"available for {task}" if reason is None else f"not available: {reason}"


def _cuda_attention() -> str:
    """State of impl="cuda": decoding on any recent GPU, the forward of sfa_attention on Hopper."""
    state = _cuda("sfa_attention_with_kvcache")
    if state.startswith("not"):
        return state
    try:
        from .impl import hopper_forward

        reason = hopper_forward.missing(None)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return f"{state} and sfa_attention" if reason is None else f"{state}; for sfa_attention {reason}"


def collect() -> dict[str, Any]:
    """The report as plain data; never raises for a missing or broken package."""
    modules, errors = {}, {}
    for name in PACKAGES:
        modules[name], errors[name] = _import(name)
    torch = modules["torch"]
    problems: list[str] = []
    try:
        devices = _devices(torch)
    except Exception as error:
        devices = []
        problems.append(f"asking for devices failed: {type(error).__name__}: {error}")
    has_cuda = any(device["type"] == "cuda" for device in devices)
    return {
        "flash_sfa": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            name: getattr(modules[name], "__version__", "unknown")
            if errors[name] is None
            else f"missing or broken ({errors[name]})"
            for name in PACKAGES
        },
        "cuda": getattr(getattr(torch, "version", None), "cuda", None),
        "devices": devices,
        "implementations": _implementations(torch, errors, has_cuda),
        "problems": problems,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    report = collect()
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    print(f"flash-sfa {report['flash_sfa']}, Python {report['python']}, {report['platform']}")
    for name, version in report["packages"].items():
        print(f"  {name:13} {version}")
    print(f"CUDA of torch: {report['cuda'] or 'none'}")
    for device in report["devices"]:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("type", "name"))
        print(f"  {device['type']:5} {device['name']} {details}")
    print("Implementations (choose with impl=...; 'auto' takes the fastest available):")
    for name, state in report["implementations"].items():
        print(f"  {name:10} {state}")
    for problem in report["problems"]:
        print(f"Problem: {problem}")
    return 0
