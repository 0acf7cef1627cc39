"""`explain`: for every way in which a secret can be alive or dead, the right sentence, on every database."""

import json
import time

import pytest
from sqlalchemy import delete, text

from oauth_store.credentials import hash_secret
from oauth_store.database.models import Client, Code
from oauth_store.database.purge import purge
from oauth_store.flows.connected import revoke_grants
from oauth_store.flows.explain import AGAIN, NOTHING, Explanation, explain
from tests.clocks import Clock
from tests.commands import run, run_json, run_on_terminal
from tests.databases import transaction
from tests.house import House
from tests.steps import Provider, authorization_params, new_client, query_of, redeem, registered
from tests.workers import answer, present_code, present_for_revocation, present_refresh_token, settle

HOUR, DAY = 3600, 24 * 3600
KEYS = (
    "live kind state client_id client_name hosts grant_id grant_live subject scopes resource created_at first_used_at "
    "last_used_at consumed_at revoked_at revoked_reason expires_at scope_changes successor explanation advice"
)


async def explained(house: House, secret: str | None) -> Explanation:
    """What is said of a secret now. It never holds the secret."""
    async with transaction(house.provider) as session:
        explanation = await session.run_sync(explain, str(secret), int(time.time()))
    assert str(secret) not in repr(explanation)
    return explanation


class TestTokens:
    async def test_live(self, house: House) -> None:
        """A live token says whose it is, for what, and until when."""
        token = await house.grant("ada")
        for secret, kind in ((token.access_token, "access token"), (token.refresh_token, "refresh token")):
            told = await explained(house, secret)
            assert (told.kind, told.state, told.live, told.grant_live) == (kind, "live", True, True)
            assert told.grant_id is not None
            assert told.grant_id.hex() == await house.grant_id(token)
            assert (told.client_id, told.client_name, told.hosts) == (
                "client-of-the-house",
                "Test client",
                ("127.0.0.1",),
            )
            assert (told.subject, told.scopes) == ("ada", ("read", "write"))
            assert "It is valid until 20" in told.text

    async def test_rotated(self, house: House, clock: Clock) -> None:
        """An exchanged refresh token says what became of its successor; the access token, that it was replaced."""
        first = await house.grant()
        second = await present_refresh_token(house.provider, house.client, first.refresh_token)
        told = await explained(house, first.refresh_token)
        assert (told.state, told.live, told.successor, told.grant_live) == ("rotated", False, "unused", True)
        assert (
            "has not been used yet: the response may have been lost. Presented again, it gets the same pair"
            in told.text
        )
        assert told.advice == NOTHING
        access = await explained(house, first.access_token)
        assert (access.state, access.successor) == ("rotated", None)
        assert "got a new pair. The grant is live." in access.text

        await house.provider.verify_token(second.access_token)
        await settle(house.provider)
        told = await explained(house, first.refresh_token)
        assert (told.successor, told.state) == ("used", "rotated")
        assert "the server treats it as a stolen copy and ends the grant" in told.text
        assert told.advice.startswith(NOTHING)

        third = await present_refresh_token(house.provider, house.client, second.refresh_token)
        told = await explained(house, first.refresh_token)
        assert told.successor == "rotated"
        assert "exchanged in turn. The grant is live." in told.text
        clock.shift(30 * DAY - 1)
        assert (await explained(house, third.refresh_token)).live
        clock.shift(1)
        for token in (first, second, third):
            assert not (await explained(house, token.refresh_token)).live
            assert not (await explained(house, token.access_token)).live

    async def test_rotated_by_a_server_without_a_grace(self, make_provider: Provider) -> None:
        """Where no pair is kept for a second answer, nothing is said of the successor."""
        house = House(lambda **settings: make_provider(refresh_grace_seconds=0, **settings))
        first = await house.grant()
        await present_refresh_token(house.provider, house.client, first.refresh_token)
        told = await explained(house, first.refresh_token)
        assert (told.state, told.successor, told.advice) == ("rotated", None, NOTHING)
        assert told.text.endswith("). The grant is live.")

    async def test_expired(self, house: House, clock: Clock) -> None:
        """An expired access token says whether its grant lives; an expired refresh token, that it was not used."""
        token = await house.grant()
        clock.shift(HOUR - 1)
        assert (await explained(house, token.access_token)).live
        clock.shift(1)
        told = await explained(house, token.access_token)
        assert (told.state, told.grant_live, told.advice) == ("expired", True, NOTHING)
        assert "the client gets a new one with its refresh token" in told.text
        clock.shift(30 * DAY - HOUR)
        told = await explained(house, token.refresh_token)
        assert (told.state, told.grant_live, told.advice) == ("expired", False, AGAIN)
        assert "if its client does not refresh in time" in told.text
        told = await explained(house, token.access_token)
        assert told.advice == AGAIN
        assert "and its grant is over too" in told.text

    async def test_expired_without_a_refresh_token(self, house: House, clock: Clock) -> None:
        """A client that uses no refresh tokens is told apart from one that lost its own."""
        client = await registered(house.provider, grant_types=["authorization_code"])
        await house.provider.authorize(client, authorization_params())
        url = await house.provider.approve(house.asks.handle)

        token = await redeem(house.provider, client, query_of(url)["code"])
        clock.shift(HOUR)
        assert "and came without a refresh token" in (await explained(house, token.access_token)).text

    async def test_revoked(self, house: House, clock: Clock) -> None:
        """By the client, by the owner on the page, or by hand: it says by whom, and when."""
        for reason in ("revoked on the page by ada", "revoked with oauth-store by grace"):
            token = await house.grant()
            async with transaction(house.provider) as session:
                grant_id = bytes.fromhex(await house.grant_id(token))
                await session.run_sync(revoke_grants, [grant_id], reason, int(time.time()))
            for secret in (token.access_token, token.refresh_token):
                told = await explained(house, secret)
                assert (told.state, told.revoked_reason, told.grant_live) == ("revoked", reason, False)
                assert f"(0 s ago): {reason}." in told.text
                assert told.advice == AGAIN
        token = await house.grant()
        assert await present_for_revocation(house.provider, house.client, str(token.refresh_token))
        assert "revoked by the client." in (await explained(house, token.access_token)).text

    async def test_expired_before_it_was_revoked(self, house: House, clock: Clock) -> None:
        """What had expired before its grant was ended died of its age."""
        token = await house.grant()
        clock.shift(2 * HOUR)
        assert await present_for_revocation(house.provider, house.client, str(token.refresh_token))
        assert (await explained(house, token.access_token)).state == "expired"
        assert (await explained(house, token.refresh_token)).state == "revoked"

    async def test_reuse(self, house: House, clock: Clock) -> None:
        """After a reuse, every token of the grant says so, and warns of a theft."""
        first = await house.grant()
        second = await present_refresh_token(house.provider, house.client, first.refresh_token)
        third = await present_refresh_token(house.provider, house.client, second.refresh_token)
        clock.shift(10 * 60)
        assert await answer(present_refresh_token(house.provider, house.client, first.refresh_token)) == "invalid_grant"
        for token in (first, second, third):
            told = await explained(house, token.refresh_token)
            assert told.state == "reuse_detected"
            assert "after the pair that followed it was in use. A stolen copy looks like that" in told.text
            assert "treat it as a theft" in told.advice

    async def test_code_replay(self, house: House) -> None:
        """After its code was replayed, the token and the code say so."""
        code = await house.code()
        token = await present_code(house.provider, house.client, code)
        assert await answer(present_code(house.provider, house.client, code)) == "invalid_grant"
        for secret in (token.access_token, token.refresh_token, code):
            told = await explained(house, secret)
            assert told.state == "code_replayed"
            assert "its authorization code was presented a second time" in told.text

    async def test_purged(self, house: House, clock: Clock) -> None:
        """What was deleted is unknown, and the sentence says what that can mean."""
        token = await house.grant()
        clock.shift(38 * DAY)
        async with transaction(house.provider) as session:
            await session.run_sync(purge, int(time.time()))
        told = await explained(house, token.refresh_token)
        assert (told.kind, told.state, told.grant_id) == ("refresh token", "unknown", None)
        assert "It expired so long ago that it was deleted, its client was removed" in told.text

    async def test_of_a_client_that_is_gone(self, house: House, database_url: str) -> None:
        """The row of a token whose client some other tool has deleted says so."""
        if "://" in database_url:
            pytest.skip("only SQLite lets another tool ignore the foreign key")
        token = await house.grant()
        await house.provider.aclose()
        import sqlite3

        connection = sqlite3.connect(database_url)  # its foreign keys are off
        connection.execute("DELETE FROM oauth_clients")
        connection.commit()
        connection.close()
        told = await explained(house, token.access_token)
        assert (told.state, told.client_id) == ("client_gone", "client-of-the-house")


class TestCodes:
    async def test_request(self, house: House, clock: Clock) -> None:
        """A request waits for the owner, then it is denied, expired, or its code waits for the client."""
        client = await registered(house.provider)
        handles = []
        for _ in range(3):
            await house.provider.authorize(client, authorization_params())
            handles.append(house.asks.handle)
        told = await explained(house, handles[0])
        assert (told.kind, told.state, told.live) == ("authorization request", "waiting", True)
        assert "It waits for the owner until" in told.text
        await house.provider.deny(handles[0])
        assert (await explained(house, handles[0])).state == "denied"
        await house.provider.approve(handles[1], subject="ada")
        told = await explained(house, handles[1])
        assert (told.state, told.subject) == ("waiting", "ada")
        assert "and waits for its client until" in told.text
        clock.shift(600)
        for handle, missed in (
            (handles[1], "did not exchange the code in time"),
            (handles[2], "the owner did not decide"),
        ):
            told = await explained(house, handle)
            assert told.state == "expired"
            assert missed in told.text

    async def test_code(self, house: House) -> None:
        """A code waits, or was exchanged for tokens whose grant lives or is over."""
        code = await house.code("ada")
        told = await explained(house, code)
        assert (told.kind, told.state) == ("authorization code", "waiting")
        token = await present_code(house.provider, house.client, code)
        told = await explained(house, code)
        assert (told.state, told.live, told.advice) == ("used", False, "A code can be exchanged only once.")
        assert "The grant is live." in told.text
        assert await present_for_revocation(house.provider, house.client, str(token.refresh_token))
        assert (await explained(house, code)).state == "revoked"

    async def test_code_of_a_grant_that_was_ended_first(self, house: House) -> None:
        """A code that was closed by a revocation was never exchanged, and says so."""
        code = await house.code("ada")
        waiting = await explained(house, code)
        assert waiting.grant_id is not None
        async with transaction(house.provider) as session:
            await session.run_sync(revoke_grants, [waiting.grant_id], "by hand", int(time.time()))
        told = await explained(house, code)
        assert told.state == "revoked"
        assert "before the client got its tokens" in told.text

    async def test_code_of_a_client_that_is_gone(self, house: House) -> None:
        """A code whose client was removed names the client."""
        code = await house.code("ada")
        async with transaction(house.provider) as session:
            await session.execute(delete(Client))
        told = await explained(house, code)
        assert (told.state, told.client_id) == ("client_gone", "client-of-the-house")
        async with transaction(house.provider) as session:
            await session.execute(delete(Code))


async def test_client_secret(house: House) -> None:
    """A client's secret is known, and says until when it is good."""
    client = new_client(token_endpoint_auth_method="client_secret_post", client_secret="the-secret")
    await house.provider.register_client(client)
    told = await explained(house, "the-secret")
    assert (told.kind, told.state, told.client_id) == ("client secret", "live", client.client_id)
    client.client_secret_expires_at = int(time.time()) - 1
    await house.provider.register_client(client)
    assert (await explained(house, "the-secret")).state == "expired"


async def test_session(house: House) -> None:
    """The session of the page of connected apps says who is signed in."""
    await house.provider.check_schema()

    async with transaction(house.provider) as session:
        await session.execute(
            text(
                "INSERT INTO oauth_tokens (token_hash, kind, grant_id, subject, scopes, created_at, expires_at) "
                "VALUES (:hash, 'session', :grant_id, 'ada', '', 1, :until)"
            ),
            {"hash": hash_secret("session_x"), "grant_id": b"\1" * 16, "until": int(time.time()) + 60},
        )
    told = await explained(house, "session_x")
    assert (told.kind, told.state, told.subject, told.grant_id) == ("session", "live", "ada", None)
    assert "It signs ada in on the page of connected apps" in told.text


@pytest.mark.parametrize(
    ("secret", "kind", "said"),
    [
        ("access_cut-off", "access token", "have 43 characters after the first _; this one has 7."),
        ("refresh_" + "x" * 43, "refresh token", "It expired so long ago"),
        ("header.payload.signature", "secret", "It is a JWT, which this server does not issue"),
        ("what?", "secret", "It expired so long ago"),
    ],
)
async def test_unknown(house: House, secret: str, kind: str, said: str) -> None:
    """What the database does not know is unknown; where its form says more, the sentence does."""
    await house.provider.check_schema()
    told = await explained(house, secret)
    assert (told.kind, told.state, told.live) == (kind, "unknown", False)
    assert said in told.text


class TestCommand:
    async def test_from_a_pipe(self, house: House, database_url: str) -> None:
        """A token from standard input is explained, as it was copied: with spaces, or a whole header; never shown."""
        token = await house.grant("ada")
        for sent in (f"  {token.access_token}\n", f"Authorization: Bearer {token.access_token}\r\n"):
            ran = run("explain", database=database_url, answer=sent)
            assert (ran.returncode, ran.stderr) == (0, "")
            assert ran.stdout.startswith("Access token: live\n")
            assert "Subject:    ada" in ran.stdout
            assert token.access_token not in ran.stdout

    async def test_at_a_prompt(self, house: House, database_url: str) -> None:
        """On a terminal it is asked for, and what is typed is not shown."""
        token = await house.grant("ada")
        code, output = run_on_terminal(
            "explain", database=database_url, answers={"Token (not shown): ": f"{token.access_token}\n"}
        )
        assert code == 0
        assert "Access token: live" in output
        assert token.access_token not in output

    async def test_json_and_exit_code(self, house: House, database_url: str) -> None:
        """The keys are these; 0 means that the server accepts it, 1 that it is dead or unknown."""
        token = await house.grant("ada")
        told = run_json("explain", database=database_url, answer=token.access_token)
        assert list(told) == KEYS.split()
        assert (told["live"], told["grant_id"]) == (True, await house.grant_id(token))
        assert token.access_token not in json.dumps(told)
        assert run_json("explain", database=database_url, answer="what?", code=1)["state"] == "unknown"

    @pytest.mark.parametrize("sent", ["", "\n", "   ", "Bearer \n"])
    def test_nothing_is_an_error(self, sent: str, tmp_path: object) -> None:
        """No token at all is an error, before any database is opened."""
        ran = run("explain", database=f"{tmp_path}/missing.db", answer=sent)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "no token was given" in ran.stderr

    def test_it_is_no_argument(self, tmp_path: object) -> None:
        """A token on the command line is refused, and not repeated."""
        ran = run("explain", "access_the-token", database=f"{tmp_path}/missing.db")
        assert ran.returncode == 2
        assert ran.stdout == ""
