"""`oauth-store token` on the command line, on every database: personal tokens, for programs that cannot sign in."""

import asyncio
import re

import pytest
from sqlalchemy import update

from oauth_store.credentials import is_personal_token
from oauth_store.database.models import Token
from tests.commands import run, run_json
from tests.databases import tokens_of, transaction
from tests.house import House
from tests.steps import RESOURCE
from tests.workers import answer, present_code, present_refresh_token, settle


@pytest.fixture
async def known(house: House) -> House:
    """A house whose database has a grant, and so the server's URL."""
    await house.grant("ada")
    return house


async def verified(house: House, text: str) -> tuple[list[str], str | None] | None:
    """The scopes and the subject of a token, or None if the server refuses it."""
    token = await house.provider.verify_token(text)
    await settle(house.provider)  # a command would wait for the row, and this loop for the command
    return None if token is None else (token.scopes, token.subject)


class TestCreate:
    async def test_it_is_printed_once(self, known: House, database_url: str) -> None:
        """Standard output is the token alone, which the server accepts; the database has only its hash."""
        created = run("token", "create", "n8n", "--scopes", "read write", "--subject", "ada", database=database_url)
        assert created.returncode == 0
        text, note = created.stdout.removesuffix("\n"), created.stderr
        assert re.fullmatch(r"mcp_[0-9A-Za-z]{49}", text)
        assert is_personal_token(text)
        assert "Copy the token now: it cannot be shown again." in note
        assert re.search(rf"It works at {re.escape(RESOURCE)}\. It expires in (29|30) d\.", note)
        assert await verified(known, text) == (["read", "write"], "ada")
        assert text not in "".join(str(row) for row in await tokens_of(known.provider))

    @pytest.mark.parametrize(("expires", "expected"), [("30d", "20"), ("1y", "20"), ("400d", "20"), ("never", None)])
    async def test_json(self, known: House, database_url: str, expires: str, expected: str | None) -> None:
        """One document has the token and what it may do; one that never expires has no time."""
        created = run_json("token", "create", "cron", "--expires", expires, database=database_url)
        assert await verified(known, created["token"]) == ([], None)
        assert created == {
            "token": created["token"],
            "name": "cron",
            "grant_id": created["grant_id"],
            "scopes": [],
            "subject": None,
            "resource": RESOURCE,
            "expires_at": created["expires_at"],
        }
        assert (created["expires_at"] or "")[:2] == (expected or "")

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["n8n", "--expires", "soon"], "the expiry is 'soon'; expected days or years, such as 30d or 1y, or never"),
            (["n8n", "--expires", "0d"], "the expiry is '0d'"),
            (["n8n", "--expires", "101y"], "the expiry is '101y'"),
            ([" "], "the token's name is empty or longer than 100 characters"),
            (["x" * 101], "the token's name is empty or longer than 100 characters"),
            (["n8n", "--scopes", 'a"b'], "is not a scope"),
        ],
    )
    async def test_what_cannot_be_created(
        self, known: House, database_url: str, arguments: list[str], complaint: str
    ) -> None:
        """One line, exit code 1, and no row."""
        before = len(await tokens_of(known.provider))
        refused = run("token", "create", *arguments, database=database_url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert complaint in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert len(await tokens_of(known.provider)) == before

    async def test_a_name_is_of_one_live_token(self, known: House, database_url: str) -> None:
        """A second one of the name is refused, also at the same moment; after a revocation the name is free."""
        created = await asyncio.gather(
            *(asyncio.to_thread(run, "token", "create", "n8n", database=database_url) for _ in range(4))
        )
        assert sorted(one.returncode for one in created) == [0, 1, 1, 1]
        assert {one.stderr for one in created if one.returncode} == {
            "oauth-store: a token named n8n exists; choose another name, or revoke that token first\n"
        }
        assert run("token", "revoke", "n8n", "--yes", database=database_url).returncode == 0
        again = run("token", "create", "n8n", database=database_url).stdout.partition("\n")[0]
        assert await verified(known, again) is not None
        assert run("token", "create", "n8n", "--subject", "bob", database=database_url).returncode == 0

    async def test_which_server(self, house: House, database_url: str) -> None:
        """Where no client has connected, the server has to be named; a token works at that server alone."""
        refused = run("token", "create", "n8n", database=database_url)
        assert "no client has connected yet; name the server's MCP URL, as in --resource https://" in refused.stderr
        other = run_json("token", "create", "n8n", "--resource", "https://other.example/mcp", database=database_url)
        assert await verified(house, other["token"]) is None
        named = run_json("token", "create", "n8n", "--resource", RESOURCE, database=database_url)
        assert await verified(house, named["token"]) is not None
        assert "several servers use this database" in run("token", "create", "x", database=database_url).stderr


class TestList:
    async def test_nothing(self, house: House, database_url: str) -> None:
        """Without tokens it prints a sentence; other grants are not in it."""
        await house.grant("ada")
        assert run("token", "list", database=database_url).stdout == "No live personal tokens.\n"
        assert run_json("token", "list", database=database_url) == {"total": 0, "tokens": []}

    async def test_the_last_use_is_right_to_five_minutes(self, known: House, database_url: str) -> None:
        """It is never, then now; and after five minutes a use is recorded again, also for a remembered token."""
        text = run_json("token", "create", "n8n", "--expires", "never", database=database_url)["token"]
        (token,) = run_json("token", "list", database=database_url)["tokens"]
        assert (token["name"], token["last_used_at"], token["expires_at"]) == ("n8n", None, None)
        row = run("token", "list", database=database_url).stdout.splitlines()[2]
        assert re.fullmatch(r"n8n +[0-9a-f]{12} +- +- +\d+ s ago +never +never", row)
        for _ in range(3):
            await verified(known, text)
            await settle(known.provider)
        for back in (200, 400):
            async with transaction(known.provider) as session:
                await session.execute(
                    update(Token)
                    .where(Token.first_used_at.is_not(None), Token.paired_hash.is_(None))
                    .values(first_used_at=Token.first_used_at - back, created_at=Token.created_at - 1000)
                )
            known.provider.issuer.uses.clear()
            await verified(known, text)
            await settle(known.provider)
            row = run("token", "list", database=database_url).stdout.splitlines()[2]
            assert (" 3 min ago" in row) == (back == 200), row


class TestRevoke:
    async def test_at_the_next_call(self, known: House, database_url: str) -> None:
        """By its name, or as any grant by its id; `explain` says so, and `grants` has it until then."""
        for by_name in (True, False):
            created = run_json("token", "create", "n8n", "--scopes", "read", database=database_url)
            for _ in range(3):
                assert await verified(known, created["token"]) == (["read"], None)
                await settle(known.provider)
            assert created["grant_id"] in {
                grant["grant_id"] for grant in run_json("grants", database=database_url)["grants"]
            }
            command = ["token", "revoke", "n8n"] if by_name else ["revoke", created["grant_id"]]
            assert run(*command, "--yes", database=database_url).returncode == 0
            assert await verified(known, created["token"]) is None
            explained = run("explain", database=database_url, answer=created["token"])
            assert (explained.returncode, "Access token: revoked" in explained.stdout) == (1, True)

    async def test_a_question_first(self, known: House, database_url: str) -> None:
        """No answer revokes nothing; an unknown name is one line."""
        created = run_json("token", "create", "n8n", database=database_url)
        refused = run("token", "revoke", "n8n", database=database_url)
        assert (refused.returncode, "Revoke this token permanently? [y/N]" in refused.stderr) == (1, True)
        assert await verified(known, created["token"]) is not None
        assert "no live token is called m8n" in run("token", "revoke", "m8n", "--yes", database=database_url).stderr


async def test_it_is_good_for_nothing_else(known: House, database_url: str) -> None:
    """As a code or a refresh token, for its own client or another's, it is refused; and its client cannot ask."""
    created = run_json("token", "create", "n8n", database=database_url)
    verified_token = await known.provider.verify_token(created["token"])
    assert verified_token is not None
    own = await known.provider.get_client(verified_token.client_id)
    assert own is not None
    assert own.redirect_uris is None
    for client in (known.client, own):
        assert await answer(present_refresh_token(known.provider, client, created["token"])) == "invalid_grant"
        assert await answer(present_code(known.provider, client, created["token"])) == "invalid_grant"
    assert await verified(known, created["token"]) is not None


async def test_scopes_of_a_token_can_change(known: House, database_url: str) -> None:
    """The owner adds and takes away what it may do, as with any grant."""
    created = run_json("token", "create", "n8n", "--scopes", "read", database=database_url)
    for options, expected in ((["--add", "write"], ["read", "write"]), (["--remove", "read"], ["write"])):
        assert run("scopes", created["grant_id"], *options, "--yes", database=database_url).returncode == 0
        assert await verified(known, created["token"]) == (expected, None)
