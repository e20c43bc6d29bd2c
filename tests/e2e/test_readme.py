"""Every command of the README is run, in its order, as a reader would: in an empty folder, by bash."""

import re
import subprocess

import numpy as np
import pytest

from deploy.demo import training
from tests.walkthrough import ROOT, Walk, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def walk(tmp_path):
    """An empty folder with what the reader has: the checkout's commands, a model and an image."""
    digits = training.Digits.load()
    training.save(training.train_digits(digits.lab_images[:40], digits.lab_labels[:40]), tmp_path)
    np.save(tmp_path / "image.npy", digits.test_images[:1])
    return Walk(tmp_path, {"ADMIN_PASSWORD": "correct-horse-battery"})


def test_the_make_targets_of_the_readme_exist():
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_can_be_followed_to_the_letter(walk):
    try:
        for kind, text in blocks(ROOT / "README.md", "sh", "sh background", "python"):
            if text.startswith("make "):
                continue
            if kind == "sh background":
                walk.start(text)
            elif kind == "python":
                walk.run(["python", "-c", f"{PRELUDE}{text}{EPILOGUE}"])
            else:
                walk.shell(text)
    finally:
        walk.stop()
    assert (walk.folder / "till-7").is_dir()


PRELUDE = "import numpy\nimage = numpy.load('image.npy')\n"
EPILOGUE = "\nfleet.stop()\nassert outputs['probabilities'].shape == (1, 10), outputs\n"
