"""`oauth-store passkey` on the command line, on every database."""

import re
import time

import pytest

from oauth_store.credentials import hash_secret
from oauth_store.database.models import ENROLLMENT
from oauth_store.flows.challenges import about, ask
from oauth_store.flows.passkeys import Link, create_link, enroll
from oauth_store.webauthn import Created
from tests.commands import run, run_json
from tests.databases import tokens_of
from tests.house import House
from tests.steps import Provider

URL = "https://wiki.example.com"


@pytest.fixture
def house(make_provider: Provider) -> House:
    """A house on each kind of database, at a host with a name."""
    return House(lambda **settings: make_provider(base_url=URL, **settings))


async def add_passkey(house: House, name: str, user: str = "owner", url: str = URL) -> Link:
    """Add a passkey as a browser does, less the browser."""
    issuer = house.provider.issuer
    link = await issuer.store.write(create_link, user, name, url)
    purpose = about("enroll", url, link.secret)
    created = Created(await ask(issuer, purpose, 300), f"credential {name} {user}", b"key", 0, ("usb",))
    await enroll(issuer, link, created, purpose)
    return link


class TestAdd:
    """The link."""

    async def test_it_is_printed_once(self, house: House, database_url: str) -> None:
        """Standard output is the link alone, to the server of the database; the database has only its hash."""
        await house.grant("ada")
        added = run("passkey", "add", "--user", "ada", "--name", "My phone", database=database_url)
        assert added.returncode == 0, added.stderr
        found = re.fullmatch(r"https://wiki\.example\.com/passkey#(enrollment_[\w-]{43})\n", added.stdout)
        assert found
        assert "within 10 minutes, on the device that gets the passkey of ada" in added.stderr
        [row] = [row for row in await tokens_of(house.provider) if row.kind == ENROLLMENT]
        assert (row.token_hash, row.subject, row.resource) == (hash_secret(found[1]), "ada", URL)
        assert found[1] not in str(row)

    async def test_json(self, house: House, database_url: str) -> None:
        """One document has the link; without a name it is called by the day."""
        added = run_json("passkey", "add", "--url", f"{URL}/", database=database_url)
        assert added == {
            "link": added["link"],
            "user": "owner",
            "name": time.strftime("%d %B %Y"),
            "url": URL,
            "expires_at": added["expires_at"],
        }

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ([], "no client has connected yet; name the server's base_url, as in --url https://wiki.example.com"),
            (["--url", "http://127.0.0.1:8000"], "use http://localhost:8000 as base_url"),
            (["--url", "https://[::1]/wiki"], "passkeys are for a host name, and ::1 is none"),
            (["--url", "wiki.example.com"], "--url is 'wiki.example.com'; expected the server's base_url"),
            (["--url", URL, "--name", " "], "the passkey's name is empty or longer than 100 characters"),
            (["--url", URL, "--user", " ada"], "the user is ' ada'"),
            (["--url", URL, "--user", ""], "the user is ''"),
        ],
    )
    async def test_what_cannot_be_added(
        self, house: House, database_url: str, arguments: list[str], complaint: str
    ) -> None:
        """One line, exit code 1, and no row."""
        await house.provider.check_schema()
        refused = run("passkey", "add", *arguments, database=database_url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert complaint in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert await tokens_of(house.provider) == []

    async def test_which_server(self, house: House, make_provider: Provider, database_url: str) -> None:
        """The tokens or the passkeys on the database name it; of several, one has to be named."""
        await add_passkey(house, "first")
        assert run("passkey", "add", database=database_url).stdout.startswith(f"{URL}/passkey#")
        other = House(lambda **settings: make_provider(base_url="https://new.example.com", mcp_path="/", **settings))
        await other.grant("ada")
        assert "several servers use this database" in run("passkey", "add", database=database_url).stderr
        await house.grant("ada")
        assert "several servers use this database" in run("passkey", "add", database=database_url).stderr


class TestList:
    """What there is."""

    async def test_nothing(self, house: House, database_url: str) -> None:
        """Without passkeys it prints a sentence; a link is none yet."""
        await house.provider.check_schema()
        assert run("passkey", "add", "--url", URL, database=database_url).returncode == 0
        assert run("passkey", "list", database=database_url).stdout == "No passkeys.\n"
        assert run_json("passkey", "list", database=database_url) == {"total": 0, "passkeys": []}

    async def test_what_is_listed(self, house: House, database_url: str) -> None:
        """Name, id, user, server and last use; no other command shows a passkey as a grant or a token."""
        await add_passkey(house, "My phone")
        [listed] = run_json("passkey", "list", database=database_url)["passkeys"]
        assert {**listed, "id": "", "created_at": ""} == {
            "id": "",
            "name": "My phone",
            "user": "owner",
            "url": URL,
            "transports": ["usb"],
            "created_at": "",
            "last_used_at": None,
        }
        shown = run("passkey", "list", database=database_url).stdout
        assert re.search(rf"My phone +{listed['id'][:12]} +owner +{URL} +\d+ s ago +never", shown)
        assert run_json("grants", database=database_url)["total"] == 0
        assert run_json("token", "list", database=database_url)["total"] == 0
        assert run_json("status", database=database_url)["live_grants"] == 0
        assert run_json("purge", database=database_url)["tokens"] == 0
        run("revoke", "--all", "--yes", database=database_url)
        assert run_json("passkey", "list", database=database_url)["total"] == 1
        assert run("revoke", listed["id"], "--yes", database=database_url).returncode == 1


class TestRemove:
    """What is gone."""

    async def test_by_name_and_by_id(self, house: House, database_url: str) -> None:
        """Either names one passkey; a name of several is refused, and so is one of none."""
        for name, user in (("phone", "ada"), ("phone", "bob"), ("key", "ada")):
            await add_passkey(house, name, user)
        several = run("passkey", "remove", "phone", "--yes", database=database_url)
        assert "2 passkeys are called phone; use an id of `oauth-store passkey list`" in several.stderr
        assert run("passkey", "remove", "phone", "--user", "bob", "--yes", database=database_url).stdout == (
            "Removed the passkey phone.\n"
        )
        [key] = [one for one in run_json("passkey", "list", database=database_url)["passkeys"] if one["name"] == "key"]
        assert run_json("passkey", "remove", key["id"][:8], "--yes", database=database_url) == {"removed": key["id"]}
        missing = run("passkey", "remove", "key", "--yes", database=database_url)
        assert "no passkey is called key; see `oauth-store passkey list`" in missing.stderr
        [left] = run_json("passkey", "list", database=database_url)["passkeys"]
        assert (left["name"], left["user"]) == ("phone", "ada")

    async def test_it_asks(self, house: House, database_url: str) -> None:
        """Without --yes it shows the passkey and asks; no is an error, and removes nothing."""
        await add_passkey(house, "phone")
        refused = run("passkey", "remove", "phone", database=database_url, answer="n\n")
        assert (refused.returncode, "phone" in refused.stdout) == (1, True)
        assert run_json("passkey", "list", database=database_url)["total"] == 1
        removed = run("passkey", "remove", "phone", "--verbose", database=database_url, answer="y\n")
        assert "passkey removed: subject=owner passkey=phone by=" in removed.stderr
        assert run_json("passkey", "list", database=database_url)["total"] == 0


class TestExplain:
    """What `explain` knows of them."""

    async def test_each(self, house: House, database_url: str) -> None:
        """A link, the id of a passkey, and a challenge are explained as what they are."""
        await add_passkey(house, "phone")
        link = run_json("passkey", "add", database=database_url)["link"].partition("#")[2]
        challenge = await ask(house.provider.issuer, "x", 300)
        for secret, kind, text in (
            (link, "enrollment", "It adds a passkey of owner on a device, once, and is valid until"),
            ("credential phone owner", "passkey", "It is the id of a passkey of owner, which only its device can use."),
            (
                challenge,
                "challenge",
                "It is what a passkey signs, or an identity provider sends back, and is valid until",
            ),
        ):
            told = run_json("explain", database=database_url, answer=f"{secret}\n")
            assert (told["kind"], told["state"]) == (kind, "live")
            assert text in run("explain", database=database_url, answer=f"{secret}\n").stdout
