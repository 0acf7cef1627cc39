"""`clients`, `clients add` and `clients remove` on the command line, on every database."""

import asyncio
import json
import logging
import re
import time

import httpx2
import pytest
from fastmcp import FastMCP
from mcp.server.auth.provider import RegistrationError, TokenError
from pydantic import AnyUrl
from sqlalchemy import func, select

from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.cli.app import app
from oauth_store.database.models import Client, Code, Token
from oauth_store.database.purge import purge
from tests.clocks import turned
from tests.commands import run, run_json
from tests.databases import rows_of, transaction, value_of
from tests.house import House
from tests.serving import free_port, serving
from tests.steps import (
    Provider,
    authorization_request,
    authorize,
    new_client,
    pkce,
    query_of,
    registered,
    sign_in,
    token_request,
)
from tests.workers import present_refresh_token

DAY = 24 * 3600
ADD = ["clients", "add", "My app", "--redirect-uri", "https://app.example.com/callback"]


class TestList:
    async def test_who_is_registered(self, house: House, database_url: str) -> None:
        """Each client with its hosts, whether it has a secret, when it was approved, and its live grants."""
        assert run("clients", database=database_url).stdout == "No registered clients.\n"
        await house.grant("ada", "one")
        await house.grant("bob", "one")
        secret = {"token_endpoint_auth_method": "client_secret_post", "client_secret": "secret"}
        await house.provider.register_client(new_client(client_id="two", client_name=None, **secret))
        told = run_json("clients", database=database_url)
        assert told["total"] == 2
        by_id = {client["client_id"]: client for client in told["clients"]}
        one, two = by_id["one"], by_id["two"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", one.pop("created_at"))
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", one.pop("last_approved_at"))
        assert one == {
            "client_id": "one",
            "client_name": "Test client",
            "hosts": ["127.0.0.1"],
            "confidential": False,
            "live_grants": 2,
        }
        assert (two["confidential"], two["last_approved_at"], two["live_grants"]) == (True, None, 0)
        lines = run("clients", database=database_url).stdout.splitlines()
        assert re.split("  +", lines[0]) == ["Client id", "Name", "Host", "Secret", "Registered", "Approved", "Grants"]
        assert any(re.fullmatch(r"two +- +127\.0\.0\.1 +yes +\d+ s ago +never +0", line) for line in lines)
        assert run("clients", "--limit", "1", database=database_url).stdout.endswith(
            "\nAnd 1 more client; use --limit to show more, or --limit 0 to show all.\n"
        )


class TestAdd:
    async def test_a_confidential_client(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """The printed client can sign in: its secret is valid, and only a hash of it is stored."""
        await provider.check_schema()
        shown = run(*ADD, "--scopes", " read  write", database=database_url)
        assert (shown.returncode, shown.stderr) == (0, "")
        client_id = re.search(r"Client id: +(\S+)\n", shown.stdout)
        secret = re.search(r"Client secret: +(\S+)\n\nCopy the secret now: it cannot be shown again.\n", shown.stdout)
        assert client_id is not None
        assert secret is not None
        client = await provider.get_client(client_id[1])
        assert client is not None
        assert (client.client_name, client.scope, client.token_endpoint_auth_method) == (
            "My app",
            "read write",
            "client_secret_post",
        )
        assert client.grant_types == ["authorization_code", "refresh_token"]
        assert client.redirect_uris == [AnyUrl("https://app.example.com/callback")]
        rows = await rows_of(provider, select(Client.__table__))
        assert secret[1] not in repr(rows)
        (listed,) = run_json("clients", database=database_url)["clients"]
        assert listed["last_approved_at"] is None
        assert secret[1] not in run("clients", database=database_url).stdout

    async def test_it_connects_over_http(self, make_provider: Provider, database_url: str) -> None:
        """An app with the printed client_id and secret gets its tokens from a running server."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        provider = make_provider(base_url=url)
        added = run_json(*ADD, "--auth-method", "client_secret_basic", database=database_url)
        verifier, challenge = pkce()
        uri = "https://app.example.com/callback"
        request = authorization_request(added["client_id"], redirect_uri=uri, code_challenge=challenge)
        async with (
            serving(FastMCP("wiki", auth=provider).http_app(), port),
            httpx2.AsyncClient(base_url=url, timeout=60) as http,
        ):
            code = query_of((await http.get("/authorize", params=request)).headers["location"])["code"]
            exchange = token_request(code, verifier, redirect_uri=uri)
            refused = await http.post("/token", data=exchange, auth=(added["client_id"], "wrong"))
            tokens = await http.post("/token", data=exchange, auth=(added["client_id"], added["client_secret"]))
        assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")
        assert await provider.verify_token(tokens.json()["access_token"]) is not None

    def test_json(self, tmp_path: object) -> None:
        """The JSON has these keys; a public client has no secret, and several redirect URIs are kept."""
        path = f"{tmp_path}/oauth.db"
        run("upgrade", database=path)
        told = run_json(*ADD, "--redirect-uri", "cursor://x/y", "--auth-method", "none", database=path)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", told.pop("created_at"))
        assert re.fullmatch(r"[0-9a-f-]{36}", told.pop("client_id"))
        assert told == {
            "client_secret": None,
            "client_name": "My app",
            "redirect_uris": ["https://app.example.com/callback", "cursor://x/y"],
            "scopes": [],
            "auth_method": "none",
        }

    async def test_a_machine(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """A machine has no redirect URI and one grant type; its secret is shown once, and only a hash is stored."""
        await provider.check_schema()
        shown = run("clients", "add", "Nightly job", "--machine", "--scopes", "read", database=database_url)
        assert (shown.returncode, shown.stderr) == (0, "")
        client_id = re.search(r"Client id: +(\S+)\n", shown.stdout)
        secret = re.search(r"Client secret: +(\S+)\n", shown.stdout)
        assert client_id is not None
        assert secret is not None
        client = await provider.get_client(client_id[1])
        assert client is not None
        assert (client.client_name, client.scope, client.redirect_uris) == ("Nightly job", "read", None)
        assert client.grant_types == ["client_credentials"]
        assert secret[1] not in repr(await rows_of(provider, select(Client.__table__)))
        listed = run("clients", database=database_url).stdout
        assert re.search(r"\n\S+ +Nightly job +- +yes +\d+ s ago +never +0\n", listed)

    async def test_a_machine_gets_a_token_over_http(self, make_provider: Provider, database_url: str) -> None:
        """The printed JSON is all that a program needs for a token."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        provider = make_provider(base_url=url)
        added = run_json("clients", "add", "Job", "--machine", "--auth-method", "client_secret_basic",
                         database=database_url)  # fmt: skip
        assert (added["redirect_uris"], added["auth_method"]) == ([], "client_secret_basic")
        form = {"grant_type": "client_credentials"}
        async with (
            serving(FastMCP("wiki", auth=provider).http_app(), port),
            httpx2.AsyncClient(base_url=url, timeout=60) as http,
        ):
            refused = await http.post("/token", data=form, auth=(added["client_id"], "wrong"))
            token = await http.post("/token", data=form, auth=(added["client_id"], added["client_secret"]))
        assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")
        assert await provider.verify_token(token.json()["access_token"]) is not None

    async def test_it_is_never_purged(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """A client that was added by hand is never purged, even if it is never approved."""
        await provider.check_schema()
        added = run_json(*ADD, database=database_url)
        await provider.register_client(new_client())
        async with transaction(provider) as session:
            purged = await session.run_sync(purge, int(time.time()) + 400 * DAY)
        assert purged["clients"] == 1
        assert await provider.get_client(added["client_id"]) is not None

    @pytest.mark.parametrize(
        ("redirect_uri", "complaint"),
        [
            ("http://app.example.com/callback", "a redirect URI uses http to another machine; use https"),
            ("javascript:alert(1)", "javascript: is not an app's own scheme; use https"),
            ("smb://files.example.com/callback", "smb: is not an app's own scheme; use https"),
            ("https://app.example.com/#x", "a redirect URI has a fragment"),
            ("https://ada@app.example.com/", "a redirect URI has a user"),
            ("not a URL", "valid URL"),
            ("", "valid URL"),
            ("https://app.example.com/" + "x" * 40_000, "bytes of metadata"),
        ],
    )
    async def test_what_the_server_would_refuse_is_refused(
        self, redirect_uri: str, complaint: str, tmp_path: object
    ) -> None:
        """A redirect URI that no registration may have is a one-line error, exit code 1, and nothing is stored."""
        path = f"{tmp_path}/oauth.db"
        run("upgrade", database=path)
        ran = run("clients", "add", "My app", "--redirect-uri", redirect_uri, database=path)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert complaint in ran.stderr
        assert ran.stderr.count("\n") == 1
        assert run_json("clients", database=path)["total"] == 0
        if "valid URL" not in complaint:
            async with SQLAlchemyOAuthProvider(path, base_url="http://127.0.0.1:8000") as provider:
                with pytest.raises(RegistrationError):
                    await provider.register_client(new_client(redirect_uris=[AnyUrl(redirect_uri)]))

    @pytest.mark.parametrize("client_id", ["https://app.example.com/a", "HTTPS://app.example.com/a", "Token-x"])
    def test_an_id_that_means_something_else(self, client_id: str, tmp_path: object) -> None:
        """The URL of a document and the id of a personal token are refused, in any case of letters."""
        path = f"{tmp_path}/oauth.db"
        run("upgrade", database=path)
        ran = run("clients", "add", "My app", "--identity-assertion", "--client-id", client_id, database=path)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "cannot be a client id here" in ran.stderr

    @pytest.mark.parametrize("options", [ADD[:3], [*ADD, "--auth-method", "private_key_jwt"], ADD[:2] + ADD[3:]])
    def test_usage(self, options: list[str], tmp_path: object) -> None:
        """Without a redirect URI or a name, or with an unsupported method, the exit code is 2."""
        ran = run(*options, database=f"{tmp_path}/missing.db")
        assert (ran.returncode, ran.stdout) == (2, "")

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ([], "Give --redirect-uri for an app, or --machine for a program without a user."),
            (["--machine", *ADD[3:]], "A machine has no redirect URI: give either --machine or --redirect-uri."),
            (["--machine", "--auth-method", "none"], "A machine needs a secret: --auth-method none is for apps."),
        ],
    )
    def test_an_app_or_a_machine(self, options: list[str], complaint: str, tmp_path: object) -> None:
        """A client is either an app with a redirect URI or a machine with a secret; anything else is a usage error."""
        path = f"{tmp_path}/oauth.db"
        run("upgrade", database=path)
        ran = run("clients", "add", "My app", *options, database=path, COLUMNS="200")
        assert (ran.returncode, ran.stdout) == (2, "")
        assert complaint in ran.stderr
        assert run_json("clients", database=path)["total"] == 0

    def test_a_name_that_nobody_can_read(self, tmp_path: object) -> None:
        """A name of only control characters and spaces is refused."""
        ran = run("clients", "add", " \t\u200b", *ADD[3:], database=f"{tmp_path}/missing.db")
        assert ran.returncode == 1
        assert "a name that people can read" in ran.stderr

    async def test_event(
        self, provider: SQLAlchemyOAuthProvider, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is a `client_registered` event that names the operator and has no secret."""
        await provider.check_schema()
        caplog.set_level(logging.INFO, "oauth_store")
        await asyncio.to_thread(app, [*ADD, "--json", "--database", database_url], result_action="return_value")
        (record,) = [record for record in caplog.records if getattr(record, "event", "") == "client_registered"]
        assert vars(record)["by"].endswith(", with oauth-store")
        (listed,) = run_json("clients", database=database_url)["clients"]
        assert vars(record)["client_id"] == listed["client_id"]


class TestRemove:
    async def test_with_everything(self, house: House, database_url: str) -> None:
        """It asks first, and deletes the client with its tokens and codes at once; another client is untouched."""
        token, other = await house.grant("ada", "one"), await house.grant("ada", "two")
        await house.code("ada", "one")
        ran = run("clients", "remove", "one", database=database_url, answer="n\n")
        assert ran.returncode == 1
        question = "Remove this client and revoke 1 grant permanently? [y/N] "
        assert f"{question}\noauth-store: nothing was changed\n" in ran.stderr
        assert await house.lives(token)
        ran = run("clients", "remove", "one", "--verbose", database=database_url, answer="y\n")
        assert ran.returncode == 0
        assert ran.stdout.endswith("Removed Test client and revoked 2 grants.\n")
        assert ran.stderr.count("INFO: grant revoked: ") == 2
        assert not await house.lives(token)
        assert await house.lives(other)
        for model in (Client, Token, Code):
            assert await rows_of(house.provider, select(model.client_id).distinct()) == [("two",)], model

    async def test_one_that_is_not_there(self, house: House, database_url: str) -> None:
        """An unknown client_id, or one that differs in a space or in case, is exit code 1, and nothing is removed."""
        await house.grant("ada", "one")
        for client_id in ("nobody", "one ", "ONE", "on_", "\x1b[2J"):
            ran = run("clients", "remove", client_id, "--yes", database=database_url)
            assert (ran.returncode, ran.stdout) == (1, "")
            assert "see `oauth-store clients`" in ran.stderr
            assert "\x1b" not in ran.stderr
        assert run_json("clients", database=database_url)["total"] == 1

    async def test_while_it_refreshes(self, provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
        """A client that is removed while it is active is refused, and never causes a server error."""
        client = await registered(provider)
        tokens = [await sign_in(provider, client) for _ in range(4)]

        async def refresh_on(token: str | None) -> str:
            while True:
                try:
                    token = (await present_refresh_token(provider, client, token)).refresh_token
                except TokenError as error:
                    return error.error

        working = [asyncio.create_task(refresh_on(token.refresh_token)) for token in tokens]
        await asyncio.sleep(0.2)
        removed = await asyncio.to_thread(
            run, "clients", "remove", client.client_id, "--yes", "--json", database=database_url
        )
        assert removed.returncode == 0, removed.stderr
        assert len(json.loads(removed.stdout)["revoked"]) == 4
        assert set(await asyncio.gather(*working)) <= {"invalid_grant", "invalid_client"}
        assert await value_of(provider, select(func.count()).select_from(Token)) == 0


async def test_a_client_of_a_day_is_told_in_days(provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
    """Ages are shown in the largest unit that fits at least twice."""
    with turned(-3 * DAY):
        client = await registered(provider)
        await authorize(provider, client)
    assert "3 d ago" in run("clients", database=database_url).stdout
