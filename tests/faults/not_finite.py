"""Puts what is not finite into a step, and reads all that a step changes."""

from contextlib import contextmanager

from hstu_rec import distributed
from hstu_rec.item_table import shards_of


def parts_of(name, value):
    """(name, tensor) of all that this rank holds of nested state, shards by their first row."""
    if isinstance(value, dict):
        for inner, one in value.items():
            yield from parts_of(f"{name}.{inner}", one)
    elif hasattr(value, "to_local") or hasattr(value, "local_shards"):
        yield from ((f"{name} {first}", rows) for rows, first in shards_of(value))
    else:
        yield name, value


def trained(learner):
    """The rows, their optimizer's state, the dense weights and AdamW's state on this rank, by name."""
    return dict(parts_of("", learner.state()))


@contextmanager
def injected(learner, where, value, on_rank):
    """Puts `value` on a rank into the loss, or one element of a gradient: of the rows as they are used, on
    which no other gradient depends, or of a dense parameter."""
    is_here, model = distributed.rank() == on_rank, learner.inputs._model

    def damaged(grad):
        flat = grad.reshape(-1).clone()
        flat[0] = value
        return flat.view_as(grad) if is_here else grad

    def dense(gathered, *inputs):
        if where == "rows":
            gathered.register_hook(damaged)
        loss = whole(gathered, *inputs)
        return loss + value if where == "loss" and is_here else loss

    if isinstance(where, int):
        handle = learner.dense[where].register_hook(damaged)
        yield
        handle.remove()
    else:
        name = "graphs" if model.graphs else "dense"
        whole = getattr(model, name)
        setattr(model, name, dense)
        yield
        setattr(model, name, whole)
