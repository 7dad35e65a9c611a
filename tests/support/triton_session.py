"""A session of the protocol's stock client against a node; prints what came back as one JSON object.

A process of its own: the client brings gevent, which does not mix with the test process's loops and socket guard.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def main() -> None:
    """Run the calls that ``argv`` names: port, directory with keys, file with a JPEG."""
    port, pki, jpeg = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).read_bytes()
    client = triton.InferenceServerClient(
        f"127.0.0.1:{port}",
        ssl=True,
        ssl_options={
            "ca_certs": str(pki / "ca.pem"),
            "certfile": str(pki / "bob.pem"),
            "keyfile": str(pki / "bob.key"),
        },
    )
    said = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("tiny"),
        "version_ready": client.is_model_ready("tiny", "1"),
        "unknown_ready": client.is_model_ready("nothing"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("mixed"),
    }
    for form, binary in (("json", False), ("binary", True)):
        said[f"mixed_{form}"] = _mixed(client, binary=binary)
        said[f"tiny_{form}"] = _tiny(client, binary=binary)
    picture = triton.InferInput("x", [1], "BYTES")
    picture.set_data_from_numpy(np.array([jpeg], dtype=object), binary_data=True)
    answer = client.infer("orientation", [picture], model_version="1.0.0")
    said["orientation"] = answer.as_numpy("fetch_name_0").tolist()
    said["refused"] = {
        name: _error(call)
        for name, call in {
            "config": lambda: client.get_model_config("tiny"),
            "statistics": lambda: client.get_inference_statistics("tiny"),
            "index": client.get_model_repository_index,
            "load": lambda: client.load_model("tiny"),
            "upload": lambda: client.load_model("tiny", config="{}", files={"file:1/model.onnx": b"x"}),
            "unload": lambda: client.unload_model("tiny"),
            "trace": lambda: client.update_trace_settings(settings={"trace_level": ["OFF"]}),
            "log": lambda: client.update_log_settings({"log_info": False}),
            "shared_memory": lambda: client.register_system_shared_memory("s", "/s", 8),
            "shared_memory_status": client.get_system_shared_memory_status,
            "compressed": lambda: _tiny(client, binary=True, request_compression_algorithm="gzip"),
            "unknown": lambda: client.get_model_metadata("nothing"),
        }.items()
    }
    json.dump(said, sys.stdout)


def _error(call):
    try:
        call()
    except InferenceServerException as error:
        return {"status": error.status(), "error": error.message()}
    return None


def _mixed(client, *, binary):
    inputs = [
        triton.InferInput("a", [2, 3], "FP32"),
        triton.InferInput("b", [2], "INT64"),
        triton.InferInput("text", [2], "BYTES"),
    ]
    inputs[0].set_data_from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3), binary_data=binary)
    inputs[1].set_data_from_numpy(np.array([2**53 + 1, -7], dtype=np.int64), binary_data=binary)
    inputs[2].set_data_from_numpy(np.array([b"caf\xc3\xa9", b""], dtype=object), binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("echo", "doubled", "negated")]
    answer = client.infer("mixed", inputs, outputs=outputs, request_id=f"id-{binary}")
    return {
        "id": answer.get_response()["id"],
        "order": [output["name"] for output in answer.get_response()["outputs"]],
        "doubled": answer.as_numpy("doubled").tolist(),
        "negated": answer.as_numpy("negated").tolist(),
        "echo": [
            text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("echo").reshape(-1).tolist()
        ],
    }


def _tiny(client, *, binary, **options):
    tensor = triton.InferInput("x", [3, 64], "FP32")
    tensor.set_data_from_numpy(np.full((3, 64), 0.5, dtype=np.float32), binary_data=binary)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    return client.infer("tiny", [tensor], outputs=wanted, **options).as_numpy("y").tolist()


if __name__ == "__main__":
    main()
