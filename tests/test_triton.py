"""The fused kernel against the float64 loop: as exact as plain torch in the same precision.

On a GPU as compiled, elsewhere in Triton's interpreter, which knows no bfloat16 products.
"""

from functools import partial
from statistics import fmean

import pytest
import torch

from hstu_rec import EncoderConfig, HSTUEncoder
from hstu_rec.ops import jagged_attention, jagged_attention_reference, jagged_layout
from hstu_rec.ops.reference import TIME_BUCKET_WIDTH
from hstu_rec.ops.triton import (
    bucket_table,
    distance_table,
    fused_attention,
    fused_attention_backward,
    triton_attention,
)
from hstu_rec.ops.triton_layout import block_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
LENGTHS = {
    "one event": [1],
    "empty users": [0, 3, 0, 0, 5, 0],
    "odd": [1, 31, 2, 17, 16, 0, 33],
    "nobody": [0, 0],
    "no user": [],
}
# Histories of several blocks as they are chosen, and widths of heads.
LONG = [400, 130, 64, 1] if DEVICE.type == "cuda" else [140, 1]
WIDTHS = [32, 128, 256] if DEVICE.type == "cuda" else [32]
# Seconds from an event to the time that its query looks back from.
QUERY_DELAY = 977
NAMES = ("q", "k", "v", "position_bias", "time_bias")


def make_inputs(lengths, heads=2, attention=5, value=7, bias_rows=1, positions=40, seed=7):
    """(float64 inputs by name, offsets, times); q, k and v are views of one tensor, as in a layer."""
    torch.manual_seed(seed)
    widths = [heads * attention, heads * attention, heads * value]
    q, k, v = torch.randn(sum(lengths), sum(widths), dtype=torch.float64).split(widths, dim=1)
    tables = [torch.randn(bias_rows, n, dtype=torch.float64) for n in (positions, 129)]
    rows = [x.unflatten(1, (heads, -1)) for x in (q, k, v)]
    times = torch.randint(0, 10**7, (sum(lengths),)).sort().values
    return (
        dict(zip(NAMES, (*rows, *tables), strict=True)),
        torch.tensor([0, *lengths]).cumsum(0),
        times,
    )


def copied(x, device, dtype):
    """A leaf of the same strides."""
    copy = torch.empty_strided(x.shape, x.stride(), device=device, dtype=dtype)
    return copy.copy_(x).requires_grad_()


def results(function, inputs, dtype, device="cpu", **settings):
    """{"out" or the input whose gradient it is: float64 tensor on CPU}"""
    leaves = {n: None if x is None else copied(x, device, dtype) for n, x in inputs.items()}
    out = function(**leaves, **settings)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weight.to(device, dtype)).sum().backward()
    grads = {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in leaves.items()
        if x is not None
    }
    return {name: x.detach().cpu().double() for name, x in {"out": out, **grads}.items()}


def compared(inputs, offsets, times, dtype=torch.float32, block=16, kind="silu", **seen):
    """{name: (what the kernel found, what float64 found, error of plain torch in that precision)}"""
    query_times = times + QUERY_DELAY
    shared = {"scale": 0.3, "kind": kind}
    settings = {"timestamps": times, "query_times": query_times, **seen, **shared}
    exact = results(jagged_attention_reference, inputs, torch.float64, offsets=offsets, **settings)
    layout = jagged_layout(offsets, inputs["q"].shape[1], times, query_times, **seen)
    plain = results(jagged_attention, inputs, dtype, offsets=offsets, layout=layout, **shared)
    layout = block_layout(offsets, times, query_times, dtype, block, **seen).to(DEVICE)
    fused = results(triton_attention, inputs, dtype, DEVICE, layout=layout, **shared)
    return {name: (fused[name], want, error(plain[name], want)) for name, want in exact.items()}


def error(found, expected):
    """Relative to the size of all, which is 0 for the scores' gradients of a softmax over one key."""
    return float((found - expected).norm() / expected.norm().clamp(min=0.1))


def assert_as_exact_as_plain_torch(*draws, eps):
    """In the mean of what `compared` gave for several draws."""
    for name in draws[0]:
        errors, errors_of_plain = [], []
        for fused, exact, error_of_plain in (found[name] for found in draws):
            assert fused.shape == exact.shape, name
            assert torch.isfinite(fused).all(), name
            errors.append(error(fused, exact))
            errors_of_plain.append(error_of_plain)
        # A position's gradient is a sum over all pairs, in the order in which programs come.
        allowed = eps * (10 if name == "position_bias" else 1)
        assert fmean(errors) <= 1.5 * fmean(errors_of_plain) + allowed, name


@pytest.fixture
def repeatable():
    """The same bits in every run; and memory that is not written yet holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize(
    "without", [(), NAMES[3:], NAMES[3:4], NAMES[4:]], ids=lambda names: f"no {names}"
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_result_is_as_exact_as_plain_torch(lengths, without, kind):
    inputs, offsets, times = make_inputs(lengths)
    inputs |= dict.fromkeys(without)
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times, kind=kind), eps=5e-7)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("lengths", [[0, 0], []], ids=["nobody", "no user"])
def test_nobody_has_tables_of_their_heads(lengths):
    inputs, offsets, times = make_inputs(lengths, bias_rows=2)
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times), eps=5e-7)


@pytest.mark.parametrize("is_repeatable", [False, True])
def test_rows_in_any_order_of_memory(is_repeatable):
    inputs, offsets, times = make_inputs(LENGTHS["odd"])
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    torch.use_deterministic_algorithms(is_repeatable)
    try:
        found = compared(inputs, offsets, times)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_as_exact_as_plain_torch(found, eps=5e-7)


@pytest.mark.parametrize("kind", ["silu", "softmax"])
def test_a_large_bias_is_no_overflow(kind):
    inputs, offsets, times = make_inputs(LENGTHS["odd"])
    inputs["position_bias"] += 150
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times, kind=kind), eps=1e-5)


@pytest.mark.parametrize(
    ("heads", "attention", "value", "bias_rows", "positions", "block"),
    [(3, 16, 32, 3, 200, 32), (1, 33, 8, 1, 9, 16), (2, 64, 64, 2, 17, 64), (4, 1, 1, 1, 1, 16)],
)
def test_any_widths_heads_tables_and_blocks(heads, attention, value, bias_rows, positions, block):
    inputs, offsets, times = make_inputs(
        LENGTHS["odd"], heads, attention, value, bias_rows, positions
    )
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times, block=block), eps=5e-7)


@pytest.mark.parametrize("is_repeatable", [False, True])
@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("without", [(), NAMES[3:]], ids=lambda names: f"no {names}")
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("num_targets", [None, [1, 0, 2, 40, 3]], ids=["history", "candidates"])
def test_candidates_and_windows(num_targets, window, without, kind, is_repeatable):
    inputs, offsets, times = make_inputs([1, 0, 2, 57, 40], heads=1)
    inputs |= dict.fromkeys(without)
    targets = None if num_targets is None else torch.tensor(num_targets)
    torch.use_deterministic_algorithms(is_repeatable)
    try:
        seen = {"num_targets": targets, "window": window}
        found = compared(inputs, offsets, times, kind=kind, **seen)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_as_exact_as_plain_torch(found, eps=5e-7)


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("spread", [1, 10**7], ids=["few buckets", "many buckets"])
def test_blocks_far_apart(spread, kind):
    inputs, offsets, times = make_inputs([150, 3], heads=2, positions=90)
    times = torch.arange(153) * 1000 + torch.randint(0, spread, (153,)).sort().values
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times, kind=kind), eps=5e-7)


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_as_exact_as_plain_torch(dtype, kind):
    inputs, offsets, times = make_inputs(LENGTHS["odd"], attention=32, value=32)
    # The inputs' own rounding is no error of either.
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times, dtype, kind=kind), eps=1e-5)


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("has_targets", [False, True], ids=["history", "candidates"])
@pytest.mark.parametrize("order", ["in order", "shuffled"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_blocks_as_they_are_chosen(dtype, width, order, has_targets, kind):
    targets = torch.tensor(LONG) // 7 if has_targets else None
    draws = []
    # The gradients of a softmax's scores add up to 0: of one draw, their sums by time may be all rounding.
    for seed in range(4 if kind == "softmax" else 1):
        inputs, offsets, times = long_inputs(width, dtype, seed)
        if order == "shuffled":
            times = times[torch.randperm(len(times))]
        draws.append(compared(inputs, offsets, times, dtype, 0, kind, num_targets=targets))
    assert_as_exact_as_plain_torch(*draws, eps=1e-5)


def wide_inputs(attention, value):
    inputs, offsets, times = make_inputs(LENGTHS["odd"], attention=attention, value=value)
    inputs = {name: x.to(HALVES[0]).double() for name, x in inputs.items()}
    inputs["q"] /= attention**0.5
    return inputs, offsets, times


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize(("attention", "value"), [(130, 20), (20, 130)])
def test_wide_heads_in_three_parts(attention, value, kind):
    inputs, offsets, times = wide_inputs(attention, value)
    targets, window = torch.tensor([0, 5, 1, 3, 0, 0, 9]), 12
    found = compared(
        inputs, offsets, times, HALVES[0], kind=kind, num_targets=targets, window=window
    )
    assert_as_exact_as_plain_torch(found, eps=1e-5)


@pytest.mark.usefixtures("repeatable")
def test_wide_heads_are_repeatable():
    first, again = (compared(*wide_inputs(130, 130), HALVES[0], block=128) for _ in range(2))
    assert_as_exact_as_plain_torch(first, eps=1e-5)
    for name, (fused, *_) in first.items():
        assert torch.equal(fused, again[name][0]), name


def long_inputs(width, dtype, seed=7):
    """Inputs of several blocks, exact in `dtype`."""
    inputs, offsets, _ = make_inputs(LONG, 2, width, width, positions=300, seed=seed)
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    inputs["q"] /= width**0.5  # scores of the size that they have in a layer
    # Multiples, so that there are few differences: none at a bucket's edge, where it may fall to either side.
    times = 9000 * torch.randint(0, 3, (sum(LONG),)).cumsum(0)
    seconds = (9000 * torch.arange(-2 * sum(LONG), 2 * sum(LONG)) + QUERY_DELAY).double()
    buckets = seconds.abs().log() / TIME_BUCKET_WIDTH
    assert float((buckets - buckets.round()).abs().min()) > 1e-5
    return inputs, offsets, times


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("bias_rows", [1, 2])
def test_repeatable_sums_are_the_same_bits_and_as_exact(bias_rows):
    inputs, offsets, times = make_inputs(LENGTHS["odd"], bias_rows=bias_rows)
    first, again = (compared(inputs, offsets, times) for _ in range(2))
    assert_as_exact_as_plain_torch(first, eps=5e-7)
    for name, (fused, *_) in first.items():
        assert torch.equal(fused, again[name][0]), name


def copied_into_nan(x, device, dtype, edges=(32, 1, 3)):
    """A leaf within a larger tensor of NaN."""
    edges = edges[-x.ndim :]
    around = torch.full([n + 2 * e for n, e in zip(x.shape, edges, strict=True)], torch.nan)
    inside = tuple(slice(e, e + n) for n, e in zip(x.shape, edges, strict=True))
    return around.to(device, dtype)[inside].copy_(x).requires_grad_()


@pytest.mark.usefixtures("repeatable")
def test_what_lies_around_the_inputs_is_not_read(monkeypatch):
    inputs, offsets, times = make_inputs(LENGTHS["odd"])
    expected = compared(inputs, offsets, times)
    monkeypatch.setattr("tests.test_triton.copied", copied_into_nan)
    found = compared(inputs, offsets, times)
    for name, (fused, *_) in found.items():
        torch.testing.assert_close(fused, expected[name][0], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("width", WIDTHS)
def test_aligned_rows_within_nan_are_read_alone(width, monkeypatch):
    """Which Hopper's tensor memory accelerator reads, beyond a history's end too."""
    dtype = HALVES[-1]
    inputs, offsets, times = long_inputs(width, dtype)
    around = partial(copied_into_nan, edges=(32, 1, 8))
    monkeypatch.setattr("tests.test_triton.copied", around)
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times, dtype, 0), eps=1e-5)


def test_times_far_apart_keep_their_buckets():
    inputs, offsets, _ = make_inputs([9])
    times = torch.arange(9) * 2**55
    assert_as_exact_as_plain_torch(compared(inputs, offsets, times), eps=5e-7)


@pytest.mark.parametrize("is_softmax", [False, True])
def test_the_operator_keeps_what_torch_compile_asks_of_it(is_softmax):
    inputs, offsets, times = make_inputs([3, 20])
    x = block_layout(offsets, times, block=16).to(DEVICE)
    leaves = [t.to(DEVICE, torch.float32).requires_grad_() for t in inputs.values()]
    tables = [distance_table(leaves[3], x, 1.0).detach(), bucket_table(leaves[4], 1.0).detach()]
    tables = [table.requires_grad_() for table in tables]
    blocks = (x.query_users, x.query_begins, x.key_users, x.key_begins, x.now, x.then)
    arguments = (*leaves[:3], *tables, x.offsets, None, *blocks, 0.3, 16, 0, True, True, is_softmax)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused_attention, arguments, test_utils=checks)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    out, logsumexp = fused_attention(*arguments)
    arguments = (torch.ones_like(out), out, logsumexp, *arguments)
    torch.library.opcheck(fused_attention_backward, arguments, test_utils=checks)


def test_a_time_bias_without_timestamps_is_refused():
    inputs, offsets, _ = make_inputs([3])
    layout = jagged_layout(offsets, 2, kernel="triton")
    with pytest.raises(ValueError, match="without timestamps"):
        jagged_attention(**inputs, offsets=offsets, scale=1.0, layout=layout)


@pytest.mark.parametrize(("query_time", "attention"), [("own", "silu"), ("next", "softmax")])
def test_an_encoder_is_the_same_with_either_kernel(query_time, attention):
    _, offsets, times = make_inputs(LENGTHS["odd"])
    x = torch.randn(len(times), 12, device=DEVICE)
    found = []
    for kernel in ("grouped", "triton"):
        torch.manual_seed(1)
        config = EncoderConfig(
            dim=12,
            dropout=0.0,
            attention=attention,
            attention_kernel=kernel,
            query_time=query_time,
            max_history_len=33,
        )
        encoder = HSTUEncoder(config).to(DEVICE)
        layout = encoder.layout(offsets, times, times + 50).to(DEVICE)
        leaf = x.clone().requires_grad_()
        encoder(leaf, offsets.to(DEVICE), layout=layout).square().sum().backward()
        found.append({name: p.grad for name, p in (("x", leaf), *encoder.named_parameters())})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)
        assert grad.abs().max() > 0, name
