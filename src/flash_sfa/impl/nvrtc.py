"""CUDA C++ at run time: NVRTC compiles a source file through cuda-core, the driver loads and launches through ctypes.

Cubins are kept in the user's cache directory, keyed by source, macros and architecture. Nothing waits for the GPU.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Any, TextIO

import torch

Macros = list[tuple[str, str]]
_threads = threading.local()


def missing(index: int | None) -> str | None:
    """None if kernels can be compiled and run on a device, else the reason."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "the GPU must have compute capability 8.0 or newer"
    if cuda_core() is None:
        return "cuda-core, which compiles the kernel, is not installed: pip install 'flash-sfa[cuda]'"
    try:
        return _no_kernel(torch.device("cuda", torch.cuda.current_device() if index is None else index))
    except torch.OutOfMemoryError as error:  # tried again at the next call
        return f"a kernel does not load: {error}"


@functools.cache
def _no_kernel(device: torch.device) -> str | None:
    """Why not even the smallest kernel compiles and loads, or None."""
    try:
        _compile_and_load(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # NVRTC is missing or broken, or the driver is too old for what it makes
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        return f"a kernel does not compile or load: {error}"
    return None


def _compile_and_load(device: torch.device) -> None:
    image, module = (
        compile_text('extern "C" __global__ void f() {}', [("SFA_PROBE", "1")], architecture(device)),
        ctypes.c_void_p(),
    )
    with torch.cuda.device(device):
        _bind(device)
        driver().call("cuModuleLoadData", ctypes.byref(module), image)
        driver().call("cuModuleUnload", module)


@functools.cache
def cuda_core() -> Any:
    """The module of cuda-core that has Program, or None."""
    for name in ("cuda.core", "cuda.core.experimental"):  # the second in its first releases
        try:
            module = importlib.import_module(name)
        except Exception:  # a broken installation may raise anything
            continue
        if hasattr(module, "Program"):
            return module
    return None


def compile_file(source: Path, macros: Macros, arch: str, log: TextIO | None = None) -> bytes:
    """A cubin; needs cuda-core and NVRTC, but no GPU. What the compiler says goes to ``log``."""
    return compile_text(_text(source), macros, arch, log)


def compile_text(text: str, macros: Macros, arch: str, log: TextIO | None = None) -> bytes:
    """As `compile_file`, of the text itself."""
    core = cuda_core()
    if core is None:
        raise RuntimeError("cuda-core is not installed: pip install 'flash-sfa[cuda]'")
    options = core.ProgramOptions(arch=arch, std="c++17", define_macro=macros)
    return bytes(core.Program(text, code_type="c++", options=options).compile("cubin", logs=log).code)


def _text(source: Path) -> str:
    """A source with the files beside it that it includes by name."""
    return re.sub(r'^#include "(.*)"$', lambda m: _text(source.with_name(m[1])), source.read_text(), flags=re.MULTILINE)


def cubin_path(source: Path, macros: Macros, arch: str) -> Path:
    """The file that holds, or is to hold, a cubin."""
    key = hashlib.sha256(repr((_text(source), macros, arch)).encode()).hexdigest()[:32]
    home = os.path.expanduser("~")  # stays "~" for a user without a home
    root = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home != "~" else tempfile.gettempdir())
    return Path(root) / "flash_sfa" / f"{source.stem}-{arch}-{key}.cubin"


def architecture(device: torch.device) -> str:
    """Such as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


class _Driver:
    """The few functions of the CUDA driver that are needed."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.lib.cuLaunchKernel.argtypes = [
            ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    def call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.lib, name)(*arguments):
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed with {code}: {(text.value or b'unknown').decode()}")


driver = functools.cache(_Driver)


class Kernels:
    """The named kernels of one source file, compiled for one set of macros, on one device.

    ``shared``: bytes of dynamic shared memory that a kernel may ask for above 48 KiB, by kernel name. The kernels named
    in ``prefer_shared`` use all of L1 as shared memory.
    """

    def __init__(
        self, source: Path, macros: Macros, names: tuple[str, ...], device: torch.device, *, arch: str | None = None,
        shared: dict[str, int] | None = None, prefer_shared: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.device, self.functions = device, {}
        arch = arch or architecture(device)
        file, module = cubin_path(source, macros, arch), ctypes.c_void_p()
        with torch.cuda.device(device):
            _bind(device)
            try:
                driver().call("cuModuleLoadData", ctypes.byref(module), file.read_bytes())
            except (OSError, RuntimeError):  # not there, or written for another driver
                image = compile_file(source, macros, arch)
                driver().call("cuModuleLoadData", ctypes.byref(module), image)
                _keep(file, image)
            for name in names:
                self.functions[name] = ctypes.c_void_p()
                driver().call("cuModuleGetFunction", ctypes.byref(self.functions[name]), module, name.encode())
            # 8: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 9: PREFERRED_SHARED_MEMORY_CARVEOUT, in per cent.
            for name, size in (shared or {}).items():
                driver().call("cuFuncSetAttribute", self.functions[name], 8, size)
            for name in prefer_shared:
                driver().call("cuFuncSetAttribute", self.functions[name], 9, 100)

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, *parameters: Any, shared: int = 0) -> None:
        """On torch's current stream; parameters are ctypes objects, in the kernel's order."""
        with torch.cuda.device(self.device):
            _bind(self.device)
            stream = torch.cuda.current_stream().cuda_stream
            arguments = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
            driver().call("cuLaunchKernel", self.functions[name], *grid, threads, 1, 1, shared, stream, arguments, None)


def _bind(device: torch.device) -> None:
    """Make torch's context current in this thread: any launch does."""
    bound = _threads.__dict__.setdefault("bound", set())
    if device not in bound:
        torch.zeros(1, device=device)
        bound.add(device)


def _keep(file: Path, image: bytes) -> None:
    """Write a cubin to the cache directory; a directory that cannot be written only costs the next compilation."""
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(image)
        os.replace(part, file)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
