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

/* A probe as two words: daisy_shared::wire::probe. The nonce follows. */
struct probe {
	struct gue gue;
	__u8 kind;
	__u8 zero[3];
};

/* Whether the datagram is a probe of this kind. */
INLINE int is_probe(const struct udp *udp, const void *end, __u8 kind)
{
	const struct probe *probe = (const void *)(udp + 1);

	return udp->len == bpf_htons(UDP_LEN + PROBE_LEN) && (const void *)probe + PROBE_LEN <= end &&
	       probe->gue.first == GUE_CONTROL_BIT && probe->gue.protocol == PROBE_CTYPE && probe->gue.flags == 0 &&
	       probe->kind == kind && !probe->zero[0] && !probe->zero[1] && !probe->zero[2];
}

/* Turns a probe into its answer. */
INLINE void answer_probe(struct ethernet *ethernet, struct ipv4 *ip, struct udp *udp)
{
	struct probe *probe = (void *)(udp + 1);
	struct ethernet saved = *ethernet;
	__be32 address = ip->source;
	__be16 port = udp->source;

	__builtin_memcpy(ethernet->destination, saved.source, 6);
	__builtin_memcpy(ethernet->source, saved.destination, 6);
	/* The header's checksum does not change when the addresses change places. */
	ip->source = ip->destination;
	ip->destination = address;
	udp->source = udp->destination;
	udp->destination = port;
	udp->checksum = 0;
	probe->kind = PROBE_REPLY;
}

/*
 * Strips the `strip` bytes of outer headers, for the local stack. The frame keeps its link-layer addresses, by
 * which the kernel tells its own frames from those it only overhears.
 */
INLINE __u32 decapsulate(struct xdp_md *ctx, struct ethernet *ethernet, __u32 strip, __u32 outcome)
{
	void *to = (void *)ethernet + strip;

	if (to + ETHERNET_LEN > (void *)(long)ctx->data_end)
		return DROP_NO_HEADROOM;
	/* The headers are longer than an Ethernet header: the copy does not reach what it reads. */
	copy_ethernet(to, ethernet);
	if (bpf_xdp_adjust_head(ctx, strip))
		return DROP_NO_HEADROOM;
	return outcome;
}

/*
 * Puts outer headers for the next owner, with a walk, in the place of the `strip` bytes of those that came:
 * daisy_shared::wire::outer.
 */
INLINE __u32 forward(struct xdp_md *ctx, const struct link *config, const struct peer *peer,
		     const struct onward *on, const __u32 list[MAX_OWNERS], __u32 strip, __u32 inner_len,
		     __u32 outcome)
{
	__u32 gue_len = GUE_BASE_LEN + GUE_WALK_BASE_LEN + 4 * on->owners;
	__u32 ip_len = OUTER_LEN + gue_len + inner_len, next = on->next, header[IPV4_LEN / 4];
	__u64 sum;
	struct ethernet *ethernet;
	struct ipv4 *ip;
	struct udp *udp;
	void *data;

	if (ip_len > config->mtu)
		return DROP_TOO_BIG;
	if (!peer || !(peer->flags & PEER_RESOLVED)) {
		/* If the buffer is full, a later packet asks. */
		bpf_ringbuf_output(&wanted, &next, sizeof(next), 0);
		return DROP_NO_NEXT_HOP;
	}
	if (bpf_xdp_adjust_head(ctx, (int)strip - (int)(OUTER_LEN + gue_len)))
		return DROP_NO_HEADROOM;
	data = (void *)(long)ctx->data;
	/* However short the walk is, the headers of IPv4 and TCP behind it are longer than the longest list. */
	if (data + OWNERS_AT + 4 * MAX_OWNERS > (void *)(long)ctx->data_end)
		return DROP_NO_HEADROOM;
	ethernet = data;
	ip = data + ETHERNET_LEN;
	udp = data + ETHERNET_LEN + IPV4_LEN;
	copy_address(ethernet->destination, peer->destination);
	copy_address(ethernet->source, peer->source);
	ethernet->type = bpf_htons(ETHERTYPE_IPV4);
	/* As words, for the sum: what was just written in smaller pieces would be slow to read back. */
	header[0] = bpf_htonl(0x45 << 24 | on->tos << 16 | ip_len);
	header[1] = bpf_htonl(0x4000);
	header[2] = bpf_htonl(OUTER_TTL << 24 | PROTOCOL_UDP << 16);
	header[3] = my_address;
	header[4] = next;
	sum = (__u64)header[0] + header[1] + header[2] + header[3] + header[4];
	header[2] |= bpf_htonl((__u32)bpf_ntohs(~fold(sum)));
	put_ipv4(ip, header);
	udp->source = on->source_port;
	udp->destination = gue_port;
	udp->len = bpf_htons(ip_len - IPV4_LEN);
	udp->checksum = 0;
	emit_walk(data, list, on->owners, on->visited, on->generation, on->hops, on->returned);
	return outcome;
}

/* The word of a bucket that this agent has to itself, but for its generation and the count of its writes. */
#define CLOSED_WINDOW ((FLAG_KNOWN | FLAG_FROM_TABLE | FLAG_HEAD_IS_ME | 1ULL << LEN_SHIFT) >> LEN_SHIFT)

/* What happens to a packet: returns the counter that it ends in. */
INLINE __u32 process(struct xdp_md *ctx, struct counters *counters)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethernet *ethernet = data;
	struct ipv4 *ip = data + ETHERNET_LEN;
	struct udp *udp = data + ETHERNET_LEN + IPV4_LEN;
	__u32 known[MAX_OWNERS], ip_len, strip, inner_len, index, reason, zero = 0, outcome, is_gue;
	struct link *config = bpf_map_lookup_elem(&link, &zero);
	const struct service *service;
	struct brief *brief;
	struct knowledge *entry;
	const struct peer *peer;
	struct onward on;
	struct inner inner;
	struct walk walk;
	struct scratch *s;
	enum kind kind;
	__u64 word, hash;

	/*
	 * Is it for the data path? Options and fragments never are: no daisy sends them. Nor is IPIP, as long as no
	 * service here travels by it: the host may have tunnels of its own.
	 */
	if (!config || (void *)(ip + 1) > end || ethernet->type != bpf_htons(ETHERTYPE_IPV4) ||
	    ip->version_ihl != 0x45 || ip->destination != my_address || (ip->fragment & bpf_htons(0x3fff)))
		return PASSED;
	is_gue = ip->protocol == PROTOCOL_UDP;
	/* Keeps the compiler from asking the packet again, for the verifier knows only this answer. */
	asm volatile("" : "+r"(is_gue));
	if (is_gue) {
		if ((void *)(udp + 1) > end || udp->destination != gue_port)
			return PASSED;
		/* The answer to a probe is for the daemon that asked. */
		if (is_probe(udp, end, PROBE_REPLY))
			return PASSED;
	} else if (ip->protocol != PROTOCOL_IPV4 || !(config->flags & LINK_IPIP)) {
		return PASSED;
	}
	counters->count[RECEIVED]++;

	if (!is_trusted(config, ip->source))
		return DROP_UNTRUSTED_SOURCE;

	/* The outer headers, as daisy_shared::wire::fast::parse reads them. */
	ip_len = bpf_ntohs(ip->len);
	if (ip_len < IPV4_LEN)
		return DROP_BAD_IP_HEADER;
	if (ip_len > (__u32)(end - data) - ETHERNET_LEN)
		return DROP_TRUNCATED;
	if (fold(sum_ipv4(ip)) != 0xffff)
		return DROP_BAD_IP_CHECKSUM;
	if (is_gue) {
		__u32 udp_len = bpf_ntohs(udp->len);

		if (udp_len < UDP_LEN || udp_len + IPV4_LEN > ip_len)
			return DROP_BAD_TRANSPORT_HEADER;
		if (is_probe(udp, end, PROBE_REQUEST)) {
			answer_probe(ethernet, ip, udp);
			return PROBES_ANSWERED;
		}
		reason = parse_walk(&walk, data, end, udp_len - UDP_LEN);
		if (reason)
			return reason;
		strip = OUTER_LEN + walk.header_len;
		inner_len = udp_len - UDP_LEN - walk.header_len;
	} else {
		no_walk(&walk);
		strip = IPV4_LEN;
		inner_len = ip_len - IPV4_LEN;
	}

	/* The inner packet, its service and its bucket. */
	reason = parse_inner(&inner, data + ETHERNET_LEN + strip, inner_len, end);
	if (reason)
		return reason;
	service = find_service(config, inner.ip->destination, inner.tcp->destination);
	if (!service)
		return DROP_UNKNOWN_SERVICE;
	outcome = inner.is_syn ? ACCEPTED : DELIVERED;
	if (!chaining)
		return decapsulate(ctx, ethernet, strip, outcome);
	hash = flow_hash(service->key, &inner);
	index = service->base + ((__u32)hash & service->mask);
	brief = bpf_map_lookup_elem(&briefs, &index);
	entry = bpf_map_lookup_elem(&knowledge, &index);
	if (!brief || !entry)
		return DROP_UNKNOWN_BUCKET;

	/*
	 * A closed window: this agent is the head and the chain holds nobody else. The rules would have the packet
	 * accepted, delivered or answered; the local stack does the right one of these by itself.
	 */
	word = *(volatile __u64 *)&brief->word;
	if ((__u16)(word >> LEN_SHIFT) == CLOSED_WINDOW && !teaches(&walk, word) &&
	    (is_newer((__u32)word, walk.generation) ||
	     (walk.visited == walk.owners && walk.visited < MAX_OWNERS)))
		return decapsulate(ctx, ethernet, strip, outcome);

	on.source_port = is_gue ? udp->source : bpf_htons(SOURCE_PORT_BASE | hash >> SOURCE_PORT_SHIFT);
	on.tos = ip->tos;
	if (!teaches(&walk, word) && read_known(entry, brief, word, known)) {
		/* A SYN is back, and everybody has looked: the local stack has it already, or accepts it. */
		if (inner.is_syn && is_back(&walk, word, known, data, end))
			return decapsulate(ctx, ethernet, strip, ACCEPTED);
		kind = kind_of(ctx, &inner);
		/* Rule 1: a packet with a local connection is delivered. */
		if (kind == MATCHED)
			return decapsulate(ctx, ethernet, strip, DELIVERED);
		outcome = walk_plainly(&on, known, &walk, word, kind, data, end);
		if (outcome == ANSWERED)
			return decapsulate(ctx, ethernet, strip, ANSWERED);
		if (outcome) {
			peer = find_peer(config, on.next);
			if (outcome == RETURNED || !peer || !(peer->flags & PEER_DEAD))
				return forward(ctx, config, peer, &on, known, strip, inner_len, outcome);
		}
	} else {
		kind = kind_of(ctx, &inner);
	}

	/* What is rare: something to learn, or a walk out of the ordinary. Even a packet that is delivered teaches. */
	if (kind == MATCHED && !teaches(&walk, word))
		return decapsulate(ctx, ethernet, strip, DELIVERED);
	s = bpf_map_lookup_elem(&scratch, &zero);
	if (!s)
		return DROP_UNKNOWN_BUCKET;
	read_owners(s, &walk, data, end);
	reason = learn(entry, brief, s, &walk);
	if (reason == LEARNED)
		counters->count[LEARNED]++;
	if (kind == MATCHED)
		return decapsulate(ctx, ethernet, strip, DELIVERED);
	if (reason >= FIRST_DROP)
		return reason;
	if (!s->is_known)
		return DROP_UNKNOWN_BUCKET;
	outcome = walk_on(s, &walk, kind);
	if (outcome >= FIRST_DROP)
		return outcome;
	if (outcome < FIRST_SEND)
		return decapsulate(ctx, ethernet, strip, outcome);
	on.next = s->next;
	on.owners = s->out.len;
	on.visited = s->out_visited;
	on.generation = s->known_generation;
	on.hops = s->out_hops;
	on.returned = s->out_returned;
	peer = find_peer(config, on.next);
	return forward(ctx, config, peer, &on, s->out.owner, strip, inner_len, outcome);
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
