/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The maps, and what is fixed when the programs are loaded. Addresses and ports are in network byte order. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "daisy_constants.h"

#define INLINE static __always_inline

/* This agent's address on the underlay. */
volatile const __u32 my_address;
/* The UDP port of encapsulated packets. */
volatile const __u16 gue_port;
/* 0: every well-formed packet is delivered locally, whatever that breaks. */
volatile const __u8 chaining;

/* Follows the interface while the programs run. */
struct link {
	/* Of the interface. */
	__u32 mtu;
	/* The largest MSS that a SYN-ACK may offer. */
	__u32 max_mss;
	/* The agent that the knowledge belongs to: it says where "head is me" holds. */
	__u32 address;
	/* Raised after prefixes have been taken out of `trusted`. */
	__u32 trusted_version;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct link);
} link SEC(".maps");

struct counters {
	__u64 count[COUNTER_COUNT];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

struct prefix {
	__u32 len;
	__u32 address;
};

/* Where encapsulated packets may come from. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_TRUSTED);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u32);
} trusted SEC(".maps");

/*
 * Sources that were found in `trusted`, by the last octets of their address: address | version << 32, the version
 * read before `trusted` was. A look-up in the trie takes longer than all of the parsing.
 */
#define TRUST_CACHE_LEN 256
__u64 trust_cache[TRUST_CACHE_LEN];

INLINE int is_trusted(__u32 address)
{
	struct prefix prefix = { .len = 32, .address = address };
	__u32 zero = 0, at = (bpf_ntohl(address) ^ bpf_ntohl(address) >> 8) % TRUST_CACHE_LEN;
	struct link *config = bpf_map_lookup_elem(&link, &zero);
	__u64 found;

	if (!config)
		return 0;
	found = (__u64)*(volatile __u32 *)&config->trusted_version << 32 | address;
	if (*(volatile __u64 *)&trust_cache[at] == found)
		return 1;
	if (!bpf_map_lookup_elem(&trusted, &prefix))
		return 0;
	*(volatile __u64 *)&trust_cache[at] = found;
	return 1;
}

struct service_key {
	__u32 vip;
	__u16 port;
	__u8 protocol;
	__u8 zero;
};

struct service {
	/* The key of the flow hash, as the two little-endian words of the SipHash paper. */
	__u64 key[2];
	/* Buckets − 1. */
	__u32 mask;
	/* Where its buckets start in the map of knowledge. */
	__u32 base;
	__u32 id;
	__u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SERVICES);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps");

/* What is known of a bucket. */
struct knowledge {
	/* generation:32 | chain length:8 | flags:8 | 0:16. Written under the lock, read without it. */
	__u64 word;
	struct bpf_spin_lock lock;
	__u32 owners[MAX_OWNERS];
};

/* Its size is set when the programs are loaded. Only the programs here write it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct knowledge);
} knowledge SEC(".maps");

struct peer {
	__u8 destination[6];
	__u8 source[6];
	__u32 flags;
};

/* Other agents. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PEERS);
	__type(key, __u32);
	__type(value, struct peer);
} peers SEC(".maps");

/* Addresses of next hops that packets needed and `peers` lacked. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, WANTED_BYTES);
} wanted SEC(".maps");
