// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The mux in the kernel: parse → service → keyed hash → bucket word → encapsulate → send. The same as
 * mux/src/pipeline.rs, byte for byte, to which mux/tests/xdp.rs holds it.
 *
 * It is compiled twice. `plain` takes what nearly all packets are: TCP over IPv4 without options, tags and padding,
 * in one buffer, for a backend that can be reached. Whatever is not so it leaves, unchanged, to `any`, which takes
 * everything and finds out why.
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
#define VERSION_IHL (4 << 4 | IPV4_LEN / 4)
#define FRAGMENT_BITS 0x3fff /* more fragments, and the offset */

/* What stands before the inner packet, without Ethernet. */
#define IPIP_LEN IPV4_LEN
#define CLOSED_LEN (OUTER_LEN + GUE_BASE_LEN)
#define OPEN_LEN (CLOSED_LEN + GUE_WALK_BASE_LEN + 4)
_Static_assert(OUTER_LEN == IPV4_LEN + UDP_LEN, "outer headers");
_Static_assert(ETHERNET_LEN + CLOSED_LEN == 46, "in whole words but for 6 bytes");
_Static_assert(HEADER_WORDS == 6, "in whole words but for 6 bytes");

/* Not an outcome: left to `any`. */
#define UNUSUAL COUNTERS

/* A little-endian word, whatever the host is. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define le32(x) (x)
#define MAC_MASK 0x0000ffffffffffffULL
#else
#define le32(x) __builtin_bswap32(x)
#define MAC_MASK 0xffffffffffff0000ULL
#endif

/* The walk of an open window, with the one owner to visit. */
struct walk {
	__u8 version_flags;
	__u8 hops;
	__u8 visited;
	__u8 owners;
	__be32 generation;
	__be32 owner;
};
_Static_assert(sizeof(struct walk) == OPEN_LEN - CLOSED_LEN, "a walk");

/* A TCP segment or UDP datagram. */
struct packet {
	/* The two words that are hashed; see daisy_shared::flow. */
	__u64 first;
	__u64 second;
	/* Of the IP packet. */
	__u64 len;
	__u32 tos;
};

INLINE const struct cell *find(const struct snapshot *snapshot, __u64 key)
{
	__u64 at = key * snapshot->multiplier >> CELL_SHIFT, i;

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
INLINE __u32 parse(struct xdp_md *ctx, int plain, const struct ipv4 *ip, const void *end, __u64 first_len,
		   __u64 link_len, struct packet *packet)
{
	const void *transport = ip + 1;
	__u64 header_len = IPV4_LEN, transport_len, sum;
	__u32 ports;

	if ((const void *)(ip + 1) > end)
		return DROP_TRUNCATED;
	packet->len = bpf_ntohs(ip->len);
	packet->tos = ip->tos;
	if (plain) {
		if (ip->version_ihl != VERSION_IHL || link_len + packet->len != first_len)
			return UNUSUAL;
	} else {
		header_len = (ip->version_ihl & 0x0f) * 4;
		if (ip->version_ihl >> 4 != 4 || header_len < IPV4_LEN || packet->len < header_len)
			return DROP_BAD_IP_HEADER;
		if (link_len + packet->len > first_len && link_len + packet->len > bpf_xdp_get_buff_len(ctx))
			return DROP_TRUNCATED;
	}
	sum = sum_ipv4(ip);
	if (!plain && header_len > IPV4_LEN) {
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
	/* At most 15 words of 32 bits, so 36: after two folds a right sum is 0xffff and not a multiple of it. */
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	if (sum != 0xffff)
		return DROP_BAD_IP_CHECKSUM;
	if (ip->fragment & bpf_htons(FRAGMENT_BITS))
		return DROP_FRAGMENT;

	transport_len = packet->len - header_len;
	if (plain || ip->protocol == PROTOCOL_TCP) {
		const struct tcp *tcp = transport;
		__u64 data_offset;

		if (plain && ip->protocol != PROTOCOL_TCP)
			return UNUSUAL;
		/* A plain packet ends where the buffer does. */
		if ((!plain && transport_len < TCP_LEN) || (const void *)(tcp + 1) > end)
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
	packet->second = (__u64)(plain ? PROTOCOL_TCP : ip->protocol) << 32 | le32(ports);
	return 0;
}

/* What becomes of a packet that is malformed or a fragment: the host judges its own. */
INLINE __u32 refused(const struct snapshot *snapshot, const struct ipv4 *ip, const void *end, __u32 reason)
{
	if (reason != PASSED && (const void *)(ip + 1) <= end &&
	    (!ip->destination || !find(snapshot, le32(ip->destination))))
		return PASSED;
	return reason;
}

/* The word of a flow's bucket, or null. Tables of the usual sizes have maps in which no function has to look. */
INLINE const __u64 *bucket_word(const struct cell *service, __u64 hash)
{
	__u32 bucket = hash & service->mask, table = service->table;
	void *map;

	if (likely(service->mask == DEFAULT_BUCKETS - 1)) {
		map = bpf_map_lookup_elem(&default_tables, &table);
		return map ? bpf_map_lookup_elem(map, &bucket) : 0;
	}
	if (service->mask == MAX_BUCKETS - 1) {
		map = bpf_map_lookup_elem(&largest_tables, &table);
		return map ? bpf_map_lookup_elem(map, &bucket) : 0;
	}
	map = bpf_map_lookup_elem(&tables, &table);
	return map ? bpf_map_lookup_elem(map, &bucket) : 0;
}

/* A backend, or null. */
INLINE const struct backend *backend_of(const struct snapshot *snapshot, __u32 number)
{
	void *map;

	if (likely(number < NEAR_BACKENDS))
		return &snapshot->near[number];
	number -= NEAR_BACKENDS;
	map = bpf_map_lookup_elem(&backends, &snapshot->backends);
	return map ? bpf_map_lookup_elem(map, &number) : 0;
}

/* Decides about a frame and encapsulates it. Returns what became of it; if it is sent, `template` says by where. */
INLINE __u32 forward(struct xdp_md *ctx, int plain, const struct snapshot *snapshot, const struct link *link,
		     const struct template **by)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u64 first_len = end - data, tags_len = 0, hash, word, outer_len, len;
	struct ethernet *ethernet = data;
	const __u64 *word_at;
	const struct template *template;
	const struct backend *backend;
	const struct cell *service;
	__u32 tags[2] = {}, reason, head, previous;
	struct packet packet;
	__be32 owner = 0;

	if ((void *)(ethernet + 1) > end)
		return DROP_TRUNCATED;
	/* A frame for another station (flooded by a switch, or broadcast) is another mux's, or nobody's. */
	if ((*(volatile __u64 *)data & MAC_MASK) != link->mac)
		return PASSED;
	__be16 type = ethernet->type;

	if (plain) {
		if (type != bpf_htons(ETHERTYPE_IPV4))
			return UNUSUAL;
	} else if (type != bpf_htons(ETHERTYPE_IPV4)) {
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

	reason = parse(ctx, plain, ip, end, first_len, ETHERNET_LEN + tags_len, &packet);
	if (unlikely(reason))
		return plain ? UNUSUAL : refused(snapshot, ip, end, reason);
	service = find(snapshot, packet.second >> 16 << 32 | packet.first >> 32);
	if (!service)
		return PASSED;
	hash = siphash13(service->hash_key, packet.first, packet.second);

	word_at = bucket_word(service, hash);
	if (!word_at)
		return DROP_NO_BACKEND;
	word = *(volatile const __u64 *)word_at;
	head = word >> 48;
	previous = word >> 32 & NOBODY;
	if (!plain && head == NOBODY)
		return DROP_NO_BACKEND;
	backend = backend_of(snapshot, head);
	if (!backend)
		return plain ? UNUSUAL : DROP_UNKNOWN_BACKEND;
	template = &backend->gue;
	outer_len = CLOSED_LEN;
	if (unlikely(previous != NOBODY)) {
		const struct backend *past = backend_of(snapshot, previous);

		/* Not sent without its walk. */
		if (!past || past->gue.reach == REACH_UNKNOWN)
			return plain ? UNUSUAL : DROP_UNKNOWN_BACKEND;
		owner = past->gue.address;
		outer_len = OPEN_LEN;
	} else if (service->is_ipip) {
		template = &backend->ipip;
		outer_len = IPIP_LEN;
	}
	len = outer_len + packet.len;
	if (!plain && template->reach != REACH_RESOLVED)
		return template->reach == REACH_UNKNOWN ? DROP_UNKNOWN_BACKEND : DROP_NO_NEXT_HOP;
	/* Where nothing can be sent, the MTU is 0. */
	if (unlikely(len > template->mtu))
		return plain ? UNUSUAL : DROP_TOO_BIG;

	/* Ethernet pads short frames; the padding is not part of the packet. */
	if (!plain && first_len != ETHERNET_LEN + tags_len + packet.len) {
		int padding = bpf_xdp_get_buff_len(ctx) - (ETHERNET_LEN + tags_len + packet.len);

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
	__u32 sum;

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
			gue[0] = sizeof(struct walk) / 4;
			walk->version_flags = GUE_WALK_VERSION << 4;
			walk->hops = 0;
			walk->visited = 0;
			walk->owners = 1;
			walk->generation = bpf_htonl((__u32)word);
			walk->owner = owner;
		}
	} else {
		((__u16 *)&words[4])[0] = template->headers[4];
	}
	outer->tos = packet.tos;
	outer->len = bpf_htons(len);
	/* Below 2^20: two folds. */
	sum = template->ip_sum + bpf_htons(packet.tos) + bpf_htons(len);
	sum = (sum & 0xffff) + (sum >> 16);
	outer->checksum = ~((sum & 0xffff) + (sum >> 16));
	if (!plain && tags_len) {
		/* The addresses come before the tags. */
		*(__u64 *)data = template->headers[0];
		((__u32 *)data)[2] = template->headers[1];
		((__u32 *)data)[3] = tags[0];
		if (tags_len > VLAN_LEN)
			((__u32 *)data)[4] = tags[1];
	}
	*by = template;
	return outer_len == OPEN_LEN ? SENT_OPEN : SENT_CLOSED;
}

/* Counts a frame for what became of it, and has the kernel do it. */
INLINE int finish(struct xdp_md *ctx, __u32 outcome, const struct template *template)
{
	__u32 zero = 0;
	struct counters *counted = bpf_map_lookup_elem(&counters, &zero);

	if (counted)
		counted->count[outcome % COUNTERS]++;
	if (likely(outcome <= SENT_OPEN)) {
		if (likely(template->ifindex == ctx->ingress_ifindex))
			return XDP_TX;
		return bpf_redirect_map(&ports, template->egress, XDP_DROP);
	}
	return outcome == PASSED ? XDP_PASS : XDP_DROP;
}

static __noinline int any(struct xdp_md *ctx)
{
	__u32 zero = 0, ifindex = ctx->ingress_ifindex, i;
	const struct template *template = 0;
	struct snapshot *snapshot;
	__u32 outcome;
	void *map;

	map = bpf_map_lookup_elem(&snapshots, &zero);
	if (!map)
		return XDP_PASS;
	snapshot = bpf_map_lookup_elem(map, &zero);
	if (!snapshot)
		return XDP_PASS;
	for (i = 0; i < MAX_LINKS; i++)
		if (snapshot->links[i].ifindex == ifindex)
			break;
	if (i == MAX_LINKS)
		return XDP_PASS;
	outcome = forward(ctx, 0, snapshot, &snapshot->links[i % MAX_LINKS], &template);
	if (outcome <= SENT_OPEN && !template)
		return XDP_ABORTED;
	return finish(ctx, outcome, template);
}

SEC("xdp.frags")
int daisy_mux(struct xdp_md *ctx)
{
	const struct template *template = 0;
	struct snapshot *snapshot;
	__u32 zero = 0, outcome;
	void *map;

	map = bpf_map_lookup_elem(&snapshots, &zero);
	if (!map)
		return XDP_PASS;
	snapshot = bpf_map_lookup_elem(map, &zero);
	/* The first interface, by the first comparison. */
	if (!snapshot || snapshot->links[0].ifindex != ctx->ingress_ifindex)
		return any(ctx);
	outcome = forward(ctx, 1, snapshot, &snapshot->links[0], &template);
	if (unlikely(outcome == UNUSUAL))
		return any(ctx);
	if (outcome <= SENT_OPEN && !template)
		return XDP_ABORTED;
	return finish(ctx, outcome, template);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
