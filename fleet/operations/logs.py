"""Structured logs on standard error: one JSON object a line in production, plain text in the embedded default.

Every record, ours or a library's, passes `redact` last: no secret leaves in a log.
"""

import logging.config
import re
from collections.abc import Mapping
from typing import Any

import structlog
from django.conf import settings
from structlog.typing import EventDict, Processor, WrappedLogger

HIDDEN = "[redacted]"
_SECRET_KEYS = re.compile(
    r"(^|[_-])(authorization|cookie|credential|password|passwd|secret|token|nonce|(secret|private|view|access)[_-]?key)$",
    re.IGNORECASE,
)
# Each keeps its first and last group, so that one still sees what kind of thing was there.
_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"(\b(?:authorization|cookie)['\"]?\s*[:=]\s*)[^\r\n]+()",
        r"(\bbearer\s+)[^\s'\",]+()",
        r"(\bfl[te]_)[\w-]+()",  # API tokens, enrolment tokens
        r"([?&;](?:[\w-]*[_-])?(?:token|key|secret|password|credential|signature|nonce|code)=)[^&\s'\"]+()",
        r"()\b[\w-]+\.\d+\.[\w-]+\.[\w-]{24,}=*()",  # a device's credential: <device>.<epoch>.<key id>.<mac>
        r"(/tuf/[^/\s]+/)[^/\s'\"?]+()",  # the view key of the plain TUF addresses
        r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s'\"]+()",  # of a presigned URL
        r"(://[^/\s:@]*:)[^/\s@]+(@)",  # the password in a database's URL
        r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END|\Z)",
    )
)


def redact(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:  # structlog's signature
    """Hide what a key or the shape of a text gives away as secret."""
    return {key: _clean(key, value) for key, value in event.items()}


def redact_text(text: str) -> str:
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{HIDDEN}\g<2>", text)
    return text


def _clean(key: object, value: Any) -> Any:
    if isinstance(key, str) and _SECRET_KEYS.search(key):
        return HIDDEN
    if isinstance(value, Mapping):
        return {inner: _clean(inner, content) for inner, content in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(None, item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return redact_text(text)  # the renderer would call str() on any other thing too, but after us


_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def formatter(*, json: bool | None = None) -> structlog.stdlib.ProcessorFormatter:
    """For records of structlog and of the standard library alike; also granian's (`granian.json`)."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_SHARED, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,  # before redact: a traceback may quote a secret
            redact,
            *_renderer(json=settings.LOG_JSON if json is None else json),
        ],
    )


def _renderer(*, json: bool) -> list[Processor]:
    if json:
        return [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer(default=str)]
    return [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]


def configure(options: Mapping[str, Any]) -> None:
    """Django calls this (`settings.LOGGING_CONFIG`) with `settings.LOGGING`."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"structured": {"()": formatter, "json": options["json"]}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "structured"}},
            "root": {"handlers": ["stderr"], "level": options["level"]},
            "loggers": {
                "django": {"handlers": [], "level": "INFO", "propagate": True},
                # django_structlog logs what failed, with the request's id; twice would be noise.
                "django.request": {"level": "CRITICAL"},
                "botocore": {"level": "WARNING"},
                "tuf": {"level": "WARNING"},  # "No signature for keyid": a missing second signature is no news
                "celery.beat": {"level": "WARNING"},
                "celery.app.trace": {"level": "WARNING"},  # "succeeded in 0.01s", twelve times a minute
                "celery.worker.strategy": {"level": "WARNING"},
            },
        }
    )
