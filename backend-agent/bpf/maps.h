/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The maps, and what is fixed when the programs are loaded. Addresses and ports are in network byte order. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "daisy_constants.h"
#include "headers.h"

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
	/* LINK_IPIP: a service here travels by IPIP. */
	__u32 flags;
	/* Raised after `services` has been changed. */
	__u32 services_version;
	/* Raised after `peers` has been changed. */
	__u32 peers_version;
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

INLINE int is_trusted(const struct link *config, __u32 address)
{
	struct prefix prefix = { .len = 32, .address = address };
	__u32 at = (bpf_ntohl(address) ^ bpf_ntohl(address) >> 8) % TRUST_CACHE_LEN;
	__u64 found;

	found = (__u64)*(const volatile __u32 *)&config->trusted_version << 32 | address;
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
	/* SERVICE_IPIP: it travels by IPIP in closed windows. For the daemon. */
	__u32 flags;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SERVICES);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps");

/*
 * What this CPU has found in `services`, by the last bits of a product of the key. A look-up in the kernel's hash
 * table costs four calls and returns, which take longer than all of the parsing. Good while `version` is the one that
 * stands in `link`; it is read before `services` is.
 */
#define CACHE_BITS 6
#define CACHE_MULTIPLIER 0x9e3779b97f4a7c15ULL

struct cached_service {
	/* As one word. */
	__u64 key;
	__u32 version;
	__u32 zero;
	struct service service;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << CACHE_BITS);
	__type(key, __u32);
	__type(value, struct cached_service);
} service_cache SEC(".maps");

INLINE const struct service *find_service(const struct link *config, __u32 vip, __u16 port)
{
	__u64 word = vip | (__u64)port << 32 | (__u64)PROTOCOL_TCP << 48;
	__u32 version = *(const volatile __u32 *)&config->services_version;
	__u32 at = word * CACHE_MULTIPLIER >> (64 - CACHE_BITS);
	struct cached_service *cached = bpf_map_lookup_elem(&service_cache, &at);
	struct service_key key = { .vip = vip, .port = port, .protocol = PROTOCOL_TCP };
	struct service *service;

	if (!cached)
		return 0;
	if (cached->key == word && cached->version == version)
		return &cached->service;
	service = bpf_map_lookup_elem(&services, &key);
	if (!service)
		return 0;
	cached->service = *service;
	cached->key = word;
	cached->version = version;
	return &cached->service;
}

/*
 * What is known of a bucket. Written under the lock, and read without it where that will do. Kernels lay an array's
 * elements out from 56 bytes behind the start of a cache line: what packets read is all in one.
 */
struct knowledge {
	struct bpf_spin_lock lock;
	__u32 zero;
	/* generation:32 | chain length:8 | flags:8 | writes:16, which is odd while the owners are being written. */
	__u64 word;
	__u32 owners[MAX_OWNERS];
	__u64 zeros[2];
};

#define ONE_WRITE (1ULL << WRITES_SHIFT)
#define ALL_WRITES (0xffffULL << WRITES_SHIFT)

/*
 * What packets mostly need of `knowledge`, once more: the word, and the owners of a chain of up to two. A closed window,
 * or one that has been moved once, costs no more than this, and of these there are four in a cache line. Written under
 * the lock of the bucket's knowledge.
 */
struct brief {
	__u64 word;
	__u32 owners[BRIEF_OWNERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct brief);
} briefs SEC(".maps");

/* Before the owners are written: whoever reads them without the lock will see it. */
INLINE void begin_write(struct knowledge *entry, struct brief *brief)
{
	*(volatile __u64 *)&entry->word += ONE_WRITE;
	*(volatile __u64 *)&brief->word = entry->word;
	asm volatile("" : : : "memory");
}

/* After the owners have been written; the count in `word` does not matter. */
INLINE void end_write(struct knowledge *entry, struct brief *brief, __u64 word)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < BRIEF_OWNERS; i++)
		brief->owners[i] = entry->owners[i];
	word = (word & ~ALL_WRITES) | ((entry->word + ONE_WRITE) & ALL_WRITES);
	asm volatile("" : : : "memory");
	*(volatile __u64 *)&entry->word = word;
	*(volatile __u64 *)&brief->word = word;
}

/*
 * Reads the owners that `word` speaks of without the lock. Returns 0 if they may have changed since `word` was read.
 * Only where stores are seen in the order they were made in, and loads are made in theirs: x86.
 */
INLINE int read_known(const struct knowledge *entry, const struct brief *brief, __u64 word, __u32 known[MAX_OWNERS])
{
#ifdef __TARGET_ARCH_x86_64
	const volatile __u64 *from = &brief->word;

	asm volatile("" : : : "memory");
	if (((word >> LEN_SHIFT) & 0xff) <= BRIEF_OWNERS) {
		__builtin_memset(known, 0, 4 * MAX_OWNERS);
		__builtin_memcpy(known, brief->owners, sizeof(brief->owners));
	} else {
		__builtin_memcpy(known, entry->owners, sizeof(entry->owners));
		from = &entry->word;
	}
	asm volatile("" : : : "memory");
	return !(word & ONE_WRITE) && *from == word;
#else
	return 0;
#endif
}

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

/* What this CPU has found in `peers`, as with services. */
struct cached_peer {
	__u32 address;
	__u32 version;
	struct peer peer;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << CACHE_BITS);
	__type(key, __u32);
	__type(value, struct cached_peer);
} peer_cache SEC(".maps");

INLINE const struct peer *find_peer(const struct link *config, __u32 address)
{
	__u32 version = *(const volatile __u32 *)&config->peers_version;
	__u32 at = address * CACHE_MULTIPLIER >> (64 - CACHE_BITS);
	struct cached_peer *cached = bpf_map_lookup_elem(&peer_cache, &at);
	const struct peer *peer;

	if (!cached)
		return 0;
	if (cached->address == address && cached->version == version)
		return &cached->peer;
	peer = bpf_map_lookup_elem(&peers, &address);
	if (!peer)
		return 0;
	cached->peer = *peer;
	cached->address = address;
	cached->version = version;
	return &cached->peer;
}

/* Addresses of next hops that packets needed and `peers` lacked. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, WANTED_BYTES);
} wanted SEC(".maps");
