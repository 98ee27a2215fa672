"""The HTTP application of apps/serve.py: requests in, answers or a sentence out."""

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import hstu_rec
from hstu_rec.answers import Request, Together, answers, sentence
from hstu_rec.serving import ServingModel


def application(model: ServingModel, max_together: int) -> FastAPI:
    """POST /recommend and GET /health; what is wrong with a request is told by 422 and {"detail": a
    sentence}."""
    app, together = FastAPI(), Together(partial(answers, model), max_together)
    about = {"name": model.config.about.get("name"), "items": len(model.items)}
    about |= {"version": hstu_rec.__version__, "uses_query_time": model.uses_query_time}

    @app.post("/recommend")
    async def recommend(request: Request) -> dict[str, Any]:
        return await together.ask(request)

    app.get("/health")(lambda: about)

    @app.exception_handler(ValueError)
    @app.exception_handler(RequestValidationError)
    async def explain(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": sentence(error)}, 422)

    return app
