"""A ranking model: what a user will do with an item, by the user's history and the item (arXiv 2402.17152).

features   what events carry, added to the rows of items      windows  parts of histories, and what is scored
model      RankingModel: HSTU or a pooled history, and heads  scoring  AUC, normalised entropy, GAUC
config     RankRunConfig                                      learner  RankLearner: the loss of a step
training   train_ranker: a run and its report                 loading  load_ranker: its model without TorchRec
"""

from hstu_rec.ranker.features import EventFeatures, Feature
from hstu_rec.ranker.loading import TrainedRanker, load_ranker
from hstu_rec.ranker.model import CachedHistory, RankBatch, RankerConfig, RankingModel

__all__ = [
    "CachedHistory",
    "EventFeatures",
    "Feature",
    "RankBatch",
    "RankerConfig",
    "RankingModel",
    "TrainedRanker",
    "load_ranker",
]
