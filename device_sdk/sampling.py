"""Which inferences are kept, with what probability, and when they may travel. Pure: chance and time are arguments."""

from dataclasses import replace

from device_sdk.protocol.assignment import DAY_MINUTES, Sampling, Window
from device_sdk.protocol.cohorts import jitter
from device_sdk.protocol.frozen import frozen


def decide(chance: float, rate: float) -> bool:
    """Whether an inference is offered: `chance` is uniform in [0, 1), so 0 keeps none and 1 keeps all."""
    return chance < rate


@frozen
class Reservoir:
    """Algorithm R over the inferences offered since the last upload: `kept` of `seen`, each with the same chance.

    `lost` were offered and never got here (full queue, failed redaction): they were seen, and count in the probability.
    """

    capacity: int
    kept: int = 0
    seen: int = 0
    lost: int = 0

    def place(self, chance: float) -> tuple["Reservoir", int | None]:
        """Decide on the next sample: its slot, or None to pass it over. A slot below `kept` is taken from another."""
        seen = self.seen + 1
        if self.kept < self.capacity:
            return replace(self, seen=seen, kept=self.kept + 1), self.kept
        slot = int(chance * (seen - self.lost))
        return replace(self, seen=seen), slot if slot < self.kept else None

    def shrink(self) -> "Reservoir":
        """One kept sample had to go for lack of room: the room is what is left. Uniform if the victim was random."""
        return replace(self, kept=self.kept - 1, capacity=max(self.kept - 1, 0))

    def lose(self) -> "Reservoir":
        return replace(self, seen=self.seen + 1, lost=self.lost + 1)

    def probability(self, rate: float) -> float:
        """With what probability each kept sample was kept, of all inferences since the last upload."""
        return rate * self.kept / self.seen if self.seen else rate


def upload_open(sampling: Sampling, device: str, second: float) -> bool:
    """Whether `device` may upload at this `second` of its local day: in the window, and after its own delay.

    The delay is at most half of the window: however large the jitter, every device gets a turn.
    """
    window = sampling.window
    if not window.contains(int(second // 60) % DAY_MINUTES):
        return False
    if window.start == window.end:
        return True
    since = (second - window.start * 60) % (DAY_MINUTES * 60)
    return since >= jitter(device, "upload") * min(sampling.jitter_seconds, _length(window) / 2)


def _length(window: Window) -> float:
    return ((window.end - window.start) % DAY_MINUTES or DAY_MINUTES) * 60.0
