"""How the kernels of `hstu_rec.ops.triton` are compiled, and in which form they are given their rows."""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_rec.ops.triton_parts import Inputs

# Products of float32 in three passes of TF32: as exact as float32's own, on the tensor cores.
PRECISION = "tf32x3"
HOPPER = 90
# Widest heads whose gradients a program has room for together.
MAX_WHOLE_WIDTH = 128


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors [T, H, W] as kernels read them; where a row's entries are apart they are copied."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def takes_tma(rows: list[Tensor]) -> bool:
    """Whether Hopper's tensor memory accelerator brings tiles of such rows: aligned, whole powers of two, an
    event's heads together."""
    return (
        _is_hopper()
        and rows[0].dtype != torch.float32
        and all(x.shape[2] == _padded(x.shape[2]) and x.data_ptr() % 16 == 0 for x in rows)
        and all(s > 0 and s * x.element_size() % 16 == 0 for x in rows for s in x.stride()[:2])
        and all(x.stride(0) >= _reach(x) for x in rows)
    )


def forward_rows(rows: list[Tensor], options: dict[str, Any]) -> Any:
    """Arguments for q, k, v of `forward`, and for grad_out as well of `query_grads`."""
    sizes = (options["M"], options["N"], options["N"], options["M"])[: len(rows)]
    return [_described(*each) for each in zip(rows, sizes, strict=True)] if options["TMA"] else rows


def backward_rows(rows: list[Tensor], grad_q: Tensor, options: dict[str, Any]) -> Any:
    """`backward`'s arguments for q, k, v, grad_out and the gradient of q."""
    sizes = options["M"], options["N"], options["N"], options["M"]
    is_alone = options["IS_ALONE"] or options["IS_REPEATABLE"] or options["PART"] != "all"
    own = _described(grad_q, options["M"]) if options["TMA_SUM"] and not is_alone else grad_q
    if not options["TMA"]:
        return [*rows, own]
    return [*(_described(*each) for each in zip(rows, sizes, strict=True)), own]


def _described(x: Tensor, size: int) -> TensorDescriptor:
    """Rows [T, H, W] that are read or written by so many events at a time."""
    return TensorDescriptor(x, [len(x), _reach(x)], [x.stride(0), 1], [size, x.shape[2]])


def _reach(x: Tensor) -> int:
    """From an event's first entry to its last, in rows [T, H, W]."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _is_hopper() -> bool:
    """Whether kernels are compiled for it."""
    target: Any = None if knobs.runtime.interpret else driver.active.get_current_target()
    return target is not None and target.arch == HOPPER


def _options(x: Inputs, dtype: torch.dtype, block: int, has_position: bool) -> dict[str, Any]:
    """What is known when a kernel is compiled, but for the events that it meets at a time."""
    a, v = (_padded(dim) for dim in (x.attention_dim, x.value_dim))
    is_native = not knobs.runtime.interpret
    return {
        "A": a,
        "V": v,
        "FAST": is_native and dtype == torch.bfloat16,
        "NATIVE": is_native,
        "PRECISION": PRECISION,
        "HAS_POSITION": has_position,
        "HAS_WINDOW": x.window > 0,
        # A tensor core takes 64 rows from four warps: eight on a block of 64 would share its columns.
        "num_warps": 4 if block <= 64 and max(a, v) <= 128 else 8,
    }


def forward_options(
    x: Inputs, rows: list[Tensor], block: int, has_position: bool
) -> dict[str, Any]:
    """What `forward` is compiled with: narrow heads leave room for two programs on a processor; keys of few
    instructions come a few at a time, so that more of them are on their way."""
    known = _options(x, rows[0].dtype, block, has_position)
    width, has_tma = max(known["A"], known["V"]), takes_tma(rows)
    if not has_tma:
        step, num_stages = 64 if width == 128 else 32, 3
    elif x.by_bucket is not None:
        step, num_stages = 64, 3 if width <= 128 else 2
    else:
        step, num_stages = (64 if width <= 64 else 32), 4 if width <= 128 else 3
    own = {"M": block, "N": min(block, step), "num_stages": num_stages, "TMA": has_tma}
    return {**known, **own}


def backward_options(
    x: Inputs,
    rows: list[Tensor],
    block: int,
    has_position: bool,
    is_alone: bool = False,
    is_repeatable: bool = False,
    part: str = "all",
) -> dict[str, Any]:
    """What `backward` is compiled with: fewer queries at a time where width and times need the registers.

    With times, wide heads spill more registers when TMA brings the rows (of 128, 280 bytes a thread, 72
    without: 13.5 ms and 10.0; of 256, keys alone, 6.0 and 5.0). Without it other numbers of stages read out
    of range in triton 3.6, as the kernel that it is compared with does.
    """
    dtype = rows[0].dtype
    known = _options(x, dtype, block, has_position)
    width, can_tma = max(known["A"], known["V"]), takes_tma(rows)
    has_tma = can_tma and (width <= 64 or x.by_bucket is None or part == "values")
    is_narrow = width > 64 and (has_tma or x.by_bucket is not None)
    step, num_stages = _wide_step(width) or (32 if is_narrow else 64), 3 if has_tma else 2
    return {
        **known,
        "M": min(block, step),
        "N": block,
        "TMA": has_tma,
        "TMA_SUM": can_tma and width > 64,
        "ONCE": adds_once(dtype, block, min(block, step), known["num_warps"]),
        "IS_ALONE": is_alone,
        "IS_REPEATABLE": is_repeatable,
        "PART": part,
        "num_stages": num_stages,
    }


def parts_of(x: Inputs, dtype: torch.dtype) -> tuple[str, ...]:
    """How often `backward` runs, and for what: heads wider than 128 leave room for one sum of their width,
    over 128 keys, and queries get theirs from `query_grads`.

    One H200, 131k events, four heads, all at once and in three parts: of 256, lengths to 4096, 13.3 ms (over
    64 keys) and 6.6; of 128, lengths to 8192, 5.8 and 5.9, with times 10.0 and 13.6.
    """
    is_wide = max(x.attention_dim, x.value_dim) > MAX_WHOLE_WIDTH and dtype != torch.float32
    return ("keys", "values") if is_wide else ("all",)


def query_options(x: Inputs, rows: list[Tensor], block: int, has_position: bool) -> dict[str, Any]:
    """What `query_grads` is compiled with."""
    known, has_tma = _options(x, rows[0].dtype, block, has_position), takes_tma(rows)
    step = _wide_step(max(known["A"], known["V"])) or 32
    own = {"M": block, "N": min(block, step), "TMA": has_tma, "num_stages": 3 if has_tma else 2}
    return {**known, **own}


def _wide_step(width: int) -> int:
    """Events at a time for which wide heads leave shared memory: half as many before Hopper; 0 for others."""
    if width <= MAX_WHOLE_WIDTH:
        return 0
    return 32 if _is_hopper() else 16


def repeatable_options(of_backward: dict[str, Any]) -> dict[str, Any]:
    """What `backward_queries` is compiled with; wide heads leave room for 64 queries and keys."""
    others = {"M", "TMA", "TMA_SUM", "ONCE", "IS_ALONE", "IS_REPEATABLE", "PART"}
    known = {n: v for n, v in of_backward.items() if n not in others}
    limit = 64 if max(known["A"], known["V"]) > 128 else 128
    return {**known, "N": min(known["N"], limit), "num_stages": 1}


def adds_once(dtype: torch.dtype, block: int, step: int, num_warps: int) -> bool:
    """Whether the warps share out a product's result, as Hopper's do of rows enough; else some hold the same,
    and to add it to memory is left to Triton."""
    is_whole = block >= max(16 * num_warps, 64) and step >= 32
    return _is_hopper() and dtype != torch.float32 and is_whole
