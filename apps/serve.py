"""Serves a folder that apps/export.py wrote over HTTP, on a CPU, without TorchRec (requirements/serve.txt).

    python apps/serve.py BUNDLE [key=value ...]

    POST /recommend  {"item_ids": ["x", "y"], "timestamps": [1700000000, 1700000100], "k": 10} gets
                     {"items": [{"item_id": "z", "rank": 1, "score": 0.71}, ...], "num_unknown": 0}
    GET  /health     {"name": "mine", "items": 12101, "version": "0.1.0", "uses_query_time": false}

`help` lists the keys, GET /docs the fields.
"""

import warnings
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from hstu_rec import __version__, load_bundle
from hstu_rec.answers import Request, ServeConfig, Together, answers, sentence
from hstu_rec.config import help_text, load, run_app
from hstu_rec.serving import ServingModel


def server(model: ServingModel, max_together: int) -> FastAPI:
    """The application; what is wrong with a request is told by 422 and {"detail": a sentence}."""
    app, together = FastAPI(), Together(partial(answers, model), max_together)
    about = {"name": model.config.about.get("name"), "items": len(model.items)}
    about |= {"version": __version__, "uses_query_time": model.uses_query_time}

    @app.post("/recommend")
    async def recommend(request: Request) -> dict[str, Any]:
        return await together.ask(request)

    app.get("/health")(lambda: about)

    @app.exception_handler(ValueError)
    @app.exception_handler(RequestValidationError)
    async def explain(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": sentence(error)}, 422)

    return app


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        return print(f"{__doc__}\n{help_text(ServeConfig)}")
    if not arguments or "=" in arguments[0]:
        raise ValueError("give BUNDLE, a folder of apps/export.py, then key=value options")
    config = load(ServeConfig, arguments[1:])
    model = load_bundle(arguments[0], use_index=config.use_index)
    app = server(model, config.max_together)
    warnings.simplefilter("ignore", UserWarning)  # of users without known events: answers tell it
    uvicorn.run(app, host=config.host, port=config.port, limit_concurrency=config.max_waiting)


if __name__ == "__main__":
    run_app(main)
