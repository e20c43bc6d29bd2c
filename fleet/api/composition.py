"""What a device should run and sample: rollouts and feedback do not know each other, so their answers meet here."""

from collections.abc import Mapping
from dataclasses import replace

from device_sdk.protocol.assignment import Assignment
from fleet.devices.models import Device
from fleet.feedback import selectors as feedback
from fleet.rollouts import selectors as rollouts


def assignments(device: Device, runs: Mapping[str, str] | None = None) -> list[Assignment]:
    """One assignment for each of the device's models, with its sampling. `runs`: what it runs, where that is known."""
    if runs is None and device.runs is not None:
        runs = device.runs.runs
    sampling = feedback.sampling_for(device)
    return [replace(item, sampling=sampling.get(item.model)) for item in rollouts.assignments_for(device, runs=runs)]
