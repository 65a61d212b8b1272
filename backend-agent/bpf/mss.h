/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * `daisy_mss` (tc egress) lowers the MSS that a service's SYN-ACK offers, so that what the client sends still fits
 * the link with the longest outer headers around it.
 */
#pragma once

#include <linux/pkt_cls.h>

#include "packet.h"

#define TCP_OPTION_END 0
#define TCP_OPTION_NOP 1
#define TCP_OPTION_MSS 2
#define TCP_OPTION_MSS_LEN 4
/* Servers put the MSS first; behind so many others it is not looked for. */
#define TCP_OPTIONS_MAX 12

/* Where the options of the TCP header at `at` hold an MSS, or 0. */
INLINE __u32 find_mss(struct __sk_buff *skb, __u32 at, __u32 header_len)
{
	__u32 offset = TCP_LEN, i;

	for (i = 0; i < TCP_OPTIONS_MAX; i++) {
		__u8 option[2] = {};

		if (offset + TCP_OPTION_MSS_LEN > header_len)
			break;
		if (bpf_skb_load_bytes(skb, at + offset, option, sizeof(option)))
			break;
		if (option[0] == TCP_OPTION_END)
			break;
		if (option[0] == TCP_OPTION_NOP) {
			offset++;
			continue;
		}
		if (option[0] == TCP_OPTION_MSS && option[1] == TCP_OPTION_MSS_LEN)
			return offset;
		if (option[1] < 2)
			break;
		offset += option[1];
	}
	return 0;
}

SEC("classifier")
int daisy_mss(struct __sk_buff *skb)
{
	struct service_key service_key = { .protocol = PROTOCOL_TCP };
	struct ipv4 ip;
	struct tcp tcp;
	struct link *config;
	__u32 tcp_at, offset, zero = 0;
	__be16 old, new;

	if (skb->protocol != bpf_htons(ETHERTYPE_IPV4) || bpf_skb_load_bytes(skb, ETHERNET_LEN, &ip, sizeof(ip)) ||
	    ip.version_ihl >> 4 != 4 || ip.protocol != PROTOCOL_TCP || (ip.fragment & bpf_htons(0x1fff)))
		return TC_ACT_UNSPEC;
	tcp_at = ETHERNET_LEN + (ip.version_ihl & 0x0f) * 4;
	if (bpf_skb_load_bytes(skb, tcp_at, &tcp, sizeof(tcp)) ||
	    (tcp.flags & (TCP_SYN | TCP_ACK)) != (TCP_SYN | TCP_ACK))
		return TC_ACT_UNSPEC;
	service_key.vip = ip.source;
	service_key.port = tcp.source;
	config = bpf_map_lookup_elem(&link, &zero);
	if (!config || !bpf_map_lookup_elem(&services, &service_key))
		return TC_ACT_UNSPEC;

	offset = find_mss(skb, tcp_at, (tcp.data_offset >> 4) * 4);
	if (!offset || bpf_skb_load_bytes(skb, tcp_at + offset + 2, &old, sizeof(old)) ||
	    bpf_ntohs(old) <= config->max_mss)
		return TC_ACT_UNSPEC;
	new = bpf_htons(config->max_mss);
	if (bpf_skb_store_bytes(skb, tcp_at + offset + 2, &new, sizeof(new), 0))
		return TC_ACT_UNSPEC;
	/* At an odd offset the value straddles two words of the sum. */
	if (offset & 1) {
		old = __builtin_bswap16(old);
		new = __builtin_bswap16(new);
	}
	/* Leaves a sum alone that the device is yet to fill in: its seed covers the pseudo-header only. */
	bpf_l4_csum_replace(skb, tcp_at + __builtin_offsetof(struct tcp, checksum), old, new, sizeof(new));
	return TC_ACT_UNSPEC;
}
