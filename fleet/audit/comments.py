"""Which actions of people need a comment, by a setting. Asked where a change is recorded, so that no door forgets."""

from fnmatch import fnmatchcase

from django.conf import settings

from fleet.audit.context import COMMAND, TOKEN, USER, Acting
from fleet.errors import Invalid

PEOPLE = frozenset({USER, TOKEN, COMMAND})
# Every action that takes a comment. An action that is not here could not be done at all where one is demanded.
TAKEN = frozenset(
    {
        "rollout.submit", "rollout.schedule", "rollout.start", "rollout.approve", "rollout.reject",
        "rollout.approve_stage", "rollout.pause", "rollout.resume", "rollout.cancel", "rollout.roll_back",
        "device.approved", "device.revoked", "device.reissued", "device.pinned", "device.unpinned", "device.labelled",
    }
)  # fmt: skip


def check(action: str, comment: str, who: Acting) -> None:
    """Raises Invalid `comment_needed`."""
    if comment.strip() or who.kind not in PEOPLE or action not in TAKEN:
        return
    if any(fnmatchcase(action, pattern) for pattern in settings.COMMENTS):
        what = action.partition(".")[2].replace("_", " ")
        raise Invalid("comment_needed", f"{what}: say why; this server asks for a comment", {"action": action})


def unknown() -> list[str]:
    """Patterns of the setting that fit no action that takes a comment."""
    return [pattern for pattern in settings.COMMENTS if not any(fnmatchcase(action, pattern) for action in TAKEN)]
