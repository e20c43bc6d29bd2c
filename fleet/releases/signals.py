"""What other rooms are told by this one, in the same transaction. Rollouts listen: this room does not know them."""

from django.dispatch import Signal

revoked = Signal()  # release: a Release, revoked just now; reason: why
when_nothing_changed = Signal()  # model: a Model
