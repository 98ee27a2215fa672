"""The fused softmax against the formula in float64: as exact as the chunked loss in the same precision.

On a GPU as compiled, elsewhere in Triton's interpreter, which knows no bfloat16 products.
"""

import pytest
import torch

from hstu_rec import softmax
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.ops import triton_softmax
from hstu_rec.softmax import Negatives

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bfloat16 has 8 bits; the sums are float32's.
DTYPES = {torch.float32: 1e-5} | ({torch.bfloat16: 4e-2} if DEVICE.type == "cuda" else {})
BOUNDED, UNBOUNDED = ("cosine", 0.05), ("dot", 0.5)


fuses = softmax.fuses


def test_where_the_kernels_are_used():
    assert fuses(True, torch.float32, 256, False)
    assert not fuses(False, torch.float32, 64, False)
    assert not fuses(True, torch.float64, 64, False)
    assert not fuses(True, torch.float32, 257, False)
    assert not fuses(True, torch.float32, 64, True)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The kernels, also where no GPU is; and blocks of several parts."""
    monkeypatch.setattr(softmax, "fuses", lambda *_: True)
    monkeypatch.setattr(triton_softmax, "MIN_STEPS", 1)


def make_inputs(num_positions, num_items, dim, with_weights, is_divided=False):
    torch.manual_seed(0)
    ids = torch.arange(num_items) * 2
    # About half of the targets are among the negatives.
    target_ids = torch.randint(0, 2 * num_items + 1, (num_positions,))
    weights = torch.rand(num_items) * 5 if with_weights else None
    negatives = Negatives(ids, weights, largest_part=num_items if is_divided else 0)
    sizes = num_positions, num_positions, num_items
    leaves = [torch.randn(n, dim) for n in sizes]
    return leaves, target_ids, negatives


def loss_and_grads(config, leaves, target_ids, negatives, dtype, device):
    """The loss and the gradients of its leaves, float64 on CPU."""
    leaves = [leaf.clone().to(device).requires_grad_() for leaf in leaves]
    encoded, targets, rows = leaves
    loss = SampledSoftmax(config)(
        encoded, targets, target_ids.to(device), rows, negatives.to(device), dtype
    )
    loss.backward()
    return [x.detach().cpu().double() for x in (loss, *(leaf.grad for leaf in leaves))]


def formula(config, leaves, target_ids, negatives):
    """The same with all logits in float64."""
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    unit = torch.nn.functional.normalize if config.similarity == "cosine" else torch.clone
    encoded, targets, rows = (unit(leaf) for leaf in leaves)
    logits = encoded @ rows.T / config.temperature
    if negatives.log_weights is not None:
        logits = logits + negatives.log_weights
    own = (encoded * targets).sum(1, keepdim=True) / config.temperature
    logits = logits.masked_fill(target_ids[:, None] == negatives.ids, -torch.inf)
    loss = (torch.cat([own, logits], 1).logsumexp(1) - own[:, 0]).sum()
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(("similarity", "temperature"), [BOUNDED, UNBOUNDED])
@pytest.mark.parametrize(
    ("num_positions", "num_items", "dim"),
    [(300, 500, 8), (1, 200, 64), (130, 3, 33), (5, 129, 200)],
)
def test_kernels_equal_the_formula(
    num_positions, num_items, dim, similarity, temperature, with_weights, dtype
):
    config = LossConfig(similarity=similarity, temperature=temperature)
    inputs = make_inputs(num_positions, num_items, dim, with_weights)
    found = loss_and_grads(config, *inputs, dtype, DEVICE)
    for got, want in zip(found, formula(config, *inputs), strict=True):
        assert want.norm() > 0
        assert (got - want).norm() <= DTYPES[dtype] * want.norm()


@pytest.mark.parametrize("is_divided", [False, True])
def test_an_exponential_beyond_float32_is_not_made(is_divided):
    config = LossConfig(similarity="dot", temperature=0.01)
    inputs = make_inputs(40, 100, 32, False, is_divided)
    found = loss_and_grads(config, *inputs, torch.float32, DEVICE)
    for got, want in zip(found, formula(config, *inputs), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(("num_positions", "num_items"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_score_is_no_loss(num_positions, num_items):
    leaves = [torch.randn(n, 8) for n in (num_positions, num_positions, num_items)]
    ids, negatives = torch.arange(num_positions), Negatives(torch.arange(num_items))
    loss, *grads = loss_and_grads(LossConfig(), leaves, ids, negatives, torch.float32, DEVICE)
    assert abs(loss) < 1e-6
    assert not any(grad.any() for grad in grads)
