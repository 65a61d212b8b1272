// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The mux in the kernel: parse → service → keyed hash → bucket word → encapsulate → send. The same as
 * mux/src/pipeline.rs, byte for byte, to which mux/tests/xdp.rs holds it.
 *
 * Headers lie in the first buffer of a frame, as all drivers put them; what follows may lie in others.
 */
#include "maps.h"

#include "headers.h"
#include "siphash.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_PROVIDER_VLAN 0x88a8
#define VLAN_LEN 4
#define FRAGMENT_BITS 0x3fff /* more fragments, and the offset */

/* What stands before the inner packet, without Ethernet. */
#define IPIP_LEN IPV4_LEN
#define CLOSED_LEN (OUTER_LEN + GUE_BASE_LEN)
#define OPEN_LEN (CLOSED_LEN + GUE_WALK_BASE_LEN + 4)
_Static_assert(OUTER_LEN == IPV4_LEN + UDP_LEN, "outer headers");
_Static_assert(ETHERNET_LEN + CLOSED_LEN == 46, "in whole words but for 6 bytes");
_Static_assert(HEADER_WORDS == 6, "in whole words but for 6 bytes");

/* A little-endian word, whatever the host is. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define le32(x) (x)
#define MAC_MASK 0x0000ffffffffffffULL
#else
#define le32(x) __builtin_bswap32(x)
#define MAC_MASK 0xffffffffffff0000ULL
#endif

/* The walk of an open window, in front of whose owner it stands in the GUE header. */
struct walk {
	__u8 version_flags;
	__u8 hops;
	__u8 visited;
	__u8 owners;
	__be32 generation;
	__be32 owner;
} __attribute__((aligned(1)));

/* A TCP segment or UDP datagram. */
struct packet {
	/* The two words that are hashed; see daisy_shared::flow. */
	__u64 first;
	__u64 second;
	/* Of the IP packet. */
	__u32 len;
	__u32 tos;
};

INLINE const struct cell *find(const struct snapshot *snapshot, __u64 key)
{
	__u32 at = key * snapshot->multiplier >> CELL_SHIFT, i;

	for (i = 0; i < MAX_PROBES; i++, at++) {
		const struct cell *cell = &snapshot->cells[at % CELLS];

		if (likely(cell->key == key))
			return cell;
		if (!cell->key)
			return 0;
	}
	return 0;
}

/*
 * daisy_shared::wire::fast::parse_ipv4, for the packet behind `link_len` bytes. Returns 0, or what becomes of it;
 * fragments and malformed packets are dropped only if they are for a service's address.
 */
INLINE __u32 parse(struct xdp_md *ctx, const struct ipv4 *ip, const void *end, __u64 first_len, __u32 link_len,
		   struct packet *packet)
{
	const void *transport = ip + 1;
	__u32 header_len = IPV4_LEN, transport_len, ports;
	__u64 sum;

	if ((const void *)(ip + 1) > end)
		return DROP_TRUNCATED;
	packet->len = bpf_ntohs(ip->len);
	packet->tos = ip->tos;
	if (unlikely(ip->version_ihl != (4 << 4 | IPV4_LEN / 4))) {
		header_len = (ip->version_ihl & 0x0f) * 4;
		if (ip->version_ihl >> 4 != 4 || header_len < IPV4_LEN)
			return DROP_BAD_IP_HEADER;
	}
	if (packet->len < header_len)
		return DROP_BAD_IP_HEADER;
	if (unlikely(link_len + packet->len > first_len))
		if (link_len + packet->len > bpf_xdp_get_buff_len(ctx))
			return DROP_TRUNCATED;
	sum = sum_ipv4(ip);
	if (unlikely(header_len > IPV4_LEN)) {
		const __u32 *option = (const void *)(ip + 1);
		__u32 words = (header_len - IPV4_LEN) / 4, i;

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
		transport = (const void *)ip + header_len;
	}
	if (fold(sum) != 0xffff)
		return DROP_BAD_IP_CHECKSUM;
	if (ip->fragment & bpf_htons(FRAGMENT_BITS))
		return DROP_FRAGMENT;

	transport_len = packet->len - header_len;
	if (likely(ip->protocol == PROTOCOL_TCP)) {
		const struct tcp *tcp = transport;
		__u32 data_offset;

		if (transport_len < TCP_LEN || (const void *)(tcp + 1) > end)
			return DROP_BAD_TRANSPORT_HEADER;
		data_offset = (tcp->data_offset >> 4) * 4;
		if (data_offset < TCP_LEN || data_offset > transport_len)
			return DROP_BAD_TRANSPORT_HEADER;
	} else if (ip->protocol == PROTOCOL_UDP) {
		const struct udp *udp = transport;
		__u32 udp_len;

		if (transport_len < UDP_LEN || (const void *)(udp + 1) > end)
			return DROP_BAD_TRANSPORT_HEADER;
		udp_len = bpf_ntohs(udp->len);
		if (udp_len < UDP_LEN || udp_len > transport_len)
			return DROP_BAD_TRANSPORT_HEADER;
	} else {
		return PASSED;
	}
	ports = *(const __u32 *)transport;
	packet->first = (__u64)le32(ip->destination) << 32 | le32(ip->source);
	packet->second = (__u64)ip->protocol << 32 | le32(ports);
	return 0;
}

/* Why a packet is not forwarded that is malformed or a fragment: the host judges its own. */
INLINE __u32 refused(const struct snapshot *snapshot, const struct ipv4 *ip, const void *end, __u32 reason)
{
	if (reason != PASSED && (const void *)(ip + 1) <= end &&
	    (!ip->destination || !find(snapshot, le32(ip->destination))))
		return PASSED;
	return reason;
}

/* Decides about a frame and encapsulates it. Returns what became of it; if it is sent, `egress` is by where. */
INLINE __u32 forward(struct xdp_md *ctx, const struct snapshot *snapshot, __u32 ingress, __u32 *egress)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u64 first_len = end - data;
	struct ethernet *ethernet = data;
	__u64 mac, hash, generation;
	__u32 tags_len = 0, tags[2] = {}, reason, bucket, head, previous, outer_len, len;
	const struct template *template;
	const struct backend *backend;
	const struct cell *service;
	struct packet packet;
	__be32 owner = 0;
	__u64 *word;
	void *map;

	if (unlikely((void *)(ethernet + 1) > end))
		return DROP_TRUNCATED;
	/* A frame for another station (flooded by a switch, or broadcast) is another mux's, or nobody's. */
	mac = *(__u64 *)ethernet->destination & MAC_MASK;
	if (mac != snapshot->links[ingress % MAX_LINKS].mac)
		return PASSED;

	__be16 type = ethernet->type;
	if (unlikely(type != bpf_htons(ETHERTYPE_IPV4))) {
		__u32 i;

#pragma unroll
		for (i = 0; i < 2; i++) {
			struct {
				__be16 tci;
				__be16 type;
			} *tag = (void *)(ethernet + 1) + i * VLAN_LEN;

			if (type != bpf_htons(ETHERTYPE_VLAN) && type != bpf_htons(ETHERTYPE_PROVIDER_VLAN))
				break;
			if ((void *)(tag + 1) > end)
				return DROP_TRUNCATED;
			/* From the EtherType that announces it on. */
			tags[i] = *(__u32 *)((void *)tag - 2);
			type = tag->type;
			tags_len += VLAN_LEN;
		}
		if (type != bpf_htons(ETHERTYPE_IPV4))
			return PASSED;
	}
	struct ipv4 *ip = (void *)(ethernet + 1) + tags_len;

	reason = parse(ctx, ip, end, first_len, ETHERNET_LEN + tags_len, &packet);
	if (unlikely(reason))
		return refused(snapshot, ip, end, reason);
	service = find(snapshot, packet.second >> 16 << 32 | packet.first >> 32);
	if (!service)
		return PASSED;
	hash = siphash13(service->hash_key, packet.first, packet.second);

	map = bpf_map_lookup_elem(&tables, &service->table);
	if (!map)
		return DROP_NO_BACKEND;
	bucket = hash & service->mask;
	word = bpf_map_lookup_elem(map, &bucket);
	if (!word)
		return DROP_NO_BACKEND;
	generation = *(volatile __u64 *)word;
	head = generation >> 48;
	previous = generation >> 32 & NOBODY;
	if (unlikely(head == NOBODY))
		return DROP_NO_BACKEND;

	map = bpf_map_lookup_elem(&templates, &snapshot->templates);
	if (!map)
		return DROP_UNKNOWN_BACKEND;
	backend = bpf_map_lookup_elem(map, &head);
	if (!backend)
		return DROP_UNKNOWN_BACKEND;
	template = &backend->gue;
	outer_len = CLOSED_LEN;
	if (unlikely(previous != NOBODY)) {
		const struct backend *past = bpf_map_lookup_elem(map, &previous);

		/* Not sent without its walk. */
		if (!past || past->gue.reach == REACH_UNKNOWN)
			return DROP_UNKNOWN_BACKEND;
		owner = past->gue.address;
		outer_len = OPEN_LEN;
	} else if (service->is_ipip) {
		template = &backend->ipip;
		outer_len = IPIP_LEN;
	}
	if (unlikely(template->reach != REACH_RESOLVED))
		return template->reach == REACH_UNKNOWN ? DROP_UNKNOWN_BACKEND : DROP_NO_NEXT_HOP;
	len = outer_len + packet.len;
	if (unlikely(len > template->mtu))
		return DROP_TOO_BIG;
	*egress = template->egress;

	/* Ethernet pads short frames; the padding is not part of the packet. */
	__u32 frame_len = ETHERNET_LEN + tags_len + packet.len;
	if (unlikely(first_len != frame_len)) {
		int padding = bpf_xdp_get_buff_len(ctx) - frame_len;

		if (padding && bpf_xdp_adjust_tail(ctx, -padding))
			return DROP_NO_HEADROOM;
	}
	if (unlikely(bpf_xdp_adjust_head(ctx, -(int)outer_len)))
		return DROP_NO_HEADROOM;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	void *out = data + tags_len;
	struct ipv4 *outer = out + ETHERNET_LEN;
	struct udp *udp = (void *)(outer + 1);
	__u8 *gue = (void *)(udp + 1);
	__u64 *words = out;

	/* The inner packet is longer than what a closed window's headers are longer than IPIP's. */
	if (out + ETHERNET_LEN + CLOSED_LEN > end)
		return DROP_NO_HEADROOM;
	words[0] = template->headers[0];
	words[1] = template->headers[1];
	words[2] = template->headers[2];
	words[3] = template->headers[3];
	if (likely(outer_len != IPIP_LEN)) {
		words[4] = template->headers[4];
		*(__u32 *)&words[5] = template->headers[5];
		((__u16 *)&words[5])[2] = template->headers[5] >> 32;
		udp->source = bpf_htons(OUTER_SOURCE_PORTS | hash >> 50);
		udp->len = bpf_htons(len - IPV4_LEN);
		if (unlikely(outer_len == OPEN_LEN)) {
			struct walk *walk = (void *)gue + GUE_BASE_LEN;

			if ((void *)(walk + 1) > end)
				return DROP_NO_HEADROOM;
			gue[0] = (GUE_WALK_BASE_LEN + 4) / 4;
			walk->version_flags = GUE_WALK_VERSION << 4;
			walk->hops = 0;
			walk->visited = 0;
			walk->owners = 1;
			walk->generation = bpf_htonl((__u32)generation);
			walk->owner = owner;
		}
	} else {
		((__u16 *)&words[4])[0] = template->headers[4];
	}
	outer->tos = packet.tos;
	outer->len = bpf_htons(len);
	outer->checksum = ~fold((__u64)template->ip_sum + bpf_htons(packet.tos) + bpf_htons(len));
	if (unlikely(tags_len)) {
		/* The addresses come before the tags. */
		*(__u64 *)data = template->headers[0];
		((__u32 *)data)[2] = template->headers[1];
		((__u32 *)data)[3] = tags[0];
		if (tags_len > VLAN_LEN)
			((__u32 *)data)[4] = tags[1];
	}
	return outer_len == OPEN_LEN ? SENT_OPEN : SENT_CLOSED;
}

SEC("xdp.frags")
int daisy_mux(struct xdp_md *ctx)
{
	__u32 zero = 0, ingress, egress = 0, ifindex = ctx->ingress_ifindex, verdict;
	struct counters *counted = bpf_map_lookup_elem(&counters, &zero);
	struct snapshot *snapshot;
	void *map;

	map = bpf_map_lookup_elem(&snapshots, &zero);
	if (!counted || !map)
		return XDP_PASS;
	snapshot = bpf_map_lookup_elem(map, &zero);
	if (!snapshot)
		return XDP_PASS;
	for (ingress = 0; ingress < MAX_LINKS; ingress++)
		if (likely(snapshot->links[ingress].ifindex == ifindex))
			break;
	if (ingress == MAX_LINKS)
		return XDP_PASS;

	verdict = forward(ctx, snapshot, ingress, &egress);
	counted->count[verdict % COUNTERS]++;
	if (likely(verdict <= SENT_OPEN)) {
		if (likely(egress == ingress))
			return XDP_TX;
		return bpf_redirect_map(&ports, egress, XDP_DROP);
	}
	return verdict == PASSED ? XDP_PASS : XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
