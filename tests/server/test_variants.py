"""Which variant a device gets, by what it can run, and the releases that it must step through first."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.protocol.abilities import Abilities
from device_sdk.protocol.manifest import Requirements
from device_sdk.protocol.versions import is_at_least, older
from fleet.rollouts.facts import ManifestRef, ReleaseRef, Traits
from fleet.rollouts.variants import choose_variant, lacks, place_on, way_to

GIB = 2**30
JETSON = Abilities("1.31.0", 23, 8 * GIB, "aarch64", ("CUDAExecutionProvider", "CPUExecutionProvider"))
PI = Abilities("1.31.0", 23, GIB, "aarch64", ("CPUExecutionProvider",))
SILENT = Abilities()


def release(
    version: str = "2.0.0", floors: dict[str, ReleaseRef] | None = None, **variants: dict[str, Any]
) -> ReleaseRef:
    refs = {name: ManifestRef(1, "aa" * 32, Requirements(**each)) for name, each in variants.items()}
    return ReleaseRef("digits", version, refs, floors or {})


def traits(abilities: Abilities, *, sdk: str = "0.1.0", **labels: str) -> Traits:
    return Traits.of(labels, ["digits"], sdk=sdk, abilities=abilities)


CUDA = {"providers": ("CUDAExecutionProvider", "TensorrtExecutionProvider")}
ALL = release(default={"memory": 2 * GIB}, cuda=CUDA, small={"memory": GIB // 2}, tiny={}, arm={"arch": ("armv7l",)})


@pytest.mark.parametrize(
    ("abilities", "label", "variant"),
    [
        (JETSON, "", "cuda"),  # the provider that it ranks highest
        (PI, "", "small"),  # too little memory for `default`: the one that asks for most of what it has
        (SILENT, "", "default"),  # as older SDKs, which say nothing: never what asks for a provider
        (JETSON, "small", "small"),  # the label has the word
        (PI, "default", None),  # but not over what the device cannot do
        (PI, "cuda", None),
        (PI, "fp16", "small"),  # no such variant: asks for nothing
        (SILENT, "arm", None),  # must have been said
    ],
)
def test_the_variant_is_chosen_by_what_the_device_can_run(
    abilities: Abilities, label: str, variant: str | None
) -> None:
    assert choose_variant(ALL, traits(abilities, **({"variant": label} if label else {}))) == variant


@pytest.mark.parametrize(
    ("variants", "label", "expected"),
    [
        ({"default", "int8"}, "int8", "int8"),
        ({"default", "int8"}, "fp16", "default"),
        ({"default", "int8"}, None, "default"),
        ({"int8", "fp16"}, None, "fp16"),
        ({"int8"}, "default", "int8"),
        (set(), "int8", None),
    ],
)
def test_without_floors_it_is_the_labels_else_default_else_the_first(
    variants: set[str], label: str | None, expected: str | None
) -> None:
    made = release(**{name: {} for name in variants})
    assert choose_variant(made, traits(SILENT, **({"variant": label} if label else {}))) == expected


@pytest.mark.parametrize(
    ("floor", "told"),
    [
        ({"sdk": "0.2"}, "needs SDK 0.2, has 0.1.0"),
        ({"runtime": "1.40"}, "needs runtime 1.40, has 1.31.0"),
        ({"opset": 24}, "needs opset 24, has 23"),
        ({"memory": 2 * GIB}, "needs 2048 MiB of memory, has 1024 MiB"),
        ({"arch": ("x86_64", "armv7l")}, "needs architecture x86_64 or armv7l, has aarch64"),
        ({"providers": ("CUDAExecutionProvider",)}, "needs provider CUDAExecutionProvider, has CPUExecutionProvider"),
        ({"sdk": "0.1", "runtime": "1.31", "opset": 23, "memory": GIB, "arch": ("aarch64",)}, ""),
    ],
)
def test_what_a_device_lacks_is_told(floor: dict[str, Any], told: str) -> None:
    assert lacks(Requirements(**floor), traits(PI)) == told
    assert way_to(release(default=floor), traits(PI)).lacks == (told and f"variant default {told}")


@pytest.mark.parametrize("floor", [{"sdk": "9"}, {"runtime": "9"}, {"opset": 99}, {"memory": 2**49}])
def test_what_an_older_sdk_does_not_say_is_not_held_against_it(floor: dict[str, Any]) -> None:
    """The device looks itself before it activates: SDK and runtime by the manifest, the rest by loading it."""
    assert lacks(Requirements(**floor), traits(SILENT, sdk="")) == ""


def test_devices_of_one_kind_have_the_same_traits_though_their_kernels_leave_them_other_bytes() -> None:
    one, other = (traits(Abilities(memory=8 * GIB - left)) for left in (70_000_000, 81_234_567))
    assert one == other
    assert hash(one) == hash(other)


@given(memory=st.integers(0, 2**50))
def test_memory_is_rounded_down_by_a_sixteenth_at_most(memory: int) -> None:
    rounded = Traits.of({}, [], abilities=Abilities(memory=memory)).memory
    assert memory - memory / 16 <= rounded <= memory


# --- releases to step through ------------------------------------------------------------------------------------

FIRST = release("1.0.0", default={})
SECOND = release("1.5.0", default={"release": "1.0.0"})
THIRD = release("2.0.0", {"1.0.0": FIRST, "1.5.0": SECOND}, default={"release": "1.5.0"})


@pytest.mark.parametrize(
    ("running", "given_next"),
    [
        ("", "1.0.0"), ("0.9.0", "1.0.0"), ("1.0.0", "1.5.0"), ("1.2.0", "1.5.0"), ("1.5.0", "2.0.0"),
        ("1.6.0", "2.0.0"), ("2.0.0", "2.0.0"), ("1.10.0", "2.0.0"), ("2026-rc", "1.0.0"),
    ],
)  # fmt: skip
def test_a_device_steps_through_each_floor_that_it_has_not_surely_passed(running: str, given_next: str) -> None:
    way = way_to(THIRD, traits(SILENT))
    assert way.steps[place_on(way, running)].path.version == given_next


@pytest.mark.parametrize(
    ("floors", "told"),
    [
        ({}, "must step through 1.5.0, which is not there to run"),
        ({"1.5.0": release("1.5.0", default={"opset": 99})}, "must step through 1.5.0: variant default needs opset 99"),
        ({"1.5.0": release("1.5.0", default={"release": "1.5.0"})}, "which is not there to run"),  # in a circle
    ],
)
def test_a_floor_that_cannot_be_run_leads_nowhere_and_says_so(floors: dict[str, ReleaseRef], told: str) -> None:
    way = way_to(release("2.0.0", floors, default={"release": "1.5.0"}), traits(PI))
    assert way.steps == ()
    assert told in way.lacks


@pytest.mark.parametrize(
    ("version", "floor", "answer"),
    [("1.10", "1.9", True), ("1.0", "1", True), ("1.9", "1.10", False), ("rc1", "rc1", True), ("rc2", "rc1", False)],
)
def test_what_is_no_dotted_number_is_only_ever_the_same(version: str, floor: str, answer: bool) -> None:
    assert is_at_least(version, floor) is answer
    assert not older("1.²", "1")  # a digit to Python, no number
