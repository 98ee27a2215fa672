"""Serves a folder that apps/export.py wrote over HTTP, on a CPU, without TorchRec (requirements/serve.txt).

    python apps/serve.py BUNDLE [key=value ...]

    POST /recommend  {"item_ids": ["x", "y"], "timestamps": [1700000000, 1700000100], "k": 10} gets
                     {"items": [{"item_id": "z", "rank": 1, "score": 0.71}, ...], "num_unknown": 0}
    GET  /health     {"name": "mine", "items": 12101, "version": "0.1.0", "uses_query_time": false}

`help` lists the keys, GET /docs the fields.
"""

import sys
import warnings

try:
    import uvicorn

    from hstu_rec import load_bundle
    from hstu_rec.answers import ServeConfig
    from hstu_rec.config import help_text, load, run_app
    from hstu_rec.web import application
except ModuleNotFoundError as error:
    install = "run `python requirements/install.py serve.txt` (for hstu_rec itself: PYTHONPATH=.)"
    print(f"error: the package {error.name} is missing; {install}", file=sys.stderr)
    sys.exit(2)  # a mistake, as failures has it


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        return print(f"{__doc__}\n{help_text(ServeConfig)}")
    if not arguments or "=" in arguments[0]:
        raise ValueError("give BUNDLE, a folder of apps/export.py, then key=value options")
    config = load(ServeConfig, arguments[1:])
    model = load_bundle(arguments[0], use_index=config.use_index)
    app = application(model, config.max_together)
    warnings.simplefilter("ignore", UserWarning)  # of users without known events: answers tell it
    uvicorn.run(app, host=config.host, port=config.port, limit_concurrency=config.max_waiting)


if __name__ == "__main__":
    run_app(main)
