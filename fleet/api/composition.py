"""What a device should run and sample: rollouts and feedback do not know each other, so their answers meet here."""

from dataclasses import replace
from importlib import import_module

from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device


def assignments(device: Device) -> list[Assignment]:
    """One assignment for each of the device's models, with its sampling."""
    sampling = import_module("fleet.feedback.selectors").sampling_for(device)
    chosen = import_module("fleet.rollouts.selectors").assignments_for(device)
    return [replace(item, sampling=sampling.get(item.model)) for item in chosen]
