"""The peer: what people write by hand. aiohttp, uvloop and onnxruntime speaking the Open Inference Protocol, without any security.

Usage: python bench/bare.py MODEL.onnx PORT [--image]    (prints "ready" when it accepts)
"""

import io
import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # noqa: TID251 -- a script of its own; must stand before the import below

import numpy as np
import onnxruntime
import orjson
import uvloop
from aiohttp import web
from PIL import Image

DTYPES = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def _session(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _image(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224))
    array = (np.asarray(picture, np.float32) / 255.0 - MEAN) / STD
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None])


def main() -> None:
    """Serve one model."""
    session = _session(sys.argv[1])
    port = int(sys.argv[2])
    outputs = [output.name for output in session.get_outputs()]
    input_name = session.get_inputs()[0].name

    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        length = request.headers.get("Inference-Header-Content-Length")
        header = orjson.loads(body[: int(length)] if length else body)
        tensor = header["inputs"][0]
        if length:
            raw = body[int(length) :]
            if tensor["datatype"] == "BYTES":
                array = _image(raw[4:])
            else:
                array = np.frombuffer(raw, DTYPES[tensor["datatype"]]).reshape(tensor["shape"])
        else:
            array = np.array(tensor["data"], DTYPES[tensor["datatype"]]).reshape(tensor["shape"])
        results = session.run(None, {input_name: array})
        answer = {
            "model_name": request.match_info["model"],
            "outputs": [
                {"name": name, "shape": result.shape, "datatype": "FP32", "data": result.ravel()}
                for name, result in zip(outputs, results, strict=True)
            ],
        }
        return web.Response(
            body=orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), content_type="application/json"
        )

    async def ready(_: web.Application) -> None:
        print("ready", flush=True)

    application = web.Application(client_max_size=64 << 20)
    application.add_routes([web.post("/v2/models/{model}/infer", infer)])
    application.on_startup.append(ready)
    web.run_app(application, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
