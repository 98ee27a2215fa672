"""The grouped back end against the loop that specifies it, in float64, outputs and gradients by name."""

import pytest
import torch

from hstu_rec.ops import (
    grouped,
    jagged_attention,
    jagged_attention_reference,
    jagged_layout,
    time_bucket,
)
from hstu_rec.ops.grouped import length_groups

LENGTHS = {
    "one event": [1],
    "empty users": [0, 3, 0, 0, 5, 0],
    "odd": [1, 63, 2, 17, 17, 0, 33],
    "nobody": [0, 0],
    "no user": [],
}


def make_inputs(lengths, heads=3, attention=5, value=7, bias_rows=1, positions=40):
    torch.manual_seed(7)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    tensors = {
        "q": leaf(total, heads, attention),
        "k": leaf(total, heads, attention),
        "v": leaf(total, heads, value),
        "position_bias": leaf(bias_rows, positions),
        "time_bias": leaf(bias_rows, 129),
    }
    times = torch.randint(0, 10**9, (total,)).sort().values
    return tensors, offsets, times


def assert_equal_with_every_gradient(ours, expected, tensors):
    """Outputs, and by name the gradients that they give `tensors`."""
    results = []
    for out in (ours, expected):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), list(tensors.values()), allow_unused=True)
        results.append([out, *grads])
    for name, mine, theirs in zip(["out", *tensors], *results, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(
            mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("bias_rows", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("max_kept", [2**20, 0], ids=["kept", "made again"])
def test_grouped_attention_equals_the_reference_with_every_gradient(
    monkeypatch, kind, bias_rows, lengths, max_kept
):
    monkeypatch.setattr(grouped, "MAX_KEPT_ENTRIES", max_kept)
    tensors, offsets, times = make_inputs(lengths, bias_rows=bias_rows)
    settings = {"timestamps": times, "query_times": times + 977, "kind": kind, "scale": 0.3}
    ours, expected = (
        function(**tensors, offsets=offsets, **settings)
        for function in (jagged_attention, jagged_attention_reference)
    )
    assert_equal_with_every_gradient(ours, expected, tensors)


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("bias_rows", [1, 3])
@pytest.mark.parametrize("window", [0, 1, 6, 100])
@pytest.mark.parametrize(
    "num_targets", [None, [0, 0, 0, 0, 0], [1, 0, 9, 4, 2]], ids=["history", "none", "candidates"]
)
def test_candidates_and_windows_equal_the_reference_with_every_gradient(
    kind, bias_rows, window, num_targets
):
    tensors, offsets, times = make_inputs([5, 0, 9, 21, 20], bias_rows=bias_rows, positions=12)
    seen = {
        "window": window,
        "num_targets": None if num_targets is None else torch.tensor(num_targets),
    }
    layout = jagged_layout(offsets, 3, times, times + 977, **seen)
    ours = jagged_attention(**tensors, offsets=offsets, kind=kind, scale=0.3, layout=layout)
    expected = jagged_attention_reference(
        **tensors,
        offsets=offsets,
        timestamps=times,
        query_times=times + 977,
        kind=kind,
        scale=0.3,
        **seen,
    )
    assert_equal_with_every_gradient(ours, expected, tensors)


def test_a_history_without_candidates_is_plain_attention():
    tensors, offsets, times = make_inputs([5, 0, 9])
    plain, none = (
        jagged_layout(offsets, 3, times, num_targets=targets)
        for targets in (None, torch.tensor([0, 0, 0]))
    )
    found = [
        jagged_attention(**tensors, offsets=offsets, scale=0.3, layout=layout)
        for layout in (plain, none)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ({"window": -1}, "window must be at least 0; got -1"),
        (
            {"num_targets": torch.tensor([1])},
            r"num_targets must be an int64 tensor \[2\], .* got Tensor torch.int64 \[1\]",
        ),
        (
            {"num_targets": torch.tensor([0, 5])},
            r"within 0..4, the rows of user 1 of the batch; got 5",
        ),
        (
            {"num_targets": torch.tensor([-1, 2])},
            r"within 0..3, the rows of user 0 of the batch; got -1",
        ),
        ({"num_targets": [0, 1]}, r"must be an int64 tensor \[2\], .* got list torch.int64 \[2\]"),
        ({"num_targets": torch.tensor([0.0, 1.0])}, "got Tensor torch.float32"),
    ],
)
def test_candidates_and_windows_that_cannot_be_are_refused(seen, problem):
    with pytest.raises(ValueError, match=problem):
        jagged_layout(torch.tensor([0, 3, 7]), 2, **seen)


def test_groups_hold_every_event_once_and_waste_little():
    lengths = torch.randint(0, 51, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    groups = length_groups(lengths)
    assert sorted(u for g in groups for u in g) == [u for u, n in enumerate(lengths) if n]
    padded = sum(len(g) * lengths[g[0]] ** 2 for g in groups)
    assert padded < 1.3 * sum(n * n for n in lengths)


def test_time_buckets_follow_the_published_formula():
    seconds = torch.tensor([0, 1, -1, 2, 60, 86_400, -86_400, 10**9])
    assert time_bucket(seconds).tolist() == [0, 0, 0, 2, 13, 37, 37, 68]


def test_a_time_bias_without_timestamps_is_refused():
    tensors, offsets, _ = make_inputs([3])
    with pytest.raises(ValueError, match="without timestamps"):
        jagged_attention(**tensors, offsets=offsets, scale=1.0)
