"""The six steps, told on the terminal as they happen. Every figure printed was measured in this run."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.dataset
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.demo import training
from deploy.demo.world import OPERATOR, Api, DemoError, World, read_counts

AT_ONCE = [{"percent": 100, "soak_seconds": 0, "min_reports": 0, "success_threshold": 0.0, "failure_budget": 0}]
# A blank frame comes about every 20 calls: 60 calls see one with a probability of 95 %, so most bad devices notice.
PROBATION = {"calls": 60, "seconds": 3.0, "max_error_rate": 0.0, "max_invalid_rate": 0.0}
NIGHT = {"window_start": 120, "window_end": 300, "jitter_seconds": 3600}
NIGHT_NOW = {"window_start": 0, "window_end": 0, "jitter_seconds": 3}


STAGES = (20, 50, 100)  # percent
STUCK_SECONDS = 5.0  # a call that has not come back by then counts as dropped


@dataclass
class Figures:
    """What the summary prints."""

    seconds: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    halted: str = ""
    exposed: int = 0
    back: int = 0
    samples: int = 0
    labelled: int = 0


def stages(devices: int) -> list[dict[str, Any]]:
    """Each stage lasts two seconds at least, wants every second device to report, and forgives one failure in five."""
    return [
        {
            "percent": percent,
            "soak_seconds": 2,
            "min_reports": max(1, devices * percent // 200),
            "success_threshold": 0.9,
            "failure_budget": devices * percent // 500,
        }
        for percent in STAGES
    ]


class Story:
    def __init__(self, world: World, console: Console, *, devices: int, processes: int) -> None:
        self.world = world
        self.console = console
        self.devices = devices
        self.counters = [world.var / f"counters-{n}.json" for n in range(processes)]
        self.figures = Figures()
        self.digits = training.Digits.load()

    def tell(self) -> None:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("A trust root, and the server", self.found_trust),
            ("CI signs and pushes real models", self.push_first_models),
            (f"{self.devices} devices enrol and run them", self.enrol_devices),
            ("1.1.0 goes out by stages; 1.2.0 is halted", self.roll_out),
            ("Night: samples come home, a better model goes out", self.close_the_loop),
            ("The admin", self.show_admin),
        ]
        for number, (title, step) in enumerate(steps, 1):
            self.console.rule(f"[bold]{number}. {title}", align="left")
            begin = time.monotonic()
            step()
            self.figures.seconds[title] = time.monotonic() - begin

    # --- 1 -----------------------------------------------------------------------------------------------------------
    def found_trust(self) -> None:
        world = self.world
        with self.console.status("laying out the database"):
            world.open()
        self.console.print(world.manage_with_notes("trust_init").strip(), style="yellow", highlight=False)
        self.keys = world.var / "ci-keys"
        self.keys.mkdir(mode=0o700)
        for model in ("digits", "wine"):
            world.manage("trust_add_model", model, "--ci-key-out", str(self.keys / f"{model}.key"))
        self.say("root (2 of 3), targets, online key, and one CI key for each of digits and wine")
        self._create_people()
        with self.console.status("starting the server"):
            world.serve()
        self.say(f"the server answers at {world.url}")

    def _create_people(self) -> None:
        self.world.manage("createsuperuser", "--noinput", "--username", OPERATOR, "--email", "operator@example.com")
        self.api = Api(self.world.url, self._token("operate"))
        self.ci_token = self._token("publish")

    def _token(self, scope: str) -> str:
        return self.world.manage("api_token", f"demo {scope}", "--user", OPERATOR, "--scope", scope).strip()

    # --- 2 -----------------------------------------------------------------------------------------------------------
    def push_first_models(self) -> None:
        few = slice(0, training.FEW)
        self.train_and_push("1.0.0", self.digits.lab_images[few], self.digits.lab_labels[few])
        measurements = training.wine_measurements()[:: training.GOLDEN]
        self.push("wine", "1.0.0", training.train_wine(), {"data": "UCI wine recognition"}, measurements=measurements)
        for model in ("digits", "wine"):
            self.start_rollout(model, "1.0.0", AT_ONCE)
        self.say("both are the standing answer for every device that enrols")

    def train_and_push(self, version: str, images: np.ndarray, labels: np.ndarray, *, stretch: bool = False) -> None:
        model = training.train_digits(images, labels, stretch=stretch)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        answers = session.run(["label"], {"image": self.digits.test_images})[0]
        accuracy = float((answers == self.digits.test_labels).mean())
        self.figures.accuracy[version] = accuracy
        facts = {"training_images": str(len(images)), "lab_accuracy": f"{accuracy:.3f}"}
        self.push("digits", version, model, facts, image=self.digits.lab_images[:: training.GOLDEN])
        self.say(f"digits {version}: {len(images)} training images, {accuracy:.1%} right on {len(answers)} held back")

    def push(self, model: str, version: str, proto: Any, metadata: dict[str, str], **golden: np.ndarray) -> None:
        """With an acceptance bundle of golden inputs, which each device asks the release before it serves."""
        folder = self.world.var / "ci" / model / version
        files = training.save(proto, folder)
        np.savez(folder / "golden.npz", **golden)
        arguments = ["push", *map(str, files), "--model", model, "--version", version, "--server", self.world.url]
        arguments += ["--key", str(self.keys / f"{model}.key"), "--token", self.ci_token, "--wait"]
        arguments += ["--accept", str(folder / "golden.npz"), "--max-latency-ms", "100"]
        for key, value in metadata.items():
            arguments += ["--meta", f"{key}={value}"]
        self.world.publish(*arguments)

    def start_rollout(self, model: str, version: str, stages: list[dict[str, Any]]) -> int:
        (release,) = self.api.all("releases/", model=model, version=version)
        body = {"release": release["id"], "stages": stages, "on_failure": "roll_back", "probation": PROBATION}
        rollout = self.api.post("rollouts/", body)
        self.api.post(f"rollouts/{rollout['id']}/start/", {"comment": "demonstration"})
        return int(rollout["id"])

    # --- 3 -----------------------------------------------------------------------------------------------------------
    def enrol_devices(self) -> None:
        world = self.world
        self.start_campaign()
        provision = world.var / "provision.json"
        world.manage(
            "provision", "--name", "demonstration", "--model", "digits", "--model", "wine",
            "--uses", str(self.devices), "--days", "1", "--out", str(provision),
        )  # fmt: skip
        for index, counters in enumerate(self.counters):
            numbers = [str(n) for n in range(self.devices) if n % len(self.counters) == index]
            world.start(
                f"devices-{index}", "-m", "deploy.demo.devices", "--homes", str(world.var / "devices"),
                "--provision", str(provision), "--counters", str(counters), *numbers,
            )  # fmt: skip
        self.follow("devices running digits 1.0.0", self.devices, lambda: self.running("1.0.0"))
        self.say("enrolled by one provisioning file; each has its own directory, credential and signed view")

    def start_campaign(self) -> None:
        body = {"name": "demo-digits", "model": "digits", "rate": 0.1, "max_samples": 400, "days": 7, **NIGHT}
        self.campaign = self.api.post("campaigns/", body)["id"]

    def running(self, version: str) -> int:
        return int(self.api.get("spread/").get("digits", {}).get(version, 0))

    def digits_feeds(self) -> list[dict[str, Any]]:
        """What the devices themselves count, read from their files, not from the server."""
        return [row for row in read_counts(self.counters) if row["model"] == "digits"]

    def serving(self, version: str) -> int:
        return sum(row["serving"] == version for row in self.digits_feeds())

    # --- 4 -----------------------------------------------------------------------------------------------------------
    def roll_out(self) -> None:
        more, lab = slice(0, training.MORE), slice(None)
        self.train_and_push("1.1.0", self.digits.lab_images[more], self.digits.lab_labels[more])
        self.figures.seconds["1.1.0 to all"] = self.follow_rollout("1.1.0")
        self.train_and_push("1.2.0", self.digits.lab_images[lab], self.digits.lab_labels[lab], stretch=True)
        self.say("in the lab 1.2.0 is the best so far; in the field a blank frame makes it answer NaN")
        rollout = self.start_rollout("digits", "1.2.0", stages(self.devices))
        begin = time.monotonic()
        halted = self.world.wait("the guard to halt 1.2.0", lambda: self._ended(rollout), seconds=120)
        if halted["state"] != "halted":
            raise DemoError(f"1.2.0 ended as {halted['state']}: the guard saw nothing")
        self.figures.seconds["1.2.0 halted"] = time.monotonic() - begin
        self.figures.halted = halted["reason"]
        self.say(f"[bold]halted[/] in stage {halted['stage_index'] + 1} of {len(STAGES)}: {halted['reason']}")
        self.figures.exposed = sum("1.2.0" in row["by_release"] for row in self.digits_feeds())
        self.follow("devices answering by 1.1.0", self.devices, lambda: self.serving("1.1.0"))
        self.figures.back = self.serving("1.1.0")

    def _ended(self, rollout: int) -> Any:
        row = self.api.get(f"rollouts/{rollout}/")
        return row if row["state"] in {"completed", "halted", "cancelled"} else None

    def follow_rollout(self, version: str) -> float:
        """Start a staged rollout, show it grow, and return the seconds until every device had committed."""
        rollout = self.start_rollout("digits", version, stages(self.devices))
        begin = time.monotonic()
        self.follow(f"devices committed to digits {version}", self.devices, lambda: self._committed(rollout))
        done = self.world.wait(f"the rollout of {version} to complete", lambda: self._ended(rollout), seconds=60)
        if done["state"] != "completed":
            raise DemoError(f"the rollout of {version} is {done['state']}: {done['reason']}")
        return time.monotonic() - begin

    def _committed(self, rollout: int) -> int:
        row = self.api.get(f"rollouts/{rollout}/")
        if row["state"] in {"halted", "cancelled"}:
            raise DemoError(f"rollout {rollout} is {row['state']}: {row['reason']}")
        return int(row["progress"]["committed"])

    # --- 5 -----------------------------------------------------------------------------------------------------------
    def close_the_loop(self) -> None:
        self.api.patch(f"campaigns/{self.campaign}/", NIGHT_NOW)
        self.say("the upload window is pulled forward to now; each device learns it from its signed view")
        self.follow("devices whose samples are in the data set", self.devices, self._devices_ingested, seconds=120)
        images, labels = self._collected()
        self.figures.labelled = len(images)
        few = slice(0, training.FEW)
        self.train_and_push(
            "1.3.0",
            np.concatenate([self.digits.lab_images[few], images]),
            np.concatenate([self.digits.lab_labels[few], labels]),
        )
        self.figures.seconds["1.3.0 to all"] = self.follow_rollout("1.3.0")

    def _devices_ingested(self) -> int:
        batches = self.api.all("batches/", state="ingested")
        self.figures.samples = sum(batch["samples"] for batch in batches)
        return len({batch["device"] for batch in batches})

    def _collected(self) -> tuple[np.ndarray, np.ndarray]:
        """Export the data set as a data scientist would, drop blank frames and repeats, and label the rest.

        The true digit is looked up in the original data: that stands in for the person who would label them.
        """
        folder = self.world.var / "dataset"
        self.world.manage("dataset", "export", "digits", "--out", str(folder))
        column = pyarrow.dataset.dataset(folder, partitioning="hive").to_table(columns=["input.image"])["input.image"]
        truth = dict(zip(map(np.ndarray.tobytes, self.digits.field_images), self.digits.field_labels, strict=True))
        seen = {np.asarray(row, dtype=np.float32).tobytes() for row in column.to_pylist()}
        known = sorted(image for image in seen if image in truth)
        self.say(f"{len(column)} samples exported to Parquet, {len(known)} different images labelled")
        images = np.stack([np.frombuffer(image, dtype=np.float32) for image in known])
        return images, np.array([truth[image] for image in known])

    # --- 6 -----------------------------------------------------------------------------------------------------------
    def show_admin(self) -> None:
        self.console.print(f"  [bold]{self.world.url}/admin/[/]")
        self.console.print(f"  user [bold]{OPERATOR}[/], password [bold]{self.world.password}[/]")
        self.console.print(f"API: {self.world.url}/api/docs/   logs: {self.world.var / 'logs'}")

    # --- telling -----------------------------------------------------------------------------------------------------
    def say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False)

    def follow(self, what: str, total: int, count: Callable[[], int], *, seconds: float = 180) -> None:
        """Draw a bar until `count` reaches `total`."""
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=total)

            def enough() -> bool:
                progress.update(task, completed=(now := count()))
                return now >= total

            self.world.wait(what, enough, seconds=seconds)

    def summary(self) -> bool:
        """Print what was measured; return whether no call failed and every device ended on 1.3.0."""
        figures, counts = self.figures, self._final_counts()
        total = {key: sum(row[key] for row in counts) for key in ("attempted", "answered", "failed", "invalid")}
        unanswered = sum(1 for row in counts if row["began"] and time.monotonic() - row["began"] > STUCK_SECONDS)
        table = Table(title="What happened", title_justify="left", show_header=False)
        final = self.serving("1.3.0")
        rows = {
            "devices": f"{self.devices} real SDK instances in {len(self.counters)} processes, two models each",
            "inference calls": f"{total['attempted']:,} made, {total['failed']} failed, {unanswered} unanswered",
            "slowest call": f"{max(row['slowest_ms'] for row in counts):.0f} ms, swaps included",
            "1.1.0 to all": f"{figures.seconds['1.1.0 to all']:.0f} s in {len(STAGES)} stages",
            "1.2.0 halted": f"after {figures.seconds['1.2.0 halted']:.0f} s, {figures.exposed} devices had it, "
            f"{total['invalid']} NaN answers: {figures.halted}",
            "back on 1.1.0": f"{figures.back} of {self.devices}, by themselves",
            "samples": f"{figures.samples:,} uploaded, {figures.labelled} different images labelled",
            "accuracy": ", ".join(f"{v} {a:.1%}" for v, a in figures.accuracy.items()),
            "1.3.0 to all": f"{figures.seconds['1.3.0 to all']:.0f} s; {final} of {self.devices} run it",
        }
        for name, text in rows.items():
            table.add_row(f"[bold]{name}", text)
        self.console.print(table)
        (self.world.var / "summary.json").write_text(json.dumps({**rows, **total, "unanswered": unanswered}, indent=1))
        better = figures.accuracy["1.3.0"] > figures.accuracy["1.0.0"]
        return not total["failed"] and not unanswered and final == self.devices and better

    def _final_counts(self) -> list[dict[str, Any]]:
        """The feeds' counts, with a complaint where one is missing or has seen an error."""
        counts = read_counts(self.counters)
        if len(counts) != 2 * self.devices or any(row["error"] for row in counts):
            errors = sorted({row["error"] for row in counts if row["error"]})
            self.console.print(f"[red]{len(counts)} of {2 * self.devices} feeds reported; errors: {errors}")
        return counts
