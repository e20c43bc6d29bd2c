"""What a process does that serves a directory's models while another one updates it."""

import logging
from collections.abc import Collection, Mapping

from device_sdk.errors import DeviceError, ModelError
from device_sdk.install import Installer
from device_sdk.peers import Board, Served, Uncollected

log = logging.getLogger("device_sdk")


class Following:
    """Serves what the updater says, and tells it what its own calls came to. Owns no thread."""

    def __init__(self, board: Board, installers: Mapping[str, Installer]) -> None:
        self._board = board
        self._installers = installers
        self._uncollected: dict[str, Uncollected] = {}
        self._drops: dict[str, int] = {}

    def follow(self, news: Mapping[str, Served], names: Collection[str]) -> None:
        """Swap as the updater did, those models of `names` that this process serves."""
        for name in news.keys() & set(names):
            self._sample(name, news[name].rate)
            try:
                self._installers[name].follow(news[name])
            except ModelError as error:
                log.error("%s: %s does not load here: %s", name, news[name].sha256, error)  # noqa: TRY400
            except DeviceError as error:
                log.warning("%s: it is tried again: %s", name, error)
                self._board.look_again()

    def tell(self) -> None:
        """Report what this process sees of a trial, and how many samples it was asked for and did not keep."""
        seen = {name: told for name, each in self._installers.items() if (told := each.seen())}
        for name, uncollected in self._uncollected.items():
            if count := uncollected.take():
                self._drops[name] = self._drops.get(name, 0) + count
        try:
            self._board.report(seen)
            if self._drops and self._board.hand_over_drops(self._drops):
                self._drops = {}
        except OSError as error:
            log.warning("the updating process is not told what this one sees: %s", error.strerror)

    def _sample(self, name: str, rate: float) -> None:
        """One process writes the spool. The others count what it would have kept of theirs."""
        uncollected = self._uncollected.setdefault(name, Uncollected(rate))
        uncollected.rate = rate
        self._installers[name].slot.sampler = uncollected if rate > 0 else None
