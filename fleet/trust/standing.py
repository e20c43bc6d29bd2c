"""How each role stands: who holds it, how long it lasts, who must act and by which command. Reads only."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import Count, Min, Q
from tuf.api.metadata import Metadata, Root, Targets

from fleet.devices.models import Device
from fleet.trust import keystore, offline, repository, selectors
from fleet.trust.models import DeviceView, RoleMetadata
from fleet.trust.selectors import ROOT, TARGETS


@dataclass(frozen=True, slots=True)
class KeyStanding:
    """A key that may sign the role, and whether it has signed the version in force."""

    keyid: str
    name: str  # what people call it; empty where nobody has said
    signed: bool


@dataclass(frozen=True, slots=True)
class RoleStanding:
    """One role. `version` 0: its keys are named, and nothing was signed yet. `left` in percent of its lifetime."""

    role: str
    version: int
    row: int | None  # of RoleMetadata
    expires_at: datetime | None
    tone: str  # good, warn, bad, quiet
    left: float
    threshold: int
    keys: tuple[KeyStanding, ...]
    proposal: selectors.Proposal | None

    @property
    def who(self) -> str:
        """Who must act next."""
        if self.role == ROOT:
            return f"{self.threshold} holders of root keys, offline"
        if self.role == TARGETS:
            return f"{self.threshold} holder{'s' if self.threshold > 1 else ''} of targets keys, offline"
        if self.proposal is not None and self.proposal.signatures.lacking:
            return "the second person, on their own machine"
        if not self.keys:
            return "nobody: no key may sign it any more"
        return "CI" if self.threshold == 1 else f"CI, then {self.threshold - 1} more by fleet-publish sign"

    @property
    def command(self) -> str:
        """What they run, with files of their own. Empty: nothing is to be done."""
        if self.proposal is not None and self.proposal.signatures.lacking:
            return selectors.sign_command(self.role)
        return renewal_command(self.role) if self.version and self.keys else ""

    @property
    def said(self) -> str:
        if not self.version:
            return "nothing signed yet"
        return {"bad": "expired", "warn": "expires soon", "good": "in force"}[self.tone]


@dataclass(frozen=True, slots=True)
class ViewStanding:
    """The views of active devices: signed by the online key, anew at a poll when half their life is over."""

    total: int
    within_a_day: int
    due: int  # of those: signed anew at the next poll
    expired: int  # their devices have not polled since
    oldest: datetime | None

    @property
    def is_worrying(self) -> bool:
        """A device that polls has a fresh view: if most have none, it is not the devices."""
        return self.expired * 2 > self.total


def renewal_command(role: str) -> str:
    if role in selectors.WARN_BEFORE:
        if keystore.at(None).private(keystore.TARGETS_KEYS[0]).exists():  # the demonstration's, not a real server's
            return f"python manage.py trust_renew {role}"
        return f"python manage.py ceremony renew STICK {role}"
    return f"fleet-publish renew --model {role} --server {settings.PUBLIC_URL} --key CI-KEY.pem"


def roles(now: datetime) -> list[RoleStanding]:
    """Root, targets, then every model by name: those that were signed, and those that could be."""
    rows = {row.role: row for row in selectors.newest_roles()}
    root = _signed(rows.get(ROOT))
    targets = _signed(rows.get(TARGETS))
    delegated = selectors.delegated_models() if targets is not None else []
    models = sorted({*rows, *delegated} - {ROOT, TARGETS})
    names = [name for name in (ROOT, TARGETS) if name in rows]
    return [_standing(role, rows.get(role), root, targets, now) for role in [*names, *models]]


def views(now: datetime) -> ViewStanding:
    soon, due = now + timedelta(hours=24), now + settings.VIEW_RENEW_BEFORE
    living = Q(expires_at__gt=now)
    rows = DeviceView.objects.filter(device__state=Device.State.ACTIVE, expires_at__isnull=False)
    found = rows.aggregate(
        total=Count("pk"),
        within_a_day=Count("pk", filter=living & Q(expires_at__lte=soon)),
        due=Count("pk", filter=living & Q(expires_at__lte=due)),
        expired=Count("pk", filter=~living),
        oldest=Min("expires_at"),
    )
    return ViewStanding(**found)


def online_keys() -> list[str]:
    """Ids of the keys that may sign views, as the newest root says."""
    root = _signed(selectors.newest(ROOT))
    return list(root.roles["timestamp"].keyids) if isinstance(root, Root) else []


def _standing(
    role: str, row: RoleMetadata | None, root: Root | Targets | None, targets: Root | Targets | None, now: datetime
) -> RoleStanding:
    keyids, threshold = _holders(role, root, targets)
    signed, names = _signers(row), offline.names_of(*(item for item in (root, targets) if item is not None))
    return RoleStanding(
        role=role,
        version=row.version if row else 0,
        row=row.pk if row else None,
        expires_at=row.expires_at if row else None,
        tone=_tone(row, now),
        left=_left(row, now),
        threshold=threshold,
        keys=tuple(KeyStanding(keyid, names.get(keyid, ""), keyid in signed) for keyid in keyids),
        proposal=None if role in selectors.WARN_BEFORE else selectors.proposal(role),
    )


def _holders(role: str, root: Root | Targets | None, targets: Root | Targets | None) -> tuple[list[str], int]:
    """Key ids and threshold of a role; none when it was taken out of the delegations."""
    if role in selectors.WARN_BEFORE:
        top = root.roles[role] if isinstance(root, Root) else None
        return (list(top.keyids), top.threshold) if top else ([], 1)
    if not isinstance(targets, Targets) or not repository.is_delegated(targets, role):
        return [], 1
    delegated = targets.get_delegated_role(role)
    return list(delegated.keyids), delegated.threshold


def _signed(row: RoleMetadata | None) -> Root | Targets | None:
    if row is None:
        return None
    content = row.content.encode()
    return repository.read_root(content) if row.role == ROOT else repository.read_targets(content)


def _signers(row: RoleMetadata | None) -> set[str]:
    """Verified when the row was stored."""
    return set(Metadata.from_bytes(row.content.encode()).signatures) if row else set()


def _tone(row: RoleMetadata | None, now: datetime) -> str:
    if row is None:
        return "quiet"
    if row.expires_at <= now:
        return "bad"
    return "warn" if row.expires_at - now <= selectors.warn_before(row.role) else "good"


def _left(row: RoleMetadata | None, now: datetime) -> float:
    """In percent of the lifetime that its kind has: at 25 it is announced."""
    if row is None or row.expires_at <= now:
        return 0.0
    return min(100.0, round(25 * ((row.expires_at - now) / selectors.warn_before(row.role)), 1))
