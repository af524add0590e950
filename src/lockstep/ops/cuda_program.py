"""Kernels written in CUDA C++: compiled when first wanted, by the compiler that comes with torch, and kept on disk.

Nothing is needed beside torch for CUDA, which brings NVIDIA's bindings and compiler: no nvcc, no headers. Importing it
imports the bindings.
Source: NVIDIA, "NVRTC" and "CUDA Driver API".
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda.bindings import driver, nvrtc

from lockstep.core.errors import KernelError

_FOLDER = "compiled"
_DIGEST_BYTES = 32
_HOPPER_PARTS = Path(__file__).with_name("hopper_parts.cu")
_TURNS: dict[Path, threading.Lock] = {}
"""By the file of a program: a thread that wants what another one compiles waits for it."""

_TURNS_LOCK = threading.Lock()


def hopper_source(facts: Mapping[str, int], *texts: str) -> str:
    """CUDA C++ for a Hopper: what is set, what such kernels have in common, and the texts of one."""
    lines = [f"#define {name} {value}" for name, value in facts.items()]
    return "\n".join([*lines, _HOPPER_PARTS.read_text(), *texts])


class Launch(NamedTuple):
    """How many thread blocks a kernel has in all and in each cluster, threads and shared bytes in each block.

    `early`: by programmatic dependent launch.
    """

    blocks: int
    cluster: int
    threads: int
    shared_bytes: int
    early: bool


class TensorMap:
    """How boxes of a tensor are copied, as the driver wrote it."""

    _BYTES = 128
    _ALIGNED_BYTES = 64

    def __init__(self) -> None:
        self._memory = (ctypes.c_char * (self._BYTES + self._ALIGNED_BYTES))()
        start = ctypes.addressof(self._memory)
        self.address = start + -start % self._ALIGNED_BYTES


class CudaProgram:
    """One kernel, loaded on one device, with so many bytes that a thread block shares at most.

    Raises KernelError with the compiler's or the driver's own words.
    """

    def __init__(
        self, source: str, name: str, device: torch.device, cache_dir: Path | None, *, shared_bytes: int
    ) -> None:
        self._device = device
        self._torch = torch.get_device_module(device)
        code = machine_code(source, architecture_of(device), cache_dir)
        with self._torch.device(device):
            self._module = checked(driver.cuModuleLoadData(code))
            self._function = checked(driver.cuModuleGetFunction(self._module, name.encode()))
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self._function, most, shared_bytes))
        self._configs: dict[tuple[Launch, int], driver.CUlaunchConfig] = {}

    def launch(self, launch: Launch, parameters: Sequence[Any]) -> None:
        """On the device's current stream, by a thread that works with this device.

        Parameters are ctypes' values and tensor maps.
        """
        stream = self._torch.current_stream(self._device).cuda_stream
        config = self._configs.get((launch, stream))
        if config is None:
            config = self._configs[launch, stream] = _config(launch, stream)
        places = (ctypes.c_void_p * len(parameters))(
            *(each.address if isinstance(each, TensorMap) else ctypes.addressof(each) for each in parameters)
        )
        checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(places), 0))


def _config(launch: Launch, stream: int) -> driver.CUlaunchConfig:
    config = driver.CUlaunchConfig()
    config.hStream = stream
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
    config.sharedMemBytes = launch.shared_bytes
    attributes = []
    if launch.cluster > 1:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dims = attributes[-1].value.clusterDim
        dims.x, dims.y, dims.z = launch.cluster, 1, 1
    if launch.early:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@cache
def missing_compiler() -> str | None:
    """None where NVIDIA's compiler can be loaded, else what to do."""
    try:
        checked(nvrtc.nvrtcVersion())
    except (RuntimeError, OSError, KernelError) as error:
        told = str(error).partition("\n")[0]
        return f"NVIDIA's compiler library NVRTC does not load ({told}): install nvidia-cuda-nvrtc"
    return None


def architecture_of(device: torch.device) -> str:
    """What the compiler calls the device's generation; the letter stands for instructions that only it has."""
    major, minor = torch.get_device_module(device).get_device_capability(device)
    return f"sm_{major}{minor}a"


def machine_code(source: str, architecture: str, cache_dir: Path | None) -> bytes:
    """The compiled source, from the cache where an earlier process left it, or another thread just now."""
    if cache_dir is None:
        return _compiled(source.encode(), architecture)
    version = checked(nvrtc.nvrtcVersion())
    name = hashlib.sha256(repr((source, architecture, version)).encode()).hexdigest()
    file = cache_dir / _FOLDER / f"{name}.cubin"
    with _turn_of(file):
        kept = _kept(file)
        if kept is None:
            kept = _compiled(source.encode(), architecture)
            _keep(kept, file)
    return kept


def _turn_of(file: Path) -> threading.Lock:
    with _TURNS_LOCK:
        return _TURNS.setdefault(file, threading.Lock())


def _kept(file: Path) -> bytes | None:
    """What was kept; None for nothing, and for what was damaged since."""
    try:
        found = file.read_bytes()
    except OSError:
        return None
    digest, code = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(code: bytes, file: Path) -> None:
    """Whole or not at all, since several processes may do so. A folder that cannot be written costs a compilation."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            written = Path(folder) / file.name
            written.write_bytes(hashlib.sha256(code).digest() + code)
            written.replace(file)
    except OSError:
        pass


def _compiled(source: bytes, architecture: str) -> bytes:
    options = (f"--gpu-architecture={architecture}", "--std=c++17")
    program = checked(nvrtc.nvrtcCreateProgram(source, b"kernel.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise KernelError(log.rstrip(b"\0 \n").decode())
        code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def tensor_map(
    pointer: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """Boxes of a 16-bit tensor, lines of 128 swizzled bytes.

    Sizes, and strides in elements of all dims but the first, are innermost first.
    """
    kinds = driver.CUtensorMapDataType
    dtypes = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    rank = len(sizes)
    made = TensorMap()
    status = _encode_tiled()(
        ctypes.c_void_p(made.address),
        int(dtypes[dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * rank)(*(stride * dtype.itemsize for stride in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    checked((driver.CUresult(status),))
    return made


@cache
def _encode_tiled() -> Any:
    """The driver's own function: NVIDIA's bindings may put a map where the driver takes none."""
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of NVIDIA's bindings returned, without its status. Raises KernelError unless that is success."""
    status, *values = result
    if int(status):
        tell = driver.cuGetErrorString if isinstance(status, driver.CUresult) else nvrtc.nvrtcGetErrorString
        raise KernelError((tell(status)[1] or b"unknown error").decode())
    return values[0] if len(values) == 1 else tuple(values)
