"""Translate the options of a server's URL for its driver. docs/database-urls.md has the table."""

import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from sqlalchemy.engine import URL

from oauth_store.errors import ConfigurationError

PLACES = {
    "user": "username",
    "password": "password",
    "passwd": "password",
    "dbname": "database",
    "database": "database",
    "db": "database",
}
"""Options that repeat a part of the URL."""
_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
"""libpq's modes, weakest first."""
_SYSTEM = "system"
"""The certificate authorities that the system trusts."""

# Options that can be ignored without harm, and the values for which that is true: None means any value.
_LEFT_OUT: Mapping[str, Mapping[str, tuple[str, ...] | None]] = {
    "postgresql": {
        **dict.fromkeys(("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count")),
        **dict.fromkeys(("tcp_user_timeout", "pool_timeout", "socket_timeout", "sslcompression")),
        **dict.fromkeys(("supa", "uselibpqcompat")),
        "client_encoding": ("utf8", "utf-8", "auto"),
        "gssencmode": ("disable", "prefer"),
        "load_balance_hosts": ("disable",),
        "sslnegotiation": ("postgres",),
        "sslsni": ("1",),
    },
    "mysql": {
        **dict.fromkeys(("charset", "characterEncoding", "useUnicode", "use_unicode", "serverTimezone")),
        **dict.fromkeys(("reconnect", "autoReconnect", "allowPublicKeyRetrieval", "zeroDateTimeBehavior")),
        **dict.fromkeys(("collation", "pool_timeout", "read_timeout", "socket_timeout")),
    },
}
_PASSED_ON = {
    "postgresql": ("passfile", "krbsrvname", "gsslib"),
    "mysql": ("unix_socket", "program_name", "read_default_file", "read_default_group"),
}
UNNAMED: Mapping[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}
"""A statement without a name is gone after its use: a pooler may run the next one on another connection."""


def with_driver_arguments(url: URL, ours: Mapping[str, Any]) -> tuple[URL, dict[str, Any]]:
    """Return `url` without its options, and the driver's arguments: `ours`, overridden by the options.

    Raises `ConfigurationError` for an option that is unknown, or that asks for something the driver cannot do.
    """
    hosts = {name: url.query[name] for name in ("host", "port") if name in url.query}  # SQLAlchemy reads these itself
    return url.set(query=hosts), {**ours, **_driver_arguments(url)}


def _driver_arguments(url: URL) -> dict[str, Any]:
    kind = url.get_backend_name()
    options = {name: str(value) for name, value in url.query.items() if name not in PLACES}
    arguments = {name: options.pop(name) for name in _PASSED_ON[kind] if name in options}
    for name, harmless in _LEFT_OUT[kind].items():
        _choice(options, name, harmless)
    _number(options, "connection_limit", least=1)
    arguments |= (_asyncpg if kind == "postgresql" else _asyncmy)(options)
    for name in options:
        raise ConfigurationError(
            f"{named(name, url)} of the database URL is unknown; remove it, or write & as %26 if it is part of a value"
        )
    return arguments


def connections(url: URL, ours: int) -> int:
    """Return the maximum number of connections: `ours`, or fewer if the URL limits them."""
    return min(ours, int(str(url.query.get("connection_limit", ours))))


def named(option: str, url: URL) -> str:
    """Return an option as an error may name it: the text after an & may be the end of a password."""
    hidden = any(word in name.lower() for name in url.query for word in ("pass", "pwd", "user", "uid"))
    shown = re.fullmatch(r"[A-Za-z][\w.-]*", option) and not hidden
    return f"the option {option}" if shown else "an option"


def _asyncpg(options: dict[str, str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name in ("host", "port"):
        options.pop(name, None)
    security = _postgresql_security(options)
    if security is not None:
        arguments["ssl"] = security
    if timeout := _number(options, "connect_timeout"):  # 0 means none: ours applies
        arguments["timeout"] = timeout
    # the server has to accept writes: the other values are for a standby
    if (attributes := _choice(options, "target_session_attrs", ("any", "primary", "read-write"))) is not None:
        arguments["target_session_attrs"] = attributes
    settings: dict[str, str] = {name: options.pop(name) for name in ("application_name", "options") if name in options}
    if "fallback_application_name" in options:
        settings = {"application_name": options.pop("fallback_application_name"), **settings}
    if "schema" in options:
        settings["search_path"] = '"' + options.pop("schema").replace('"', '""') + '"'
    if settings:
        arguments["server_settings"] = settings
    caches = {name: _number(options, name) for name in ("statement_cache_size", "prepared_statement_cache_size")}
    if _flag(options, "pgbouncer") or 0 in caches.values():
        return {**arguments, **UNNAMED}
    return {**arguments, **{name: size for name, size in caches.items() if size is not None}}


_POSTGRESQL_SECURITY: Mapping[str, Mapping[str, str]] = {
    "sslmode": {"no-verify": "require"},
    "ssl": {"true": "verify-full", "1": "verify-full", "false": "disable", "0": "disable"},
    "sslaccept": {"strict": "verify-full", "accept_invalid_certs": "require"},
}
"""Names of other drivers for a mode, besides libpq's own."""


def _postgresql_security(options: dict[str, str]) -> ssl.SSLContext | str | None:
    """Return asyncpg's `ssl`: a mode, a context, or None for its own default."""
    if "sslidentity" in options:
        _refuse("sslidentity", "names a PKCS #12 file, which asyncpg cannot read", "set sslcert and sslkey")
    modes = []
    for name, aliases in _POSTGRESQL_SECURITY.items():
        if (value := _choice(options, name, (*_MODES, *aliases))) is not None:
            modes.append(aliases.get(value, value))
    mode = max(modes, key=_MODES.index, default=None)
    files = _taken(options, "ssl", ("rootcert", "cert", "key", "crl", "password"))
    # asyncpg has no channel binding. A verified certificate proves the same: that this is the server.
    if _choice(options, "channel_binding", ("disable", "prefer", "require")) == "require":
        if mode == "disable":
            _refuse("channel_binding", "contradicts sslmode=disable", "keep one")
        mode = "verify-full"
    if files.get("rootcert") == _SYSTEM:
        if mode not in (None, "verify-full"):
            _refuse("sslrootcert", "is system, which is safe only with sslmode=verify-full", "set that")
        mode = "verify-full"
    if mode not in ("require", "verify-ca", "verify-full"):
        if files:
            _refuse(f"ssl{next(iter(files))}", "has no effect without TLS", f"add sslmode=verify-full, {_WEAKER}")
        return mode
    if mode == "require" and not files:
        return mode
    root = os.environ.get("PGSSLROOTCERT") or os.path.expanduser("~/.postgresql/root.crt")
    if os.path.exists(root):
        if not files:
            return mode  # asyncpg reads the files that the environment and the home directory name
        files = {"rootcert": root, **files}
    return _context(mode, "ssl", files, root="rootcert")


_WEAKER = "or verify-ca, which accepts any host name, or require, which accepts any certificate"


def _asyncmy(options: dict[str, str]) -> dict[str, Any]:
    # overrides the URL: a client's name may hold any character
    arguments: dict[str, Any] = {"charset": "utf8mb4", **_mysql_security(options)}
    if timeout := _number(options, "connect_timeout"):
        arguments["connect_timeout"] = timeout
    return arguments


_MYSQL_SECURITY: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(
        ("ssl-mode", "ssl_mode", "sslmode", "sslMode"),
        # without the modes that use TLS only if the server offers it: asyncmy cannot
        {"disabled": "disable", "required": "require", "verify-ca": "verify-ca", "verify-identity": "verify-full"}
        | {mode: mode for mode in ("disable", "require", "verify-full")},
    ),
    "ssl": {"true": "require", "false": "disable", "1": "require", "0": "disable"}
    | {'{"rejectunauthorized":true}': "verify-full", '{"rejectunauthorized":false}': "require"},
    "sslaccept": {"strict": "verify-full", "accept-invalid-certs": "require"},
    "useSSL": {"true": "require", "false": "disable"},
    "ssl_disabled": {"true": "disable", "1": "disable", "false": "require", "0": "require"},
}
"""Names of hosting providers and other drivers for a mode, and its values."""


def _mysql_security(options: dict[str, str]) -> dict[str, Any]:
    given = []
    for name, modes in _MYSQL_SECURITY.items():
        if name in options:
            value = options.pop(name).lower().replace("_", "-").replace(" ", "")
            if value not in modes:
                _refuse(name, "has an unknown value", f"expected one of {', '.join(modes)}")
            given.append(modes[value])
    names = ("ca", "cert", "key", "capath", "cipher")
    files = _taken(options, "ssl-", names) | _taken(options, "ssl_", names)
    authorities = "ca" in files or "capath" in files
    checks = [_flag(options, "ssl_check_hostname"), _flag(options, "ssl_verify_identity")]
    verifies = _flag(options, "ssl_verify_cert")
    if True in checks or (verifies and not authorities):
        given.append("verify-full")
    elif verifies is False:
        given.append("require")
    if files and not given:
        given.append("require" if not authorities else "verify-ca" if False in checks else "verify-full")
    mode = max(given, key=_MODES.index, default="disable")
    if files and mode == "disable":
        _refuse(f"ssl_{next(iter(files))}", "has no effect without TLS", "set ssl-mode=VERIFY_IDENTITY or REQUIRED")
    if mode == "disable":
        return {}
    return {"ssl": _context(mode, "ssl_", files, root="ca")}


def _context(mode: str, prefix: str, files: Mapping[str, str], *, root: str) -> ssl.SSLContext:
    """Return a context that verifies what `mode` promises. With a root, "require" is "verify-ca", as in libpq.

    `root` is the name, after the `prefix`, of the option whose file has the authorities.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    authorities, directory = files.get(root), files.get("capath")
    if authorities == _SYSTEM or (not authorities and not directory and mode == "verify-full"):
        context.load_default_certs()
    elif authorities or directory:
        _read(f"{prefix}{root}", lambda: context.load_verify_locations(authorities, directory))
    elif mode == "verify-ca":
        _refuse(f"{prefix}{root}", "is missing, and verify-ca needs it", "add it, or verify the host name too")
    else:
        context.verify_mode = ssl.CERT_NONE
    if "crl" in files:
        _read(f"{prefix}crl", lambda: context.load_verify_locations(files["crl"]))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if "cert" in files:  # without a password, OpenSSL would prompt for it
        key, password = files.get("key"), files.get("password", "")
        _read(f"{prefix}cert", lambda: context.load_cert_chain(files["cert"], key, lambda: password))
    if "cipher" in files:
        _read(f"{prefix}cipher", lambda: context.set_ciphers(files["cipher"]))
    return context


def _read(option: str, read: Callable[[], object]) -> None:
    reason = ""
    try:
        read()
    except ssl.SSLError:
        reason = "cannot be read by OpenSSL"
    except OSError as error:
        reason = f"names a file that cannot be read: {os.strerror(error.errno or 0)}"
    if reason:
        _refuse(option, reason, "expected a file in the PEM format that the server's user may read")


def _choice(options: dict[str, str], name: str, expected: tuple[str, ...] | None) -> str | None:
    """Take an option, whose value must be one of `expected`."""
    value = options.pop(name, None)
    if value is not None and expected is not None and (value := value.lower()) not in expected:
        _refuse(name, "has an unsupported value", f"expected {' or '.join(expected)}")
    return value


def _flag(options: dict[str, str], name: str) -> bool | None:
    value = _choice(options, name, ("true", "false", "1", "0"))
    return None if value is None else value in ("true", "1")


def _number(options: dict[str, str], name: str, *, least: int = 0) -> int | None:
    value = options.pop(name, None)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) < least:
        _refuse(name, "is not a valid number", f"expected a whole number, {least} or more")
    return int(value)


def _taken(options: dict[str, str], prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Take the options that have these names after a prefix."""
    return {name: options.pop(prefix + name) for name in names if prefix + name in options}


def _refuse(option: str, found: str, do: str) -> NoReturn:
    raise ConfigurationError(f"the option {option} of the database URL {found}; {do}")
