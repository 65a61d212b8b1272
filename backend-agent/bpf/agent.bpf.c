// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The agent's data path. `daisy_agent` (XDP) takes encapsulated packets: it gives them to the local stack or
 * sends them on by the rules of daisy_shared::chain. It reads top to bottom: `process` is what happens to a
 * packet, and `daisy_agent` the one exit that counts it. Beside it stand `daisy_install` (install.h), which writes
 * the daemon's tables, and `daisy_mss` (mss.h), which leaves room for the outer headers.
 */
#include "decide.h"
#include "flow.h"
#include "install.h"
#include "mss.h"

/* Where the outer headers of a frame stand. */
struct outer {
	struct ethernet *ethernet;
	struct ipv4 *ip;
	struct udp *udp;
};

INLINE struct outer outer_of(void *data)
{
	struct outer outer = {
		.ethernet = data,
		.ip = data + ETHERNET_LEN,
		.udp = data + ETHERNET_LEN + IPV4_LEN,
	};

	return outer;
}

/* A probe as two words: daisy_shared::wire::probe. The nonce follows. */
struct probe {
	struct gue gue;
	__u8 kind;
	__u8 zero[3];
};

INLINE int is_probe(const struct outer *outer, const void *end, __u8 kind)
{
	const struct probe *probe = (const void *)(outer->udp + 1);

	return outer->udp->len == bpf_htons(UDP_LEN + PROBE_LEN) && (const void *)probe + PROBE_LEN <= end &&
	       probe->gue.first == GUE_CONTROL_BIT && probe->gue.protocol == PROBE_CTYPE && probe->gue.flags == 0 &&
	       probe->kind == kind && !probe->zero[0] && !probe->zero[1] && !probe->zero[2];
}

/* Turns a probe into its answer. */
INLINE void answer_probe(const struct outer *outer)
{
	struct probe *probe = (void *)(outer->udp + 1);
	struct ethernet ethernet = *outer->ethernet;
	__be32 address = outer->ip->source;
	__be16 port = outer->udp->source;

	__builtin_memcpy(outer->ethernet->destination, ethernet.source, 6);
	__builtin_memcpy(outer->ethernet->source, ethernet.destination, 6);
	/* The header's checksum does not change when the addresses change places. */
	outer->ip->source = outer->ip->destination;
	outer->ip->destination = address;
	outer->udp->source = outer->udp->destination;
	outer->udp->destination = port;
	outer->udp->checksum = 0;
	probe->kind = PROBE_REPLY;
}

/*
 * Strips the outer headers, for the local stack. The frame keeps its link-layer addresses, by which the kernel
 * tells its own frames from those it only overhears.
 */
INLINE __u32 decapsulate(struct xdp_md *ctx, const struct ethernet *ethernet, __u32 gue_len, __u32 outcome)
{
	struct ethernet saved = *ethernet, *to;

	if (bpf_xdp_adjust_head(ctx, OUTER_LEN + gue_len))
		return DROP_NO_HEADROOM;
	to = (void *)(long)ctx->data;
	if ((void *)(to + 1) > (void *)(long)ctx->data_end)
		return DROP_NO_HEADROOM;
	*to = saved;
	return outcome;
}

/* Rewrites the outer headers for the next owner: daisy_shared::wire::outer. */
INLINE __u32 forward(struct xdp_md *ctx, struct scratch *s, const struct outer *from, __u32 payload_len,
		     __u32 gue_len, __u32 outcome)
{
	__u32 new_gue_len = GUE_BASE_LEN + GUE_WALK_BASE_LEN + 4 * s->out.len;
	__u32 ip_len = OUTER_LEN + payload_len - gue_len + new_gue_len;
	__u32 zero = 0, next = s->next;
	__u16 source_port = from->udp->source;
	__u8 tos = from->ip->tos;
	struct link *config = bpf_map_lookup_elem(&link, &zero);
	struct outer to;
	void *data, *end;

	if (!config || ip_len > config->mtu)
		return DROP_TOO_BIG;
	if (!(s->peer.flags & PEER_RESOLVED)) {
		/* If the buffer is full, a later packet asks. */
		bpf_ringbuf_output(&wanted, &next, sizeof(next), 0);
		return DROP_NO_NEXT_HOP;
	}
	if (bpf_xdp_adjust_head(ctx, (int)gue_len - (int)new_gue_len))
		return DROP_NO_HEADROOM;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + GUE_AT > end)
		return DROP_NO_HEADROOM;
	to = outer_of(data);
	__builtin_memcpy(to.ethernet->destination, s->peer.destination, 6);
	__builtin_memcpy(to.ethernet->source, s->peer.source, 6);
	to.ethernet->type = bpf_htons(ETHERTYPE_IPV4);
	to.ip->version_ihl = 0x45;
	to.ip->tos = tos;
	to.ip->len = bpf_htons(ip_len);
	to.ip->id = 0;
	to.ip->fragment = bpf_htons(0x4000);
	to.ip->ttl = OUTER_TTL;
	to.ip->protocol = PROTOCOL_UDP;
	to.ip->checksum = 0;
	to.ip->source = my_address;
	to.ip->destination = next;
	to.ip->checksum = ~fold(sum_ipv4(to.ip));
	to.udp->source = source_port;
	to.udp->destination = gue_port;
	to.udp->len = bpf_htons(ip_len - IPV4_LEN);
	to.udp->checksum = 0;
	if (emit_walk(data, end, s->out.owner, s->out.len, s->out_visited, s->known_generation, s->out_hops,
		      s->out_returned))
		return DROP_NO_HEADROOM;
	return outcome;
}

/* The word of a bucket that this agent has to itself, but for its generation. */
#define CLOSED_WINDOW (FLAG_KNOWN | FLAG_FROM_TABLE | FLAG_HEAD_IS_ME | 1ULL << LEN_SHIFT)

/* What happens to a packet: returns the counter that it ends in. */
INLINE __u32 process(struct xdp_md *ctx, struct counters *counters)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct outer outer = outer_of(data);
	struct service_key service_key = {};
	struct service *service;
	struct knowledge *entry;
	struct inner inner;
	struct walk walk;
	struct scratch *s;
	enum kind kind;
	__u64 word;
	__u32 ip_len, udp_len, payload_len, index, reason, zero = 0, outcome;

	/* Is it for the data path? Options and fragments never are: no daisy sends them. */
	if (data + GUE_AT > end || outer.ethernet->type != bpf_htons(ETHERTYPE_IPV4) ||
	    outer.ip->version_ihl != 0x45 || outer.ip->protocol != PROTOCOL_UDP ||
	    outer.ip->destination != my_address || (outer.ip->fragment & bpf_htons(0x3fff)) ||
	    outer.udp->destination != gue_port)
		return PASSED;
	/* The answer to a probe is for the daemon that asked. */
	if (is_probe(&outer, end, PROBE_REPLY))
		return PASSED;
	counters->count[RECEIVED]++;

	if (!is_trusted(outer.ip->source))
		return DROP_UNTRUSTED_SOURCE;

	/* The outer headers, as daisy_shared::wire::fast::parse reads them. */
	ip_len = bpf_ntohs(outer.ip->len);
	udp_len = bpf_ntohs(outer.udp->len);
	if (ip_len < IPV4_LEN)
		return DROP_BAD_IP_HEADER;
	if (ip_len > (__u32)(end - data) - ETHERNET_LEN)
		return DROP_TRUNCATED;
	if (fold(sum_ipv4(outer.ip)) != 0xffff)
		return DROP_BAD_IP_CHECKSUM;
	if (udp_len < UDP_LEN || udp_len + IPV4_LEN > ip_len)
		return DROP_BAD_TRANSPORT_HEADER;
	payload_len = udp_len - UDP_LEN;

	if (is_probe(&outer, end, PROBE_REQUEST)) {
		answer_probe(&outer);
		return PROBES_ANSWERED;
	}

	/* The walk, the inner packet, its service and its bucket. */
	reason = parse_walk(&walk, data, end, payload_len);
	if (reason)
		return reason;
	reason = parse_inner(&inner, data + GUE_AT + walk.header_len, payload_len - walk.header_len, end);
	if (reason)
		return reason;
	service_key.vip = inner.ip->destination;
	service_key.port = inner.tcp->destination;
	service_key.protocol = PROTOCOL_TCP;
	service = bpf_map_lookup_elem(&services, &service_key);
	if (!service)
		return DROP_UNKNOWN_SERVICE;
	outcome = inner.is_syn ? ACCEPTED : DELIVERED;
	if (!chaining)
		return decapsulate(ctx, outer.ethernet, walk.header_len, outcome);
	index = service->base + ((__u32)flow_hash(service->key, &inner) & service->mask);
	entry = bpf_map_lookup_elem(&knowledge, &index);
	if (!entry)
		return DROP_UNKNOWN_BUCKET;

	/*
	 * A closed window: this agent is the head and the chain holds nobody else. The rules would have the packet
	 * accepted, delivered or answered; the local stack does the right one of these by itself.
	 */
	word = *(volatile __u64 *)&entry->word;
	if (word >> LEN_SHIFT == CLOSED_WINDOW >> LEN_SHIFT && !teaches(&walk, word) &&
	    (is_newer((__u32)word, walk.generation) ||
	     (walk.visited == walk.owners && walk.visited < MAX_OWNERS)))
		return decapsulate(ctx, outer.ethernet, walk.header_len, outcome);

	/* Rule 1: a packet with a local connection is delivered, but even that one teaches. */
	kind = kind_of(ctx, &inner);
	if (kind == MATCHED && !teaches(&walk, word))
		return decapsulate(ctx, outer.ethernet, walk.header_len, DELIVERED);
	s = bpf_map_lookup_elem(&scratch, &zero);
	if (!s)
		return DROP_UNKNOWN_BUCKET;
	read_owners(s, &walk, data, end);
	reason = learn(entry, s, &walk);
	if (reason == LEARNED)
		counters->count[LEARNED]++;
	if (kind == MATCHED)
		return decapsulate(ctx, outer.ethernet, walk.header_len, DELIVERED);
	if (reason >= FIRST_DROP)
		return reason;
	if (!s->is_known)
		return DROP_UNKNOWN_BUCKET;
	outcome = walk_on(s, &walk, kind);
	if (outcome >= FIRST_DROP)
		return outcome;
	if (outcome >= FIRST_SEND)
		return forward(ctx, s, &outer, payload_len, walk.header_len, outcome);
	return decapsulate(ctx, outer.ethernet, walk.header_len, outcome);
}

SEC("xdp")
int daisy_agent(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 outcome;
	struct counters *c = bpf_map_lookup_elem(&counters, &zero);

	if (!c)
		return XDP_ABORTED;
	outcome = process(ctx, c);
	/* Keeps the compiler from checking one copy and using another, which the verifier would not follow. */
	asm volatile("" : "+r"(outcome));
	if (outcome >= COUNTER_COUNT)
		return XDP_ABORTED;
	c->count[outcome]++;
	if (outcome < FIRST_SEND)
		return XDP_PASS;
	return outcome < FIRST_DROP ? XDP_TX : XDP_DROP;
}

/* The kernel's helpers are for programs under the GPL; these are under the GPL or, at choice, Apache-2.0. */
char _license[] SEC("license") = "Dual BSD/GPL";
