/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * What the program reads, and its counters. Userspace writes it, by src/io/xdp/layout.rs.
 *
 * Everything but the words of buckets hangs on one snapshot, which userspace replaces as a whole: a packet that has
 * looked up the snapshot stays with it to its end.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "daisy_constants.h"

#define INLINE static __always_inline

/* An interface of the mux. */
struct link {
	/* Its Ethernet address, and two bytes of 0. */
	__u64 mac;
	__u32 ifindex;
	__u32 zero;
};

/* A service, or an address that a service has; key 0 is neither. */
struct cell {
	/* The little-endian word of address, port, protocol and 0; of an address without its services, address and 0. */
	__u64 key;
	/* The key of the flow hash, as the two little-endian words of the SipHash paper. */
	__u64 hash_key[2];
	/* Buckets − 1. */
	__u32 mask;
	/* Where its table is, in `default_tables`, `largest_tables` or `tables`. */
	__u32 table;
	/* Whether packets travel as IPIP in closed windows. */
	__u32 is_ipip;
	__u32 zero[7];
};
_Static_assert(sizeof(struct cell) == 64, "a cache line");

/* A backend's outer headers, ready but for the fields that differ from packet to packet: one cache line. */
struct template {
	/* Ethernet, IPv4, UDP and GUE of a closed window, or Ethernet and IPv4 of IPIP, in whole words. */
	__u64 headers[HEADER_WORDS];
	/* The sum of the IPv4 header's 16-bit words, as they lie in memory. */
	__u32 ip_sum;
	/* The backend's underlay address. */
	__be32 address;
	/* Of the interface that packets leave by; 0 if they cannot be sent. */
	__u16 mtu;
	__u8 reach;
	/* The interface that packets leave by: the mux's number for it, and the kernel's. */
	__u8 egress;
	__u32 ifindex;
};
_Static_assert(sizeof(struct template) == 64, "a cache line");

/* Both forms. */
struct backend {
	struct template gue;
	struct template ipip;
};

struct snapshot {
	/* What a key is multiplied with; the highest bits of the product are the first cell to look in. */
	__u64 multiplier;
	/* Which of the maps in `backends` belongs to it. */
	__u32 backends;
	__u32 zero[13];
	struct link links[MAX_LINKS];
	/* Open addressing. Every key is among the MAX_PROBES cells from its first on. */
	struct cell cells[CELLS];
	/* The first backends, by number. The others are in `backends`. */
	struct backend near[NEAR_BACKENDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(map_flags, BPF_F_MMAPABLE);
		__uint(max_entries, 1);
		__uint(key_size, sizeof(__u32));
		__uint(value_size, sizeof(struct snapshot));
	});
} snapshots SEC(".maps");

/* The other backends: two maps, of which the snapshot names one, while the other is written. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
		__uint(max_entries, 1);
		__uint(key_size, sizeof(__u32));
		__uint(value_size, sizeof(struct backend));
	});
} backends SEC(".maps");

/*
 * The tables of services: words `head:16 | previous:16 | generation:32`, which userspace writes in place. Where all
 * tables are of one size, the kernel looks words up without calling a function: those of the usual sizes are by
 * themselves.
 */
#define TABLES(name, flags, buckets)                                                                                   \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);                                                              \
		__uint(max_entries, MAX_TABLES);                                                                       \
		__type(key, __u32);                                                                                    \
		__array(values, struct {                                                                               \
			__uint(type, BPF_MAP_TYPE_ARRAY);                                                              \
			__uint(map_flags, BPF_F_MMAPABLE | (flags));                                                   \
			__uint(max_entries, buckets);                                                                  \
			__uint(key_size, sizeof(__u32));                                                               \
			__uint(value_size, sizeof(__u64));                                                             \
		});                                                                                                    \
	} name SEC(".maps")

TABLES(tables, BPF_F_INNER_MAP, 1);
TABLES(default_tables, 0, DEFAULT_BUCKETS);
TABLES(largest_tables, 0, MAX_BUCKETS);

/* Where packets are sent that leave by another interface than they came in by. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, MAX_LINKS);
	__type(key, __u32);
	__type(value, __u32);
} ports SEC(".maps");

/* What became of packets. Each is counted once. */
struct counters {
	__u64 count[COUNTERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");
