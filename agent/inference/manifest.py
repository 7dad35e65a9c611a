"""``model.yaml``: what a model package says of itself.

Rules:

1. The YAML is read with PyYAML's safe loader, narrowed: at most :data:`MAX_MANIFEST_BYTES`, no aliases (a few hundred
   bytes of them stand for gigabytes), bounded nesting, no key twice (:mod:`agent.strict_yaml`).
2. Its shape is validated by ``model.schema.json``; what a schema can't say is checked here: names that occur once, an
   image input that exists and has room for its channels, ranges that are ranges.
3. Whatever is wrong is a :class:`~agent.errors.VerificationError` named ``manifest``.
"""

import json
import math
from importlib.resources import files
from typing import Literal, TypeAlias

import jsonschema
import msgspec
from jsonschema.exceptions import best_match

from agent import strict_yaml
from agent.errors import VerificationError
from agent.records import TensorSpec

__all__ = [
    "MANIFEST_FILE",
    "MAX_LABELS_BYTES",
    "MAX_MANIFEST_BYTES",
    "ImageModality",
    "ModelManifest",
    "Range",
    "TensorModality",
    "parse_labels",
    "parse_manifest",
    "version_key",
]

MANIFEST_FILE = "model.yaml"
MAX_MANIFEST_BYTES = 64 * 1024
MAX_LABELS_BYTES = 1 << 20

_VALIDATOR = jsonschema.Draft202012Validator(
    json.loads(files("agent.inference").joinpath("model.schema.json").read_bytes())
)


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Least and greatest value, both included."""

    low: float
    high: float


class ImageModality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="image"):
    """How decoded pixels become the model's input; the other inputs are plain tensors.

    A pixel ``p`` (0..255) becomes ``(low + p / 255 * (high - low) - mean) / std``, by channel.

    Attributes:
        height: pixels that the model takes; 0 until :func:`parse_manifest` has filled it in from the input's shape.
        width: as ``height``.
        resize_short: scale the shorter side to this, then cut the centre out; None: stretch to height x width.
    """

    input: str
    layout: Literal["NCHW", "NHWC"]
    color: Literal["RGB", "BGR", "GRAY"] = "RGB"
    height: int = 0
    width: int = 0
    resize_short: int | None = None
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def channels(self) -> int:
        """Return 1 or 3."""
        return 1 if self.color == "GRAY" else 3


class TensorModality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="tensor"):
    """What values the inputs may hold."""

    allow_nonfinite: bool = False
    ranges: dict[str, Range] = {}


Modality: TypeAlias = ImageModality | TensorModality


class ModelManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A validated ``model.yaml``. Empty profile names leave the choice to policy."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    modality: Modality = TensorModality()
    labels: str | None = None
    sensitivity: Literal["public", "internal", "confidential", "restricted"] = "internal"
    sanitizer: str = ""
    output_profile: str = ""

    @property
    def image(self) -> ImageModality | None:
        """Return the image modality, when the model has one."""
        return self.modality if isinstance(self.modality, ImageModality) else None

    @property
    def allow_nonfinite(self) -> bool:
        """Whether NaN and infinities may come in."""
        return isinstance(self.modality, TensorModality) and self.modality.allow_nonfinite

    def input_spec(self, name: str) -> TensorSpec | None:
        """Return the named input."""
        return next((spec for spec in self.inputs if spec.name == name), None)


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that orders versions by their dotted parts: numbers by value and above words.

    ``1.0rc`` < ``1.0`` < ``1.2`` < ``1.10``.
    """
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in version.split("."))


def parse_manifest(data: bytes) -> ModelManifest:
    """Parse and check ``model.yaml``.

    Raises:
        VerificationError: ``manifest``; the text says where and what.
    """
    # 1. Size, then YAML within the limits.
    if len(data) > MAX_MANIFEST_BYTES:
        raise _wrong(f"{len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    try:
        document = strict_yaml.load(data)
    except ValueError as error:
        raise _wrong(str(error)) from error
    # 2. The schema.
    problem = best_match(_VALIDATOR.iter_errors(document))
    if problem is not None:
        raise _wrong(f"{problem.json_path}: {problem.message[:300]}")
    # 3. The value; msgspec also refuses keys that are not strings.
    try:
        manifest = msgspec.convert(document, ModelManifest)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from error
    # 4. What the schema can't say.
    _check_unique("inputs", manifest.inputs)
    _check_unique("outputs", manifest.outputs)
    match manifest.modality:
        case ImageModality():
            return msgspec.structs.replace(manifest, modality=_check_image(manifest, manifest.modality))
        case TensorModality():
            _check_ranges(manifest, manifest.modality)
            return manifest


def parse_labels(data: bytes) -> tuple[str, ...]:
    """Return a label file's lines.

    Raises:
        VerificationError: ``labels``: too large, or not UTF-8.
    """
    if len(data) > MAX_LABELS_BYTES:
        raise VerificationError("labels", f"{len(data)} bytes, more than {MAX_LABELS_BYTES}")
    try:
        return tuple(data.decode().splitlines())
    except UnicodeDecodeError as error:
        raise VerificationError("labels", f"not UTF-8: {error.reason} at byte {error.start}") from error


def _wrong(message: str) -> VerificationError:
    return VerificationError("manifest", f"{MANIFEST_FILE}: {message}")


def _check_unique(what: str, specs: tuple[TensorSpec, ...]) -> None:
    if len({spec.name for spec in specs}) != len(specs):
        raise _wrong(f"$.{what}: a name occurs twice")


def _check_ranges(manifest: ModelManifest, modality: TensorModality) -> None:
    for name, limits in modality.ranges.items():
        if manifest.input_spec(name) is None:
            raise _wrong(f"$.modality.ranges: there is no input {name!r}")
        _check_range(f"$.modality.ranges.{name}", limits.low, limits.high)


def _check_range(where: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise _wrong(f"{where}: low {low} must be less than high {high}, both finite")


def _check_image(manifest: ModelManifest, image: ImageModality) -> ImageModality:
    spec = manifest.input_spec(image.input)
    if spec is None:
        raise _wrong(f"$.modality.input: there is no input {image.input!r}")
    _check_range("$.modality", image.low, image.high)
    for what, values in (("mean", image.mean), ("std", image.std)):
        if len(values) not in {1, image.channels} or not all(map(math.isfinite, values)):
            raise _wrong(f"$.modality.{what}: one finite number, or one for each of {image.channels} channels")
    if min(image.std) <= 0:
        raise _wrong("$.modality.std: must be greater than 0")
    if spec.datatype not in {"FP16", "FP32", "FP64", "UINT8"} or len(spec.shape) != len(image.layout):
        raise _wrong(f"$.modality: input {spec.name!r} must be FP16, FP32, FP64 or UINT8 with 4 dimensions")
    axes = dict(zip(image.layout, spec.shape, strict=True))
    if axes["C"] not in {-1, image.channels}:
        raise _wrong(f"$.modality.color: {image.color} has {image.channels} channels, the input has {axes['C']}")
    plain = (image.low, image.high, set(image.mean), set(image.std)) == (0, 255, {0}, {1})
    if spec.datatype == "UINT8" and not plain:
        raise _wrong("$.modality: a UINT8 input takes plain pixels: low 0, high 255, mean 0, std 1")
    height = _side("height", image.height, axes["H"])
    width = _side("width", image.width, axes["W"])
    if image.resize_short is not None and image.resize_short < max(height, width):
        raise _wrong(
            f"$.modality.resize_short: {image.resize_short} leaves too little to cut {height} x {width} out of"
        )
    return msgspec.structs.replace(image, height=height, width=width)


def _side(what: str, stated: int, dimension: int) -> int:
    side = stated or dimension
    if side < 1 or dimension not in {-1, side}:
        raise _wrong(f"$.modality.{what}: state it, and as the input's dimension ({dimension}) where that is fixed")
    return side
