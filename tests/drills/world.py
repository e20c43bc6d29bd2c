"""The people who hold keys, the stick that goes between them, a server of their own, and devices that are far away.

Everything goes by the commands of `deploy/keys.md`: `ceremony` on machines without a network (here: in this process,
it needs neither database nor settings), `trust_export` and `trust_import` on the server, `fleet-publish` in CI.
"""

import io
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from django.core.management import call_command
from securesystemslib.signer import CryptoSigner

from device_sdk import Fleet, publish, signing
from device_sdk.protocol.polls import Bundle
from tests.attacks.forgery import part
from tests.attacks.world import Shop
from tests.live import LiveServer
from tests.sdk.world import scaling

ONES = {"x": np.ones((1, 4), np.float32)}


class Custody:
    """Who holds which key now, by name. The first keys are those that `trust_init` made, in the server's keystore."""

    def __init__(self, server: LiveServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.stick = folder / "stick"
        self.safe = folder / "safe"
        self.online = server.keystore / "online.pem"  # where the server finds its key
        self.roots = ["root-1", "root-2", "root-3"]
        self.targets = "targets-1"
        self._numbers = itertools.count(10)

    def key(self, name: str) -> Path:
        made = self.safe / f"{name}.pem"
        return made if made.exists() else self.server.keystore / f"{name}.pem"

    def make(self, kind: str) -> str:
        """A new key for a person or for CI; its name."""
        name = f"{kind}-{next(self._numbers)}"
        self.ceremony("make-key", name, "--private", str(self.safe), "--stick", str(self.stick), "--no-passphrase")
        return name

    def make_online(self, path: Path) -> Path:
        """The server's own new key; its public half."""
        public = path.with_suffix(".pub.json")
        fresh = self.folder / f"online-{next(self._numbers)}"
        self.ceremony("make-key", fresh.name, "--private", str(fresh), "--no-passphrase")
        (fresh / f"{fresh.name}.pem").rename(path)
        (fresh / f"{fresh.name}.pub.json").rename(public)
        named = fresh / f"{fresh.name}.pub.json"  # the file's name is what people will call the key
        shutil.copyfile(public, named)
        return named

    def lose_online_keys(self, *others: Path) -> None:
        for path in (self.online, *others):
            path.unlink(missing_ok=True)
            path.with_suffix(".pub.json").unlink(missing_ok=True)
        for name in ("URI", "PUBLIC"):  # the operator takes the lost one out of the settings, for commands from now on
            self.server.env.pop(f"FLEET_NEXT_ONLINE_KEY_{name}", None)

    def ceremony(self, *arguments: str) -> str:
        said = io.StringIO()
        call_command("ceremony", *arguments, stdout=said)
        return said.getvalue()

    def edit(self, step: str, *arguments: str) -> str:
        return self.ceremony(step, str(self.stick), *arguments)

    def fetch(self) -> "Custody":
        """What the server holds now, onto an empty stick."""
        shutil.rmtree(self.stick, ignore_errors=True)
        self.stick.mkdir()
        self.server.manage("trust_export", str(self.stick))
        return self

    def sign(self, *names: str) -> None:
        """Each with their own key, one after another."""
        for name in names:
            self.edit("sign", "--key", str(self.key(name)), "--yes")

    def bring(self) -> str:
        """The stick to the server. What it said."""
        return self.server.manage("trust_import", str(self.stick))

    def newest_root(self) -> int:
        return max(int(path.name.split(".")[0]) for path in self.stick.glob("*.root.json"))

    def signers_of(self, bundle: Bundle) -> set[str]:
        return set(part(bundle, "timestamp").signatures)

    def signer(self, bundle: Bundle) -> CryptoSigner:
        """The online key that signed `bundle`, as a thief of the server would have it."""
        (keyid,) = self.signers_of(bundle)
        found = [self.online, *self.folder.parent.glob("next*/*.pem")]
        signers = [signing.load_signer(str(path)) for path in found if path.exists()]
        return next(signer for signer in signers if signer.public_key.keyid == keyid)


class FarShop(Shop):
    """A model whose devices are offline most of the time, and whose releases answer ever larger numbers."""

    last = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ci = self.key

    def next_release(self) -> float:
        """CI pushes another release, an operator rolls it out to everyone; what it answers."""
        self.last += 1
        assert self.push_by(self.ci, self.last) == publish.OK
        self.roll_out(self.last)
        return self.last

    def push_by(self, key: Path, factor: float, options: Sequence[str] = ()) -> int:
        model = self.folder / "model.onnx"
        model.write_bytes(scaling(factor))
        version = f"{factor:.0f}.0.0"
        named = ["--model", self.model, "--version", version, "--server", self.server.url]
        code = publish.main(["push", str(model), *named, "--key", str(key), "--token", self.token, "--wait", *options])
        if code == publish.OK:
            found = self.api("GET", f"releases/?model={self.model}")["results"]
            self.releases |= {each["version"]: each["id"] for each in found}
        return code

    def enrol(self, name: str, server: str = "", others: Sequence[str] = ()) -> Path:
        usual = self.provision.read_bytes()
        if others:
            named = [part for model in (self.model, *others) for part in ("--model", model)]
            self.server.manage("provision", "--name", f"{self.model}-{name}", *named, "--out", str(self.provision))
        home = super().enrol(name, server)
        self.provision.write_bytes(usual)
        return home

    def renew(self, key: Path, *options: str) -> int:
        """CI signs its role anew, with nothing changed."""
        named = ["--model", self.model, "--server", self.server.url, "--key", str(key), "--token", self.token]
        return publish.main(["renew", *named, *options])


class FarDevice:
    """A device that is on now and then: each visit is a start of the SDK, from what the last one left on disk."""

    def __init__(self, shop: FarShop, name: str, server: str = "", others: Sequence[str] = ()) -> None:
        """`others`: further models that it runs."""
        self.shop = shop
        self.home = shop.enrol(name, server, others)

    def visit(self) -> float:
        """Come online, take what is there and prove it. What the model answers then."""
        with Fleet.open(self.home, rehearsal_nice=0) as fleet:
            fleet.update_once()
            model = fleet.model(self.shop.model)
            for _ in range(6):  # probation asks for five calls
                answer = float(model.run(ONES)["y"][0, 0])
            fleet.update_once()
            return answer

    def offline(self, model: str = "") -> float:
        """What it answers without the server."""
        with Fleet.open(self.home) as fleet:
            return float(fleet.model(model or self.shop.model).run(ONES)["y"][0, 0])

    def root(self) -> int:
        """The version of the newest root that it holds."""
        kept = self.home / "trust" / "roots.json"
        body = json.loads(json.loads(kept.read_bytes())["body"]) if kept.exists() else {"pinned": 1, "roots": []}
        return int(body["pinned"]) + len(body["roots"])


def public_of(key: Path) -> Path:
    """The public half of a private key's file, as JSON beside it; made where CI's key came without."""
    path = key.with_suffix(".pub.json")
    if not path.exists():
        path.write_text(signing.public_to_json(signing.load_signer(str(key)).public_key))
    return path
