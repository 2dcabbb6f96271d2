"""GET /dashboard: one page that draws the server's own /metrics, live.

The page consists of plain ES modules and one chart library (static/vendor, see server/vendor). Its
content-security policy lets it request from this host only. It uses relative addresses, so it also
works behind a proxy that serves the API below a path.
"""

from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).with_name("static")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers ask each time, by ETag, whether the file has changed
}


def attach_dashboard(app: FastAPI) -> None:
    """Add the page and its files, which are static and say nothing about the model."""
    files = StaticFiles(directory=STATIC)

    async def answer(path: str, request: Request) -> Response:
        response = await files.get_response(path, request.scope)
        response.headers.update(HEADERS)
        return response

    @app.get("/dashboard", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await answer("index.html", request)

    @app.get("/dashboard/", include_in_schema=False)
    async def without_slash() -> Response:
        return RedirectResponse("../dashboard")

    @app.get("/dashboard/{path:path}", include_in_schema=False)
    async def asset(path: str, request: Request) -> Response:
        return await answer(path, request)
