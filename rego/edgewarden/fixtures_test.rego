# METADATA
# title: Fixtures
# description: Requests that the shipped policy allows, one per action, and the means to change one member of them.
package edgewarden.fixtures

signer := "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a"

digest := "dbc1b4c900ffe48d575b5da5c638040125f65db0fe3e24494b76ea986457d986"

resource := {
	"model": "surface-defects",
	"version": "3",
	"digest": digest,
	"signer": signer,
	"measured": true,
	"sensitivity": "internal",
}

# 2026-03-03 is a Tuesday.
request := {
	"bytes": 4096,
	"batch": 1,
	"source_ip": "10.20.1.7",
	"rate": {"1s": 1, "60s": 20},
	"time": "2026-03-03T09:30:00.123456Z",
}

node := {"id": "edge-1", "trust": "unknown", "posture": {}}

infer := {
	"subject": {"id": "press-12", "kind": "mtls", "roles": ["operator"], "mfa": false, "claims": {}},
	"action": "infer",
	"resource": resource,
	"request": request,
	"node": node,
}

metadata := object.union(infer, {"action": "metadata"})

admin := {
	"subject": {"id": "ada", "kind": "mtls", "roles": ["admin"], "mfa": false, "claims": {}},
	"action": "admin.status",
	"request": request,
	"node": node,
}

load := {
	"subject": {"id": "edgewarden", "kind": "unix", "roles": ["node"]},
	"action": "load",
	"resource": resource,
	"request": {"time": "2026-03-03T09:30:00.123456Z"},
	"node": node,
}

unload := object.union(load, {"action": "unload"})

open := object.union(load, {"action": "open"})

# No shipped role may export; the tests grant it.
export := object.union(infer, {"action": "export"})

set(document, path, value) := json.patch(document, [{"op": "add", "path": path, "value": value}])

drop(document, path) := json.remove(document, [path])

# Overriding a member of `data` merges it into what is read of its parent. To take members away the area is replaced.
roles(definitions) := object.union(json.remove(data.roles, ["/definitions"]), {"definitions": definitions})

node_serving(states) := object.union(json.remove(data.node, ["/serves"]), {"serves": states})
