"""The structural gate: what a graph may be made of before any runtime sees it.

Pure: bytes in, report or refusal out. It runs in the inspector, a sandboxed process that lives for one package, for it
gives hostile bytes to a parser (docs/adr/0010-onnx-parser-in-the-inspector.md).

Rules:

1. Operators come from an allowlist (:mod:`agent.inference.operators`); a function of the model's own is allowed when its
   body keeps to the same rules, does not call itself and does not stand for more than :data:`MAX_NODES` nodes.
2. Counts, depths and sizes are within named limits, and every tensor holds exactly the data that its shape needs.
3. External data lies in files of the package, inside their bounds, and belongs to initializers only.
4. The graph's inputs and outputs are the manifest's: same names and datatypes; a dimension that the graph fixes is fixed
   to the same number in the manifest, one that it leaves open may be fixed there.
5. A refusal is a :class:`~agent.errors.VerificationError` named after the first check that fails.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from agent.errors import VerificationError
from agent.inference.manifest import ModelManifest
from agent.inference.operators import ALLOWED_DOMAINS, ALLOWED_OPERATORS, MAX_OPSET
from agent.inference.report import GateReport
from agent.inference.weights import Weights, text
from agent.records import TensorSpec

__all__ = [
    "MAX_ATTRIBUTES",
    "MAX_DEPTH",
    "MAX_FUNCTIONS",
    "MAX_IR_VERSION",
    "MAX_MODEL_BYTES",
    "MAX_NODES",
    "MAX_OPERANDS",
    "check_model",
    "graph_specs",
    "parse_model",
]

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit
MIN_IR_VERSION = 3
MAX_IR_VERSION = onnx.IR_VERSION
MAX_NODES = 100_000  # of all graphs, subgraphs and functions, with the functions' bodies in place of their calls
MAX_DEPTH = 8  # subgraphs within subgraphs
MAX_ATTRIBUTES = 64  # of one node
MAX_ATTRIBUTE_VALUES = 1 << 20  # numbers or strings in one attribute
MAX_OPERANDS = 16_384  # inputs or outputs of one node
MAX_FUNCTIONS = 1_000
MAX_NAME_BYTES = 4_096

_DATATYPES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.UINT16: "UINT16",
    onnx.TensorProto.INT16: "INT16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.STRING: "BYTES",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.DOUBLE: "FP64",
    onnx.TensorProto.UINT32: "UINT32",
    onnx.TensorProto.UINT64: "UINT64",
}


def parse_model(data: bytes) -> Any:  # noqa: ANN401 -- onnx has no types
    """Parse a ModelProto.

    Raises:
        VerificationError: ``model-size`` or ``onnx-format``.
    """
    if len(data) > MAX_MODEL_BYTES:
        raise VerificationError("model-size", f"{len(data)} bytes, more than {MAX_MODEL_BYTES}")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise VerificationError("onnx-format", f"not an ONNX model: {str(error)[:200]}") from error
    if not model.HasField("graph"):
        raise VerificationError("onnx-format", "the model has no graph")
    return model


def check_model(data: bytes, sizes: Mapping[str, int], manifest: ModelManifest) -> GateReport:
    """Check a model against the rules above.

    Args:
        data: ``model.onnx``.
        sizes: path to size in bytes of the package's other files, which may hold external data.
        manifest: the package's.

    Raises:
        VerificationError: ``model-size``, ``onnx-format``, ``ir-version``, ``opset``, ``training``, ``functions``,
            ``depth``, ``node-count``, ``name-length``, ``operands``, ``attributes``, ``operator``, ``tensor-type``,
            ``tensor-shape``, ``tensor-size``, ``external-data``, ``text-encoding``, ``model-inputs`` or ``model-outputs``.
    """
    # 1. A format and operator sets that we know.
    model = parse_model(data)
    if not MIN_IR_VERSION <= model.ir_version <= MAX_IR_VERSION:
        raise VerificationError("ir-version", f"{model.ir_version} is not in {MIN_IR_VERSION}..{MAX_IR_VERSION}")
    functions = _functions(model)
    opsets = _opsets(model.opset_import, {domain for domain, _ in functions})
    # 2. Nothing that is for training only: it would not run, but could hide data.
    if model.training_info:
        raise VerificationError("training", "the model carries training information")
    # 3. Every node and tensor of the graph and of each function.
    weights = Weights(sizes)
    walk = _Walk(functions.keys(), weights)
    graph_calls = walk.graph(model.graph, 0)
    bodies = {key: walk.nodes(function.node, 0) for key, function in functions.items()}
    nodes = _inlined(graph_calls, bodies)
    # 4. The interface that the manifest promises.
    inputs, outputs = graph_specs(model)
    _check_interface("model-inputs", inputs, manifest.inputs, whole=True)
    _check_interface("model-outputs", outputs, manifest.outputs, whole=False)
    return GateReport(
        ir_version=model.ir_version,
        opsets=opsets,
        nodes=nodes,
        parameters=weights.elements,
        operators={f"{domain}:{name}": count for (domain, name), count in sorted(walk.operators.items())},
        external=tuple(sorted(weights.external)),
    )


def _domain(domain: str | bytes) -> str:
    return "" if domain == "ai.onnx" else text(domain)


def _functions(model: Any) -> dict[tuple[str, str], Any]:  # noqa: ANN401 -- onnx has no types
    if len(model.functions) > MAX_FUNCTIONS:
        raise VerificationError("functions", f"{len(model.functions)} functions, more than {MAX_FUNCTIONS}")
    functions = {(_domain(function.domain), text(function.name)): function for function in model.functions}
    if len(functions) != len(model.functions):
        raise VerificationError("functions", "two functions have one name")
    for (domain, name), function in functions.items():
        if domain in ALLOWED_DOMAINS or function.overload:
            raise VerificationError("functions", f"{domain or 'ai.onnx'}:{name[:80]} hides or overloads an operator")
        _opsets(function.opset_import, {domain for domain, _ in functions})
    return functions


def _opsets(imports: Sequence[Any], own_domains: set[str]) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = _domain(entry.domain)
        if domain in opsets:
            raise VerificationError("opset", f"domain {domain[:80]!r} is imported twice")
        opsets[domain] = entry.version
        if domain not in ALLOWED_DOMAINS | own_domains:
            # Exporters list domains that they then don't use; a node that uses one fails the check "operator".
            continue
        if not 1 <= entry.version <= MAX_OPSET.get(domain, entry.version):
            raise VerificationError("opset", f"version {entry.version} of {domain or 'ai.onnx'} is not known")
    return opsets


def _inlined(calls: Counter[tuple[str, str]], bodies: Mapping[Any, Counter[Any]]) -> int:
    """Count nodes with every call of a function replaced by its body."""
    known: dict[Any, int] = {}

    def size(key: Any, path: tuple[Any, ...]) -> int:  # noqa: ANN401 -- (domain, name)
        if key not in bodies:
            return 1
        if key in path:
            raise VerificationError("functions", f"{key[1][:80]} calls itself")
        if key not in known:
            if len(path) > MAX_DEPTH:
                raise VerificationError("functions", f"calls are nested deeper than {MAX_DEPTH}")
            known[key] = sum(count * size(callee, (*path, key)) for callee, count in bodies[key].items())
        return known[key]

    total = sum(count * size(key, ()) for key, count in calls.items())
    if total > MAX_NODES:
        raise VerificationError("node-count", f"the functions stand for {total} nodes, more than {MAX_NODES}")
    return total


class _Walk:
    """Visits every node and tensor once and counts."""

    def __init__(self, functions: Any, weights: Weights) -> None:  # noqa: ANN401 -- a set of (domain, name)
        self.operators: Counter[tuple[str, str]] = Counter()
        self._functions = functions
        self._weights = weights
        self._count = 0

    def graph(self, graph: Any, depth: int) -> Counter[tuple[str, str]]:  # noqa: ANN401 -- onnx has no types
        """Check a graph; returns how often each operator or function stands in it, subgraphs included."""
        if depth > MAX_DEPTH:
            raise VerificationError("depth", f"subgraphs are nested deeper than {MAX_DEPTH}")
        for tensor in graph.initializer:
            self._weights.check(tensor, may_be_external=True)
        for sparse in graph.sparse_initializer:
            self._weights.check_sparse(sparse)
        return self.nodes(graph.node, depth)

    def nodes(self, nodes: Sequence[Any], depth: int) -> Counter[tuple[str, str]]:
        self._count += len(nodes)
        if self._count > MAX_NODES:
            raise VerificationError("node-count", f"{self._count} nodes or more, the limit is {MAX_NODES}")
        calls: Counter[tuple[str, str]] = Counter()
        for node in nodes:
            calls.update(self._node(node, depth))
        return calls

    def _node(self, node: Any, depth: int) -> Counter[tuple[str, str]]:  # noqa: ANN401 -- onnx has no types
        key = (_domain(node.domain), text(node.op_type))
        if node.overload or (key not in ALLOWED_OPERATORS and key not in self._functions):
            raise VerificationError("operator", f"{key[0][:80] or 'ai.onnx'}:{key[1][:80]} is not allowed")
        if max(len(node.input), len(node.output)) > MAX_OPERANDS:
            raise VerificationError("operands", f"a node has more than {MAX_OPERANDS} inputs or outputs")
        if any(len(name) > MAX_NAME_BYTES for name in (node.name, *node.input, *node.output)):
            raise VerificationError("name-length", f"a name is longer than {MAX_NAME_BYTES}")
        if len(node.attribute) > MAX_ATTRIBUTES:
            raise VerificationError("attributes", f"a node has more than {MAX_ATTRIBUTES} attributes")
        self.operators[key] += 1
        calls = Counter([key])
        for attribute in node.attribute:
            calls.update(self._attribute(attribute, depth))
        return calls

    def _attribute(self, attribute: Any, depth: int) -> Counter[tuple[str, str]]:  # noqa: ANN401 -- onnx has no types
        values = (attribute.ints, attribute.floats, attribute.strings, attribute.tensors, attribute.graphs)
        if max(map(len, values)) > MAX_ATTRIBUTE_VALUES:
            raise VerificationError("attributes", f"{attribute.name[:80]} has more than {MAX_ATTRIBUTE_VALUES} values")
        if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                self._weights.check_sparse(sparse)
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            self._weights.check(tensor, may_be_external=False)
        calls: Counter[tuple[str, str]] = Counter()
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            calls.update(self.graph(graph, depth + 1))
        return calls


def graph_specs(model: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:  # noqa: ANN401 -- onnx has no types
    """Return a model's inputs (without those that an initializer fills) and outputs.

    Raises:
        VerificationError: ``model-inputs`` or ``model-outputs``, for one that is no tensor of a served datatype.
    """
    filled = {tensor.name for tensor in model.graph.initializer}
    filled |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    inputs = tuple(_spec("model-inputs", info) for info in model.graph.input if info.name not in filled)
    return inputs, tuple(_spec("model-outputs", info) for info in model.graph.output)


def _spec(check: str, info: Any) -> TensorSpec:  # noqa: ANN401 -- onnx has no types
    kind = info.type.tensor_type
    datatype = _DATATYPES.get(kind.elem_type)
    if not info.type.HasField("tensor_type") or datatype is None or not kind.HasField("shape"):
        raise VerificationError(check, f"{info.name[:80]!r} must be a tensor of a served datatype with a known rank")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else -1 for dim in kind.shape.dim)
    return TensorSpec(text(info.name), datatype, shape)


def _check_interface(check: str, graph: Sequence[TensorSpec], stated: Sequence[TensorSpec], *, whole: bool) -> None:
    offered = {spec.name: spec for spec in graph}
    if len(offered) != len(graph):
        raise VerificationError(check, "the graph has a name twice")
    missing = offered.keys() - {spec.name for spec in stated} if whole else ()
    for name in sorted(missing):
        raise VerificationError(check, f"the graph has {name[:80]!r}, the manifest has not")
    for spec in stated:
        real = offered.get(spec.name)
        if real is None:
            raise VerificationError(check, f"the manifest has {spec.name!r}, the graph has not")
        fits = len(real.shape) == len(spec.shape) and all(
            have in {-1, want} for have, want in zip(real.shape, spec.shape, strict=True)
        )
        if real.datatype != spec.datatype or not fits:
            raise VerificationError(
                check,
                f"{spec.name}: the graph has {real.datatype} {list(real.shape)}, "
                f"the manifest {spec.datatype} {list(spec.shape)}",
            )
