"""Upper bounds of everything that crosses the wire, in one place. Bytes unless the name says otherwise."""

KIB, MIB, GIB = 1024, 1024**2, 1024**3

METADATA = 4 * MIB  # one TUF file; 10,000 releases in one role take 1.4 MB
BUNDLE = 16 * MIB
MANIFEST = 256 * KIB
ARTIFACT = 16 * GIB  # hard cap; the server's setting may be lower
FILES_PER_VARIANT = 256
ATTACHMENT = MIB  # what is said about a release, such as a bill of materials; devices never fetch it
ATTACHMENTS_PER_VARIANT = 16
VARIANTS_PER_RELEASE = 32
ACCEPTANCE = 16 * MIB  # golden inputs and outputs; nothing in it is compressed
ACCEPTANCE_INDEX = MIB // 4
ACCEPTANCE_SAMPLES = 256
TENSORS = 256
RANK = 16
PATCHES = 64  # offered for one file
PATCH_OFFERS = 64 * KIB

EVENTS_PER_POST = 100
EVENT_BODY = 256 * KIB
REASON_CHARS = 500

BATCH = 32 * MIB
SAMPLES_PER_BATCH = 2_000
BATCH_INDEX = 2 * MIB

MODELS_PER_DEVICE = 64
LABELS = 32
LABEL_CHARS = 64
PROVIDERS = 16  # execution providers, or architectures, that a device or a variant names
