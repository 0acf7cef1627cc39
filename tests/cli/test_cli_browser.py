"""`oauth-store browser` on the command line, on every database."""

import time

import pytest

from oauth_store.database.models import BROWSER, SESSION
from oauth_store.flows import sessions
from oauth_store.flows.sessions import Began
from tests.commands import run, run_json
from tests.databases import tokens_of
from tests.house import House
from tests.steps import Provider

URL = "https://wiki.example.com"


@pytest.fixture
async def house(make_provider: Provider) -> House:
    """A server on each kind of database, with two users in three browsers, and a session on a page."""
    house = House(lambda **settings: make_provider(base_url=URL, **settings))
    store, now = house.provider.issuer.store, int(time.time())
    for secret, user, way in (
        ("one", "ada", "account sub:ada"),
        ("two", "ada", "passkey"),
        ("three", "bob", "passkey"),
    ):
        began = Began(user, way, None, f"{URL}/mcp")
        await store.write(sessions.begin, secret, began, BROWSER, sessions.BROWSER_SECONDS, now)
    began = Began("ada", "passkey", None, f"{URL}/mcp")
    await store.write(sessions.begin, "four", began, SESSION, sessions.SESSION_SECONDS, now)
    return house


async def left(house: House) -> list[str]:
    """Whose browsers stay signed in."""
    return sorted(str(row.subject) for row in await tokens_of(house.provider) if row.kind == BROWSER)


class TestList:
    """What is listed."""

    async def test_them_all(self, house: House, database_url: str) -> None:
        """Each with its user and how they signed in; a session on a page is none of them, and one that is over."""
        told = run_json("browser", "list", database=database_url)
        assert told["total"] == 3
        assert [(one["user"], one["way"]) for one in told["browsers"]].count(("ada", "account")) == 1
        assert {one["resource"] for one in told["browsers"]} == {f"{URL}/mcp"}
        shown = run("browser", "list", database=database_url).stdout
        assert all(one["id"][:12] in shown for one in told["browsers"])
        assert "in 29 d" in shown or "in 30 d" in shown
        began = Began("eve", "passkey", b"0" * 32, f"{URL}/mcp")  # its passkey was removed
        await house.provider.issuer.store.write(sessions.begin, "five", began, BROWSER, 3600, int(time.time()))
        await house.provider.issuer.store.write(
            sessions.begin, "six", Began("eve", "account sub:eve", None, None), BROWSER, 3600, int(time.time()) - 3601
        )
        assert run_json("browser", "list", database=database_url)["total"] == 3

    async def test_none(self, make_provider: Provider, database_url: str) -> None:
        """Without any it says so."""
        await make_provider(base_url=URL).check_schema()
        assert run("browser", "list", database=database_url).stdout == "No browser stays signed in.\n"
        assert (
            run("browser", "remove", "--all", "--yes", database=database_url).stdout == "No browser stays signed in.\n"
        )


class TestRemove:
    """Who is signed out."""

    async def test_one(self, house: House, database_url: str) -> None:
        """One by its id, after a question."""
        [bob] = [one for one in run_json("browser", "list", database=database_url)["browsers"] if one["user"] == "bob"]
        assert run("browser", "remove", bob["id"][:6], database=database_url, answer="n\n").returncode == 1
        assert len(await left(house)) == 3
        removed = run("browser", "remove", bob["id"][:6].upper(), "--verbose", database=database_url, answer="y\n")
        assert "Signed out 1 browser." in removed.stdout
        assert "browser signed out: subject=bob by=" in removed.stderr
        assert await left(house) == ["ada", "ada"]

    async def test_of_a_user(self, house: House, database_url: str) -> None:
        """All of a user; the others, and the session on a page, stay."""
        assert run_json("browser", "remove", "--user", "ada", "--yes", database=database_url) == {"signed_out": 2}
        assert await left(house) == ["bob"]
        assert SESSION in {row.kind for row in await tokens_of(house.provider)}

    async def test_all(self, house: House, database_url: str) -> None:
        """All of them."""
        assert run("browser", "remove", "--all", "--yes", database=database_url).stdout == "Signed out 3 browsers.\n"
        assert not await left(house)

    @pytest.mark.parametrize(
        "chosen", [[], ["--all", "--user", "ada"], ["abc"], ["zzzzzz"], ["--user", "nobody"], [""]]
    )
    async def test_a_bad_choice(self, house: House, database_url: str, chosen: list[str]) -> None:
        """Nothing, two things, too few digits, or what is not there, signs nobody out."""
        refused = run("browser", "remove", *chosen, "--yes", database=database_url)
        assert refused.returncode in (1, 2)
        assert "Give exactly one of" in refused.stderr or "no such browser" in refused.stderr
        assert len(await left(house)) == 3
