"""Try a release before it serves: in a process that may die of it, then in this one, as its makers would have it asked.

Imported with the first release that comes: a start does without all of this.
"""

from collections.abc import Callable

from device_sdk import acceptance
from device_sdk.acceptance import Exam
from device_sdk.errors import ModelError
from device_sdk.protocol.arrays.acceptance import Acceptance
from device_sdk.protocol.manifest import Manifest
from device_sdk.rehearsal import rehearse
from device_sdk.room import Rules
from device_sdk.runtime import RuntimeOptions
from device_sdk.slot import Loaded, trim
from device_sdk.store import LoadedFiles, Store

Found = dict[str, float | str]


def bundle_of(store: Store, manifest: Manifest) -> Acceptance | None:
    entry = manifest.acceptance
    return None if entry is None else acceptance.read(store.read_blob(entry))


def warm_up(store: Store, manifest: Manifest) -> Exam | None:
    """What a process asks that follows another: its execution providers may be others than the updater's."""
    bundle = bundle_of(store, manifest)
    return Exam(bundle, seconds=acceptance.WARM_SECONDS) if bundle else None


def test(
    files: LoadedFiles,
    bundle: Acceptance | None,
    *,
    rules: Rules | None,
    options: RuntimeOptions,
    go_on: Callable[[], None],
    make: Callable[[Exam | None], Loaded],
) -> tuple[Loaded, Found]:
    """What `make` loads in this process, and what the bundle showed. Without `rules` there is no rehearsal.

    Raises what `rehearsal.rehearse` and `make` raise.
    """
    took = None
    if rules is not None:
        took = rehearse(files, options=options, rules=rules, go_on=go_on, bundle=bundle)
    trim()  # two releases are in memory from here on: what calls have freed is not to stand beside them
    if bundle is None:
        return make(None), {}
    # Latency is measured here: with the threads, the options and the company that the release will have.
    seconds = None if took is None else acceptance.WARM_SECONDS
    exam = Exam(bundle, seconds=seconds, timed=True, go_on=go_on)
    return make(exam), _passed(exam, took)


def told(error: ModelError) -> str:
    """What a release's makers asked of it is not on any page: the reason says what was expected, and what came."""
    return f"{error.code}: {error}"[:300] if error.code in acceptance.CODES else error.code


def _passed(exam: Exam, took: int | None) -> Found:
    memory = {"memory": float(took)} if took else {}
    return {"accepted": float(exam.asked), "latency_ms": round(exam.latency_ms, 3), **memory}
