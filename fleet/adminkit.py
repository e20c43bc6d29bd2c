"""What the admin pages of all rooms share: who may do what, how a date looks, and actions that ask for a comment."""

from collections.abc import Callable
from typing import Any

from django import forms
from django.contrib import messages
from django.db.models import Model
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from unfold.admin import ModelAdmin
from unfold.dataclasses import ActionDialog
from unfold.forms import BaseDialogForm
from unfold.widgets import UnfoldAdminTextareaWidget

from device_sdk.protocol.errors import ProtocolError
from fleet.errors import FleetError


class KeptAdmin(ModelAdmin):  # type: ignore[misc]  # unfold ships no types
    """Rows that are never deleted by hand: history, or something that history points at."""

    list_filter_submit = False
    list_per_page = 50
    show_full_result_count = False
    compressed_fields = True

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def found(self, request: HttpRequest, object_id: object) -> Any:
        """The row of an address that may hold anything, as Django's own pages find it. Raises Http404."""
        row = self.get_object(request, object_id)
        if row is None:
            raise Http404
        return row

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        """Without the bulk delete, which Django offers by itself."""
        return {name: action for name, action in super().get_actions(request).items() if name != "delete_selected"}


class ReadOnlyAdmin(KeptAdmin):
    """Rows that nobody edits: they come from devices, CI or services."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class CommentForm(BaseDialogForm):  # type: ignore[misc]  # unfold ships no types
    """Why: it is kept in the history beside who and when."""

    comment = forms.CharField(
        label="Comment",
        max_length=500,
        help_text="Kept in the history, with your name.",
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 3, "autofocus": True}),
    )


class OptionalCommentForm(CommentForm):
    comment = forms.CharField(
        label="Comment",
        required=False,
        max_length=500,
        help_text="Optional; kept in the history, with your name.",
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 3, "autofocus": True}),
    )


def dialog(title: str, description: str, submit: str, form: type[BaseDialogForm] = CommentForm) -> ActionDialog:
    return ActionDialog(title=title, description=description, form_class=form, form_submit_text=submit)


def perform(
    request: HttpRequest, act: Callable[[], object], *, done: str | Callable[[Any], str], then: str
) -> HttpResponse:
    """Call a service for a person: what it refuses is shown to them. Leads on to the address `then`.

    `done` may depend on what the service gave back.
    """
    try:
        result = act()
    except (FleetError, ProtocolError) as error:
        messages.error(request, str(error))
    else:
        messages.success(request, done if isinstance(done, str) else done(result))
    return leave_dialog(request, then)


def leave_dialog(request: HttpRequest, address: str) -> HttpResponse:
    """A dialog is swapped in by htmx, which must be told to leave the page; without scripts it is a plain redirect."""
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": address})
    return HttpResponseRedirect(address)


def actor(request: HttpRequest) -> Any:
    """The signed-in user: whoever reaches an admin page is one."""
    return request.user
