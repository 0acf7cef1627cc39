"""What the options of a URL do on real servers: with certificates, behind PgBouncer, and on MariaDB."""

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from oauth_store import ConfigurationError, DatabaseUnavailable
from oauth_store.database.copy import copy
from oauth_store.database.engines import create_engine
from oauth_store.database.options import UNNAMED
from oauth_store.database.schema import upgrade
from oauth_store.database.url import database_url as as_url
from tests.commands import run
from tests.crowds import flow
from tests.databases import (
    MARIADB,
    create_mariadb_database,
    create_postgres_database,
    drop_mariadb_database,
    drop_postgres_database,
    is_server,
    postgres_directory,
    value_of,
)
from tests.serving import AUTHORITIES, free_port, self_signed, wait_for_port
from tests.steps import provider_on, refresh, registered, sign_in

STARTED_SECONDS = 30


async def answer(setting: str, query: str) -> tuple[Any, ...]:
    """The one row of a query, over an engine as everything here has it."""
    engine = create_engine(await asyncio.to_thread(as_url, setting), poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            return tuple((await connection.execute(text(query))).one())
    finally:
        await engine.dispose()


async def is_refused(setting: str, reason: str) -> None:
    """Hold it that a provider does not get at a database, for this reason, in one line."""
    provider = provider_on(setting)
    with pytest.raises(DatabaseUnavailable, match=reason) as caught:
        await provider.check_schema()
    assert "\n" not in str(caught.value)
    await provider.aclose()


@contextmanager
def started(
    command: list[str], port: int, log: Path, *, user: str | None = None, stop: int = signal.SIGTERM
) -> Iterator[None]:
    """A server in a process of its own, from its first answer on; afterwards `stop` ends it at once."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, user=user, cwd="/")
    try:
        wait_for_port(process, port, log)
        yield
    finally:
        process.send_signal(stop)
        process.wait(STARTED_SECONDS)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of a server whose name is `localhost`: it is its own authority."""
    path = tmp_path_factory.mktemp("authority") / "authority.pem"
    path.write_bytes(self_signed("localhost"))
    return path


class TestPostgreSQL:
    """Options on a real server."""

    @pytest.fixture
    async def server_url(self, postgres_server: str) -> AsyncIterator[str]:
        """A database, and the `?` or `&` that options follow."""
        url = await create_postgres_database(postgres_server)
        yield url + ("&" if "?" in url else "?")
        await drop_postgres_database(postgres_server, url)

    @pytest.mark.parametrize(
        ("options", "query", "expected"),
        [
            ("application_name=wiki", "SELECT current_setting('application_name')", "wiki"),
            ("fallback_application_name=w&application_name=wiki", "SELECT current_setting('application_name')", "wiki"),
            ("options=-c%20work_mem%3D5MB%20-cjit%3Doff", "SELECT current_setting('work_mem')", "5MB"),
            ("options=-csearch_path%3Doauth", "SELECT current_setting('search_path')", "oauth"),
            ("schema=oauth", "SELECT current_setting('search_path')", '"oauth"'),
            ("sslmode=prefer&connect_timeout=5&target_session_attrs=read-write", "SELECT 1", 1),
            ("statement_cache_size=0", "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''", 0),
            ("pgbouncer=true&connection_limit=1", "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''", 0),
        ],
    )
    async def test_options_reach_the_server(self, server_url: str, options: str, query: str, expected: Any) -> None:
        """The server has the setting that the URL names."""
        assert await answer(server_url + options, query) == (expected,)

    async def test_the_whole_flow_with_options(self, server_url: str, tmp_path: Path) -> None:
        """A provider, `upgrade`, `status`, `doctor` and a copy all take a URL with options."""
        options = "application_name=wiki&connect_timeout=5&keepalives=1&pgbouncer=true&gssencmode=disable"
        url = server_url + options
        await asyncio.to_thread(upgrade, url)
        provider = provider_on(url)
        client = await registered(provider)
        token = await refresh(provider, client, await sign_in(provider, client))
        assert await provider.verify_token(token.access_token) is not None
        assert await value_of(provider, "SELECT current_setting('application_name')") == "wiki"
        await provider.aclose()
        copied = await asyncio.to_thread(lambda: asyncio.run(copy(url, str(tmp_path / "copy.db"))))
        assert copied.rows["oauth_clients"] == 1
        for command in (["status"], ["doctor"], ["upgrade"]):
            done = await asyncio.to_thread(run, *command, database=url)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tls_postgres(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a PostgreSQL server that takes connections with TLS alone. The one that tests install has none."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (str(installed[-1]) if installed else None)
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    if program is None or user not in (None, *(entry.pw_name for entry in pwd.getpwall())):
        pytest.skip("no PostgreSQL is installed, whose build knows TLS")
    port = free_port()
    with postgres_directory() as directory:
        if user is not None:
            shutil.chown(directory, user)
        data = directory / "data"
        command = [program, "-D", str(data), "-N", "--auth=trust", "-U", "postgres"]
        subprocess.run(command, check=True, capture_output=True, user=user, cwd=directory)
        key = data / "server.pem"
        key.write_bytes(authority.read_bytes())
        key.chmod(0o600)
        if user is not None:
            shutil.chown(key, user)
        (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\n")
        settings = ["-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories=", "-c", "ssl=on"]
        settings += ["-c", f"ssl_cert_file={key}", "-c", f"ssl_key_file={key}", "-c", "fsync=off"]
        log = tmp_path_factory.mktemp("postgresql") / "postgresql.log"
        server = [str(Path(program).parent / "postgres"), "-D", str(data), *settings]
        with started(server, port, log, user=user, stop=signal.SIGQUIT):  # at once, and its children with it
            while not (data / "postmaster.pid").read_text().rstrip().endswith("ready"):  # it listens a little earlier
                time.sleep(0.02)
            yield port


class TestTLS:
    """What a URL demands of PostgreSQL's certificate is held."""

    ENCRYPTED = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"

    @pytest.mark.parametrize(
        "options",
        [
            "sslmode=require",
            "sslmode=verify-ca&sslrootcert={authority}",
            "sslmode=require&sslrootcert={authority}",
            "sslmode=verify-full&sslrootcert={authority}",
            "sslmode=verify-full&sslrootcert={authority}&sslcert={authority}&sslkey={authority}",
            "sslmode=require&channel_binding=require&sslrootcert={authority}",
        ],
    )
    async def test_the_right_server_is_reached(self, tls_postgres: int, authority: Path, options: str) -> None:
        """The server that the certificate names is reached, with TLS."""
        url = f"postgresql://postgres@localhost:{tls_postgres}/postgres?{options.format(authority=authority)}"
        assert await answer(url, self.ENCRYPTED) == (True,)

    async def test_the_authorities_of_the_system(
        self, tls_postgres: int, authority: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`sslrootcert=system` and Neon's `channel_binding=require` trust those of the system, and no others."""
        url = f"postgresql://postgres@localhost:{tls_postgres}/postgres"
        demands = ("sslmode=verify-full&sslrootcert=system", "sslmode=require&channel_binding=require")
        for demand in demands:
            await is_refused(f"{url}?{demand}", "CERTIFICATE_VERIFY_FAILED")
        monkeypatch.setenv(AUTHORITIES, str(authority))
        for demand in demands:
            assert await answer(f"{url}?{demand}", self.ENCRYPTED) == (True,)

    @pytest.mark.parametrize(
        "options", ["sslmode=verify-full&sslrootcert={authority}", "channel_binding=require&sslrootcert={authority}"]
    )
    async def test_another_name_is_refused(self, tls_postgres: int, authority: Path, options: str) -> None:
        """The same server under a name that its certificate does not have is not used."""
        url = f"postgresql://postgres@127.0.0.1:{tls_postgres}/postgres?{options.format(authority=authority)}"
        await is_refused(url, "IP address mismatch")

    @pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
    async def test_another_authority_is_refused(self, tls_postgres: int, tmp_path: Path, mode: str) -> None:
        """A certificate that the authority of the URL did not sign is not accepted."""
        (tmp_path / "other.pem").write_bytes(self_signed("localhost"))
        options = f"sslmode={mode}&sslrootcert={tmp_path / 'other.pem'}"
        await is_refused(
            f"postgresql://postgres@localhost:{tls_postgres}/postgres?{options}", "CERTIFICATE_VERIFY_FAILED"
        )


@pytest.fixture
async def pgbouncer(postgres_server: str, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a migrated database behind PgBouncer in transaction mode, with two connections of its own."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    direct = await create_postgres_database(postgres_server)
    await asyncio.to_thread(upgrade, direct)
    url, port = make_url(direct), free_port()
    host = str(url.query.get("host") or url.host)
    with postgres_directory() as directory:
        directory.chmod(0o755)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\nwiki = host={host} port={url.port or 5432} dbname={url.database} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            "pool_mode = transaction\ndefault_pool_size = 2\n"
        )
        # it does not run as root; the socket of our own server is for its owner alone
        user = ["-u", Path(host).owner() if Path(host).is_dir() else "nobody"] if os.geteuid() == 0 else []
        context = started([program, *user, str(configuration)], port, tmp_path / "pgbouncer.log", stop=signal.SIGKILL)
        await asyncio.to_thread(context.__enter__)
        yield f"postgresql://postgres@127.0.0.1:{port}/wiki"
        context.__exit__(None, None, None)
    await drop_postgres_database(postgres_server, direct)


async def test_pgbouncer_in_transaction_mode(pgbouncer: str) -> None:
    """With pgbouncer=true every flow works where each transaction may have another connection."""
    provider = provider_on(f"{pgbouncer}?pgbouncer=true&application_name=wiki")
    for _ in range(3):
        await asyncio.gather(*(flow(provider) for _ in range(8)))
    await provider.aclose()


async def test_pgbouncer_without_the_option(pgbouncer: str) -> None:
    """Without it too: the provider recognizes a pooler, and its statements get no names."""
    provider = provider_on(pgbouncer)
    for _ in range(3):
        await asyncio.gather(*(flow(provider) for _ in range(8)))
    await provider.aclose()


async def test_pgbouncer_that_was_declared_wrongly(pgbouncer: str) -> None:
    """Where `pgbouncer=false` is not true, the error of the first statement on another connection names the option."""
    provider = provider_on(f"{pgbouncer}?pgbouncer=false")
    with pytest.raises(DatabaseUnavailable, match=r"prepared statement .* add pgbouncer=true to the options"):
        for _ in range(10):
            await asyncio.gather(*(flow(provider) for _ in range(8)))
    await provider.aclose()


@pytest.mark.parametrize(
    ("driver", "named", "unnamed"),
    [("asyncpg", {}, UNNAMED), ("psycopg", {}, {"prepare_threshold": None})],
)
async def test_an_engine_that_names_its_statements(
    pgbouncer: str, driver: str, named: dict[str, Any], unnamed: dict[str, Any]
) -> None:
    """Behind a pooler an engine that was passed in is refused if its statements have names; otherwise it serves."""
    url = make_url(pgbouncer).set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url, connect_args=named)
    with pytest.raises(ConfigurationError, match=r"through a pooler .* connect_args=") as caught:
        await provider_on(engine).check_schema()
    assert "\n" not in str(caught.value)
    await engine.dispose()
    engine = create_async_engine(url, connect_args=dict(unnamed))
    provider = provider_on(engine)
    for _ in range(3):
        await asyncio.gather(*(flow(provider) for _ in range(8)))
    await engine.dispose()


async def test_a_limit_of_connections(database_url: str) -> None:
    """connection_limit is the pool's size: 24 flows at once have no more connections, and all succeed."""
    if not is_server(database_url):
        pytest.skip("an SQLite URL takes no options")
    limit = "&" if "?" in database_url else "?"
    provider = provider_on(f"{database_url}{limit}connection_limit=2")
    await asyncio.gather(*(flow(provider) for _ in range(24)))
    of_this_database = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
    }
    look = of_this_database[make_url(database_url).get_backend_name()]
    for _ in range(100):  # PostgreSQL lists for a moment the connection that looked for a pooler
        if (connections := await value_of(provider, look)) <= 2:
            break
        await asyncio.sleep(0.05)
    assert connections <= 2
    await provider.aclose()


class TestMariaDB:
    """Options on a real MariaDB server."""

    @pytest.fixture(autouse=True)
    def present(self) -> None:
        """Skip where no server is named."""
        if not MARIADB:
            pytest.skip("OAUTH_STORE_TEST_MARIADB names no server")

    @pytest.mark.parametrize("charset", ["utf8", "latin1", "utf8mb4", "ascii"])
    async def test_the_character_set_is_always_the_whole_one(self, charset: str) -> None:
        """Whatever character set the URL names, an emoji in a client's name is stored and read back."""
        url = await create_mariadb_database()
        provider = provider_on(f"{url}?charset={charset}")
        client = await registered(provider, client_name="Ada's 🦊")
        assert client.client_name == "Ada's 🦊"
        await provider.aclose()
        await drop_mariadb_database(url)

    async def test_the_socket_and_the_time_out(self) -> None:
        """unix_socket and connect_timeout reach the driver, and what is left out does no harm."""
        at = make_url(MARIADB)
        (socket,) = await answer(MARIADB, "SELECT @@socket")
        if not Path(socket).is_socket():
            pytest.skip("the server's socket is not on this machine")
        options = f"unix_socket={socket}&connect_timeout=5&reconnect=true&serverTimezone=UTC"
        url = at.set(host="away.invalid").render_as_string(hide_password=False)
        assert await answer(f"{url}?{options}", "SELECT @@character_set_client") == ("utf8mb4",)

    async def test_a_server_without_tls_is_refused(self) -> None:
        """Where the server offers no TLS, nothing is sent in clear that the URL wants encrypted."""
        if await answer(f"{MARIADB}?ssl-mode=DISABLED", "SELECT @@have_ssl") == ("YES",):
            pytest.skip("the server has TLS")
        await is_refused(f"{MARIADB}?ssl-mode=REQUIRED", "cannot be used")


@pytest.fixture(scope="module")
def tls_mariadb(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a MariaDB server with TLS, without users."""
    program = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin")
    if not MARIADB or program is None:
        pytest.skip("OAUTH_STORE_TEST_MARIADB names no server, or mariadbd is not installed")
    directory, port = tmp_path_factory.mktemp("mariadb"), free_port()
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    mark = b"-----BEGIN PRIVATE KEY"
    first, _, second = authority.read_bytes().partition(mark)
    certificate.write_bytes(first)
    key.write_bytes(mark + second)
    data = directory / "data"
    data.mkdir()
    command = [program, "--no-defaults", f"--datadir={data}", "--skip-grant-tables", "--bind-address=127.0.0.1"]
    command += [f"--port={port}", f"--socket={directory / 's'}", f"--ssl-cert={certificate}", f"--ssl-key={key}"]
    command += ["--skip-networking=0", "--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M"]
    if os.geteuid() == 0:
        command.append("--user=root")
    with started(command, port, directory / "mariadb.log"):
        yield port


class TestMariaDBWithTLS:
    """What a URL demands of MariaDB's certificate is held."""

    ENCRYPTED = "SHOW STATUS LIKE 'Ssl_version'"

    @pytest.mark.parametrize(
        ("options", "encrypted"),
        [
            ("ssl-mode=DISABLED", False),
            ("ssl-mode=REQUIRED", True),
            ("ssl=true", True),
            ("useSSL=true", True),
            ("ssl_ca={authority}", True),
            ("ssl-mode=VERIFY_CA&ssl-ca={authority}", True),
            ("ssl-mode=VERIFY_IDENTITY&ssl-ca={authority}", True),
        ],
    )
    async def test_the_right_server_is_reached(
        self, tls_mariadb: int, authority: Path, options: str, encrypted: bool
    ) -> None:
        """The server that the certificate names is reached, with TLS where the URL wants it."""
        url = f"mysql://root@localhost:{tls_mariadb}/information_schema?{options.format(authority=authority)}"
        assert bool((await answer(url, self.ENCRYPTED))[1]) is encrypted

    @pytest.mark.parametrize(
        ("host", "options", "reason"),
        [
            ("127.0.0.1", "ssl-mode=VERIFY_IDENTITY&ssl-ca={authority}", "IP address mismatch"),
            ("127.0.0.1", "ssl_ca={authority}", "IP address mismatch"),
            ("localhost", "sslaccept=strict", "CERTIFICATE_VERIFY_FAILED"),
            ("localhost", 'ssl={{"rejectUnauthorized":true}}', "CERTIFICATE_VERIFY_FAILED"),
        ],
    )
    async def test_another_server_is_refused(
        self, tls_mariadb: int, authority: Path, host: str, options: str, reason: str
    ) -> None:
        """Another name, or an authority that the URL does not trust, is not accepted."""
        url = f"mysql://root@{host}:{tls_mariadb}/information_schema?{options.format(authority=authority)}"
        await is_refused(url, reason)
