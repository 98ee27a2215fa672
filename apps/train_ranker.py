"""Trains a ranking model (what a user does with an item) and prints AUC, normalised entropy and GAUC.

    python apps/prepare.py ratings.parquet data/ratings 'feature_columns=[rating]' split=share
    python apps/train_ranker.py [CONFIG.yaml ...] [key=value ...]

`help` lists the keys. torchrun and torchx launch it like apps/train.py.
"""

from hstu_rec.config import help_text, load, run_app
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.training import train_ranker


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        print(f"{__doc__}\n{help_text(RankRunConfig)}")
        return
    train_ranker(load(RankRunConfig, arguments))


if __name__ == "__main__":
    run_app(main)
