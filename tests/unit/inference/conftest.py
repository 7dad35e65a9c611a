"""onnxruntime's door demands that the parent process switched its telemetry off."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 -- stands for the parent process
