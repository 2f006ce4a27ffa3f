"""Compile the kernel for GPUs that are not here: `python -m tests.measures.triton_compile`."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entropy_monitor.measures.triton_kernel import row_kernel

POINTERS = {"out_ptr": "*fp32", "two_valued_ptr": "*i32"}
FLOATS = ("scale", "softcap", "hiding")
SHAPE = {"GROUP": 2, "D": 64, "BLOCK_D": 64, "BLOCK_M": 64, "BLOCK_N": 32, "UPCAST": False}
CONTIGUOUS = {"q_stride_d": 1, "k_stride_d": 1, "mask_stride_n": 1}


def compiled(capability: int, dtype: str, mask: str, **options: Any) -> Any:
    fixed = SHAPE | CONTIGUOUS | options
    types = {}
    for name in row_kernel.arg_names:
        if name in fixed:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, mask if name == "mask_ptr" else dtype)
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    places = {(row_kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(row_kernel, types, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


if __name__ == "__main__":
    causal = {"LEFT": False, "RIGHT": True, "SOFTCAP": False, "MASK": 0, "SUMS": True}
    masked = {"LEFT": True, "RIGHT": False, "SOFTCAP": True, "MASK": 1, "SUMS": False}
    for capability, dtype, mask, options in ((80, "*bf16", "*bf16", causal), (90, "*fp16", "*u8", masked)):
        kernel = compiled(capability, dtype, mask, **options)
        assert "mma" in kernel.asm["ptx"]  # on tensor cores
        assert len(kernel.asm["cubin"]) > 0
        print("compiled", capability, dtype, kernel.metadata.shared)
