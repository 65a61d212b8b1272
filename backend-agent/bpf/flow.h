/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The keyed flow hash: daisy_shared::flow. */
#pragma once

#include "packet.h"
#include "siphash.h"

/* The hash of a TCP flow. The words of the message are little-endian whatever the host is. */
INLINE __u64 flow_hash(const __u64 key[2], const struct inner *inner)
{
	__u32 ports = *(const __u32 *)inner->tcp;

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	__u64 first = (__u64)inner->ip->destination << 32 | inner->ip->source;
	__u64 second = (__u64)PROTOCOL_TCP << 32 | ports;
#else
	__u64 first = (__u64)__builtin_bswap32(inner->ip->destination) << 32 | __builtin_bswap32(inner->ip->source);
	__u64 second = (__u64)PROTOCOL_TCP << 32 | __builtin_bswap32(ports);
#endif
	return siphash13(key, first, second);
}
