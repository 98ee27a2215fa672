"""The HTTP application of apps/serve.py: requests in, answers or a sentence out."""

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse

import hstu_rec
from hstu_rec.answers import Answer, Health, Refusal, Request, Together, answers, sentence
from hstu_rec.serving import ServingModel


def application(model: ServingModel, max_together: int) -> FastAPI:
    """POST /recommend, GET /health and /docs; what is wrong with a request is told by 422 and {"detail": a
    sentence}."""
    app = FastAPI(title="hstu_rec", version=hstu_rec.__version__)
    together = Together(partial(answers, model), max_together)
    name = model.config.about.get("name")
    about = Health(
        name=None if name is None else str(name),
        items=len(model.items),
        version=hstu_rec.__version__,
        uses_query_time=model.uses_query_time,
    )

    @app.post(
        "/recommend",
        response_model=Answer,
        response_model_exclude_unset=True,
        responses={422: {"model": Refusal, "description": "What is wrong, in a sentence"}},
    )
    async def recommend(request: Request) -> dict[str, Any]:
        return await together.ask(request)

    @app.get("/health")
    async def health() -> Health:
        return about

    @app.get("/", include_in_schema=False)
    async def start() -> RedirectResponse:
        return RedirectResponse("docs")  # relative, for proxies that serve it below a path

    @app.exception_handler(ValueError)
    @app.exception_handler(RequestValidationError)
    async def explain(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": sentence(error)}, 422)

    return app
