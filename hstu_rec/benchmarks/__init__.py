"""What apps/benchmark.py times or measures: a configuration and a function for each."""

from typing import Any

from hstu_rec.benchmarks.attention import AttentionTimes, attention_times
from hstu_rec.benchmarks.attention_tuning import OptionTimes, option_times
from hstu_rec.benchmarks.candidates import CandidateTimes, candidate_times
from hstu_rec.benchmarks.encoder import EncoderTimes, encoder_times
from hstu_rec.benchmarks.guarding import guard_times
from hstu_rec.benchmarks.loss import LossTimes, loss_times
from hstu_rec.benchmarks.memory import measure_memory
from hstu_rec.benchmarks.ranking import RankingTimes, ranking_times
from hstu_rec.benchmarks.saving import saving_times
from hstu_rec.benchmarks.serving import ServingTimes, serving_times
from hstu_rec.benchmarks.steps import compare_steps, figures_by_epoch, time_epochs
from hstu_rec.config import RunConfig
from hstu_rec.planning import PlannedRun

MEASURES: dict[str, tuple[Any, Any]] = {
    "step": (RunConfig, compare_steps),
    "epoch": (RunConfig, time_epochs),
    "curve": (RunConfig, figures_by_epoch),
    "attention": (AttentionTimes, attention_times),
    "tune": (OptionTimes, option_times),
    "encoder": (EncoderTimes, encoder_times),
    "candidates": (CandidateTimes, candidate_times),
    "loss": (LossTimes, loss_times),
    "ranking": (RankingTimes, ranking_times),
    "guards": (RunConfig, guard_times),
    "saving": (RunConfig, saving_times),
    "serving": (ServingTimes, serving_times),
    "memory": (PlannedRun, measure_memory),
}
