/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The GUE header and the walk in it: daisy_shared::wire::gue. */
#pragma once

#include "packet.h"

struct gue {
	/* Version, control bit, Hlen. */
	__u8 first;
	__u8 protocol;
	__be16 flags;
};

struct gue_walk {
	/* Version, flags. */
	__u8 first;
	__u8 hops;
	__u8 visited;
	__u8 owners;
	__be32 generation;
};

_Static_assert(sizeof(struct gue) == GUE_BASE_LEN, "GUE header");
_Static_assert(sizeof(struct gue_walk) == GUE_WALK_BASE_LEN, "walk");
#define WALK_AT (GUE_AT + GUE_BASE_LEN)
#define OWNERS_AT (WALK_AT + GUE_WALK_BASE_LEN)

/* What a packet says of its way so far; the addresses stay in the packet until they are needed. */
struct walk {
	/* The whole GUE header, in bytes. */
	__u32 header_len;
	/* 0: the packet carries no walk, and the rest is 0. */
	__u32 present;
	__u32 generation;
	__u32 hops;
	__u32 visited;
	/* Visited and to visit. */
	__u32 owners;
};

/* Of a packet without a GUE header, or with one that says nothing. */
INLINE void no_walk(struct walk *walk)
{
	walk->header_len = walk->present = walk->generation = walk->hops = walk->visited = walk->owners = 0;
}

/*
 * daisy_shared::wire::gue::Header::parse for a UDP payload of `len` bytes. Returns 0, or the counter of the
 * reason to drop.
 */
INLINE __u32 parse_walk(struct walk *walk, const void *data, const void *end, __u32 len)
{
	const struct gue *gue = data + GUE_AT;
	const struct gue_walk *from = data + WALK_AT;
	__u32 flags, returned;

	no_walk(walk);
	if (len < GUE_BASE_LEN || (const void *)(gue + 1) > end)
		return DROP_TRUNCATED;
	if ((gue->first & (GUE_VERSION_MASK | GUE_CONTROL_BIT)) || gue->flags || gue->protocol != GUE_PROTO_IPV4)
		return DROP_GUE_UNSUPPORTED;
	walk->header_len = GUE_BASE_LEN + 4 * (gue->first & GUE_HLEN_MASK);
	if (len < walk->header_len)
		return DROP_TRUNCATED;
	if (walk->header_len == GUE_BASE_LEN)
		return 0;
	if (walk->header_len < GUE_BASE_LEN + GUE_WALK_BASE_LEN)
		return DROP_GUE_MALFORMED;
	if ((const void *)(from + 1) > end)
		return DROP_TRUNCATED;
	flags = from->first & 0x0f;
	if (from->first >> 4 != GUE_WALK_VERSION || (flags & ~GUE_FLAG_RETURNED))
		return DROP_GUE_UNSUPPORTED;
	walk->visited = from->visited;
	walk->owners = from->owners;
	if (walk->owners > MAX_OWNERS || walk->visited > walk->owners ||
	    walk->header_len != GUE_BASE_LEN + GUE_WALK_BASE_LEN + 4 * walk->owners)
		return DROP_GUE_MALFORMED;
	returned = flags & GUE_FLAG_RETURNED;
	if (returned && (walk->visited == 0 || walk->visited != walk->owners))
		return DROP_GUE_MALFORMED;
	walk->present = 1;
	walk->generation = bpf_ntohl(from->generation);
	walk->hops = from->hops;
	return 0;
}

/*
 * Writes the GUE header of a walk with `owners` addresses, of which the first `visited` have been visited. There must
 * be room for the longest list.
 */
INLINE void emit_walk(void *data, const __u32 list[MAX_OWNERS], __u32 owners, __u32 visited, __u32 generation,
		      __u32 hops, __u32 returned)
{
	struct gue *gue = data + GUE_AT;
	struct gue_walk *to = data + WALK_AT;
	__u32 *place = data + OWNERS_AT;
	__u32 i;

	gue->first = GUE_WALK_BASE_LEN / 4 + owners;
	gue->protocol = GUE_PROTO_IPV4;
	gue->flags = 0;
	to->first = GUE_WALK_VERSION << 4 | (returned ? GUE_FLAG_RETURNED : 0);
	to->hops = hops;
	to->visited = visited;
	to->owners = owners;
	to->generation = bpf_htonl(generation);
#pragma unroll
	for (i = 0; i < MAX_OWNERS; i++) {
		if (i >= owners)
			break;
		place[i] = list[i];
	}
}
