"""Writes the best checkpoint of a finished run as a folder to share: JSON, safetensors and parquet.

    python apps/export.py RUN_FOLDER OUT [key=value ...]

It needs no GPU. hstu_rec.load_bundle(OUT) recommends with it on a CPU, in own ids. `help` lists the keys.
"""

from pathlib import Path

from hstu_rec.approximate import index_sentence, int8_sentence
from hstu_rec.config import help_text, load, run_app
from hstu_rec.export import ExportConfig, export


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        print(f"{__doc__}\n{help_text(ExportConfig)}")
        return
    if len(arguments) < 2 or "=" in arguments[0] or "=" in arguments[1]:
        given = " ".join(arguments) or "nothing"
        raise ValueError(f"give RUN_FOLDER and OUT, then key=value options; got {given}")
    run, output, *options = arguments
    config = export(Path(run), Path(output), load(ExportConfig, options))
    size = sum(file["size"] for file in config.files.values())
    print(f"wrote    {output}: {config.num_items:,} items, {size / 2**20:.1f} MiB", flush=True)
    for name, in_words in (("int8", int8_sentence), ("index", index_sentence)):
        if measured := config.about.get(name):
            print(f"{name:8} {in_words(measured)}", flush=True)


if __name__ == "__main__":
    run_app(main)
