/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What the local TCP stack has for a packet: daisy_shared::chain::Kind. */
#pragma once

#include "packet.h"

enum kind {
	/* A connection, a request socket or a live SYN cookie fits. */
	MATCHED,
	/* SYN without ACK, and nothing fits. */
	NEW,
	/* Anything else. */
	ORPHAN,
};


INLINE enum kind kind_of(struct xdp_md *ctx, const struct inner *inner)
{
	struct bpf_sock_tuple tuple = {
		.ipv4.saddr = inner->ip->source,
		.ipv4.daddr = inner->ip->destination,
		.ipv4.sport = inner->tcp->source,
		.ipv4.dport = inner->tcp->destination,
	};
	struct bpf_sock *sk = bpf_skc_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	enum kind kind = MATCHED;

	if (!sk)
		return inner->is_syn ? NEW : ORPHAN;
	if (sk->state == BPF_TCP_LISTEN) {
		if (inner->is_syn)
			kind = NEW;
		/* The helper looks at ACKs only, and only while the listener has cookies out that may return. */
		else if (bpf_tcp_check_syncookie(sk, (void *)inner->ip, IPV4_LEN, (void *)inner->tcp, TCP_LEN))
			kind = ORPHAN;
	} else if (sk->state == BPF_TCP_TIME_WAIT && inner->is_syn) {
		kind = NEW;
	}
	bpf_sk_release(sk);
	return kind;
}
