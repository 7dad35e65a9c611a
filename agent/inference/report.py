"""What an inspector says to the agent.

These stand apart from the agent's side (:mod:`agent.inference.inspection`), so that the inspector does not load what starts processes.
"""

import msgspec

from agent.records import TensorSpec

__all__ = ["GateReport", "InspectionReport", "Refusal"]


class GateReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gate saw in a model that passed.

    Attributes:
        ir_version: of the ONNX format.
        opsets: domain to version; ``ai.onnx`` is the empty domain.
        nodes: of all graphs, with the functions' bodies in place of their calls.
        parameters: elements of all initializers.
        operators: ``domain:name`` to how often it stands in the file.
        external: files with external data.
    """

    ir_version: int
    opsets: dict[str, int]
    nodes: int
    parameters: int
    operators: dict[str, int]
    external: tuple[str, ...]


class InspectionReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="passed"):
    """A model that passed.

    Attributes:
        gate: what the structural gate saw; ``gate.external`` are the files that the session needs.
        outputs: names, datatypes and shapes that the trial run gave.
        load_us: time to make a session.
        run_us: time of the trial run, a cold one.
    """

    gate: GateReport
    outputs: tuple[TensorSpec, ...]
    load_us: int
    run_us: int


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """A model that did not pass: the first check that failed."""

    check: str
    message: str
