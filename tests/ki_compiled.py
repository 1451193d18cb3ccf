"""Compile the kernels for an NVIDIA GPU that need not be there: what the interpreter lets pass, the compiler may not.

Run without TRITON_INTERPRET, alone: `python tests/ki_compiled.py growlib/ki/epilogue.py`. Prints a line per kernel.
"""

import importlib.util
import sys
import warnings

warnings.simplefilter("ignore")  # of Triton's own defaults

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

NUMBERS = ("scale", "cap", "teacher_scale", "teacher_cap", "tau")
POINTERS = {"labels": "*i64", "ids": "*i64", "silent": "*u8"}
OF_LOGITS = ("logits", "teacher")
FLAGS = {"GATE": True, "NUMBERS_ONLY": True, "GRADIENT": True, "MARK": -65504.0}


def compiled(kernel, dtype, arch, **constants):
    """A kernel for logits of a dtype; the sizes and flags in capitals are constants."""
    constants = {**FLAGS, **constants}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        pointer = "*" + dtype if name in OF_LOGITS else POINTERS.get(name, "*fp32")
        number = "i32" if name.endswith("stride") else "fp32" if name in NUMBERS else pointer
        signature[name] = "constexpr" if name in constants else number
        if name not in constants and number != "fp32":
            aligned[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("epilogue", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = {"V": 32768, "V_T": 32768, "BLOCK": 4096, "CAPPED": False, "TOGETHER": True}
    all_of_it = {"V": 50257, "V_T": 50000, "BLOCK": 4096, "CAPPED": True, "TOGETHER": False}
    for dtype, sizes, arch in (("bf16", plain, 90), ("fp32", all_of_it, 80)):
        hard = not sizes["TOGETHER"]
        one = compiled(module.dense_epilogue, dtype, arch, TEACHER_CAPPED=hard, TEMPERED=hard, **sizes)
        two = compiled(module.sparse_epilogue, dtype, arch, TAIL=hard, K=28, K_BLOCK=32, **sizes)
        three = compiled(module.sparse_epilogue, dtype, arch, TAIL=True, K=16, K_BLOCK=16, **sizes)
        for name, kernel in (("dense", one), ("sparse", two), ("bucket", three)):
            print(name, dtype, arch, len(kernel.asm["cubin"]))
