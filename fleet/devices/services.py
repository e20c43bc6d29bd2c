"""All that changes a device: enrolment, approval, revocation, and what it reports."""

from fleet.devices import credentials
from fleet.devices.models import Device
from fleet.errors import Denied


def authenticate(header: str | None) -> Device:
    """The active device behind an `Authorization` header. One query. Unauthorized (401), or Denied `device_pending`."""
    claim = credentials.verify(header)
    device = Device.objects.select_related("runs").filter(pk=claim.device, epoch=claim.epoch).first()
    if device is None or device.state == Device.State.REVOKED:
        raise credentials.refused()
    if device.state == Device.State.PENDING:
        raise Denied("device_pending", "this device waits for an operator's approval")
    return device
