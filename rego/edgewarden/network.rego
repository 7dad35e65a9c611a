# METADATA
# title: Network
# description: |
#   1. A peer's address must be in an allowed network of the action, and in no denied one. Denied networks win.
#   2. The address is one IPv4 or IPv6 address. Anything else is refused before it is compared: the engines differ in
#      what they make of it. So is an IPv4 address in IPv6 clothes (RFC 4291, 2.5.5.2), which one engine would match
#      with IPv4 networks and the other not; the gateway states it as IPv4.
#   3. A local subject (kind `unix`) has no address.
package edgewarden.network

ok if {
	input.subject.kind == "unix"
} else if {
	networks := rules(data.network)
	denied := networks.deny
	is_address(input.request.source_ip)
	within(networks.allow, input.request.source_ip)
	not within(denied, input.request.source_ip)
}

rules(policy) := value if {
	value := policy.actions[input.action]
} else := value if {
	data.edgewarden.rbac.administers
	value := policy.actions["admin.*"]
} else := policy["default"]

is_address(address) if {
	is_string(address)
	net.cidr_is_valid(concat("/", [address, "32"]))
	not mapped(address)
}

mapped(address) if {
	contains(address, ":")
	net.cidr_contains("::ffff:0:0/96", address)
}

within(networks, address) if {
	some cidr in networks
	net.cidr_contains(cidr, address)
}

reasons contains "source_not_allowed" if not ok
