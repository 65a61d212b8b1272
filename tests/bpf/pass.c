// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* Passes everything. The peer of a veth whose XDP program transmits (XDP_TX) needs a native program, any one:
 * without it the kernel does not set up the peer's receive ring, and what was transmitted vanishes. */

#define SEC(name) __attribute__((section(name), used))

struct xdp_md;

SEC("xdp")
int pass(struct xdp_md *packet)
{
	(void)packet;
	return 2; /* XDP_PASS */
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
