"""Compiles, loads and launches the CUDA sources of csrc/ at run time, with what a torch wheel already brings.

The sources include no header but those of csrc/include, so NVRTC is enough: no nvcc, no build step, and each specialization (a set of
macros) is compiled when it is first needed and kept on disk. Kernels are launched through the driver (libcuda), on torch's current
stream and in its context, so they take part in CUDA graphs like any other kernel.

Nothing here knows a tree or a matrix.
"""

import ctypes
import functools
import hashlib
import os
import re
from pathlib import Path

import torch

from tpinv.runtime.state import device_state

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_TENSOR_DTYPES = {torch.float32: 7, torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def cache_dir() -> Path:
    """Where compiled kernels and tuned choices live: $TPINV_CACHE, or tpinv under the user's cache directory."""
    base = os.environ.get("TPINV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpinv"
    path = Path(base)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Ranks share the cache: a reader sees the old file or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


def source_path(name: str) -> Path:
    """Where csrc/``name`` is: in the installed package, or in the checkout beside it. FileNotFoundError otherwise."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"csrc/{name} lies neither in {package} nor beside it; reinstall tpinv")


@functools.cache
def source(name: str) -> str:
    """Text of csrc/``name``. FileNotFoundError if there is none."""
    return source_path(name).read_text()


@functools.cache
def headers(name: str) -> dict[str, str]:
    """What csrc/``name`` includes, by the names it uses, which are paths in csrc/. Headers include none. FileNotFoundError if one is missing."""
    return {header: source(header) for header in re.findall(r'^#include "(.*)"$', source(name), re.M)}


def whole_source(name: str) -> str:
    """csrc/``name`` and all that it includes: what a compiled kernel may depend on."""
    return "\0".join([source(name), *headers(name).values()])


# -- NVRTC -------------------------------------------------------------------------------------------------------------------


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    # torch's stub finds its own NVRTC through its rpath; after that the soname resolves wherever the wheel put it.
    stub = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    if stub.is_file():
        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def missing(name: str) -> str | None:
    """Why csrc/``name`` cannot be compiled on this machine; None when it can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        headers(name)
        _nvrtc()
    except OSError as error:  # FileNotFoundError is one too
        return f"it cannot be compiled here: {error}"
    return None


def compile_source(name: str, macros: dict[str, int], arch: str) -> bytes:
    """csrc/``name`` compiled for ``arch`` ("sm_90a") with ``macros``: the cubin, from the disk cache where it can.

    RuntimeError with the compiler's log when it does not compile.
    """
    lib = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{k}={v}" for k, v in sorted(macros.items()))]
    included = headers(name)
    key = hashlib.sha256("\0".join([whole_source(name), *options, f"{major.value}.{minor.value}"]).encode()).hexdigest()[:32]
    cached = cache_dir() / f"{Path(name).stem}-{key}.cubin"
    if cached.is_file():
        return cached.read_bytes()
    program = ctypes.c_void_p()
    texts, names = ((ctypes.c_char_p * len(included))(*(t.encode() for t in given)) for given in (included.values(), included))
    lib.nvrtcCreateProgram(ctypes.byref(program), source(name).encode(), name.encode(), len(included), texts, names)
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    if failed:
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC {major.value}.{minor.value} rejected {name} with {options}:\n{log.value.decode()}")
    size = ctypes.c_size_t()
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, cubin)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    write_atomically(cached, cubin.raw)
    return cubin.raw


# -- the driver --------------------------------------------------------------------------------------------------------------


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(name))
        raise RuntimeError(f"{call} failed with {status}: {(name.value or b'unknown').decode()}")


def load(name: str, function: str, macros: tuple[tuple[str, int], ...], arch: str, shared_bytes: int, device: int) -> ctypes.c_void_p:
    """The function of a compiled source, loaded into the context of CUDA device ``device`` and kept."""
    key = name, function, macros, arch, shared_bytes
    loaded = device_state(device).functions
    if key in loaded:
        return loaded[key]
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes sure that torch has created the context
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), compile_source(name, dict(macros), arch)), "cuModuleLoadData")
        _check(_driver().cuModuleGetFunction(ctypes.byref(handle), module, function.encode()), "cuModuleGetFunction")
        _check(_driver().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared_bytes), "cuFuncSetAttribute")
    loaded[key] = handle
    return handle


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with a number."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((n, ctypes.c_uint) for n in ("grid_x", "grid_y", "grid_z", "threads_x", "threads_y", "threads_z", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def launch(function: ctypes.c_void_p, grid: int, threads: int, shared_bytes: int, stream: int, *arguments, early: bool = False) -> None:
    """Launches a 1-D grid. ``arguments`` are ctypes structures or scalars, copied by the driver before this returns. ``early``: blocks may
    start while the kernel before ends; the source then waits for it (griddepcontrol.wait) before it reads or writes memory."""
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    if early:
        attribute = _Attribute(_SERIALIZATION, 0, 1)
        config = _Launch(grid, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.pointer(attribute), 1)
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), "cuLaunchKernelEx")
        return
    status = _driver().cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared_bytes, ctypes.c_void_p(stream), pointers, None)
    _check(status, "cuLaunchKernel")


@functools.lru_cache(maxsize=8192)
def tensor_map(pointer: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]):
    """A descriptor for the copy engine: innermost dimension first, unit stride there, the others in elements.

    Boxes are 128-byte swizzled; what lies outside the tensor reads as zero. Pointer and strides must be multiples of 16
    bytes (RuntimeError from the driver otherwise).
    """
    rank = len(sizes)
    # The descriptor must lie on a 64-byte boundary, which ctypes does not promise.
    buffer = (ctypes.c_char * 192)()
    shift = -ctypes.addressof(buffer) % 64
    descriptor = (ctypes.c_char * 128).from_buffer(buffer, shift)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(descriptor), _TENSOR_DTYPES[dtype], rank, ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*(dtype.itemsize * s for s in strides)),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*([1] * rank)), 0, _SWIZZLE_128B, _L2_PROMOTION_256B, 0,
    )  # fmt: skip
    _check(status, f"cuTensorMapEncodeTiled(sizes={sizes}, strides={strides}, box={box})")
    return descriptor
