"""The kernels compile for Hopper, which no interpreter shows; no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Triton asks its driver for the target alone, when a kernel is compiled and not started.
SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from hstu_rec.ops import triton as kernels
from hstu_rec.ops import triton_options as options_of
from hstu_rec.ops import triton_softmax as softmax
from hstu_rec.ops.triton_layout import block_layout

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cuda)

driver.set_active(Hopper())
times, table = torch.arange(256), torch.empty(2, 512)
half = torch.bfloat16
for dtype, width, is_rich in (
    (torch.float32, 64, False), (half, 64, False), (half, 128, False), (torch.float16, 256, False),
    (torch.float32, 256, False), (half, 128, True), (half, 256, True),
):
    layout = block_layout(
        torch.tensor([0, 256]), times * 2**33 if is_rich else times, None, dtype,
        num_targets=torch.tensor([9]) if is_rich else None, window=50 * is_rich,
    )
    q, sums = torch.empty(256, 2, width, dtype=dtype), torch.empty(256, 2, width)
    for by_bucket, rows in ((table, None), (table, table), (None, None)):
        x = kernels.inputs(
            q, q, q, table, by_bucket, layout.now, layout.then, logsumexp=rows, delta=rows,
            offsets=layout.offsets, num_seen=layout.num_seen, window=layout.window, is_sorted=1,
            users=layout.query_users, begins=layout.query_begins, scale=0.1,
        )
        has_position, ends = by_bucket is not None, (table, table, 513)
        of_rows, block = [q, q, q, q], layout.block
        forward = options_of.forward_options(x, of_rows, block, has_position)
        of_queries = options_of.query_options(x, of_rows, block, has_position)
        parts = options_of.parts_of(x, dtype)
        modes = [
            options_of.backward_options(x, of_rows, block, has_position, *mode, part)
            for mode in ((False, False), (True, False), (False, True)) for part in parts
        ]
        for made in (
            kernels.forward.warmup(
                x, *options_of.forward_rows(of_rows[:3], forward), q, **forward, grid=(1,)
            ),
            kernels.backward_queries.warmup(
                x, *of_rows, q, *ends, **options_of.repeatable_options(modes[0]), grid=(1,)
            ),
            kernels.query_grads.warmup(
                x, *options_of.forward_rows(of_rows, of_queries), q, **of_queries, grid=(1,)
            ),
            *(
                kernels.backward.warmup(
                    x, *options_of.backward_rows(of_rows, sums, mode), q, q, *ends, 64, **mode, grid=(1,)
                )
                for mode in modes
            ),
        ):
            print(made.name, len(made.asm["cubin"]), made.metadata.shared)

for precision, dtype, width in (
    ("ieee", torch.float32, 128), ("tf32", torch.float32, 128), ("tf32", half, 128),
    ("ieee", torch.float32, 256), ("tf32", half, 256),
):
    torch.backends.cuda.matmul.fp32_precision = precision
    rows, sums = torch.empty(512, width, dtype=dtype), torch.empty(512)
    x = softmax.Scored(rows, rows, sums, torch.arange(512))
    block, step, options = softmax._form(x, softmax.SUMS)
    sizes = {"M": block, "N": step, "IS_BOUNDED": False}
    many = [softmax.sums_of_queries.warmup(
        x, sums, sums, sums, 512, 512, width, 512, **sizes, **options, grid=(1,)
    )]
    block, step, options = softmax._form(x, softmax.GRADS)
    many.append(softmax.grads_of_candidates.warmup(
        x, sums, sums, 512, 512, width, 512, M=step, N=block, **options, grid=(1,)
    ))
    for made in many:
        print(made.name, len(made.asm["cubin"]), made.metadata.shared)
"""
# Bytes of shared memory that a program of Hopper can have.
MAX_SHARED = 232_448


def test_every_kernel_compiles_for_hopper_with_and_without_bias() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [line.split() for line in done.stdout.splitlines()]
    assert len(made) == 154 and min(int(size) for _, size, _ in made) > 1000
    assert all(int(shared) <= MAX_SHARED for *_, shared in made), [
        m for m in made if int(m[2]) > MAX_SHARED
    ]
