"""A notice as an e-mail, by Django's mail. The message's id is the notice's, so that a second copy is seen as one."""

from collections.abc import Sequence
from smtplib import SMTPException
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from django.core.validators import validate_email

from fleet.errors import Invalid, Unavailable
from fleet.notices.models import Notice
from fleet.notices.webhooks import DeliveryError

MOST = 20  # addresses of one subscription


def check_addresses(text: str) -> list[str]:
    """Addresses separated by commas. Invalid where one is none, Unavailable without a mail server."""
    if not settings.EMAIL_HOST:
        raise Unavailable("no_mail_server", "this server has no mail server: set FLEET_EMAIL_HOST")
    found = [part.strip() for part in text.split(",") if part.strip()]
    try:
        for address in found:
            validate_email(address)
    except ValidationError as error:
        raise Invalid("mail_address", f"expected e-mail addresses separated by commas; got {text!r:.100}") from error
    if not 0 < len(found) <= MOST:
        raise Invalid("mail_address", f"expected 1 to {MOST} e-mail addresses; got {len(found)}")
    return found


def send(notice: Notice, *, to: Sequence[str], text: str) -> None:
    """Raises DeliveryError."""
    if not settings.EMAIL_HOST:
        raise DeliveryError("no mail server: FLEET_EMAIL_HOST is not set")
    host = urlsplit(settings.PUBLIC_URL).hostname or "fleet"
    subject = f"[Fleet] {' '.join(notice.title.split())}"[:200]
    letter = EmailMessage(subject, text, to=list(to), headers={"Message-ID": f"<{notice.key}@{host}>"})
    try:
        letter.send()
    except (OSError, SMTPException) as error:
        raise DeliveryError(f"{type(error).__name__}: {error}"[:300]) from error
