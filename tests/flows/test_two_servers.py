"""Two servers on one database are strangers to each other: neither answers, shows nor ends what is the other's."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from mcp.server.auth.provider import AuthorizeError, TokenError
from mcp.shared.auth import InvalidScopeError, OAuthClientInformationFull, OAuthToken
from pydantic import AnyUrl

from oauth_store.database.models import SESSION
from tests.databases import tokens_of
from tests.sites import PASSWORD, Browser, Site, handle_of, site
from tests.steps import REDIRECT_URI, query_of, registered, registration_options


@pytest.fixture
async def sites(database_url: str) -> AsyncIterator[tuple[Site, Site]]:
    """A wiki and a calendar, with one password, on one database."""
    async with AsyncExitStack() as stack:
        wiki, calendar = [await stack.enter_async_context(site(database_url)) for _ in range(2)]
        yield wiki, calendar


def name_at(served: Site, cookie: str) -> str:
    """The name that a server has for the cookie of another one."""
    return f"{cookie.rpartition('_')[0]}_{served.provider.cookies._server}"


async def allowed(served: Site, **metadata: Any) -> tuple[str, OAuthToken]:
    """A client of a server, and its tokens."""
    metadata.setdefault("redirect_uris", [AnyUrl(REDIRECT_URI)])
    client_id = metadata.setdefault("client_id", f"client of {served.url}")
    return client_id, await served.connect(**metadata)


async def test_a_request_is_answered_where_it_was_made(sites: tuple[Site, Site]) -> None:
    """The owner of one server can neither see, allow nor deny what waits at the other."""
    wiki, calendar = sites
    async with Browser() as browser:
        page = await browser.open(await wiki.authorize_url())
        handle = handle_of(page)
        carried = await browser.open(f"{calendar.url}/consent?handle={handle}")
        assert carried.status_code == 403
        for answer in (calendar.provider.approve(handle, subject="owner"), calendar.provider.deny(handle)):
            with pytest.raises(AuthorizeError, match="unknown, expired or already answered"):
                await answer
        redirect = await browser.allow(page)
        assert "code" in query_of(redirect.headers["location"])


async def test_a_browser_that_carries_the_cookie_sees_nothing(sites: tuple[Site, Site]) -> None:
    """A cookie under the name that the other server gives it does not open a request there."""
    wiki, calendar = sites
    async with Browser() as browser:
        page = await browser.open(await wiki.authorize_url())
        (cookie,) = [cookie for cookie in browser.http.cookies.jar if cookie.name.startswith("oauth_store_")]
        name = name_at(calendar, cookie.name)
        carried = await browser.http.get(
            f"{calendar.url}/consent?handle={handle_of(page)}", headers={"cookie": f"{name}={cookie.value}"}
        )
        assert carried.status_code == 410


async def test_the_list_is_of_one_server(sites: tuple[Site, Site]) -> None:
    """/apps shows and ends the grants of its own server, each of them and all of them."""
    wiki, calendar = sites
    _, at_wiki = await allowed(wiki, client_name="Wiki reader")
    _, at_calendar = await allowed(calendar, client_name="Calendar reader")
    (grant_id,) = {row.grant_id for row in await tokens_of(wiki.provider) if row.resource.startswith(wiki.url)}
    async with Browser() as browser:
        page = await browser.sign_in(f"{calendar.url}/apps", PASSWORD)
        assert "Calendar reader" in page.text
        assert "Wiki reader" not in page.text
        answered = await browser.submit(page, {"revoke": grant_id.hex()})
        assert "It was already revoked." in answered.text
        answered = await browser.submit(page, {"revoke": "all", "password": PASSWORD})
        assert "1 app no longer has access." in answered.text
    assert await wiki.provider.verify_token(at_wiki.access_token) is not None
    assert await calendar.provider.verify_token(at_calendar.access_token) is None


async def test_a_session_is_of_one_server(sites: tuple[Site, Site]) -> None:
    """Who signed in at one server is not signed in at the other, though the password is the same."""
    wiki, calendar = sites
    async with Browser() as browser:
        await browser.sign_in(f"{wiki.url}/apps", PASSWORD)
        (session,) = [cookie for cookie in browser.http.cookies.jar if "session" in cookie.name]
        name = name_at(calendar, session.name)
        page = await browser.http.get(f"{calendar.url}/apps", headers={"cookie": f"{name}={session.value}"})
        assert "Sign out" not in page.text
        page = await browser.http.get(f"{wiki.url}/apps")
        assert "Sign out" in page.text
    (row,) = await rows_of_sessions(wiki)
    assert row.resource == f"{wiki.url}/mcp"


async def rows_of_sessions(served: Site) -> list[Any]:
    """The rows of sessions."""
    return [row for row in await tokens_of(served.provider) if row.kind == SESSION]


async def test_a_token_is_revoked_where_it_is_good(sites: tuple[Site, Site]) -> None:
    """A client that has tokens of both servers ends at one what it has there."""
    wiki, calendar = sites
    client_id, tokens = await allowed(wiki)
    async with Browser() as browser:
        for served, lives in ((calendar, True), (wiki, False)):
            form = {"token": str(tokens.refresh_token), "client_id": client_id}
            answer = await browser.http.post(f"{served.url}/revoke", data=form)
            assert answer.status_code == 200
            assert (await wiki.provider.verify_token(tokens.access_token) is not None) is lives


async def test_a_code_is_exchanged_where_it_was_given(sites: tuple[Site, Site]) -> None:
    """The other server does not exchange it."""
    wiki, calendar = sites
    client: OAuthClientInformationFull = await registered(wiki.provider)
    url = await wiki.authorize_url(client_id="other")
    async with Browser() as browser:
        handle = handle_of(await browser.open(url))
    callback = await wiki.provider.approve(handle)
    assert client.client_id
    with pytest.raises(TokenError, match="another resource"):
        await calendar.redeem(url, callback)


@pytest.mark.parametrize("asked", [["read"], ["write"], None])
async def test_scopes_are_those_of_the_server(asked: list[str] | None, database_url: str) -> None:
    """What a client registered for at one server, it is not granted at another that has no such scope."""
    async with (
        site(database_url, client_registration_options=registration_options("read", "write")) as wiki,
        site(database_url, client_registration_options=registration_options("read")) as calendar,
    ):
        await registered(wiki.provider, client_id="both", scope="read write")
        client = await calendar.provider.get_client("both")
        assert client is not None
        if asked == ["write"]:
            with pytest.raises(InvalidScopeError, match="write"):
                client.validate_scope("write")
        else:
            assert client.validate_scope(None if asked is None else " ".join(asked)) == ["read"]
