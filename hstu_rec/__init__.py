"""Large-catalogue sequential recommendation: HSTU over item tables sharded by TorchRec.

Names are loaded when first used: the encoder needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu_rec.config import RunConfig
    from hstu_rec.encoder import EncoderConfig, HSTUEncoder
    from hstu_rec.hstu import HSTU
    from hstu_rec.ops import jagged_attention
    from hstu_rec.recommender import Recommender
    from hstu_rec.serving import ServingModel, load_bundle
    from hstu_rec.trainer import evaluate_run, train

__version__ = "0.1.0"
__all__ = [
    "HSTU",
    "EncoderConfig",
    "HSTUEncoder",
    "Recommender",
    "RunConfig",
    "ServingModel",
    "evaluate_run",
    "jagged_attention",
    "load_bundle",
    "train",
]

_MODULE_OF = {
    "HSTU": "hstu",
    "EncoderConfig": "encoder",
    "HSTUEncoder": "encoder",
    "Recommender": "recommender",
    "RunConfig": "config",
    "ServingModel": "serving",
    "evaluate_run": "trainer",
    "jagged_attention": "ops",
    "load_bundle": "serving",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hstu_rec' has no attribute {name!r}")
    return getattr(import_module(f"hstu_rec.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
