package edgewarden.network_test

import data.edgewarden.fixtures
import data.edgewarden.network

from(address) := fixtures.set(fixtures.infer, "/request/source_ip", address)

test_loopback_and_private_networks_are_allowed if {
	every address in ["127.0.0.1", "10.0.0.1", "172.31.255.254", "192.168.1.1", "::1", "fd00::1", "fe80::1", "FD00::1"] {
		network.ok with input as from(address)
	}
}

test_other_networks_are_not if {
	every address in ["8.8.8.8", "172.32.0.1", "192.169.0.1", "11.0.0.0", "::2", "2001:db8::1", "0.0.0.0", "::"] {
		network.reasons == {"source_not_allowed"} with input as from(address)
	}
}

test_what_is_no_address_is_not_allowed if {
	every address in [
		"", " ", "10.0.0", "10.0.0.1:443", "10.0.0.1/8", "010.0.0.1", "10.0.0.256", "[::1]", "fe80::1%eth0",
		"localhost", "10.0.0.1 ", "0x0a.0.0.1", "167772161", "10.0.0.1\n", "١٠.0.0.1", null, 10, [], {},
	] {
		network.reasons == {"source_not_allowed"} with input as from(address)
	}
	network.reasons == {"source_not_allowed"} with input as fixtures.drop(fixtures.infer, "/request/source_ip")
}

test_an_ipv4_address_in_ipv6_clothes_is_not_allowed if {
	every address in ["::ffff:10.0.0.1", "::ffff:a00:1", "0:0:0:0:0:ffff:a00:1", "::FFFF:10.0.0.1"] {
		network.reasons == {"source_not_allowed"} with input as from(address)
		not network.ok with input as from(address) with data.network["default"].allow as ["::/0", "0.0.0.0/0"]
	}
}

test_a_denied_network_wins if {
	rules := {"allow": ["10.0.0.0/8", "fd00::/8"], "deny": ["10.20.0.0/16", "fd00:1::/32"]}
	network.ok with input as from("10.21.0.1") with data.network["default"] as rules
	not network.ok with input as from("10.20.1.7") with data.network["default"] as rules
	network.ok with input as from("fd00:2::1") with data.network["default"] as rules
	not network.ok with input as from("fd00:1::1") with data.network["default"] as rules
}

test_an_action_may_have_its_own_networks if {
	actions := {"infer": {"allow": ["192.168.0.0/24"], "deny": []}}
	not network.ok with input as fixtures.infer with data.network.actions as actions
	network.ok with input as from("192.168.0.9") with data.network.actions as actions
	network.ok with input as fixtures.metadata with data.network.actions as actions
}

test_admin_verbs_share_their_networks_unless_named if {
	actions := {
		"admin.*": {"allow": ["10.20.1.0/24"], "deny": []},
		"admin.model.install": {"allow": ["10.99.0.0/16"], "deny": []},
	}
	network.ok with input as fixtures.admin with data.network.actions as actions
	install := fixtures.set(fixtures.admin, "/action", "admin.model.install")
	not network.ok with input as install with data.network.actions as actions
	elsewhere := fixtures.set(fixtures.admin, "/request/source_ip", "10.20.2.1")
	not network.ok with input as elsewhere with data.network.actions as actions
}

test_an_empty_allowlist_allows_nobody if {
	not network.ok with input as fixtures.infer with data.network["default"].allow as []
}

test_a_local_subject_has_no_address if {
	network.ok with input as fixtures.load
}
