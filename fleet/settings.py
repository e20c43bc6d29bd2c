"""Every setting of the server, from the environment (twelve-factor). `deploy/SETTINGS.md` is generated from here:
`manage.py settings_reference --write`; the comment beside or above a setting is its text there.

The embedded default needs nothing: SQLite, local objects, a broker of files, all under `FLEET_VAR`.
"""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery.schedules import crontab
from environs import Env

from fleet.dashboard.unfold import UNFOLD  # noqa: F401  # Django reads it here

env = Env()
BASE_DIR = Path(__file__).resolve().parent.parent

VAR: Path = env.path("FLEET_VAR", BASE_DIR / "var")  # where the embedded default keeps all it writes
DEBUG: bool = env.bool("FLEET_DEBUG", False)  # tracebacks in the browser; never in production
DEMO_SECRET = "demonstration-only-" + "0" * 40
SECRET_KEY: str = env.str("FLEET_SECRET_KEY", DEMO_SECRET)  # signs sessions; the default is refused in production
PRODUCTION: bool = env.bool("FLEET_PRODUCTION", False)  # turns warnings about demonstration keys into errors
PUBLIC_URL: str = env.str("FLEET_PUBLIC_URL", "http://127.0.0.1:8000").rstrip("/")  # as devices and CI reach it
# Host names that the server answers to.
ALLOWED_HOSTS: list[str] = env.list("FLEET_ALLOWED_HOSTS", ["127.0.0.1", "localhost", "[::1]"])
# Origins from which forms may come.
CSRF_TRUSTED_ORIGINS: list[str] = env.list("FLEET_CSRF_TRUSTED_ORIGINS", [PUBLIC_URL])

# --- processes of `manage.py serve` ------------------------------------------------------------------------------
WEB_WORKERS: int = env.int("FLEET_WEB_WORKERS", 1)  # web processes; about one for each core
WEB_THREADS: int = env.int("FLEET_WEB_THREADS", 16)  # requests that one web process serves at a time
TASK_WORKERS: int = env.int("FLEET_TASK_WORKERS", 2)  # processes that validate, ingest and tick

# --- trust -------------------------------------------------------------------------------------------------------
# The online key: a PKCS#8 file (its passphrase: FLEET_KEY_PASSPHRASE), env:NAME, or a KMS or HSM URI.
ONLINE_KEY_URI: str = env.str("FLEET_ONLINE_KEY_URI", f"file2:{VAR / 'keystore' / 'online.pem'}")
ONLINE_KEY_PUBLIC: Path = env.path("FLEET_ONLINE_KEY_PUBLIC", VAR / "keystore" / "online.pub.json")  # its public half
# The online key after the next change of root, in the same forms. The server signs with whichever of both root names.
NEXT_ONLINE_KEY_URI: str = env.str("FLEET_NEXT_ONLINE_KEY_URI", "")
# Its public half.
NEXT_ONLINE_KEY_PUBLIC: Path = env.path("FLEET_NEXT_ONLINE_KEY_PUBLIC", VAR / "keystore" / "online-next.pub.json")
DEMO_DEVICE_SECRET = "demo:" + "00" * 32
# Secrets that key the macs of device credentials, newest first: `<id>:<hex>`. The first one signs, all verify.
DEVICE_SECRETS: list[str] = env.list("FLEET_DEVICE_SECRETS", [DEMO_DEVICE_SECRET])
VIEW_LIFETIME = timedelta(hours=24)
VIEW_RENEW_BEFORE = timedelta(hours=12)

# --- devices -----------------------------------------------------------------------------------------------------
POLL_INTERVAL: float = env.float("FLEET_POLL_INTERVAL", 300.0)  # seconds between polls, told to every device
FAST_POLL: bool = env.bool("FLEET_FAST_POLL", True)  # answer idle polls from memory; off: Django answers them all
LAST_SEEN_FLUSH: float = env.float("FLEET_LAST_SEEN_FLUSH", 1.0)  # seconds that last-seen marks wait in memory

# --- uploads and validation --------------------------------------------------------------------------------------
MAX_ARTIFACT_BYTES: int = env.int("FLEET_MAX_ARTIFACT_BYTES", 4 * 1024**3)  # of one file of a release
VALIDATION_SECONDS: int = env.int("FLEET_VALIDATION_SECONDS", 120)  # in which a release must load
VALIDATION_MEMORY: int = env.int("FLEET_VALIDATION_MEMORY", 4 * 1024**3)  # bytes of address space for the loader
PATCH_SECONDS: int = env.int("FLEET_PATCH_SECONDS", 600)  # in which a patch between releases must be made; 0: none are
PRESIGNED_SECONDS: int = env.int("FLEET_PRESIGNED_SECONDS", 900)  # that a presigned URL is good for
BATCH_RETENTION_DAYS: int = env.int("FLEET_BATCH_RETENTION_DAYS", 30)  # raw batches; data sets are kept
# Received batches wait this long for company, so that data sets get few, large files. 0: the next sweep takes them.
COMPACT_SECONDS: float = env.float("FLEET_COMPACT_SECONDS", 0.0)
TICK_SECONDS: float = env.float("FLEET_TICK_SECONDS", 5.0)  # between looks at rollouts: how late a guard can halt
SWEEP_SECONDS: float = env.float("FLEET_SWEEP_SECONDS", 30.0)  # between searches for work that was left undone

# --- storage -----------------------------------------------------------------------------------------------------
# SQLite, or postgres://user:password@host/name
DATABASES = {"default": env.dj_db_url("FLEET_DATABASE_URL", f"sqlite:///{VAR / 'fleet.sqlite3'}", conn_max_age=60)}
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        "transaction_mode": "IMMEDIATE",  # writers queue at the start; none fails half-way for a stale read
        "timeout": 20,  # seconds in that queue
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

S3_BUCKET: str = env.str("FLEET_S3_BUCKET", "")  # set it and objects live in S3; else in a local folder
_OBJECTS: dict[str, Any] = {
    "BACKEND": "django.core.files.storage.FileSystemStorage",
    "OPTIONS": {"location": str(VAR / "objects"), "allow_overwrite": True},
}
if S3_BUCKET:
    _OBJECTS = {
        "BACKEND": "storages.backends.s3.S3Storage",
        "OPTIONS": {
            "bucket_name": S3_BUCKET,
            "endpoint_url": env.str("FLEET_S3_ENDPOINT", None),  # other than AWS's
            "access_key": env.str("FLEET_S3_ACCESS_KEY", None),  # left out: the machine's own role
            "secret_key": env.str("FLEET_S3_SECRET_KEY", None),  # of that access key
            "region_name": env.str("FLEET_S3_REGION", "us-east-1"),  # of the bucket
            "addressing_style": env.str("FLEET_S3_ADDRESSING", "path"),  # path or virtual
            "signature_version": "s3v4",
            "file_overwrite": True,
            "querystring_expire": PRESIGNED_SECONDS,
        },
    }
INCOMING = VAR / "incoming"  # partial uploads, on this machine's disk
STORAGES = {
    "default": _OBJECTS,
    "objects": _OBJECTS,
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedStaticFilesStorage"},
}
STATIC_URL = "static/"
STATIC_ROOT = VAR / "static"

# --- shared cache and queue --------------------------------------------------------------------------------------
REDIS_URL: str = env.str("FLEET_REDIS_URL", "")  # set it and broker and cache are Redis
CACHES: dict[str, Any] = {
    "default": (
        {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": REDIS_URL}
        if REDIS_URL
        else {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
    )
}
CELERY_BROKER_URL = REDIS_URL or "fleet-files://localhost"  # see fleet/operations/broker.py
if not REDIS_URL:
    _QUEUE = VAR / "queue"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(_QUEUE),
        "data_folder_out": str(_QUEUE),
        "control_folder": str(VAR / "queue-control"),
        "polling_interval": 0.2,  # seconds between looks into the folder
    }
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_TIME_LIMIT = 1800
CELERY_WORKER_PREFETCH_MULTIPLIER = 1  # a worker that dies holds up little; the sweeps find it
CELERY_WORKER_MAX_TASKS_PER_CHILD = 500
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = True
CELERY_WORKER_ENABLE_REMOTE_CONTROL = bool(REDIS_URL)  # its mailboxes would pile up in a folder
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BEAT_SCHEDULE_FILENAME = str(VAR / "beat-schedule")
CELERY_BEAT_SCHEDULE: dict[str, dict[str, Any]] = {
    "rollouts-tick": {"task": "fleet.rollouts.tasks.tick", "schedule": TICK_SECONDS},
    "validate-sweep": {"task": "fleet.releases.tasks.sweep", "schedule": SWEEP_SECONDS},
    "feedback-sweep": {"task": "fleet.feedback.tasks.sweep", "schedule": SWEEP_SECONDS},
    "feedback-retention": {"task": "fleet.feedback.tasks.retention", "schedule": crontab(hour="4", minute="30")},
    "audit-seal": {"task": "fleet.audit.tasks.seal", "schedule": SWEEP_SECONDS},
    "spread-history": {"task": "fleet.devices.tasks.record_spread", "schedule": SWEEP_SECONDS},
    "notices-sweep": {"task": "fleet.notices.tasks.sweep", "schedule": SWEEP_SECONDS},
    "notices-retention": {"task": "fleet.notices.tasks.retention", "schedule": crontab(hour="4", minute="50")},
    "rollouts-retention": {"task": "fleet.rollouts.tasks.retention", "schedule": crontab(hour="4", minute="20")},
    "device-retention": {"task": "fleet.devices.tasks.retention", "schedule": crontab(hour="4", minute="10")},
}
for _entry in CELERY_BEAT_SCHEDULE.values():
    # A worker that was busy or away does one of each when it is back, not all that it missed.
    if isinstance(_entry["schedule"], float):
        _entry["options"] = {"expires": max(_entry["schedule"], 5.0)}

# --- Django ------------------------------------------------------------------------------------------------------
INSTALLED_APPS = [
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "knox",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_structlog",
    "django_prometheus",
    "fleet.audit",
    "fleet.accounts",
    "fleet.notices",
    "fleet.devices",
    "fleet.releases",
    "fleet.trust",
    "fleet.rollouts",
    "fleet.feedback",
    "fleet.dashboard",
    "fleet.api",
    "fleet.operations",
]
MIDDLEWARE = [
    "fleet.operations.health.HealthMiddleware",
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "fleet.operations.requests.LoggedRequests",
    "fleet.operations.requests.ContentPolicy",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "fleet.audit.context.ActingMiddleware",
    "fleet.accounts.login.LockedOutMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "fleet.dashboard.middleware.ViewerTimeZone",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_prometheus.middleware.PrometheusAfterMiddleware",
]
ROOT_URLCONF = "fleet.urls"
WSGI_APPLICATION = "fleet.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
USE_TZ = True
TIME_ZONE = env.str("FLEET_TIME_ZONE", "UTC")  # of the admin's pages, where the browser does not tell
LANGUAGE_CODE = "en-gb"
SESSION_ENGINE = "fleet.accounts.sessions"  # keeps a digest of the key: who reads the database is nobody's session
LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "admin:index"

BEHIND_TLS: bool = env.bool("FLEET_BEHIND_TLS", PRODUCTION)  # cookies, HSTS, and the proxy's scheme header
# Proxies of ours in front that tell a client's address in X-Forwarded-For; 0: that header is not believed.
PROXIES: int = env.int("FLEET_PROXIES", 1 if BEHIND_TLS else 0)
if BEHIND_TLS:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = True
    SECURE_HSTS_SECONDS = 31_536_000
    SECURE_HSTS_INCLUDE_SUBDOMAINS = True
    SECURE_HSTS_PRELOAD = True
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True

# --- limits ------------------------------------------------------------------------------------------------------
# Failed log-ins of one user name from one address; then that name waits there. All limits count failures only, empty
# is no limit; without Redis each web process counts for itself; of an IPv6 address the first 64 bits count.
LIMIT_LOGIN: str = env.str("FLEET_LIMIT_LOGIN", "5/5 minutes")
LIMIT_LOGIN_USER: str = env.str("FLEET_LIMIT_LOGIN_USER", "100/1 hour")  # of one user name, from wherever
LIMIT_LOGIN_ADDRESS: str = env.str("FLEET_LIMIT_LOGIN_ADDRESS", "50/10 minutes")  # from one address, as whomever
# Different unknown enrolment tokens from one address; a site behind one address enrols any number with a good one.
LIMIT_ENROL_ADDRESS: str = env.str("FLEET_LIMIT_ENROL_ADDRESS", "30/10 minutes")
# Refused enrolments by one token: used up, expired, name taken. So a leaked or spent token costs little.
LIMIT_ENROL_TOKEN: str = env.str("FLEET_LIMIT_ENROL_TOKEN", "100/1 minute")
LIMIT_API_TOKEN: str = env.str("FLEET_LIMIT_API_TOKEN", "30/10 minutes")  # different wrong API tokens from one address

# --- people ------------------------------------------------------------------------------------------------------
# Models whose rollouts start only with the approval of somebody else than their author; * in a name stands for any
# characters, so * is every model.
APPROVAL: list[str] = env.list("FLEET_APPROVAL", [])
# Actions of people that need a comment, by their names in the audit trail: rollout.cancel, device.pinned; or *.
COMMENTS: list[str] = env.list("FLEET_COMMENTS", [])

# --- notices -----------------------------------------------------------------------------------------------------
# Lets webhooks go to private and loopback addresses, and without TLS. For a receiver in your own network: everybody
# who may subscribe can then make this server post to any address that it reaches.
WEBHOOK_PRIVATE: bool = env.bool("FLEET_WEBHOOK_PRIVATE", False)
EMAIL_HOST: str = env.str("FLEET_EMAIL_HOST", "")  # the mail server; empty: no notices by e-mail
EMAIL_PORT: int = env.int("FLEET_EMAIL_PORT", 587)  # of the mail server
EMAIL_HOST_USER: str = env.str("FLEET_EMAIL_USER", "")  # to log in there; empty: without
EMAIL_HOST_PASSWORD: str = env.str("FLEET_EMAIL_PASSWORD", "")  # of that user
EMAIL_USE_TLS: bool = env.bool("FLEET_EMAIL_STARTTLS", True)  # STARTTLS, as on port 587
EMAIL_TIMEOUT = 15
DEFAULT_FROM_EMAIL: str = env.str("FLEET_EMAIL_FROM", "fleet@localhost")  # the sender of notices

# --- logs and metrics --------------------------------------------------------------------------------------------
LOG_JSON: bool = env.bool("FLEET_LOG_JSON", PRODUCTION)  # one JSON object a line instead of text
LOG_LEVEL: str = env.str("FLEET_LOG_LEVEL", "INFO").upper()  # DEBUG logs every request and task
LOGGING_CONFIG = "fleet.operations.logs.configure"
LOGGING = {"json": LOG_JSON, "level": LOG_LEVEL}
# A request that went well is worth no line: polls are thousands a second, and they are counted in the metrics.
DJANGO_STRUCTLOG_STATUS_DEFAULT_LOG_LEVEL = logging.DEBUG
DJANGO_STRUCTLOG_STATUS_4XX_LOG_LEVEL = logging.INFO
DJANGO_STRUCTLOG_CELERY_ENABLED = True
DJANGO_STRUCTLOG_CELERY_DEFAULT_LOG_LEVEL = logging.DEBUG
DJANGO_STRUCTLOG_CELERY_TASK_FAILURE_LOG_LEVEL = logging.ERROR
METRICS_TOKEN: str = env.str("FLEET_METRICS_TOKEN", "")  # what a scraper of /metrics shows as its bearer token
PROMETHEUS_EXPORT_MIGRATIONS = False

# --- interfaces --------------------------------------------------------------------------------------------------
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework.authentication.SessionAuthentication",
        "fleet.api.auth.ApiTokenAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["fleet.api.auth.ModelPermissions"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "DEFAULT_FILTER_BACKENDS": ["django_filters.rest_framework.DjangoFilterBackend"],
    "DEFAULT_PAGINATION_CLASS": "fleet.api.pagination.BoundedPages",
    "DEFAULT_PARSER_CLASSES": ["fleet.api.parsers.BoundedJSON"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "PAGE_SIZE": 100,
    "EXCEPTION_HANDLER": "fleet.api.errors.handle",
}
KNOX_TOKEN_MODEL = "accounts.ApiToken"  # noqa: S105  # a model's name
REST_KNOX = {
    "TOKEN_PREFIX": "flt_",
    "AUTH_HEADER_PREFIX": "Bearer",
    "TOKEN_TTL": timedelta(days=90),
    "AUTO_REFRESH": False,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Fleet",
    "DESCRIPTION": "Model releases, rollouts and feedback for devices.",
    "VERSION": "1",
    "SERVE_INCLUDE_SCHEMA": False,
    "ENUM_NAME_OVERRIDES": {
        "ReleaseState": "fleet.releases.models.Release.State",
        "VariantState": "fleet.releases.models.Variant.State",
        "DeviceState": "fleet.devices.models.Device.State",
        "RolloutState": "fleet.rollouts.models.Rollout.State",
        "BatchState": "fleet.feedback.models.Batch.State",
    },
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
}
