"""An HTTP server for language models, with the API that OpenAI's clients speak."""

from nanojaxgpt.extras import require_package

for _package in ("h11", "prometheus_client", "pydantic", "starlette", "uvicorn"):
    require_package(_package, "serve", "serve")
