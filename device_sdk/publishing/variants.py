"""The variants of a release, from files on CI's disk and what the command line says of them."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_sdk.errors import SetupError, TransferError
from device_sdk.protocol import limits
from device_sdk.protocol.manifest import (
    ATTACHMENT_KINDS,
    MODEL_SIGNATURE,
    Attachment,
    FileEntry,
    Manifest,
    Requirements,
    TensorSpec,
)
from device_sdk.protocol.names import ReleasePath, check_file_name, check_name
from device_sdk.protocol.scores import Scores
from device_sdk.publishing.console import say
from device_sdk.publishing.needs import of_variants

if TYPE_CHECKING:
    from device_sdk.publishing.recording import Wanted

_DTYPES = {"float": "float32", "double": "float64", "string": "object"}


@dataclass(frozen=True, slots=True)
class LocalFile:
    path: Path
    entry: FileEntry


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant to publish; the first file is the one that is loaded. `beside`: what is attached, and the bundle."""

    manifest: Manifest
    files: tuple[LocalFile, ...]
    beside: tuple[LocalFile, ...] = ()


def build_variant(
    path: ReleasePath,
    files: Sequence[Path],
    *,
    requires: Requirements,
    metadata: Mapping[str, str],
    attach: Sequence[tuple[str, Path]] = (),
    accept: Path | None = None,
    scores: Scores | None = None,
) -> Variant:
    """`attach`: kind and file of what is said about the variant. `accept`: its acceptance bundle."""
    local = tuple(_local(file) for file in files)
    inputs, outputs = _tensors(files[0])
    if scores and outputs and scores.output not in {spec.name for spec in outputs}:
        raise SetupError(f"--scores: no output {scores.output!r}; the model has {[spec.name for spec in outputs]}")
    attached = tuple((kind, _attachment(file)) for kind, file in attach)
    bundle = _local(accept) if accept else None
    manifest = Manifest(
        path=path,
        files=tuple(file.entry for file in local),
        entry=local[0].entry.name,
        inputs=inputs,
        outputs=outputs,
        requires=requires,
        metadata=metadata,
        attachments=tuple(Attachment(kind, f.entry.name, f.entry.length, f.entry.sha256) for kind, f in attached),
        acceptance=bundle.entry if bundle else None,
        scores=scores,
    )
    beside = (*(file for _, file in attached), *filter(None, (bundle,)))
    return Variant(Manifest.parse(manifest.to_bytes()), local, beside)  # parsed: what we refuse need not travel


def chosen(options: argparse.Namespace, folder: Path) -> list[Variant]:
    """`--variant NAME=file,file` for several, or one made of the positional files. Bundles are written to `folder`."""
    named = [spec for spec in options.variant if "=" in spec]
    if bool(named) == bool(options.files) or (options.files and len(options.variant) > 1):
        raise SetupError("give either files (and one --variant NAME), or --variant NAME=file,file for each variant")
    chosen: dict[str, list[Path]] = {}
    for spec in named or [f"{(options.variant or ['default'])[0]}="]:
        name, _, listed = spec.partition("=")
        if name in chosen:
            raise SetupError(f"variant {name!r} is given twice")
        chosen[check_name(name, "variant")] = [Path(file) for file in listed.split(",")] if named else options.files
    common = Requirements(options.min_sdk, options.min_runtime, options.opset, options.memory)
    requires = of_variants(options.needs, chosen, common)
    metadata = _metadata(options.meta)
    version = check_name(options.version, "version")
    attach, wanted = _attached(options.attach, chosen), _wanted(options)
    scores = Scores.from_text(options.scores) if options.scores else None
    return [
        build_variant(
            ReleasePath(options.model, version, name),
            files,
            requires=requires[name],
            metadata=metadata,
            attach=attach[name],
            accept=_record(files[0], wanted, folder / name) if wanted else None,
            scores=scores,
        )
        for name, files in chosen.items()
    ]


def _wanted(options: argparse.Namespace) -> "Wanted | None":
    given = [options.max_latency_ms, options.max_memory_mb, *options.accept_rtol, *options.accept_atol]
    if not options.accept:
        if any(given):
            raise SetupError("budgets and tolerances of an acceptance bundle need its samples: --accept FILE")
        return None
    from device_sdk.publishing import recording  # it needs numpy, and pushing without a bundle does not

    return recording.wanted(options)


def _record(model: Path, wanted: "Wanted", folder: Path) -> Path:
    """A file named by what is asked: on another machine the answers differ in their last bits, and are as good."""
    from device_sdk.publishing import recording

    bundle = recording.record(model, wanted)
    path = folder / f"acceptance-{bundle.question()}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bundle.to_bytes())
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from error
    return path


def _attached(specs: Sequence[str], variants: Sequence[str] | Mapping[str, Any]) -> dict[str, list[tuple[str, Path]]]:
    """`KIND=FILE` for every variant, `VARIANT:KIND=FILE` for one."""
    attached: dict[str, list[tuple[str, Path]]] = {name: [] for name in variants}
    for spec in specs:
        named, equals, file = spec.partition("=")
        variant, _, kind = named.rpartition(":")
        if not equals or kind not in ATTACHMENT_KINDS or (variant and variant not in attached):
            expected = f"[VARIANT:]KIND=FILE with KIND one of {', '.join(ATTACHMENT_KINDS)}"
            raise SetupError(f"--attach: expected {expected}; got {spec!r}")
        for name in [variant] if variant else attached:
            attached[name].append((kind, Path(file)))
    return attached


def _attachment(path: Path) -> LocalFile:
    file = _local(path)
    if file.entry.length > limits.ATTACHMENT:
        raise SetupError(f"{path}: expected at most {limits.ATTACHMENT} bytes; got {file.entry.length}")
    return file


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    wrong = [key for key, equals, _ in split if not equals or not key]
    if wrong:
        raise SetupError(f"--metadata: expected KEY=VALUE; got {wrong[0]!r}")
    return {key: value for key, _, value in split}


def check_same(present: Mapping[str, Any], variants: Sequence[Variant]) -> None:
    """The same files under the same names are the same release, even where tensors were read on one machine only."""
    held = {name: _essence(Manifest.parse(item["manifest"].encode())) for name, item in present["variants"].items()}
    if held != {variant.manifest.path.variant: _essence(variant.manifest) for variant in variants}:
        message = f"{present['model']} {present['version']} was published with other content; releases never change"
        raise TransferError(message, code="version_exists", status=422)


def _essence(manifest: Manifest) -> Manifest:
    """Without what differs from one machine to the next: ECDSA signs anew each time, floats differ in the last bits.

    Of an acceptance bundle its name stays, which says what was asked.
    """
    said = tuple(item for item in manifest.attachments if item.kind != MODEL_SIGNATURE)
    asked = replace(manifest.acceptance, length=0, sha256="") if manifest.acceptance else None
    return replace(manifest, inputs=(), outputs=(), attachments=said, acceptance=asked)


def _local(path: Path) -> LocalFile:
    try:
        with path.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
            return LocalFile(path, FileEntry(check_file_name(path.name), file.tell(), sha256))
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error


def _tensors(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs where onnxruntime is at hand and the model loads; else none: the server reads them anyway."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # onnxruntime has no base class
        say(f"note: inputs and outputs are not stated: {' '.join(str(error).split())[:200]}")
        return (), ()
    return _specs(session.get_inputs()), _specs(session.get_outputs())


def _specs(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    def dtype(kind: str) -> str:
        bare = kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
        return _DTYPES.get(bare, bare)[:32]

    return tuple(
        TensorSpec(item.name, dtype(item.type), tuple(s if isinstance(s, (int, str)) else None for s in item.shape))
        for item in arguments
    )
