"""Makes events whose best possible result is known.

    python apps/make_events.py catalogue OUT.parquet [key=value ...]    a planted rule, of any size
    python apps/make_events.py dirichlet OUT.parquet [key=value ...]    a Dirichlet process a user
    python apps/make_events.py counting OUT.parquet [key=value ...]     an answer that a count decides

It prints the best Recall@10 that is possible on what it makes. apps/prepare.py makes a dataset folder of
OUT.parquet. The last two are data for configs/intensity_silu.yaml and its like. `help` lists the keys.
"""

from collections.abc import Sequence
from pathlib import Path

from hstu_rec.config import help_text, load, run_app
from hstu_rec.data.intensity import (
    CountingConfig,
    DirichletConfig,
    best_counting_recall,
    best_recall,
    counting_events,
    dirichlet_events,
)
from hstu_rec.data.known_best import best_catalogue_recall
from hstu_rec.data.synthetic import SyntheticConfig, event_tables, write_events

KINDS = {
    "catalogue": (SyntheticConfig, event_tables, best_catalogue_recall),
    "dirichlet": (DirichletConfig, dirichlet_events, best_recall),
    "counting": (CountingConfig, counting_events, best_counting_recall),
}


def main(arguments: Sequence[str]) -> None:
    """Writes the events of kind arguments[0] to arguments[1]."""
    if len(arguments) and arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        for kind, (schema, _, _) in KINDS.items():
            print(f"{kind}\n{help_text(schema)}")
        return
    if len(arguments) < 2 or arguments[0] not in KINDS or "=" in arguments[1]:
        given = " ".join(arguments) or "nothing"
        kinds = " or ".join(KINDS)
        raise ValueError(f"give {kinds}, OUT.parquet, then key=value; got {given}")
    kind, output, *options = arguments
    if Path(output).exists():
        raise ValueError(f"{output} is already there; remove it, or give another file")
    schema, make, best_of = KINDS[kind]
    config = load(schema, options)
    num_events, best = write_events(make(config), output), best_of(config, 10)
    known = ", ".join(f"{what} {value:.4f}" for what, value in best.items())
    print(f"wrote    {output}: {num_events:,} events\nbest Recall@10 of who knows    {known}")


if __name__ == "__main__":
    run_app(main)
