// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Hands packets for services to the mux's AF_XDP sockets and leaves everything else (ARP, ICMP, BGP, SSH, answers
 * to the mux's own probes) to the kernel.
 *
 * Taken are IPv4 packets, with up to two VLAN tags before them, that are addressed to this station and, by address,
 * protocol and port, to a service, and fragments for a service's address, which the mux counts and drops. Whatever is
 * malformed is the kernel's.
 */
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Fields in network byte order. A protocol of 0 stands for fragments to the address. */
struct service {
	__be32 address;
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, struct service);
	__type(value, __u8);
} services SEC(".maps");

/* The station's Ethernet address, and two bytes of 0. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} station SEC(".maps");

/* The sockets, by receive queue. The loader sets the number of queues. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

struct vlan_tag {
	__be16 contents;
	__be16 next; /* the EtherType of what follows */
};

#define MAX_TAGS 2
#define FRAGMENT_BITS 0x3fff /* more fragments, and the offset */

SEC("xdp")
int daisy_filter(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct vlan_tag *tag = (void *)(eth + 1);

	if ((void *)tag > end)
		return XDP_PASS;
	__be16 kind = eth->h_proto;
#pragma unroll
	for (int i = 0; i < MAX_TAGS; i++) {
		if (kind != bpf_htons(ETH_P_8021Q) && kind != bpf_htons(ETH_P_8021AD))
			break;
		if ((void *)(tag + 1) > end)
			return XDP_PASS;
		kind = tag->next;
		tag++;
	}
	struct iphdr *ip = (void *)tag;
	if ((void *)(ip + 1) > end || kind != bpf_htons(ETH_P_IP))
		return XDP_PASS;

	__u32 zero = 0;
	__be16 *mac = bpf_map_lookup_elem(&station, &zero);
	__be16 *to = (__be16 *)eth->h_dest;
	/* Not memcmp: clang calls a function, which there is not. */
	if (!mac || to[0] != mac[0] || to[1] != mac[1] || to[2] != mac[2])
		return XDP_PASS;

	struct service key = { .address = ip->daddr };
	if (!(ip->frag_off & bpf_htons(FRAGMENT_BITS))) {
		if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
			return XDP_PASS;
		__be16 *ports = (void *)ip + ip->ihl * 4;
		if (ip->ihl < 5 || (void *)(ports + 2) > end)
			return XDP_PASS;
		key.port = ports[1];
		key.protocol = ip->protocol;
	}
	if (!bpf_map_lookup_elem(&services, &key))
		return XDP_PASS;
	/* A queue without a socket: the kernel drops what it does not own, and counts it. */
	return bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
