"""From a setting to what a driver is given: which URLs are understood, and what stands in the refusal of the others."""

import asyncio
import inspect
import re
import ssl
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import asyncmy
import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from oauth_store import ConfigurationError, SQLAlchemyOAuthProvider
from oauth_store.database import engines, options
from oauth_store.database.engines import create_engine
from oauth_store.database.url import database_url, display_name, is_memory
from tests.commands import run
from tests.serving import self_signed
from tests.steps import BASE_URL


class NotConnectedError(Exception):
    """The arguments are known, and nobody is to be connected to."""


def arguments_of(setting: str) -> dict[str, Any]:
    """All that reaches connect() of the driver, none of which it may refuse."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines._Pooler, "connect", lambda *_: None)  # it would connect, to look who answers
        patch.setattr(engines._Hosts, "connect", lambda *_: None)  # it would connect to each host by itself
        engine = create_engine(database_url(setting), poolclass=NullPool)

    @event.listens_for(engine.sync_engine, "do_connect")
    def take(_dialect: Any, _record: Any, positional: list[Any], named: dict[str, Any]) -> None:
        assert not positional
        arguments.update(named)
        raise NotConnectedError

    async def connect() -> None:
        with suppress(NotConnectedError):
            await engine.connect()

    asyncio.run(connect())
    driver = asyncpg.connect if setting.startswith("postgres") else asyncmy.connect
    taken = {"prepared_statement_cache_size", "prepared_statement_name_func"}  # by SQLAlchemy, on the way
    assert set(arguments) - taken <= set(inspect.signature(driver).parameters)
    return arguments


def security(value: Any) -> Any:
    """A context by what it verifies, a mode as it is."""
    if isinstance(value, ssl.SSLContext):
        return "host" if value.check_hostname else "authority" if value.verify_mode == ssl.CERT_REQUIRED else "none"
    return value


UNNAMED = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
HOSTED: dict[str, tuple[str, dict[str, Any]]] = {
    "Neon": (
        "postgresql://neondb_owner:npg_A1@ep-cool-1.eu-central-1.aws.neon.tech/neondb?sslmode=require"
        "&channel_binding=require",
        {"host": "ep-cool-1.eu-central-1.aws.neon.tech", "ssl": "host"},
    ),
    "Neon, by its endpoint": (
        "postgresql://ada:pw@eu.neon.tech/neondb?sslmode=require&options=endpoint%3Dep-cool-1",
        {"ssl": "require", "server_settings": {"options": "endpoint=ep-cool-1"}},
    ),
    "Supabase": (
        "postgresql://postgres:pw@db.abcdefgh.supabase.co:5432/postgres",
        {"user": "postgres", "password": "pw", "database": "postgres", "ssl": None, "port": 5432},
    ),
    "Supabase, session pooler": (
        "postgres://postgres.abcdefgh:pw@aws-0-eu-central-1.pooler.supabase.com:5432/postgres",
        {"user": "postgres.abcdefgh", "ssl": None},
    ),
    "Supabase, transaction pooler": (
        "postgresql://postgres.abcdefgh:pw@aws-0-eu-central-1.pooler.supabase.com:6543/postgres?pgbouncer=true"
        "&connection_limit=1",
        {"port": 6543, **UNNAMED},
    ),
    "Supabase on Vercel": (
        "postgres://postgres.abc:pw@aws-0-eu-central-1.pooler.supabase.com:6543/postgres?sslmode=require"
        "&supa=base-pooler.x",
        {"ssl": "require"},
    ),
    "Heroku": ("postgres://uabc:pdef@ec2-1-2-3-4.compute-1.amazonaws.com:5432/dghi", {"ssl": None}),
    "Render": ("postgresql://wiki:pw@dpg-abc-a.oregon-postgres.render.com/wiki_x1y2", {"ssl": None}),
    "Railway": ("postgresql://postgres:pw@roundhouse.proxy.rlwy.net:35432/railway", {"port": 35432}),
    "Amazon RDS": (
        "postgresql://wiki:pw@wiki.abc.eu-central-1.rds.amazonaws.com:5432/wiki?sslmode=verify-full"
        "&sslrootcert={certificate}",
        {"ssl": "host"},
    ),
    "Amazon RDS Proxy": (
        "postgresql://wiki:pw@wiki.proxy-abc.eu-central-1.rds.amazonaws.com/wiki?sslmode=verify-ca"
        "&sslrootcert={certificate}&application_name=wiki",
        {"ssl": "authority", "server_settings": {"application_name": "wiki"}},
    ),
    "Azure, PostgreSQL": (
        "postgresql://ada%40wiki:p%40ss%2Fword@wiki.postgres.database.azure.com:5432/postgres?sslmode=require",
        {"user": "ada@wiki", "password": "p@ss/word", "ssl": "require"},
    ),
    "Azure, verified": (
        "postgresql://ada:pw@wiki.postgres.database.azure.com/wiki?sslmode=verify-full&sslrootcert=system",
        {"ssl": "host"},
    ),
    "DigitalOcean, PostgreSQL": (
        "postgresql://doadmin:AVNS_x@db-postgresql-fra1-1.b.db.ondigitalocean.com:25060/defaultdb?sslmode=require",
        {"ssl": "require"},
    ),
    "Aiven, with a client's certificate": (
        "postgres://avnadmin:AVNS_x@pg-1.aivencloud.com:12691/defaultdb?sslmode=verify-ca&sslrootcert={certificate}"
        "&sslcert={certificate}&sslkey={certificate}",
        {"ssl": "authority"},
    ),
    "Google Cloud SQL": (
        "postgresql://wiki:pw@/wiki?host=/cloudsql/project:region:instance",
        {"host": "/cloudsql/project:region:instance", "database": "wiki"},
    ),
    "Prisma": (
        "postgresql://ada:pw@db/wiki?schema=oauth&connect_timeout=5&pool_timeout=0&connection_limit=5",
        {"timeout": 5, "server_settings": {"search_path": '"oauth"'}},
    ),
    "libpq": (
        "postgresql://ada:pw@db/wiki?target_session_attrs=read-write&keepalives=1&keepalives_idle=30&gssencmode=disable"
        "&options=-c%20search_path%3Doauth&passfile=/run/secrets/pgpass",
        {
            "target_session_attrs": "read-write",
            "server_settings": {"options": "-c search_path=oauth"},
            "passfile": "/run/secrets/pgpass",
        },
    ),
    "two hosts": (
        "postgresql://ada:pw@/wiki?host=one:5432&host=two:5433&target_session_attrs=primary",
        {"host": ["one", "two"], "port": [5432, 5433]},
    ),
    "two hosts, libpq's way": (
        "postgresql://ada:pw@/wiki?host=one,two&port=5432,5433",
        {"host": ["one", "two"], "port": [5432, 5433]},
    ),
    "SQLAlchemy": (
        "postgresql+asyncpg://ada:pw@db/wiki?ssl=require&prepared_statement_cache_size=50",
        {"ssl": "require", "prepared_statement_cache_size": 50, "statement_cache_size": None},
    ),
    "libpq, a socket": (
        "postgresql://wiki:pw@%2Fvar%2Frun%2Fpostgresql/wiki",
        {"host": "/var/run/postgresql", "database": "wiki", "password": "pw"},
    ),
    "libpq, a socket and its port": (
        "postgresql://wiki@%2Fvar%2Frun%2Fpostgresql:5433/wiki",
        {"host": "/var/run/postgresql", "port": 5433},
    ),
    "a port that was left empty": ("postgresql://ada:pw@db:/wiki?connect_timeout=0", {"host": "db", "timeout": 10}),
    "two hosts before the path": (
        "postgresql://ada:pw@one:5433,two/wiki?target_session_attrs=read-write&sslmode=require",
        {"host": ["one", "two"], "port": [5433, 5432], "user": "ada", "password": "pw", "ssl": "require"},
    ),
    "two ports of one host": (
        "postgresql://ada:pw@db:5433,db:5434/wiki",
        {"host": ["db", "db"], "port": [5433, 5434], "user": "ada", "password": "pw"},
    ),
    "two addresses before the path": (
        "postgresql://ada:pw@[::1]:5433,127.0.0.1:5434/wiki?options=-c%20search_path%3Doauth",
        {"host": ["::1", "127.0.0.1"], "port": [5433, 5434], "database": "wiki"},
    ),
    "Node.js": ("postgresql://ada:pw@db/wiki?ssl=1", {"ssl": "host"}),
    "Node.js, without TLS": ("postgresql://ada:pw@db/wiki?ssl=0", {"ssl": "disable"}),
    "Node.js, unverified": ("postgresql://ada:pw@db/wiki?sslmode=no-verify", {"ssl": "require"}),
    "Node.js, as libpq": ("postgresql://ada:pw@db/wiki?sslmode=require&uselibpqcompat=true", {"ssl": "require"}),
    "Prisma, TLS": ("postgresql://ada:pw@db/wiki?sslaccept=strict&socket_timeout=10", {"ssl": "host"}),
    "Prisma, unverified": ("postgresql://ada:pw@db/wiki?sslaccept=accept_invalid_certs", {"ssl": "require"}),
    "any pooler": ("postgresql://ada:pw@db/wiki?statement_cache_size=0", UNNAMED),
    "PlanetScale": (
        'mysql://abc:pscale_pw_x@aws.connect.psdb.cloud/wiki?ssl={"rejectUnauthorized":true}',
        {"ssl": "host", "charset": "utf8mb4", "db": "wiki"},
    ),
    "PlanetScale, Prisma": ("mysql://abc:pscale_pw_x@aws.connect.psdb.cloud/wiki?sslaccept=strict", {"ssl": "host"}),
    "DigitalOcean, MySQL": (
        "mysql://doadmin:AVNS_x@db-mysql-fra1-1.b.db.ondigitalocean.com:25060/defaultdb?ssl-mode=REQUIRED",
        {"ssl": "none", "port": 25060},
    ),
    "Azure, MySQL": (
        "mysql://ada:pw@wiki.mysql.database.azure.com:3306/wiki?useSSL=true&allowPublicKeyRetrieval=true"
        "&serverTimezone=UTC&autoReconnect=true",
        {"ssl": "none"},
    ),
    "Amazon RDS, MySQL": (
        "mysql://ada:pw@wiki.abc.eu-central-1.rds.amazonaws.com/wiki?ssl_ca={certificate}&charset=utf8",
        {"ssl": "host", "charset": "utf8mb4"},
    ),
    "Amazon RDS, MySQL, without the host's name": (
        "mysql://ada:pw@wiki.abc.rds.amazonaws.com/wiki?ssl-ca={certificate}&ssl-mode=VERIFY_CA",
        {"ssl": "authority"},
    ),
    "Google Cloud SQL, MySQL": (
        "mysql://wiki:pw@/wiki?unix_socket=/cloudsql/project:region:instance&charset=latin1",
        {"unix_socket": "/cloudsql/project:region:instance", "charset": "utf8mb4", "ssl": None},
    ),
    "TiDB": (
        "mysql://ada.root:pw@gateway01.eu-central-1.prod.aws.tidbcloud.com:4000/wiki?ssl_ca={certificate}"
        "&ssl_verify_cert=true&ssl_verify_identity=true",
        {"ssl": "host", "port": 4000},
    ),
    "TiDB, the authority alone": ("mysql://ada:pw@db/wiki?ssl_ca={certificate}&ssl_verify_cert=true", {"ssl": "host"}),
    "TiDB, unverified": ("mysql://ada:pw@db/wiki?ssl_verify_cert=false&ssl_verify_identity=false", {"ssl": "none"}),
    "MySQL Connector/Python": ("mysql://ada:pw@db:/wiki?ssl_disabled=true&collation=utf8mb4_bin", {"ssl": None}),
    "MariaDB": ("mariadb://ada:pw@db:3307/wiki?connect_timeout=3&ssl=false", {"connect_timeout": 3, "ssl": None}),
    "both of two": ("mysql://ada:pw@db/wiki?useSSL=true&sslMode=VERIFY_IDENTITY", {"ssl": "host"}),
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate and its key."""
    path = tmp_path_factory.mktemp("certificate") / "certificate.pem"
    path.write_bytes(self_signed("db"))
    return path


@pytest.mark.parametrize("hoster", HOSTED)
def test_the_urls_of_hosters_are_understood(hoster: str, certificate: Path) -> None:
    """Each reaches the driver as arguments that it takes, and none says less than the URL, also of TLS."""
    url, expected = HOSTED[hoster]
    arguments = arguments_of(url.replace("{certificate}", str(certificate)))
    found = {name: arguments.get(name) for name in expected}
    assert found | {"ssl": security(arguments.get("ssl"))} == {"ssl": security(arguments.get("ssl"))} | expected


def test_the_page_has_every_option() -> None:
    """docs/database-urls.md names each option that is understood."""
    page = (Path(__file__).parent.parent.parent / "docs" / "database-urls.md").read_text()
    source = inspect.getsource(options)
    understood = {
        name for kind in ("postgresql", "mysql") for name in (*options._LEFT_OUT[kind], *options._PASSED_ON[kind])
    }
    understood |= {*options.PLACES, *options._MYSQL_SECURITY, *options._POSTGRESQL_SECURITY, "connection_limit"}
    understood |= {"ssl_verify_cert", "ssl_verify_identity"}
    understood |= set(re.findall(r'_(?:choice|flag|number)\(options, "(\w+)"', source))
    assert len(understood) > 40
    assert [name for name in sorted(understood) if not re.search(rf"`{name}[`=]", page)] == []


REFUSED = [
    ("postgresql://ada:pw55@db/wiki?sslmod=require", "the option sslmod of the database URL is unknown"),
    ("postgresql://ada:pw55@db/wiki?sslmode=requires", "the option sslmode .* expected disable or allow"),
    ("postgresql://ada:pw55@db/wiki?sslmode=", "the option sslmode of the database URL has no value"),
    ("postgresql://ada:pw55@db/wiki?sslmode", "the option sslmode of the database URL has no value"),
    ("postgresql://ada:pw55@db/wiki?sslmode=disable&sslmode=require", "the option sslmode is given twice"),
    ("postgresql://ada:pw55@db/wiki?sslmode=require&sslrootcert=system", "the option sslrootcert .* is system"),
    ("postgresql://ada:pw55@db/wiki?sslmode=verify-full&sslrootcert=/no/pw55.crt", "sslrootcert .* cannot be read: No"),
    (
        "postgresql://ada:pw55@db/wiki?sslmode=verify-full&sslrootcert=/dev/null",
        "sslrootcert .* cannot be read by OpenSSL",
    ),
    ("postgresql://ada:pw55@db/wiki?sslmode=require&sslcert=/no/pw55.crt", "sslcert .* cannot be read"),
    ("postgresql://ada:pw55@db/wiki?sslmode=verify-ca", "sslrootcert .* is missing"),
    ("postgresql://ada:pw55@db/wiki?sslrootcert=/etc/passwd", "sslrootcert .* has no effect without TLS"),
    ("postgresql://ada:pw55@db/wiki?sslmode=prefer&sslcert=/etc/passwd", "sslcert .* has no effect without TLS"),
    ("postgresql://ada:pw55@db/wiki?sslmode=disable&channel_binding=require", "channel_binding .* contradicts"),
    ("postgresql://ada:pw55@db/wiki?gssencmode=require", "the option gssencmode .* expected disable or prefer"),
    ("postgresql://ada:pw55@db/wiki?target_session_attrs=standby", "the option target_session_attrs .* read-write"),
    ("postgresql://ada:pw55@db/wiki?client_encoding=latin1", "the option client_encoding .* expected utf8"),
    ("postgresql://ada:pw55@db/wiki?connect_timeout=soon", "the option connect_timeout .* whole number, 0 or more"),
    ("postgresql://ada:pw55@db/wiki?connection_limit=0", "the option connection_limit .* whole number, 1 or more"),
    ("mysql://ada:pw55@db/wiki?connection_limit=many", "the option connection_limit .* whole number, 1 or more"),
    ("postgresql://ada:pw55@db/wiki?sslidentity=client.p12", "the option sslidentity .* sslcert and sslkey"),
    ("postgresql://ada:pw55@db/wiki?statement_cache_size=-1", "the option statement_cache_size .* whole number, 0"),
    ("postgresql://ada:pw55@db/wiki?pgbouncer=maybe", "the option pgbouncer .* expected true or false"),
    ("postgresql://ada:pw55@/wiki?host=one:5432&host=two", "host and port .* do not match"),
    ("postgresql://ada:pw55@/wiki?host=one:a:b&host=two:1", "host and port .* do not match"),
    ("postgresql://ada:pw55@/wiki?host=one,two&port=1,2,3", "host and port .* do not match"),
    ("mysql://ada:pw55@one,two/wiki", "several hosts, which only PostgreSQL supports"),
    ("postgresql://ada:pw55@one,/wiki", "cannot be parsed"),
    ("postgresql://ada:pw55@one:5432,two:x/wiki", "cannot be parsed"),
    ("postgresql://ada:pw55@one:5432,two:0/wiki", "cannot be parsed"),
    ("postgresql://ada:pw55@one,two/wiki?host=three", "names its hosts twice"),
    ("postgresql://ada:pw55@one,t$o/wiki", "characters that no host name has"),
    ("postgresql://ada:pw55@d%24b/wiki", r"characters that no host name has.*\?host=/directory"),
    ("mysql://ada:pw55@%2Frun%2Fmysqld.sock/wiki", r"characters that no host name has.*unix_socket="),
    ("postgresql://ada:pw55@db:0/wiki", "cannot be parsed"),
    ("postgresql://ada:pw55@db:65536/wiki", "cannot be parsed"),
    ("postgresql://ada:pw55@db /wiki", "holds a space"),
    ("postgresql://ada:pw55@db/wiki\n", "control character"),
    ("postgresql://ada:pw55@db/wi%0Aki", "control character"),
    ("postgresql://ada:pw55%00@db/wiki", "NUL"),
    ("mysql://ada:pw55@db/wiki?ssl-mode=PREFERRED", "the option ssl-mode .* expected one of disabled, required"),
    ("mysql://ada:pw55@db/wiki?ssl_ca=/no/pw55.crt", "ssl_ca .* cannot be read"),
    ("mysql://ada:pw55@db/wiki?ssl_ca=/etc/passwd&ssl-mode=DISABLED", "ssl_ca .* has no effect without TLS"),
    ("mysql://ada:pw55@db/wiki?sslmode=VERIFY_CA", "ssl_ca .* is missing"),
    ("mysql://ada:pw55@db/wiki?autocommit=true", "the option autocommit of the database URL is unknown"),
    ("mysql://ada:pw55@db/wiki?sql_mode=ANSI", "the option sql_mode of the database URL is unknown"),
]


@pytest.mark.parametrize(("url", "complaint"), REFUSED)
def test_what_cannot_be_done_is_refused(url: str, complaint: str) -> None:
    """When the provider is built, one line names the option and what to do, and neither its value nor the password."""
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        SQLAlchemyOAuthProvider(url, base_url=BASE_URL)
    assert "\n" not in str(caught.value)
    assert "pw55" not in everything_of(caught.value)


def everything_of(error: BaseException) -> str:
    """An error with all that hangs on it, also what a log leaves out."""
    texts = []
    following: BaseException | None = error
    while following is not None:
        texts += [str(following), "".join(traceback.format_exception_only(following))]
        following = following.__cause__ or following.__context__
    return "".join(texts)


MISREAD = [
    "postgresql://wiki:hunter@2secret@db/wiki",
    "postgresql://wiki:hunter@2/secret@db/wiki",
    "postgresql://wiki:hunter@2?secret=1@db/wiki",
    "postgresql://wiki:hunter@2:secret@db/wiki",
    "postgresql://wiki@hunter2secret@db/wiki",
    "postgresql://wi/ki:hunter2secret@db/wiki",
    "postgresql://wiki:hunter2secret/wiki",
    "postgresql://wiki:hunter2secret",
    "postgresql://db:5432/wiki?password=hunter2secret&user=ada@wiki",
    "postgresql://db/wiki?password=hunter2secret&user=ada@wiki",
    "postgresql://db/wiki?user=ada&password=hunter&2secret",
    "postgresql://db/wiki?user=ada&password=hunter&2secret=1",
    "postgresql://db/wiki?user=ada&password=hunter2&secret=1",
    "mysql://wiki:hunter@2secret@db/wiki",
    "mysql://db/wiki?user=ada&passwd=hunter2&secret=1",
    "postgresql://db/wiki?pwd=hunter2&secret=1",
    "postgresql://db/wiki?user=ada:hunter2&secret=1",
    "postgresql:wiki:hunter2secret@db/wiki",
    "postgres:/wiki:hunter2secret@db/wiki",
    "mysql+asyncmy:wiki:hunter2secret@db/wiki",
    " postgresql://wiki:hunter2secret@db/wiki",
    "'postgresql://wiki:hunter2secret@db/wiki'",
    "jdbc:postgresql://wiki:hunter2secret@db/wiki",
]


@pytest.mark.parametrize("url", MISREAD)
def test_a_misread_password_is_nowhere(url: str) -> None:
    """No part of a password that shifts what is a host, a port or an option stands in the error or in a cause of it."""
    with pytest.raises(ConfigurationError) as caught:
        database_url(url)
    assert "\n" not in str(caught.value)
    for part in ("hunter", "secret"):
        assert part not in everything_of(caught.value)


@given(st.text("ab4@:/?#%&=+,[]", max_size=12), st.sampled_from(["postgresql", "mysql"]))
def test_a_raw_password_is_read_whole_or_refused(password: str, scheme: str) -> None:
    """Whatever stands for a password, host and name are never read out of it."""
    try:
        url = database_url(f"{scheme}://wiki:{password}@db.example.com/wiki")
    except ConfigurationError:
        return
    assert (url.username, url.password, url.host, url.database) == (
        "wiki",
        unquote(password),
        "db.example.com",
        "wiki",
    )
    assert display_name(url).endswith("://wiki:***@db.example.com/wiki")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_an_encoded_password_works(password: str) -> None:
    """Percent-encoded, every password is read as it is."""
    assert database_url(f"postgresql://wiki:{quote(password, safe='')}@db/wiki").password == password


@pytest.mark.parametrize("command", [["status"], ["doctor"], ["upgrade"], ["copy", "{url}", "target.db"]])
@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgresql://wiki:hunter@2secret@db/wiki", "encode it as %40"),
        ("postgresql://wiki:hunter2secret@db/wiki?sslmod=require", "the option sslmod of the database URL is unknown"),
        ("~nobody-2secret/hunter.db", "no home directory"),
        ("sqlite://hunter2secret.db", "three slashes"),
    ],
)
def test_commands_refuse_a_url_in_one_line(command: list[str], url: str, complaint: str) -> None:
    """A command that is given such a URL prints one line on standard error, and exits with 1."""
    answer = run(*(part.replace("{url}", url) for part in command), database=url)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("oauth-store: ")
    assert complaint in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "hunter" not in answer.stderr


class TestPath:
    """A path is a path."""

    @pytest.mark.parametrize(
        ("setting", "complaint"),
        [
            ("", "is empty"),
            ("oauth.db\n", "control character"),
            ("oa\0uth.db", "control character"),
            ("oa\tuth.db", "control character"),
            ("/srv/", "names a directory; set MCP_OAUTH_DB to a file in it: /srv/oauth.db"),
            ("~nobody-of-that-name/o.db", "~nobody-of-that-name has no home directory"),
            ("file:oauth.db", "begins with file:"),
            ("file:///srv/oauth.db", "no support for 'file' databases"),
            ("sqlite:oauth.db", "begins with sqlite:"),
            ("sqlite:/srv/oauth.db", "begins with sqlite:"),
            ("sqlite://oauth.db", "three slashes"),
            ("sqlite://srv/oauth.db", "three slashes"),
            ("sqlite://ada:pw@/oauth.db", "three slashes"),
            ("sqlite:///", "names no file"),
            ("sqlite:////srv/", "names a directory"),
            ("sqlite:///file:oauth.db", "begins with file:"),
            ("sqlite:///file:oauth?mode=memory&uri=true", "options of an SQLite URL"),
            ("sqlite:///what?.db", "options of an SQLite URL"),
            ("sqlite:///oauth.db%0A", "control character"),
        ],
    )
    def test_what_is_no_file_is_refused(self, setting: str, complaint: str) -> None:
        """One line says what was found and what is expected, when the provider is built."""
        with pytest.raises(ConfigurationError, match=complaint) as caught:
            SQLAlchemyOAuthProvider(setting, base_url=BASE_URL)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        [
            "mode=memory.db",
            "file?mode=memory",
            "./:memory:",
            "C:\\oauth.db",
            "C:/oauth.db",
            "a b.db",
            "./~x.db",
            "x:y.db",
        ],
    )
    async def test_any_other_name_is_a_file(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file of just this name holds the database."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "C:").mkdir()
        provider = SQLAlchemyOAuthProvider(name, base_url=BASE_URL)
        await provider.check_schema()
        await provider.aclose()
        assert (tmp_path / name).read_bytes().startswith(b"SQLite format 3")

    @pytest.mark.parametrize("setting", ["sqlite:///{}", "sqlite+aiosqlite:///{}", "{}"])
    def test_an_absolute_path(self, setting: str, tmp_path: Path) -> None:
        """A URL with its slashes and a path lead to the same file."""
        assert database_url(setting.format(tmp_path / "oauth.db")).database == str(tmp_path / "oauth.db")


class TestUrl:
    """What a setting means."""

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            ("oauth.db", "sqlite+aiosqlite:///oauth.db"),
            ("/srv/wiki/oauth.db", "sqlite+aiosqlite:////srv/wiki/oauth.db"),
            (":memory:", "sqlite+aiosqlite:///:memory:"),
            ("sqlite:///oauth.db", "sqlite+aiosqlite:///oauth.db"),
            ("postgresql://ada@db/wiki", "postgresql+asyncpg://ada@db/wiki"),
            ("postgres://ada@db/wiki", "postgresql+asyncpg://ada@db/wiki"),
            ("postgresql+asyncpg://ada@db/wiki", "postgresql+asyncpg://ada@db/wiki"),
            ("postgresql://ada@db/wiki?sslmode=require", "postgresql+asyncpg://ada@db/wiki?sslmode=require"),
        ],
    )
    def test_settings(self, setting: str, expected: str) -> None:
        """A path, `:memory:` and the URLs that people copy from their hoster all lead to our drivers."""
        assert database_url(setting) == make_url(expected)

    @pytest.mark.parametrize("name", ["a b.db", "50%25.db", "100%.db", "q?x=1.db", "ü#.db"])
    def test_a_path_is_taken_as_it_is(self, tmp_path: Path, name: str) -> None:
        """Percent signs, question marks and the like are part of a file's name."""
        assert database_url(str(tmp_path / name)).database == str(tmp_path / name)
        assert database_url(tmp_path / name).database == str(tmp_path / name)

    def test_the_environment_names_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a setting MCP_OAUTH_DB counts, and without that mcp_oauth.db in the working directory."""
        monkeypatch.delenv("MCP_OAUTH_DB", raising=False)
        assert database_url().database == "mcp_oauth.db"
        monkeypatch.setenv("MCP_OAUTH_DB", "/srv/oauth.db")
        assert database_url().database == "/srv/oauth.db"
        assert database_url("other.db").database == "other.db"

    def test_the_home_directory_is_found(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A leading ~ is the user's home, also where no shell expanded it."""
        monkeypatch.setenv("HOME", str(tmp_path))
        assert database_url("~/oauth.db").database == str(tmp_path / "oauth.db")

    @pytest.mark.parametrize(
        ("setting", "complaint"),
        [
            ("mongodb://db/wiki", "no support for 'mongodb' databases; expected a file's path"),
            ("postgresql+psycopg2://db/wiki", "no support for the driver 'psycopg2'"),
            ("sqlite+pysqlite:///x.db", "no support for the driver 'pysqlite'"),
            ("postgresql://db:port/wiki", "cannot be parsed"),
            ("://", "cannot be parsed"),
        ],
    )
    def test_what_is_not_supported_says_what_is(self, setting: str, complaint: str) -> None:
        """An unknown database or driver is a ConfigurationError when the provider is built."""
        with pytest.raises(ConfigurationError, match=complaint):
            SQLAlchemyOAuthProvider(setting, base_url=BASE_URL)

    def test_a_password_is_not_in_the_error(self) -> None:
        """A URL that cannot be used is not repeated with its password."""
        with pytest.raises(ConfigurationError) as caught:
            database_url("postgresql://ada:pa55word@db:port/wiki")
        assert "pa55word" not in str(caught.value)

    @pytest.mark.parametrize("url", ["postgresql://ada:pa55word@db/wiki", "mysql://db/wiki?user=ada&passwd=pa55word"])
    def test_a_password_is_not_in_the_name(self, url: str) -> None:
        """What operators read of a URL has no password, neither before the host nor among the driver's options."""
        name = display_name(database_url(url))
        assert "pa55word" not in name
        assert "ada" in name

    def test_a_misread_password_is_not_in_the_name_of_an_engine(self) -> None:
        """What an application made of such a URL itself shows neither host nor database."""
        assert display_name(make_url("postgresql+asyncpg://wiki:hunter@2secret@db/wiki")) == (
            "postgresql+asyncpg://wiki:***@hidden/hidden"
        )

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("sqlite+aiosqlite://", True),
            ("sqlite+aiosqlite:///file::memory:?uri=true", True),
            ("sqlite+aiosqlite:///file:oauth?mode=memory&cache=shared&uri=true", True),
            ("sqlite+aiosqlite:///file:oauth.db?mode=rw&uri=true", False),
            ("sqlite+aiosqlite:///mode=memory.db", False),
            ("sqlite+aiosqlite:///oauth.db?mode=memory", False),
            ("sqlite+aiosqlite:///:memory:", True),
            ("sqlite+aiosqlite:///oauth.db", False),
            ("postgresql+asyncpg://db/memory", False),
        ],
    )
    def test_memory_is_told_from_a_file(self, url: str, expected: bool) -> None:
        """What is gone with the process is known as such."""
        assert is_memory(make_url(url)) is expected
