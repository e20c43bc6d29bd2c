"""Rollouts: people start, pause, resume, cancel and roll back, and say why. Nothing here moves a state by itself."""

from collections.abc import Callable
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Count, Model, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import path
from django.utils.html import format_html
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from device_sdk.protocol.assignment import CONDITION_FLAGS
from fleet import adminkit, presentation
from fleet.adminkit import CommentForm, KeptAdmin, OptionalCommentForm, dialog
from fleet.errors import FleetError
from fleet.rollouts import add_page, approval, deciding, device_admin, services
from fleet.rollouts.counting import tallies
from fleet.rollouts.forms import RolloutForm
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.terms import watch

__all__ = ["device_admin"]

State = Rollout.State


def offered(state: str | None) -> set[str]:
    """What a person may do in a state: the buttons. The table is the services', which have the last word."""
    return {action for (before, action) in services.TRANSITIONS if before == state}


def condition_texts(conditions: dict[str, Any]) -> list[str]:
    """What a device waits for and may use, for people."""
    flags = [name for name in CONDITION_FLAGS if conditions.get(name)]
    return flags + [
        _SIZE_TEXTS[name].format(presentation.size(conditions[name])) for name in _SIZE_TEXTS if conditions.get(name)
    ]


_SIZE_TEXTS = {
    "free_disk": "{} of disk free", "free_memory": "{} of memory free", "rate": "{} a second", "daily": "{} a day",
}  # fmt: skip


def counted(changelist: Any) -> Any:
    """A change list that counts the outcomes of the rollouts on its page, by one query, and of no others."""

    class Counted(changelist):  # type: ignore[misc]
        def get_results(self, request: HttpRequest) -> None:
            super().get_results(request)
            rows = list(self.result_list)
            counts = tallies.outcome_counts([row.pk for row in rows])
            for row in rows:
                row.counts = counts[row.pk]
            self.result_list: list[Any] = rows

    return Counted


def pace_texts(rollout: Rollout) -> list[str]:
    """Limits, timeout and retries, for people."""
    found = [f"{rollout.max_in_flight} updates at a time"] if rollout.max_in_flight else []
    found += [f"{rollout.starts_per_minute:g} starts a minute"] if rollout.starts_per_minute else []
    found += [f"{presentation.span(rollout.timeout_seconds)} for a device"] if rollout.timeout_seconds else []
    after = f" after {presentation.span(rollout.retry_seconds)} and more"
    return found + ([f"{rollout.retries} retries{after}"] if rollout.retries else [])


@admin.register(Rollout)
class RolloutAdmin(KeptAdmin):
    list_display: ClassVar = ["name", "to", "state_label", "stage", "counts", "started", "by"]
    list_filter: ClassVar = [("state", ChoicesDropdownFilter), ("release__model", RelatedDropdownFilter)]
    search_fields: ClassVar = ["release__version", "release__model__name", "group__name"]
    list_select_related: ClassVar = ["release__model", "group", "created_by"]
    fields = (
        "meant_for",
        "on_failure",
        "install",
        "waits_for",
        "probation_text",
        "pace_text",
        "by",
        "approved",
        "begins",
        "started",
        "finished",
        "audited",
    )
    readonly_fields = fields
    add_fieldsets = add_page.FIELDSETS
    change_form_outer_before_template = "dashboard/rollout.html"
    actions_detail: ClassVar = [
        "start", "approve", "approve_stage", "resume", "pause", "roll_back", "reject", "cancel",
    ]  # fmt: skip

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_operate_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("rollouts.operate_rollout"))

    def has_approve_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm(approval.PERMISSION))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        """Only what makes sense now; the services have the last word. Nobody is asked to approve what is their own."""
        rollout = self.get_object(request, object_id)
        offers = offered(rollout.state) if rollout else set()
        if rollout and not approval.stage_waits(rollout):
            offers.discard(services.APPROVE_STAGE)
        if rollout and approval.is_author(rollout, adminkit.actor(request)):
            offers -= {services.APPROVE, services.APPROVE_STAGE, services.REJECT}
        return [item for item in super().get_actions_detail(request, object_id) if item.path in offers]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Rollout]:
        rows: QuerySet[Rollout] = super().get_queryset(request)
        return rows.annotate(stage_count=Count("stages"))

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> Any:
        return counted(super().get_changelist(request, **kwargs))

    # --- adding ---------------------------------------------------------------------------------------------------

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> Any:
        return self.readonly_fields if obj else ("reaches",)

    def get_urls(self) -> list[Any]:
        reach = self.admin_site.admin_view(self.reach)
        return [path("reach/", reach, name="rollouts_rollout_reach"), *super().get_urls()]

    def reach(self, request: HttpRequest) -> HttpResponse:
        """How many devices a rollout would be for, as it is filled in. For who may see devices."""
        if not request.user.has_perm("devices.view_device"):
            raise PermissionDenied
        return HttpResponse(add_page.reached(request.GET))

    @display(description="Reaches now")
    def reaches(self, rollout: Rollout) -> str:
        return format_html('<div id="chosen" aria-live="polite">{}</div>', add_page.reached({}))

    def get_form(self, request: HttpRequest, obj: Model | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change, **kwargs) if change else RolloutForm

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        try:
            response: HttpResponse = super().add_view(request, form_url, extra_context)
        except FleetError as error:  # the form has checked what it can; a race is told, not raised
            messages.error(request, error.message)
            return HttpResponseRedirect(request.path)
        return response

    def save_model(self, request: HttpRequest, obj: Rollout, form: Any, change: bool) -> None:
        made = services.create(**form.terms(), actor=adminkit.actor(request))
        if form.cleaned_data["start_now"] and self.has_operate_permission(request):
            made = services.start(rollout=made, actor=adminkit.actor(request), comment=form.cleaned_data["comment"])
        obj.__dict__.update(made.__dict__)

    # --- operating ------------------------------------------------------------------------------------------------

    @action(
        description="Start",
        icon="play_arrow",
        url_path=services.START,
        variant=ActionVariant.PRIMARY,
        permissions=["operate"],
        dialog=dialog(
            "Start this rollout?",
            "Devices of the first stage get the release at their next poll. Where it needs approval, or its time is to "
            "come, it waits for that first.",
            "Start",
            OptionalCommentForm,
        ),
    )
    def start(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, services.start, "")

    @action(
        description="Approve",
        icon="verified",
        url_path=services.APPROVE,
        variant=ActionVariant.PRIMARY,
        permissions=["approve"],
        dialog=dialog(
            "Approve this rollout?",
            "It begins at once, or when its time comes.",
            "Approve",
            OptionalCommentForm,
        ),
    )
    def approve(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, deciding.approve, "")

    @action(
        description="Reject",
        icon="thumb_down",
        url_path=services.REJECT,
        variant=ActionVariant.DANGER,
        permissions=["approve"],
        dialog=dialog("Reject this rollout for good?", "No device is ever offered it.", "Reject"),
    )
    def reject(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, deciding.reject, "rejected")

    @action(
        description="Approve stage",
        icon="verified",
        url_path=services.APPROVE_STAGE,
        variant=ActionVariant.PRIMARY,
        permissions=["approve"],
        dialog=dialog(
            "Let this stage pass?",
            "It passes when it has also done well: soaked, with enough reports and successes.",
            "Approve",
            OptionalCommentForm,
        ),
    )
    def approve_stage(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, deciding.approve_stage, "free to pass its stage")

    @action(
        description="Resume",
        icon="play_arrow",
        url_path=services.RESUME,
        variant=ActionVariant.PRIMARY,
        permissions=["operate"],
        dialog=dialog("Resume this rollout?", "It goes on with the stage at which it stopped.", "Resume"),
    )
    def resume(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, services.resume, "resumed")

    @action(
        description="Pause",
        icon="pause",
        url_path=services.PAUSE,
        permissions=["operate"],
        dialog=dialog(
            "Pause this rollout?",
            "No further device starts. Whoever has not activated the release is recalled; whoever runs it keeps it.",
            "Pause",
        ),
    )
    def pause(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, services.pause, "paused")

    @action(
        description="Roll back",
        icon="undo",
        url_path=services.ROLL_BACK,
        variant=ActionVariant.DANGER,
        permissions=["operate"],
        dialog=dialog(
            "Roll back this rollout?",
            "Every device returns to the release that it had before, at its next poll.",
            "Roll back",
        ),
    )
    def roll_back(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, services.roll_back, "rolled back")

    @action(
        description="Cancel",
        icon="close",
        url_path=services.CANCEL,
        permissions=["operate"],
        dialog=dialog(
            "Cancel this rollout for good?",
            "It cannot be resumed. Devices fall back to the rollout before it.",
            "Cancel the rollout",
        ),
    )
    def cancel(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        return self._operate(request, form, object_id, services.cancel, "cancelled")

    def _operate(
        self, request: HttpRequest, form: CommentForm, object_id: str, service: Callable[..., object], done: str
    ) -> HttpResponse:
        rollout = self.found(request, object_id)
        comment = form.cleaned_data["comment"]
        return adminkit.perform(
            request,
            lambda: service(rollout=rollout, actor=adminkit.actor(request), comment=comment),
            done=lambda made: f"Rollout {rollout} is {done or made.get_state_display().lower()}.",
            then=presentation.page_of(rollout),
        )

    # --- columns --------------------------------------------------------------------------------------------------

    @display(description="Rollout", ordering="pk")
    def name(self, rollout: Rollout) -> str:
        return str(rollout)

    @display(description="To")
    def to(self, rollout: Rollout) -> str:
        """Short, for the list."""
        narrowed = "*" if rollout.selector or rollout.exclude or rollout.exclude_group_id else ""
        return f"{rollout.group or 'every device'}{narrowed}"

    @display(description="For")
    def meant_for(self, rollout: Rollout) -> str:
        """The group and what narrows it, as it is written."""
        parts = [f"group {rollout.group}" if rollout.group else "every device", f"only {rollout.selector}"]
        parts += [f"without group {rollout.exclude_group}", f"without {rollout.exclude}"]
        there = (True, rollout.selector, rollout.exclude_group, rollout.exclude)
        return presentation.chips(part for part, is_there in zip(parts, there, strict=True) if is_there)

    @display(description="State", ordering="state")
    def state_label(self, rollout: Rollout) -> str:
        return presentation.state(rollout.state, rollout.get_state_display())

    @display(description="Stage")
    def stage(self, rollout: Rollout) -> str:
        count = rollout.stage_count  # type: ignore[attr-defined]
        if not rollout.started_at or rollout.state == State.COMPLETED:
            return f"{count} stage{'s' * (count != 1)}"
        return f"{rollout.stage_index + 1} of {count}"

    @display(description="Devices")
    def counts(self, rollout: Rollout) -> str:
        counts: dict[str, int] = rollout.counts  # type: ignore[attr-defined]  # see `counted`
        parts = [f"{number} {state}" for state in Outcome.State.values if (number := counts[state])]
        return ", ".join(parts) or "-"

    @display(description="Created by")
    def by(self, rollout: Rollout) -> str:
        return str(rollout.created_by or "-")

    @display(description="Approval")
    def approved(self, rollout: Rollout) -> str:
        given = rollout.actions.filter(action=services.APPROVE).last()
        if given:
            return f"by {given.actor}"
        needed = rollout.started_at is None and approval.is_needed(rollout)
        return "needed, by somebody else than its author" if needed else "-"

    @display(description="Begins at")
    def begins(self, rollout: Rollout) -> str:
        return presentation.moment(rollout.start_at, never="when it is started")

    @display(description="Pace")
    def pace_text(self, rollout: Rollout) -> str:
        return presentation.chips(pace_texts(rollout))

    @display(description="Started", ordering="started_at")
    def started(self, rollout: Rollout) -> str:
        return presentation.ago(rollout.started_at, never="not yet")

    @display(description="Finished", ordering="finished_at")
    def finished(self, rollout: Rollout) -> str:
        return presentation.ago(rollout.finished_at, never="not yet")

    @display(description="Changed by")
    def audited(self, rollout: Rollout) -> str:
        return presentation.audit_link("rollout", str(rollout.pk))

    @display(description="Devices install")
    def install(self, rollout: Rollout) -> str:
        if rollout.urgent:
            return "at once: it is urgent"
        if not rollout.window:
            return "at any time"
        return "from " + " to ".join(
            f"{m // 60:02}:{m % 60:02}" for m in (rollout.window["start"], rollout.window["end"])
        )

    @display(description="Conditions")
    def waits_for(self, rollout: Rollout) -> str:
        return presentation.chips(condition_texts(rollout.conditions))

    @display(description="Probation")
    def probation_text(self, rollout: Rollout) -> str:
        said = watch.texts(rollout.probation, rollout.max_hold, forgive=rollout.forgive)
        return presentation.chips(said) if said else "standard"
