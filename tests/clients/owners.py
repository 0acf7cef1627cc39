"""The owner of a server, at the browser that a client opens: ticks scopes on the consent page, and allows."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Route

from tests.serving import free_port, serving
from tests.sites import Browser, action_of
from tests.steps import query_of


class Owner:
    """Answers each request of a client with the same choice; `ticks` None leaves the boxes as the page shows them."""

    def __init__(self, ticks: Sequence[str] | None = None) -> None:
        self.ticks = ticks
        self.asked: list[str] = []
        """The scopes that each request of the client named, in its own words."""

    async def answer(self, authorize_url: str) -> httpx2.Response:
        """Open the page, tick, and return the redirect back to the client."""
        self.asked.append(query_of(authorize_url).get("scope", ""))
        async with Browser() as browser:
            page = await browser.open(authorize_url)
            ticked: dict[str, Any] = {} if self.ticks is None else {"scope": list(self.ticks)}
            answer = await browser.allow(page, **ticked)
        assert answer.status_code == 303, answer.text
        return answer

    async def answer_device(self, url: str) -> None:
        """Open the page with a device's code, compare, and go on to the consent page."""
        async with Browser() as browser:
            page = await browser.open(url)
            code = query_of(url)["user_code"]
            assert f'value="{code}"' in page.text
            answer = await browser.http.post(action_of(page), data={"user_code": code})
            allowed = await browser.allow(await browser.open(answer.headers["location"]))
        assert allowed.status_code == 303, allowed.text

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Answer for a client that is another program: it opens this URL, followed by the one of its request."""

        async def opened(request: Request) -> RedirectResponse:
            answer = await self.answer(request.query_params["url"])
            return RedirectResponse(answer.headers["location"], 302)

        async with serving(Starlette(routes=[Route("/", opened)]), free_port()) as url:
            yield f"{url}/?url="
