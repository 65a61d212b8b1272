/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* SipHash-1-3, of which daisy_shared::flow makes the flow hash. */
#pragma once

#include <linux/types.h>

#include <bpf/bpf_helpers.h>

static __always_inline __u64 rotate(__u64 value, int bits)
{
	return value << bits | value >> (64 - bits);
}

#define SIP_ROUND(v0, v1, v2, v3)	\
	do {				\
		v0 += v1;		\
		v1 = rotate(v1, 13) ^ v0;\
		v0 = rotate(v0, 32);	\
		v2 += v3;		\
		v3 = rotate(v3, 16) ^ v2;\
		v0 += v3;		\
		v3 = rotate(v3, 21) ^ v0;\
		v2 += v1;		\
		v1 = rotate(v1, 17) ^ v2;\
		v2 = rotate(v2, 32);	\
	} while (0)

/* SipHash-1-3 of a message of two words. */
static __always_inline __u64 siphash13(const __u64 key[2], __u64 first, __u64 second)
{
	__u64 v0 = key[0] ^ 0x736f6d6570736575ULL;
	__u64 v1 = key[1] ^ 0x646f72616e646f6dULL;
	__u64 v2 = key[0] ^ 0x6c7967656e657261ULL;
	__u64 v3 = key[1] ^ 0x7465646279746573ULL;
	const __u64 len = 16ULL << 56;

	v3 ^= first;
	SIP_ROUND(v0, v1, v2, v3);
	v0 ^= first;
	v3 ^= second;
	SIP_ROUND(v0, v1, v2, v3);
	v0 ^= second;
	v3 ^= len;
	SIP_ROUND(v0, v1, v2, v3);
	v0 ^= len;
	v2 ^= 0xff;
	SIP_ROUND(v0, v1, v2, v3);
	SIP_ROUND(v0, v1, v2, v3);
	SIP_ROUND(v0, v1, v2, v3);
	return v0 ^ v1 ^ v2 ^ v3;
}
