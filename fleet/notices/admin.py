"""Subscriptions and deliveries: who is told, and what did not arrive. A webhook's secret is shown once."""

from typing import Any, ClassVar

from django.contrib import admin, messages
from django.db.models import Count, Model, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from fleet import adminkit, presentation
from fleet.adminkit import CommentForm, OptionalCommentForm, ReadOnlyAdmin
from fleet.errors import FleetError
from fleet.notices import services
from fleet.notices.forms import SubscriptionForm
from fleet.notices.models import Delivery, Subscription

SECRET_PAGE = "dashboard/webhook_secret.html"  # noqa: S105  # a template's name


@admin.register(Subscription)
class SubscriptionAdmin(ModelAdmin):  # type: ignore[misc]  # unfold ships no types
    """Made and deleted, not changed: another address is another subscription."""

    list_display: ClassVar = ["name", "kind", "target", "event_chips", "state", "dead"]
    fields = ("name", "kind", "target", "event_chips", "state", "dead", "by", "made")
    readonly_fields = fields
    add_fieldsets = ((None, {"fields": ("name", "kind", "target", "events")}),)
    actions_detail: ClassVar = ["test", "switch", "renew"]
    list_filter_submit = False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_own_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("notices.add_subscription"))

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        """One at a time: the service notes each."""
        return {}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Subscription]:
        rows: QuerySet[Subscription] = super().get_queryset(request)
        return rows.annotate(given_up=Count("deliveries", filter=Q(deliveries__state=Delivery.State.DEAD)))

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> Any:
        return self.readonly_fields if obj else ()

    def get_form(self, request: HttpRequest, obj: Model | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change, **kwargs) if change else SubscriptionForm

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        try:
            response: HttpResponse = super().add_view(request, form_url, extra_context)
        except FleetError as error:  # an address that is refused, or a name that is taken
            messages.error(request, error.message)
            return HttpResponseRedirect(request.path)
        return response

    def save_model(self, request: HttpRequest, obj: Subscription, form: Any, change: bool) -> None:
        made, secret = services.subscribe(**form.cleaned_data, actor=adminkit.actor(request))
        obj.__dict__.update(made.__dict__)
        request.new_secret = secret  # type: ignore[attr-defined]  # for the page that answers this request

    def response_add(self, request: HttpRequest, obj: Any, post_url_continue: str | None = None) -> HttpResponse:
        secret = request.new_secret  # type: ignore[attr-defined]
        if not secret:
            response: HttpResponse = super().response_add(request, obj, post_url_continue)
            return response
        return self._secret_page(request, obj, secret)

    def delete_model(self, request: HttpRequest, obj: Subscription) -> None:
        services.unsubscribe(subscription=obj)

    def _secret_page(self, request: HttpRequest, row: Subscription, secret: str) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"Webhook {row.name}",
            "opts": self.opts,
            "secret": secret,
            "row": row,
            "list_url": reverse("admin:notices_subscription_changelist"),
        }
        return TemplateResponse(request, SECRET_PAGE, context)

    @action(
        description="Send a test",
        icon="send",
        url_path="test",
        variant=ActionVariant.PRIMARY,
        permissions=["own"],
        dialog=adminkit.dialog("Send a test notice?", "It goes out at once.", "Send", OptionalCommentForm),
    )
    def test(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        row = self._found(request, object_id)
        return adminkit.perform(
            request,
            lambda: services.send_test(subscription=row),
            done="On its way; see the deliveries.",
            then=presentation.page_of(row),
        )

    @action(
        description="Switch on or off",
        icon="toggle_on",
        url_path="switch",
        permissions=["own"],
        dialog=adminkit.dialog(
            "Switch it on, or off?",
            "While it is off it is told nothing; what waits for it is kept until it is on again.",
            "Switch",
            OptionalCommentForm,
        ),
    )
    def switch(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        row = self._found(request, object_id)
        return adminkit.perform(
            request,
            lambda: services.switch(subscription=row, active=not row.active, why=form.cleaned_data["comment"]),
            done=f"{row} is {'off' if row.active else 'on'}.",
            then=presentation.page_of(row),
        )

    @action(description="New secret", icon="key", url_path="renew", permissions=["own"])
    def renew(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """A page that asks, then the one that shows: a link alone changes nothing."""
        row = self._found(request, object_id)
        if request.method != "POST":
            context = {**self.admin_site.each_context(request), "title": f"A new secret for {row}?", "row": row}
            return TemplateResponse(request, "dashboard/webhook_renew.html", context)
        try:
            secret = services.renew_secret(subscription=row)
        except FleetError as error:
            messages.error(request, error.message)
            return HttpResponseRedirect(presentation.page_of(row))
        return self._secret_page(request, row, secret)

    def _found(self, request: HttpRequest, object_id: str) -> Subscription:
        row = self.get_object(request, object_id)
        if row is None:
            raise Http404
        found: Subscription = row
        return found

    @display(description="Of what")
    def event_chips(self, row: Subscription) -> str:
        return presentation.chips(row.events) if row.events else "everything"

    @display(description="State", ordering="active")
    def state(self, row: Subscription) -> str:
        return presentation.state("active" if row.active else "withdrawn", "on" if row.active else "off")

    @display(description="Given up")
    def dead(self, row: Subscription) -> str:
        return str(row.given_up or "-")  # type: ignore[attr-defined]

    @display(description="Made by")
    def by(self, row: Subscription) -> str:
        return str(row.created_by or "-")

    @display(description="Made")
    def made(self, row: Subscription) -> str:
        return presentation.ago(row.created_at)


@admin.register(Delivery)
class DeliveryAdmin(ReadOnlyAdmin):
    list_display: ClassVar = ["title", "subscription", "state_label", "tries", "error", "when"]
    list_filter: ClassVar = [("state", ChoicesDropdownFilter), ("subscription", RelatedDropdownFilter)]
    list_select_related: ClassVar = ["notice", "subscription"]
    search_fields: ClassVar = ["notice__title", "notice__key"]
    fields = ("title", "subscription", "state_label", "tries", "error", "next_try", "sent", "when", "key", "body")
    readonly_fields = fields
    actions_detail: ClassVar = ["send_again"]

    def has_resend_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("notices.resend_delivery"))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        row = self.get_object(request, object_id)
        going = row is None or row.state == Delivery.State.PENDING
        return [] if going else super().get_actions_detail(request, object_id)

    @action(
        description="Send again",
        icon="replay",
        url_path="send_again",
        variant=ActionVariant.PRIMARY,
        permissions=["resend"],
        dialog=adminkit.dialog(
            "Send it again?",
            "The same notice with the same id: a receiver that has it already takes it once.",
            "Send again",
            OptionalCommentForm,
        ),
    )
    def send_again(self, request: HttpRequest, form: CommentForm, object_id: str) -> HttpResponse:
        row = self.found(request, object_id)
        return adminkit.perform(
            request,
            lambda: services.send_again(delivery=row),
            done="On its way again.",
            then=presentation.page_of(row),
        )

    @display(description="Notice", ordering="notice__kind")
    def title(self, row: Delivery) -> str:
        return row.notice.title

    @display(description="State", ordering="state")
    def state_label(self, row: Delivery) -> str:
        return presentation.state(row.state, row.get_state_display())

    @display(description="Happened", ordering="notice__at")
    def when(self, row: Delivery) -> str:
        return presentation.ago(row.notice.at)

    @display(description="Next attempt")
    def next_try(self, row: Delivery) -> str:
        return presentation.ago(row.next_at) if row.state == Delivery.State.PENDING else "-"

    @display(description="Arrived")
    def sent(self, row: Delivery) -> str:
        return presentation.ago(row.sent_at, never="not yet")

    @display(description="Id")
    def key(self, row: Delivery) -> str:
        return presentation.short(row.notice.key, 40)

    @display(description="As it is sent")
    def body(self, row: Delivery) -> str:
        return presentation.json_block(row.notice.body)
