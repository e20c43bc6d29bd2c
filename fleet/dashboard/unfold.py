"""How the admin looks and what its sidebar holds. Settings import `UNFOLD` from here."""

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse_lazy

# Teal, one step darker than usual at 600, so that white text on it is readable (WCAG AA).
_PRIMARY = {
    "50": "oklch(98.4% .014 180.7)",
    "100": "oklch(95.3% .051 180.8)",
    "200": "oklch(91% .096 180.4)",
    "300": "oklch(85.5% .11 181)",
    "400": "oklch(77.7% .12 181.9)",
    "500": "oklch(70.4% .115 182.5)",
    "600": "oklch(51.1% .096 186.4)",
    "700": "oklch(43.7% .078 188.2)",
    "800": "oklch(38.6% .063 188.4)",
    "900": "oklch(33% .055 190)",
    "950": "oklch(27.7% .046 192.5)",
}


def _static(path: str) -> Callable[[HttpRequest], str]:
    return lambda _request: static(path)


def _is_on_signed_roles(request: HttpRequest) -> bool:
    """The Trust page stands below their list's address, and has an entry of its own."""
    listed = str(reverse_lazy("admin:trust_rolemetadata_changelist"))
    return request.path.startswith(listed) and request.path != str(reverse_lazy("admin:trust_overview"))


def _item(title: str, icon: str, model: str) -> dict[str, Any]:
    """A list of `model` (`app_label.name`), for those who may see it."""
    app, name = model.split(".")
    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{app}_{name}_changelist"),
        "permission": lambda request: request.user.has_perm(f"{app}.view_{name}"),
    }


UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "Fleet",
    "SITE_HEADER": "Fleet",
    "SITE_SUBHEADER": "Models on devices",
    "SITE_SYMBOL": "deployed_code",
    "SITE_URL": None,
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": _static("dashboard/favicon.svg")},
    ],
    "LOGIN": {"form": "fleet.accounts.login.LoginForm"},
    "SHOW_HISTORY": False,
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_BACK_BUTTON": True,
    "BORDER_RADIUS": "8px",
    "COLORS": {"primary": _PRIMARY},
    "STYLES": [_static("dashboard/fleet.css")],
    "SCRIPTS": [_static("dashboard/fleet.js")],
    "DASHBOARD_CALLBACK": "fleet.dashboard.views.first_page",
    "COMMAND": {"search_models": ["devices.device", "releases.release", "releases.model"]},
    "SIDEBAR": {
        "show_search": True,
        "command_search": True,
        "navigation": [
            {
                "items": [{"title": "Overview", "icon": "monitoring", "link": reverse_lazy("admin:index")}],
            },
            {
                "title": "Delivery",
                "separator": True,
                "items": [
                    _item("Rollouts", "rocket_launch", "rollouts.rollout"),
                    _item("Releases", "new_releases", "releases.release"),
                    _item("Models", "category", "releases.model"),
                    _item("Provenance keys", "fingerprint", "releases.provenancekey"),
                ],
            },
            {
                "title": "Devices",
                "separator": True,
                "items": [
                    _item("Devices", "memory", "devices.device"),
                    _item("Groups", "workspaces", "devices.group"),
                    _item("Enrolment tokens", "qr_code_2", "devices.enrolmenttoken"),
                    _item("Events", "history", "devices.deviceevent"),
                ],
            },
            {
                "title": "Feedback",
                "separator": True,
                "items": [
                    _item("Campaigns", "ads_click", "feedback.campaign"),
                    _item("Batches", "upload_file", "feedback.batch"),
                    _item("Data sets", "dataset", "feedback.datasetpart"),
                ],
            },
            {
                "title": "Access",
                "separator": True,
                "items": [
                    {
                        "title": "Trust",
                        "icon": "shield",
                        "link": reverse_lazy("admin:trust_overview"),
                        "permission": lambda request: request.user.has_perm("trust.view_rolemetadata"),
                    },
                    _item("Signed roles", "verified_user", "trust.rolemetadata") | {"active": _is_on_signed_roles},
                    _item("Proposed roles", "signature", "trust.pendingrole"),
                    _item("Audit trail", "history_edu", "audit.auditentry"),
                    _item("Subscriptions", "notifications", "notices.subscription"),
                    _item("Deliveries", "outbox", "notices.delivery"),
                    _item("API tokens", "key", "accounts.apitoken"),
                    _item("Users", "person", "auth.user"),
                    _item("Permissions", "admin_panel_settings", "auth.group"),
                ],
            },
        ],
    },
}
