"""`grants`, `revoke` and `explain` on the command line, on every database."""

import asyncio
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastmcp import Client
from sqlalchemy import select, update

from examples.demo import ClientApp
from oauth_store import SQLAlchemyOAuthProvider
from oauth_store.cli.app import app
from oauth_store.credentials import hash_secret
from oauth_store.database.models import Code, Token
from oauth_store.flows.connected import grants_named, grants_to_end, live_grants, revoke_grants
from tests.commands import run, run_json
from tests.databases import tokens_of, transaction
from tests.example import ExampleServer
from tests.house import House
from tests.steps import RESOURCE, authorize, new_client, registered, sign_in
from tests.workers import answer, present_code, present_refresh_token


class TestGrants:
    async def test_nothing(self, database_url: str) -> None:
        """Without grants it prints a sentence; --json has an empty list."""
        assert run("grants", database=database_url).stdout == "No live grants.\n"
        assert run_json("grants", database=database_url) == {"total": 0, "grants": []}

    async def test_each_grant_is_a_line(self, house: House, database_url: str) -> None:
        """A line has the start of the id, the client, its host, scopes, subject, and three times."""
        grant_id = await house.grant_id(await house.grant("ada"))
        lines = run("grants", database=database_url).stdout.splitlines()
        assert lines[0].split() == [
            "Grant",
            "Client",
            "Host",
            "Scopes",
            "Subject",
            "Created",
            "Last",
            "used",
            "Expires",
        ]
        assert re.fullmatch(
            rf"{grant_id[:12]} +Test client +127\.0\.0\.1 +read write +ada +\d+ s ago +\d+ s ago +in (29|30) d",
            lines[2],
        )
        assert len(lines) == 3

    async def test_json(self, house: House, database_url: str) -> None:
        """A grant has these keys, and its times are ISO 8601."""
        token = await house.grant("ada")
        told = run_json("grants", "--database", database_url, database=database_url)
        (grant,) = told["grants"]
        times = {name: grant.pop(name) for name in ("created_at", "last_used_at", "expires_at")}
        assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", at) for at in times.values())
        assert told["total"] == 1
        assert grant == {
            "grant_id": await house.grant_id(token),
            "client_id": "client-of-the-house",
            "client_name": "Test client",
            "hosts": ["127.0.0.1"],
            "scopes": ["read", "write"],
            "scope_changes": [],
            "subject": "ada",
            "resource": RESOURCE,
        }

    async def test_filters_and_limit(self, house: House, database_url: str) -> None:
        """It filters by client, by subject, and by both; beyond the limit it prints how many more there are."""
        ids = {}
        # MariaDB mistakes "one " for "one", so it is not a client: its code is refused
        padded = "three" if database_url.startswith("mysql") else "one "
        for subject, client_id in (("ada", "one"), ("ada", "two"), ("bob", "two"), ("ada ", padded)):
            ids[subject, client_id] = await house.grant_id(await house.grant(subject, client_id))

        def listed(*options: str) -> set[str]:
            return {grant["grant_id"] for grant in run_json("grants", *options, database=database_url)["grants"]}

        assert listed() == set(ids.values())
        assert listed("--subject", "ada") == {ids["ada", "one"], ids["ada", "two"]}
        assert listed("--client", "two") == {ids["ada", "two"], ids["bob", "two"]}
        assert listed("--client", "two", "--subject", "bob") == {ids["bob", "two"]}
        assert listed("--client", "t_o") == listed("--subject", "%") == set()
        assert run("grants", "--limit", "3", database=database_url).stdout.endswith(
            "\nAnd 1 more grant; use --limit to show more, or --limit 0 to show all.\n"
        )
        assert run_json("grants", "--limit", "1", database=database_url)["total"] == 4

    async def test_a_refreshed_grant_is_one(self, house: House) -> None:
        """After a refresh it is still one grant, with its original age and the granted scopes."""
        first = await house.grant("ada")
        async with transaction(house.provider) as session:
            (before,), _ = await session.run_sync(
                live_grants,
            )
        await present_refresh_token(house.provider, house.client, first.refresh_token, ["read"])
        async with transaction(house.provider) as session:
            (after,), total = await session.run_sync(
                live_grants,
            )
        assert total == 1
        assert (after.grant_id, after.granted_at, after.scopes) == (before.grant_id, before.granted_at, before.scopes)


class TestRevoke:
    async def test_it_shows_and_asks(self, house: House, database_url: str) -> None:
        """Without --yes it shows the grant and asks; only a yes revokes it, and no other grant."""
        token, other = await house.grant("ada"), await house.grant("bob")
        prefix = (await house.grant_id(token))[:12]
        ran = run("revoke", prefix, database=database_url, answer="n\n")
        question = "Revoke 1 grant permanently? [y/N] "
        assert (ran.returncode, ran.stderr) == (1, f"{question}\noauth-store: nothing was changed\n")
        assert f"{prefix}   Test client" in ran.stdout
        ran = run("revoke", prefix, database=database_url)
        assert ran.returncode == 1
        assert "no answer, so nothing was changed; pass --yes in scripts" in ran.stderr
        assert await house.lives(token)
        ran = run("revoke", prefix.upper(), database=database_url, answer="Y\n", SUDO_USER="grace")
        assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "Revoked 1 grant.")
        assert not await house.lives(token)
        assert await answer(present_refresh_token(house.provider, house.client, token.refresh_token)) != token
        assert await house.lives(other)
        tokens = await tokens_of(house.provider)
        assert {token.revoked_reason for token in tokens} == {None, "revoked with oauth-store by grace"}

    async def test_of_a_client_of_a_subject_and_all(self, house: House, database_url: str) -> None:
        """--client, --subject and --all revoke the matching grants, including codes that are not exchanged yet."""
        tokens = {name: await house.grant(*name) for name in (("ada", "one"), ("ada", "two"), ("bob", "two"))}
        tokens["bob", "three"] = await house.grant("bob", "three")
        codes = {name: await house.code(*name) for name in (("ada", "two"), ("eve", "four"))}

        async def living() -> set[tuple[str, str]]:
            return {name for name, token in tokens.items() if await house.lives(token)}

        told = run_json("revoke", "--client", "two", "--yes", database=database_url)
        assert told["total"] == len(told["revoked"]) == 3
        assert await living() == {("ada", "one"), ("bob", "three")}
        two = new_client(client_id="two")
        assert await answer(present_code(house.provider, two, codes["ada", "two"])) == "invalid_grant"
        ran = run("revoke", "--subject", "bob", "--yes", database=database_url)
        assert (ran.stdout, ran.stderr) == ("Revoked 1 grant.\n", "")
        assert await living() == {("ada", "one")}
        assert run("revoke", "--all", "--yes", database=database_url).stdout == "Revoked 2 grants.\n"
        assert await living() == set()
        four = new_client(client_id="four")
        assert await answer(present_code(house.provider, four, codes["eve", "four"])) == "invalid_grant"
        assert run("revoke", "--all", "--yes", database=database_url).stdout == "No live grants.\n"

    async def test_what_does_not_exist_is_an_error(self, house: House, database_url: str) -> None:
        """For a grant, client or subject without live grants the exit code is 1; so it is for a revoked grant."""
        grant_id = await house.grant_id(await house.grant("ada"))
        run("revoke", grant_id, "--yes", database=database_url)
        for which in ([grant_id], ["0" * 32], ["--client", "nobody"], ["--subject", "nobody"]):
            ran = run("revoke", *which, "--yes", database=database_url)
            assert (ran.returncode, ran.stdout) == (1, "")
            assert "see `oauth-store grants`" in ran.stderr
            assert ran.stderr.count("\n") == 1

    async def test_a_prefix_of_several_is_an_error(self, house: House, database_url: str) -> None:
        """A prefix of two grants revokes neither; one more digit is enough to choose."""
        tokens = [await house.grant("ada"), await house.grant("bob")]
        twins = bytes.fromhex("aaaaaa0" + "0" * 25), bytes.fromhex("aaaaaa1" + "0" * 25)
        async with transaction(house.provider) as session:
            for token, twin in zip(tokens, twins, strict=True):
                grant_id = bytes.fromhex(await house.grant_id(token))
                await session.execute(update(Token).where(Token.grant_id == grant_id).values(grant_id=twin))
        ran = run("revoke", "aaaaaa", "--yes", database=database_url)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert f"such as {twins[0].hex()} and {twins[1].hex()}; give more digits" in ran.stderr
        assert run("revoke", "aaaaaa1", "--yes", database=database_url).returncode == 0
        assert [await house.lives(token) for token in tokens] == [True, False]

    @pytest.mark.parametrize("which", [[], ["abcdef", "--all"], ["--client", "x", "--subject", "y"]])
    def test_one_way_to_name_them(self, which: list[str], tmp_path: Path) -> None:
        """Naming the grants in no way or in two ways is a usage error, exit code 2, before any database is opened."""
        ran = run("revoke", *which, "--yes", database=str(tmp_path / "missing.db"))
        assert ran.returncode == 2
        shown = " ".join(ran.stderr.split()).replace("│ │ ", "")
        assert "Give exactly one of GRANT, --client, --subject and --all" in shown
        assert ran.stdout == ""

    @pytest.mark.parametrize("prefix", ["abc", "g" * 6, "0" * 33, "", "\x1b[2J0000"])
    async def test_a_grant_is_named_by_hex_digits(self, prefix: str, tmp_path: Path) -> None:
        """Fewer than six digits, more than a whole id, and other characters are refused in one safe line."""
        path = str(tmp_path / "oauth.db")
        run("upgrade", database=path)
        ran = run("revoke", "--yes", "--", prefix, database=path)
        assert ran.returncode == 1
        assert "expected 6 to 32 hex digits" in ran.stderr
        assert "\x1b" not in ran.stderr

    async def test_events(
        self, house: House, database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each revoked grant is a `revoked` event that names the operator; --verbose prints them."""
        monkeypatch.setenv("SUDO_USER", "grace")
        ids = {await house.grant_id(await house.grant("ada")) for _ in range(2)}
        caplog.set_level(logging.INFO, "oauth_store")
        caplog.clear()
        arguments = ["revoke", "--subject", "ada", "--yes", "--database", database_url]
        await asyncio.to_thread(app, arguments, result_action="return_value")
        told = [vars(record) for record in caplog.records if getattr(record, "event", "") == "revoked"]
        assert {record["grant_id"] for record in told} == ids
        assert {(record["client_id"], record["by"]) for record in told} == {
            ("client-of-the-house", "grace, with oauth-store")
        }
        grant_id = await house.grant_id(await house.grant("bob"))
        ran = run("revoke", grant_id, "--yes", "--verbose", database=database_url, SUDO_USER="grace")
        assert ran.stderr == (
            f"INFO: grant revoked: grant_id={grant_id} client_id=client-of-the-house by='grace, with oauth-store'\n"
        )

    async def test_more_than_a_statement_takes(self, house: House) -> None:
        """Any number of grants is revoked in one transaction, though no database takes that many values at once."""
        token = await house.grant("ada")
        ids = [number.to_bytes(16, "big") for number in range(40_000)]
        async with transaction(house.provider) as session:
            await session.run_sync(
                revoke_grants, [*ids, bytes.fromhex(await house.grant_id(token))], "all", int(time.time())
            )
        assert not await house.lives(token)


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[ExampleServer]:
    """A process of examples/server.py on each kind of database."""
    running = ExampleServer(tmp_path / "server.log", database_url)
    running.start()
    yield running
    running.kill()


@pytest.mark.filterwarnings("ignore:Using in-memory token storage")
async def test_a_running_server_sees_a_revocation_at_once(server: ExampleServer, database_url: str) -> None:
    """The first request after the command is refused, even by a server that had accepted a hundred before."""
    connected = ClientApp(server.url)
    await connected.call_tool()
    tokens = await connected.tokens()
    headers = {"Authorization": f"Bearer {tokens.access_token}"}
    async with Client(server.url, auth=tokens.access_token) as client:
        for _ in range(100):  # so that the server remembers the token
            await client.call_tool("read_page", {"title": "Home"})
    (grant,) = run_json("grants", database=database_url)["grants"]
    assert run("revoke", grant["grant_id"], "--yes", database=database_url).returncode == 0
    async with httpx2.AsyncClient(timeout=60) as http:
        refused = await http.post(server.url, headers=headers, json={})
        refresh = {"grant_type": "refresh_token", "refresh_token": tokens.refresh_token}
        not_refreshed = await http.post(
            server.url.replace("/mcp", "/token"), data={**refresh, "client_id": grant["client_id"]}
        )
    assert refused.status_code == 401
    assert not_refreshed.json()["error"] == "invalid_grant"
    assert run_json("grants", database=database_url)["total"] == 0
    explained = run_json("explain", database=database_url, answer=tokens.access_token, code=1)
    assert explained["state"] == "revoked"
    assert explained["revoked_reason"].startswith("revoked with oauth-store by ")
    await connected.call_tool()  # it was approved again, as its owner would
    assert connected.authorizations == 2


async def test_what_can_be_ended_is_what_can_be_used(house: House) -> None:
    """Denied, expired and used codes are not grants; a prefix finds a grant that has only a code, too."""
    now = int(time.time())
    await house.grant("ada")
    code = await house.code("bob")
    async with transaction(house.provider) as session:
        assert len(await session.run_sync(grants_to_end, now)) == 2
        assert len(await session.run_sync(grants_to_end, now + 700)) == 1
        assert len(await session.run_sync(grants_to_end, now + 40 * 24 * 3600)) == 0
        waiting = (await session.execute(select(Code.grant_id).where(Code.code_hash == hash_secret(code)))).scalar_one()
        assert await session.run_sync(grants_named, waiting.hex()[:7]) == [waiting]
        assert [name.grant_id for name in await session.run_sync(grants_to_end, now, grant_id=waiting)] == [waiting]
        assert await session.run_sync(live_grants, grant_id=waiting) == ([], 0)


async def test_a_client_of_the_default_kind_is_listed(provider: SQLAlchemyOAuthProvider, database_url: str) -> None:
    """Without sign-in, a grant has no subject, and `grants` shows a dash."""
    client = await registered(provider, client_name="\x1b[31mred\u202e\n" + "x" * 200)
    await sign_in(provider, client)
    await authorize(provider, client)
    output = run("grants", database=database_url).stdout
    assert "\x1b" not in output
    assert "\u202e" not in output
    line = output.splitlines()[2]
    assert "[31mred " + "x" * 70 in line
    assert "…" in line
    assert " - " in line
