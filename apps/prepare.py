"""Makes a dataset folder of event files.

    python apps/prepare.py INPUT OUT [key=value ...]
    python apps/prepare.py check=FOLDER [memory_limit=4GB]

INPUT is a file, folder or glob of parquet, CSV or JSON lines (also .gz). OUT must not exist, unless
overwrite=true. `help` lists the keys. For example

    python apps/prepare.py reviews_Beauty_5.json.gz data/beauty preset=amazon2014 kcore=5

`check` looks whether a folder, by this or by another engine, keeps the specification of docs/own-data.md, and
makes the mapped files of one that has items.parquet and sequences.parquet alone.
"""

import sys
from collections.abc import Sequence

from hstu_rec.config import help_text, load, run_app
from hstu_rec.data.check import CheckConfig, check
from hstu_rec.data.prepare import PrepareConfig, prepare, report


def main(arguments: Sequence[str]) -> None:
    """Prepares arguments[0] into arguments[1], or checks a folder, and prints what is there."""
    if len(arguments) and arguments[0] in ("-h", "--help", "help"):
        print(f"{__doc__}\n{help_text(PrepareConfig)}")
        return
    if len(arguments) and arguments[0].startswith("check="):
        config = load(CheckConfig, arguments)
        print(report(check(config.check, config.memory_limit, has_progress=True)))
        print(f"checked  {config.check}", flush=True)
        return
    if len(arguments) < 2 or "=" in arguments[0] or "=" in arguments[1]:
        given = " ".join(arguments) or "nothing"
        raise ValueError(
            f"give INPUT and OUT, then key=value options, or check=FOLDER; got {given}"
        )
    source, output, *options = arguments
    stats = prepare(load(PrepareConfig, options), source, output, has_progress=True)
    print(report(stats))
    print(f"wrote    {output}", flush=True)


if __name__ == "__main__":
    sys.exit(run_app(main))
