"""What a device must have, as it is typed for `fleet-publish`."""

import pytest

from device_sdk.errors import SetupError
from device_sdk.protocol.manifest import Requirements
from device_sdk.publishing.needs import of_variants

COMMON = Requirements(sdk="0.1.0", opset=17)


def test_a_floor_is_for_all_variants_or_for_one_and_the_one_wins():
    given = ["cuda:memory=4000", "memory=1000", "cuda:providers=CUDAExecutionProvider, TensorrtExecutionProvider",
             "arch=aarch64", "release=1.5.0"]  # fmt: skip
    default = Requirements("0.1.0", "", 17, 1000, "1.5.0", ("aarch64",))
    cuda = Requirements(
        "0.1.0", "", 17, 4000, "1.5.0", ("aarch64",), ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    )
    assert of_variants(given, ["default", "cuda"], COMMON) == {"default": default, "cuda": cuda}


def test_without_any_the_floors_are_those_of_all():
    assert of_variants([], ["default"], COMMON) == {"default": COMMON}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("memory", r"expected \[VARIANT:\]KEY=VALUE"),
        ("disk=1", "with KEY one of sdk, runtime"),
        ("int8:memory=1", r"expected \[VARIANT:\]KEY=VALUE"),
        ("memory=lots", "memory: expected a whole number"),
        ("release=../x", "version: expected 1 to 64"),
        ("arch=" + "a" * 40, "arch: expected texts of 1 to 32"),
    ],
)
def test_a_floor_that_makes_no_sense_is_refused(spec: str, said: str):
    with pytest.raises(SetupError, match=said):
        of_variants([spec], ["default"], COMMON)
