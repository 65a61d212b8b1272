/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The checks that daisy_shared::wire::fast makes. */
#pragma once

#include "headers.h"
#include "maps.h"

/* Where the GUE header starts. */
#define GUE_AT (ETHERNET_LEN + OUTER_LEN)
_Static_assert(OUTER_LEN == IPV4_LEN + UDP_LEN, "outer headers");

INLINE void copy_ethernet(void *to, const void *from)
{
	__u64 first = *(const __u64 *)from;
	__u32 second = *(const __u32 *)(from + 8);
	__u16 third = *(const __u16 *)(from + 12);

	*(__u64 *)to = first;
	*(__u32 *)(to + 8) = second;
	*(__u16 *)(to + 12) = third;
}

INLINE void put_ipv4(void *to, const __u32 words[IPV4_LEN / 4])
{
	__u32 i;

#pragma unroll
	for (i = 0; i < IPV4_LEN / 4; i++)
		((__u32 *)to)[i] = words[i];
}

/* A link-layer address. */
INLINE void copy_address(void *to, const void *from)
{
	*(__u32 *)to = *(const __u32 *)from;
	*(__u16 *)(to + 4) = *(const __u16 *)(from + 4);
}

/* A whole TCP segment over IPv4, or what it takes to say that there is no service for it. */
struct inner {
	const struct ipv4 *ip;
	const struct tcp *tcp;
	/* Of the IPv4 header, in bytes. */
	__u32 header_len;
	__u32 is_syn;
};

/*
 * daisy_shared::wire::fast::parse_ipv4 for the `len` bytes at `ip`. Returns 0, or the counter of the reason to
 * drop. UDP is checked, and then has no service: services are TCP.
 */
INLINE __u32 parse_inner(struct inner *inner, const struct ipv4 *ip, __u32 len, const void *end)
{
	const void *transport;
	__u32 header_len, ip_len, transport_len, i;
	__u64 sum;

	if (len < IPV4_LEN || (const void *)(ip + 1) > end)
		return DROP_TRUNCATED;
	header_len = (ip->version_ihl & 0x0f) * 4;
	ip_len = bpf_ntohs(ip->len);
	if (ip->version_ihl >> 4 != 4 || header_len < IPV4_LEN || ip_len < header_len)
		return DROP_BAD_IP_HEADER;
	if (ip_len > len)
		return DROP_TRUNCATED;
	sum = sum_ipv4(ip);
	if (header_len > IPV4_LEN) {
		const __u32 *option = (const void *)(ip + 1);
		__u32 words = (header_len - IPV4_LEN) / 4;

		/* Keeps what the loop finds out of `header_len`, or the verifier would follow each length by itself. */
		asm volatile("" : "+r"(words));
		for (i = 0; i < 10 && i < words; i++, option++) {
			const void *behind = option + 1;

			/* Keeps the compiler from comparing with `end` + 1 instead, which the verifier refuses. */
			asm volatile("" : "+r"(behind));
			if (behind > end)
				return DROP_TRUNCATED;
			sum += *option;
		}
	}
	if (fold(sum) != 0xffff)
		return DROP_BAD_IP_CHECKSUM;
	if (ip->fragment & bpf_htons(0x3fff))
		return DROP_FRAGMENT;

	transport = (const void *)ip + header_len;
	transport_len = ip_len - header_len;
	if (ip->protocol == PROTOCOL_TCP) {
		const struct tcp *tcp = transport;
		__u32 data_offset;

		if (transport_len < TCP_LEN || (const void *)(tcp + 1) > end)
			return DROP_BAD_TRANSPORT_HEADER;
		data_offset = (tcp->data_offset >> 4) * 4;
		if (data_offset < TCP_LEN || data_offset > transport_len)
			return DROP_BAD_TRANSPORT_HEADER;
		inner->ip = ip;
		inner->tcp = tcp;
		inner->header_len = header_len;
		inner->is_syn = (tcp->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
		return 0;
	}
	if (ip->protocol == PROTOCOL_UDP) {
		const struct udp *udp = transport;
		__u32 udp_len;

		if (transport_len < UDP_LEN || (const void *)(udp + 1) > end)
			return DROP_BAD_TRANSPORT_HEADER;
		udp_len = bpf_ntohs(udp->len);
		if (udp_len < UDP_LEN || udp_len > transport_len)
			return DROP_BAD_TRANSPORT_HEADER;
	}
	return DROP_UNKNOWN_SERVICE;
}
