"""The ``embedded`` engine: Regorus, in this process. The only door to it.

Rules:

1. Before a module is parsed, its brackets are counted: Regorus doubles its time with each level of ``[`` and ``{``
   (8 ms at depth 8, 36 at 10, 122 at 12, seconds at 16 for twenty bytes of source).
2. A module is refused that calls what neither the bundle nor the engine defines, by name: Regorus would find out only when a
   decision gets there. ``http.send`` counts as lacking, and raises should it be called all the same.
3. Data that overlaps a package is refused: it would override the package's rules.
4. Packages stand inside the manifest's roots.
5. One ``clone()`` for each decision, of an engine that has analysed its modules already; an input that is not JSON aborts it. The
   answer is read from ``eval_rule_as_json``, where ``"<undefined>"`` is undefined (a query would analyse every module again), or, where the
   decision is assembled from partial rules, from ``eval_query_as_json``, where ``{}`` is. Builtin errors are strict: the binding knows no
   other way. Its bytecode machine (RVM) is not used.

An evaluation may loop for ever, overflow the stack or take all memory: run this in a policy worker only.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Never

import msgspec
import regorus

from agent.errors import PolicyError
from agent.policy.bundle import Bundle, covers
from agent.policy.engine import DECISION_QUERY, undefined
from agent.policy.reads import request_reads
from agent.policy.source import bracket_depth

__all__ = ["MAX_BRACKET_DEPTH", "EmbeddedEngine"]

MAX_BRACKET_DEPTH = 10
_MAX_ERROR_CHARS = 400
_UNDEFINED = '"<undefined>"'
_NO_RULE = "not a valid rule path"
_WHERE = re.compile(r"--> (?P<file>[^\n]*):(?P<line>\d+):\d+\n.*?^error: (?P<text>.*)", re.DOTALL | re.MULTILINE)
_LACKING = frozenset({"http.send"})
_STATEMENTS = frozenset({"print"})  # not among the engine's builtins; its output is dropped


class _Expression(msgspec.Struct, frozen=True):
    value: msgspec.Raw


class _Row(msgspec.Struct, frozen=True):
    expressions: tuple[_Expression, ...]


class _Result(msgspec.Struct, frozen=True):
    result: tuple[_Row, ...] = ()


_RESULT = msgspec.json.Decoder(_Result)


class EmbeddedEngine:
    """Regorus with one bundle loaded.

    Args:
        bundle: what to evaluate.

    Raises:
        PolicyError: the bundle is refused by rules 1 to 4, or does not parse.
    """

    def __init__(self, bundle: Bundle) -> None:
        # 1. Nothing that takes the parser for ever.
        for path, source in bundle.modules.items():
            if (depth := bracket_depth(source)) > MAX_BRACKET_DEPTH:
                raise PolicyError(f"{path}: brackets are nested {depth} deep, over {MAX_BRACKET_DEPTH}")
        engine = regorus.Engine()
        engine.set_gather_prints(True)
        engine.add_extension("http.send", 1, _refuse_http)
        try:
            for path, source in bundle.modules.items():
                engine.add_policy(path, source)
            engine.add_data_json(json.dumps(bundle.data))
            modules = json.loads(engine.get_ast_as_json())
            engine.eval_query_as_json("true")  # clones inherit the analysis that this makes
        except (RuntimeError, ValueError) as error:
            raise _explained("the bundle does not load", error) from error
        # 2. Nothing that the engine lacks.
        called = _check_calls(modules, _builtins())
        self.request_reads: tuple[str, ...] | None = request_reads(modules, called)
        self._packages = {
            tuple(_parts(module["ast"]["package"]["refr"])): module["source"]["file"] for module in modules
        }
        for package, path in self._packages.items():
            name = "/".join(package)
            # 3. Rules and data apart.
            if _overlaps(bundle.data, package):
                raise PolicyError(f"{path}: the bundle has data at {name}, which would override the package's rules")
            # 4. Inside the roots.
            if not any(covers(root, name) for root in bundle.roots):
                raise PolicyError(f"{path}: the package {name} is outside the roots {list(bundle.roots)}")
        self._engine = engine
        self._is_rule = _is_rule(engine)

    def evaluate(self, input_json: bytes) -> bytes:
        """See :meth:`agent.policy.engine.Engine.evaluate`."""
        if self._is_rule:
            value = self._ask(regorus.Engine.eval_rule_as_json, DECISION_QUERY, input_json)
            if value == _UNDEFINED:
                raise undefined(DECISION_QUERY)
            return value.encode()
        rows = _RESULT.decode(self._query(DECISION_QUERY, input_json)).result
        if not rows:
            raise undefined(DECISION_QUERY)
        return bytes(rows[0].expressions[0].value)

    def check(self) -> None:
        """See :meth:`agent.policy.engine.Engine.check`."""
        for package in self._packages:
            self._query("data" + "".join(f"[{json.dumps(part)}]" for part in package), b"{}")

    def _query(self, query: str, input_json: bytes) -> str:
        return self._ask(regorus.Engine.eval_query_as_json, query, input_json)

    def _ask(self, method: Callable[[Any, str], str], what: str, input_json: bytes) -> str:
        engine = self._engine.clone()
        try:
            engine.set_input_json(input_json.decode())
            return method(engine, what)
        except (RuntimeError, ValueError) as error:
            raise _explained(what, error) from error


def _is_rule(engine: Any) -> bool:  # noqa: ANN401 -- the binding has no types
    """Say whether the decision is one rule; partial rules below its name, or none at all, are no rule to the engine."""
    try:
        engine.clone().eval_rule_as_json(DECISION_QUERY)
    except RuntimeError as error:
        return _NO_RULE not in str(error)
    return True


def _refuse_http(_request: object) -> Never:
    raise PolicyError("http.send: a policy opens no connection")


def _explained(what: str, error: Exception) -> PolicyError:
    """Shorten Regorus' error, which carries source lines and a stack trace, to place and words."""
    text = str(error).split("\n\nStack backtrace", 1)[0].strip()
    if found := _WHERE.search(text):
        text = f"{found['file']}:{found['line']}: {found['text'].strip()}"
    return PolicyError(f"{what}: {text[:_MAX_ERROR_CHARS]}")


def _builtins() -> frozenset[str]:
    answer = json.loads(regorus.Engine().eval_query_as_json("opa.runtime().builtins"))
    names = answer["result"][0]["expressions"][0]["value"]
    return frozenset(names) - _LACKING | _STATEMENTS


def _check_calls(modules: Sequence[Mapping[str, Any]], builtins: frozenset[str]) -> frozenset[str]:
    """Return the builtins that are called."""
    called = set()
    defined = {f"{_package(module)}.{name}" for module in modules for name in _functions(module["ast"])}
    for module in modules:
        aliases = dict(_imports(module))
        for name in _calls(module["ast"]["rules"]):
            first, _, rest = name.partition(".")
            full = f"{aliases[first]}.{rest}" if first in aliases else name
            if {full, f"{_package(module)}.{name}"} & defined:
                continue
            called.add(name)
            if name not in builtins:
                file = module["source"]["file"]
                raise PolicyError(f"{file}: the function {name} is neither in the bundle nor in the embedded engine")
    return frozenset(called)


def _package(module: Mapping[str, Any]) -> str:
    return f"data.{_dotted(module['ast']['package']['refr'])}"


def _functions(ast: Mapping[str, Any]) -> Iterator[str]:
    for rule in ast["rules"]:
        if head := rule.get("Spec", {}).get("head", {}).get("Func"):
            yield _dotted(head["refr"])


def _imports(module: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    source = module["source"]["contents"].encode()
    for entry in module["ast"]["imports"]:
        parts = _parts(entry["refr"])
        alias = entry.get("as")  # only its place in the source is given
        yield source[alias["start"] : alias["end"]].decode() if alias else parts[-1], ".".join(parts)


def _calls(node: Any) -> Iterator[str]:  # noqa: ANN401 -- any node of a JSON tree
    if isinstance(node, dict):
        for kind, value in node.items():
            if kind == "Call":
                yield _dotted(value["fcn"])
            yield from _calls(value)
    elif isinstance(node, list):
        for value in node:
            yield from _calls(value)


def _dotted(reference: Mapping[str, Any]) -> str:
    return ".".join(_parts(reference))


def _parts(reference: Mapping[str, Any]) -> list[str]:
    """Return the path of a reference node; what is no constant in it gives a part that no name can have."""
    ((kind, node),) = reference.items()
    match kind:
        case "RefDot":
            return [*_parts(node["refr"]), node["field"][-1]]
        case "RefBrack":
            return [*_parts(node["refr"]), *(_parts(node["index"]))]
        case "Var" | "String":
            return [node["value"]]
        case _:
            return ["[]"]


def _overlaps(data: Any, package: Sequence[str]) -> bool:  # noqa: ANN401 -- a JSON tree
    """Say whether data gives a value at or below a package's path, or a scalar above it."""
    for part in package:
        if not isinstance(data, dict):
            return True
        if part not in data:
            return False
        data = data[part]
    return True
