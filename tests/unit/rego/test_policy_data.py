"""The shipped policy data: in the shape that its schemas say, complete, and with no name that leads nowhere."""

import ipaddress
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from bench.realistic_policy import realistic_data
from tests.support.rego import POLICIES, policy_data

AREAS = sorted(path.parent.name for path in POLICIES.glob("*/data.yaml"))


def schema_of(area: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((POLICIES / area / "schema.json").read_text())
    return schema


@pytest.fixture(scope="module", params=["shipped", "realistic"])
def data(request) -> dict[str, Any]:
    return policy_data() if request.param == "shipped" else realistic_data(seed=7)


@pytest.mark.parametrize("area", AREAS)
def test_data_is_valid(area, data):
    """Each area's data is valid against the schema beside it."""
    jsonschema.Draft202012Validator(schema_of(area)).validate(data[area])


def test_areas_are_the_roots_of_the_bundle():
    """The manifest claims exactly the areas that are there, each with a schema."""
    roots = json.loads((POLICIES / ".manifest").read_text())["roots"]
    assert sorted(roots) == AREAS
    assert all((POLICIES / area / "schema.json").is_file() for area in AREAS)


@pytest.mark.parametrize("area", AREAS)
def test_schemas_are_schemas(area):
    """Each schema is a valid JSON Schema of draft 2020-12."""
    schema = schema_of(area)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and every schema within it."""
    yield schema
    for container in ("properties", "patternProperties", "$defs"):
        for inner in schema.get(container, {}).values():
            yield from subschemas(inner)
    for single in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(single), dict):
            yield from subschemas(schema[single])
    for inner in schema.get("oneOf", []):
        yield from subschemas(inner)


@pytest.mark.parametrize("area", AREAS)
def test_schemas_describe_every_member_and_allow_no_other(area):
    """A misspelt member is an error, and a reader finds each member explained."""
    for schema in subschemas(schema_of(area)):
        assert "description" in schema or set(schema) == {"$ref"}, schema
        if schema.get("type") == "object":
            assert "additionalProperties" in schema, schema
            assert schema["additionalProperties"] is not True


@pytest.mark.parametrize(
    ("area", "path", "value"),
    [
        ("roles", ["definitions", "operator", "grants", "infer", "models"], []),
        ("roles", ["definitions", "operator", "grants", "infer", "model"], ["*"]),
        ("roles", ["definitions", "operator", "grants", "delete"], {}),
        ("roles", ["bindings", "subjects", "x509"], {}),
        ("roles", ["suspended", "mtls"], {"press-7": False}),
        ("models", ["unlisted"], "maybe"),
        ("models", ["defaults", "signers"], "any"),
        ("models", ["models", "m"], {"sensitivity": "secret"}),
        ("models", ["sensitivity", "public", "rank"], "0"),
        ("limits", ["limits", "standard", "max_bytes"], None),
        ("limits", ["limits", "standard", "max_batch"], 0),
        ("sanitizers", ["profiles", "none", "steps"], [{"step": "jpeg"}]),
        ("sanitizers", ["profiles", "none", "steps"], [{"step": "jpeg", "quality": 75, "quality_min": 60}]),
        ("sanitizers", ["profiles", "none", "steps"], [{"step": "blur"}]),
        ("outputs", ["profiles", "full", "top_k"], 0),
        ("network", ["default", "allow"], ["10.0.0.0"]),
        ("network", ["default", "deny"], None),
        ("network", ["actions", "load"], {"allow": [], "deny": []}),
        ("node", ["enrolled"], "false"),
        ("node", ["serves", "contraindicated"], "public"),
        ("windows", ["definitions", "w"], {"days": ["Monday"], "from": "6:00", "to": "18:00"}),
        ("windows", ["definitions", "w"], {"days": [], "from": "06:00", "to": "18:00"}),
    ],
)
def test_schemas_refuse_mistakes(area, path, value):
    """What a rule would read otherwise than its author meant is refused before activation."""
    document: Any = policy_data()[area]
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert not jsonschema.Draft202012Validator(schema_of(area)).is_valid(document)


def test_networks_are_networks(data):
    """Each network parses as written, without host bits: a malformed one would be an error at each decision."""
    for networks in [data["network"]["default"], *data["network"]["actions"].values()]:
        for cidr in networks["allow"] + networks["deny"]:
            ipaddress.ip_network(cidr)


def test_names_lead_somewhere(data):
    """Each profile, limit, role and window that data names is defined."""
    limits = set(data["limits"]["limits"])
    roles = set(data["roles"]["definitions"])
    windows = set(data["windows"]["definitions"])
    models = data["models"]["models"].values()
    levels = data["models"]["sensitivity"].values()
    assert {model["sanitizer"] for model in models if "sanitizer" in model} <= set(data["sanitizers"]["profiles"])
    assert {entry["output"] for entry in [*models, *levels] if "output" in entry} <= set(data["outputs"]["profiles"])
    assert {role for model in models for role in model.get("roles", [])} <= roles
    assert {model["limit"] for model in models if "limit" in model} <= limits
    assert {data["limits"]["default"], *data["limits"]["roles"].values()} <= limits
    assert {limit for subjects in data["limits"]["subjects"].values() for limit in subjects.values()} <= limits
    assert {
        role for kind in data["roles"]["bindings"]["subjects"].values() for held in kind.values() for role in held
    } <= roles
    assert {
        role for claim in data["roles"]["bindings"]["claims"].values() for held in claim.values() for role in held
    } <= roles
    assert set(data["windows"]["roles"]) <= roles
    assert {
        name for bound in ("roles", "models") for held in data["windows"][bound].values() for name in held
    } <= windows
