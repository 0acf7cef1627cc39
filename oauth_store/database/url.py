"""Parse a setting into a database URL, or refuse it in one line that repeats nothing that may be secret."""

import importlib.util
import os
import re
import unicodedata
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from oauth_store.database.options import PLACES, named, with_driver_arguments
from oauth_store.errors import ConfigurationError

DEFAULT_DATABASE = "mcp_oauth.db"

# scheme -> (SQLAlchemy's driver, the module it needs, our extra that installs it)
_DRIVERS = {
    "sqlite": ("sqlite+aiosqlite", "aiosqlite", None),
    "postgresql": ("postgresql+asyncpg", "asyncpg", "postgresql"),
    "postgres": ("postgresql+asyncpg", "asyncpg", "postgresql"),
    "mysql": ("mysql+asyncmy", "asyncmy", "mysql"),
    "mariadb": ("mysql+asyncmy", "asyncmy", "mysql"),
}
DRIVER_MODULES = {"sqlite3", *(module for _, module, _ in _DRIVERS.values())}

_NO_SLASHES = re.compile(rf"(file|{'|'.join(_DRIVERS)})(\+\w+)?:")
_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%[\w.-]+)?")
"""A host name or an IPv4 address, or an IPv6 address."""
_PLACE = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::([0-9]{0,5}))?")
"""A host and its port, before the path."""
_ENCODE = "in a user name and a password, write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23 and % as %25"


def database_url(database: str | Path | None = None) -> URL:
    """Return the SQLAlchemy URL of a setting: a path, `:memory:`, or a URL. `None` reads `MCP_OAUTH_DB`.

    The only place that reads `MCP_OAUTH_DB`. Raises `ConfigurationError` for a database that is not supported, and for
    an option of a URL that can neither be passed to the driver nor be ignored without harm.
    """
    if database is None:
        database = os.environ.get("MCP_OAUTH_DB") or DEFAULT_DATABASE
    if not isinstance(database, str | Path):  # from a caller without type checks
        kind = f"{type(database).__module__}.{type(database).__qualname__}"
        raise ConfigurationError(f"the database is a {kind}; expected a path, a URL as text, or an AsyncEngine")
    setting = str(database)
    _check_characters(setting)
    if isinstance(database, Path) or "://" not in setting:
        return _path(setting)
    name, _, rest = setting.partition("://")
    if not re.fullmatch(r"[\w+]+", name):
        raise ConfigurationError(_UNREADABLE)
    scheme, _, driver = name.partition("+")
    if scheme not in _DRIVERS:
        supported = ", ".join(sorted({f"{name}://" for name in _DRIVERS if name != "postgres"}))
        raise ConfigurationError(
            f"no support for {scheme!r} databases; expected a file's path, ':memory:', or a URL of {supported}"
        )
    drivername, module, extra = _DRIVERS[scheme]
    if driver and driver != drivername.partition("+")[2]:
        raise ConfigurationError(
            f"no support for the driver {driver!r}; expected {drivername}://, or {scheme}:// without a driver"
        )
    if extra and importlib.util.find_spec(module) is None:
        raise ConfigurationError(f"{module} is not installed; run: pip install 'fastmcp-oauth-store[{extra}]'")
    url = (_file if scheme == "sqlite" else _server)(drivername, rest)
    name = unquote(url.database or "")  # SQLAlchemy 2.0 does not decode it
    for part in (url.username, url.host, name, *url.query, *map(str, url.query.values())):
        _check_characters(part or "")
    if "\0" in (url.password or ""):
        raise ConfigurationError("the password of the database URL holds a NUL character; remove %00 from it")
    return url


_UNREADABLE = (
    "the database URL cannot be parsed; expected a path, ':memory:', or a URL such as "
    f"postgresql://user:password@host:5432/name; {_ENCODE}"
)


def _check_characters(text: str) -> None:
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ConfigurationError(
            "the database setting holds a control character, such as a line break at its end; remove it"
        )


def _path(name: str) -> URL:
    if not name:
        raise ConfigurationError("the database setting is empty; expected a file's path, ':memory:', or a URL")
    if name != ":memory:":
        _check_path(name)
        path = os.path.expanduser(name)
        if path.startswith("~"):
            raise ConfigurationError(
                f"{name.partition('/')[0]} has no home directory on this machine; write the full path, or start it "
                "with ./ if the name of the file starts with ~"
            )
        name = path
    return URL.create("sqlite+aiosqlite", database=name)  # make_url() would percent-decode it


_NO_PATH = re.compile(r"\b(host|server|user|uid|password|pwd|dbname|database)\s*=|^[^/]*:[^/]*@|//[^/]*:[^/]*@", re.I)
"""A URL without the colon of its scheme, or another kind of connection string: it may hold a password."""


def _check_path(name: str) -> None:
    if _NO_PATH.search(name):
        raise ConfigurationError(_UNREADABLE)
    if found := _NO_SLASHES.match(name):
        raise ConfigurationError(
            f"the database setting begins with {found[0]} like a URL, but lacks two slashes; expected a file's path "
            f"alone (or ./{found[0]}...), or a URL such as sqlite:////srv/oauth.db or postgresql://host/name"
        )
    if name.endswith(("/", os.sep)):
        raise ConfigurationError(f"{name} names a directory; set MCP_OAUTH_DB to a file in it: {name}oauth.db")


def _file(drivername: str, rest: str) -> URL:
    url = _parsed(f"{drivername}://{rest}")
    if "?" in rest:
        raise ConfigurationError("options of an SQLite URL are not supported; expected the file's path alone")
    if not rest.startswith("/") and rest:
        raise ConfigurationError(
            "an SQLite URL needs three slashes before a relative path and four before an absolute one; expected "
            "sqlite:///oauth.db or sqlite:////srv/oauth.db"
        )
    if rest and not url.database:
        raise ConfigurationError("the SQLite URL names no file; expected sqlite:///oauth.db or sqlite:////srv/oauth.db")
    if url.database not in (None, ":memory:"):
        _check_path(str(url.database))
    return url


def _server(drivername: str, rest: str) -> URL:
    login, at, _ = rest.partition("@")
    if re.search(r"\s", rest):
        raise ConfigurationError("the database URL holds a space; write it as %20, or remove it")
    without, hosts = _without_hosts(rest)
    url = _parsed(f"{drivername}://{without}") if rest.count("@") < 2 else None
    # an @ after the host, or with the host already before it, has shifted the password, the host and the name
    if url is None or (at and (url.username is None or re.search(r"/[^?]*\?[^=]*=", login))):
        raise ConfigurationError(
            "the database URL holds an @ that does not end its user name and password; encode it as %40, also after "
            f"the host; {_ENCODE}"
        )
    postgresql = url.get_backend_name() == "postgresql"
    if len(hosts) > 1 and not postgresql:
        raise ConfigurationError("the database URL names several hosts, which only PostgreSQL supports; name one")
    for host in [host for host, _ in hosts] or [url.host or "localhost"]:
        if not _HOST.fullmatch(host) and not (postgresql and host.startswith("/")):
            socket = "?host=/directory" if postgresql else "?unix_socket=/file"
            raise ConfigurationError(
                f"the host of the database URL holds characters that no host name has; {_ENCODE}, and the path of a "
                f"Unix socket as an option: {url.drivername.partition('+')[0]}://user:password@/name{socket}"
            )
    _check_values(rest.rpartition("@")[2].partition("?")[2], url)
    if hosts:
        if url.query.keys() & {"host", "port"}:
            raise ConfigurationError("the database URL names its hosts twice; keep those before or those after the ?")
        names, ports = zip(*hosts, strict=True)
        url = url.update_query_dict({"host": ",".join(names), "port": ",".join(ports)})
    if url.port is not None and not 0 < url.port < 65536:
        raise ConfigurationError(_UNREADABLE)
    _check_hosts(with_driver_arguments(url, {})[0])
    for name in PLACES.keys() & url.query.keys():
        url = url.set(**{PLACES[name]: url.query[name]}).difference_update_query([name])  # type: ignore[arg-type]  # names and text
    return url


def _without_hosts(rest: str) -> tuple[str, list[tuple[str, str]]]:
    """Return `rest` without the hosts that SQLAlchemy cannot parse there, several or a socket, and each with its port.

    One host may be named twice, with another port.
    """
    login, at, behind = rest.rpartition("@")
    places = re.split("[/?]", behind)[0]
    behind = behind.removeprefix(places)
    if "," not in places and not places.lower().startswith("%2f"):
        return login + at + places.removesuffix(":") + behind, []
    hosts = []
    for place in places.split(","):
        found = _PLACE.fullmatch(place)
        if found is None or not 0 < int(found[2] or 5432) < 65536:
            raise ConfigurationError(_UNREADABLE)
        hosts.append((unquote(found[1].strip("[]")), found[2] or "5432"))
    return login + at + behind, hosts


def _parsed(setting: str) -> URL:
    url = None
    with suppress(exc.ArgumentError, ValueError):  # both may quote a part of a password: neither may be a cause
        url = make_url(setting)
    if url is None:
        raise ConfigurationError(_UNREADABLE)
    return url


def _check_values(query: str, url: URL) -> None:
    """Raise `ConfigurationError` for an option without a value, which SQLAlchemy would ignore, or with two."""
    for name, value in parse_qsl(query, keep_blank_values=True):
        if not value:
            raise ConfigurationError(f"{named(name, url)} of the database URL has no value; give it one, or remove it")
        if not isinstance(url.query[name], str) and (name != "host" or url.get_backend_name() != "postgresql"):
            raise ConfigurationError(f"{named(name, url)} is given twice in the database URL; keep one")


def _check_hosts(url: URL) -> None:
    arguments = None
    with suppress(exc.ArgumentError, ValueError):
        arguments = url.get_dialect()().create_connect_args(url)
    if arguments is None:
        raise ConfigurationError(
            "the options host and port of the database URL do not match; expected host=one:5432&host=two:5432"
        )


def display_name(url: URL) -> str:
    """Return the path of a file, or a URL without its password, and without options that may hold one."""
    if url.get_backend_name() == "sqlite":
        return str(url.database or ":memory:")
    if "@" in f"{url.host}{url.database}":  # from an engine that was passed in: a misread password
        url = url.set(host="hidden", database="hidden")
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def is_memory(url: URL) -> bool:
    """Return whether `url` is an SQLite database that exists only in this process."""
    if url.get_backend_name() != "sqlite":
        return False
    if url.database in (None, "", ":memory:"):
        return True
    name = str(url.database)  # of an engine that was passed in: SQLite reads a URI only where `uri` is on
    uri = f"{name}?mode={url.query.get('mode')}"
    return "uri" in url.query and name.startswith("file:") and (":memory:" in name or "mode=memory" in uri)


def sqlite_name(url: URL) -> str:
    """Return the name that SQLite opens."""
    return ":memory:" if is_memory(url) else os.path.abspath(str(url.database))
