"""One hypothesis profile for all: the same examples in each run, and no deadline on a shared machine."""

import os

from hypothesis import settings

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # noqa: TID251 -- must stand before any test imports onnxruntime
os.environ["RUST_BACKTRACE"] = "0"  # noqa: TID251 -- as in every child of the zygote: a trace with each error of a policy takes long
settings.register_profile("edgewarden", deadline=None, derandomize=True)
settings.load_profile("edgewarden")
