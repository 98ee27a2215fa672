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

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cuda)

driver.set_active(Hopper())
times, sums = torch.arange(256), torch.empty(8)
for dtype in (torch.float32, torch.bfloat16):
    block = kernels.BLOCKS[dtype]
    layout = kernels.block_layout(torch.tensor([0, 256]), times, times, block)
    q, v = torch.empty(256, 2, 64, dtype=dtype), torch.empty(256, 2, 32, dtype=dtype)
    tables = (torch.empty(1, 200), torch.empty(2, 129))
    for given, rows in ((tables, None), (tables, sums), ((None, None), None)):
        x = kernels.inputs(
            q, q, v, *given, grad_out=v, logsumexp=rows, delta=rows, offsets=layout.offsets,
            users=layout.query_users, begins=layout.query_begins, now=layout.now,
            then=layout.then, scale=0.1,
        )
        for kernel, outputs in (
            (kernels.forward, (v,)),
            (kernels.backward_queries, (q, sums, sums)),
            (kernels.backward_keys, (q, v)),
        ):
            own = {"HAS_OWN_ROW": True} if kernel is kernels.backward_queries else {}
            made = kernel.warmup(x, *outputs, **kernels.shape(x, block), **own, grid=(1,))
            print(kernel.__name__, len(made.asm["cubin"]))
"""


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
    sizes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(sizes) == 18 and min(sizes) > 1000
