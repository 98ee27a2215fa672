"""Runs the script that the first argument names, with the arguments that follow it."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Becomes `python SCRIPT ARGUMENTS`; exits with a sentence when the first argument is no file."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--"]:
        del arguments[0]
    if not arguments or not Path(arguments[0]).is_file():
        given = f"'{arguments[0]}' is no file" if arguments else "no script was given"
        sys.exit(
            f"error: {given}; name a script of apps/, for example: "
            "torchx run -s local_cwd dist.ddp -j 1x2 apps/train.py configs/demo.yaml"
        )
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
