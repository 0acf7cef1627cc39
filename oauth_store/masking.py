"""No log line of ours has a secret. If a library, or an error, puts one into a line, this filter masks it."""

import logging
import re

_SECRET = re.compile(r"\b(mcp|access|refresh|code|device|request|session|browser|enrollment)_[A-Za-z0-9_-]{43,}")


def masked(text: str) -> str:
    """Return a text with the secrets of this package masked."""
    return _SECRET.sub(r"\1_***", text)


class SecretFilter(logging.Filter):
    """Masks secrets in the lines of a logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, without a secret in its message or its exception."""
        message = record.getMessage()
        if _SECRET.search(message):
            record.msg, record.args = masked(message), ()
        if record.exc_info and not record.exc_text:
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text = masked(text) if _SECRET.search(text) else None
        return True
