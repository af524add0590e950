"""Seeing the memory of a simulated tensor as a host tensor, and the other way round, without a copy.

A DLPack capsule is a tensor's address, shape and strides under a device number; the same capsule under another number
is the same memory on another device. Source: DLPack's dlpack.h, structures DLDevice and DLTensor.
"""

from __future__ import annotations

import ctypes

import torch

HOST, SIMULATED = 1, 12
"""DLPack's kDLCPU, and kDLExtDev, which torch reads as its PrivateUse1 device."""


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)


def as_host(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor over the memory of a simulated one, which it keeps alive."""
    return _on_device(tensor, HOST)


def as_simulated(tensor: torch.Tensor) -> torch.Tensor:
    """A simulated tensor over the memory of a host one, which it keeps alive."""
    return _on_device(tensor, SIMULATED)


def _on_device(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    capsule = torch.utils.dlpack.to_dlpack(tensor.detach())
    header = _DLTensor.from_address(_pointer_of(capsule, b"dltensor"))
    header.device_type, header.device_id = device_type, 0
    for dim, stride in enumerate(tensor.stride()):
        # Torch writes 1 for the stride of a dim of size one; kernels must see what the caller has.
        header.strides[dim] = stride
    seen: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
    return seen
