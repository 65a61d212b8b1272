// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For timing only. A program under test changes its packet, and BPF_PROG_TEST_RUN with `repeat` hands each round
 * the packet as the round before left it. `bench_next` makes the packet of another flow and then tail-calls the
 * program; with `bench_empty` as the target it times itself.
 */
#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_helpers.h>

#include "headers.h"

#define IP_WORDS 12
#define FRAME_LEN (ETHERNET_LEN + IP_WORDS * 4)

/* The Ethernet header, and a packet of IPv4 and TCP; the last two bytes of its source address, its source port and
 * the checksum of its IPv4 header are 0. */
volatile const __u64 addresses;
volatile const __u32 source_end;
volatile const __u16 type;
volatile const __u32 packet[IP_WORDS];
/* The number of flows − 1: a power of two − 1, below 2^32. */
volatile const __u32 flow_mask;

__u32 rounds;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} target SEC(".maps");

SEC("xdp.frags")
int bench_next(struct xdp_md *ctx)
{
	int len = ctx->data_end - ctx->data, i;
	/* An odd factor visits every flow before it visits one again, and neighbours never after another. */
	__u32 flow = rounds++ * 0x9e3779b1 & flow_mask;

	if (bpf_xdp_adjust_head(ctx, len - FRAME_LEN))
		return XDP_ABORTED;
	void *data = (void *)(long)ctx->data;
	__u32 words[IP_WORDS];
	__u64 sum = 0;

	if (data + FRAME_LEN > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
#pragma unroll
	for (i = 0; i < IP_WORDS; i++)
		words[i] = packet[i];
	/* Of the source address the lower half, which is in the upper half of a little-endian word, and the port. */
	words[3] |= flow << 16;
	words[5] |= flow >> 16;
#pragma unroll
	for (i = 0; i < IPV4_LEN / 4; i++)
		sum += words[i];
	words[2] |= (__u32)(__u16)~fold(sum) << 16;
	/* In pieces of which a program reads none together with another: that would take longer than after a device. */
	*(__u64 *)data = addresses;
	*(__u32 *)(data + 8) = source_end;
	*(__u16 *)(data + 12) = type;
#pragma unroll
	for (i = 0; i < IP_WORDS; i++)
		*(__u32 *)(data + ETHERNET_LEN + 4 * i) = words[i];
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

SEC("xdp.frags")
int bench_empty(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
