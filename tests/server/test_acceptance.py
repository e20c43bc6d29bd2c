"""What the server asks of an acceptance bundle: it is read, run and shown; a release that fails is invalid."""

from typing import Any

import numpy as np
import pytest

from device_sdk.protocol.arrays.acceptance import INDEX, Acceptance, Budgets, Sample, Tolerance
from device_sdk.protocol.arrays.archive import packed
from device_sdk.protocol.manifest import FileEntry, digest
from fleet.releases import selectors
from fleet.releases.models import Variant
from tests.registry import MODEL, Registry, onnx_model, refusal

X = np.ones((2, 4), np.float32)


def bundle(factor: float = 2.0, name: str = "x", budgets: Budgets = Budgets(5.0, 2**28)) -> bytes:  # noqa: B008
    samples = [Sample({name: X[:rows]}, {"y": X[:rows] * np.float32(factor)}) for rows in (2, 1)]
    return Acceptance(samples, Tolerance(1e-3, 1e-4), budgets=budgets).to_bytes()


def publish(registry: Registry, data: bytes, *, upload: bool = True) -> Any:
    if upload:
        assert registry.upload(data).status_code == 201
    return registry.publish("1.0.0", acceptance=FileEntry("acceptance.npz", len(data), digest(data)))


def test_a_bundle_that_holds_is_shown_and_devices_may_fetch_it(registry: Registry) -> None:
    data = bundle()
    assert publish(registry, data).status_code == 201
    release = registry.release("1.0.0")
    assert (release["state"], release["reason"]) == ("valid", "")
    found = release["variants"]["default"]["acceptance"]
    assert found.pop("here_ms") > 0
    expected = {"samples": 2, "asked": 2, "problem": "", "rtol": 0.001, "atol": 0.0001, "tolerances": {}}
    assert found == {**expected, "latency_ms": 5.0, "memory": 2**28}
    assert selectors.servable_blob(digest(data), [MODEL]) is not None
    assert Variant.objects.get().size == len(onnx_model())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            bundle(3.0),
            "acceptance bundle says: sample 1 of 2: output 'y' at [0, 0]: expected 3 ±",
        ),
        (bundle(name="z"), "its acceptance bundle: sample 1: "),
        (bundle()[:-1], "its acceptance bundle is no good: expected a whole zip"),
        (packed({INDEX: b"{}"}), "its acceptance bundle is no good: "),
        (packed({INDEX: b"[" * 99_999}), "its acceptance bundle is no good: "),
    ],
    ids=["does not hold", "an input that does not exist", "cut short", "an empty index", "an index too deep"],
)
def test_a_bundle_that_is_none_or_does_not_hold_makes_the_release_invalid(
    registry: Registry,
    data: bytes,
    reason: str,
) -> None:
    assert publish(registry, data).status_code == 201
    release = registry.release("1.0.0")
    assert release["state"] == "invalid"
    assert reason in release["reason"]


def test_budgets_are_the_devices_and_make_nothing_invalid_here(registry: Registry) -> None:
    publish(registry, bundle(budgets=Budgets(1e-9, 1)))
    assert registry.release("1.0.0")["state"] == "valid"


def test_a_bundle_must_be_uploaded_like_any_file(registry: Registry) -> None:
    assert refusal(publish(registry, bundle(), upload=False)) == (422, "missing_blob")
