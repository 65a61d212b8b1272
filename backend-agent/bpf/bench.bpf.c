// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For timing only. A program under test changes its packet, and BPF_PROG_TEST_RUN with `repeat` hands each round
 * the packet as the round before left it. `bench_restore` makes the packet anew, each time of another of the frames,
 * and then tail-calls the program; with `bench_empty` as the target it times itself.
 */
#include "maps.h"

struct frame {
	__u8 bytes[BENCH_FRAME_LEN];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, BENCH_FRAMES);
	__type(key, __u32);
	__type(value, struct frame);
} frames SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} target SEC(".maps");

__u64 rounds;

SEC("xdp")
int bench_restore(struct xdp_md *ctx)
{
	/* An odd step: all of them in turn, and not in the order in which they lie in memory. */
	__u32 at = rounds * 1597 % BENCH_FRAMES;
	struct frame *from = bpf_map_lookup_elem(&frames, &at);
	int len = ctx->data_end - ctx->data;

	if (!from || bpf_xdp_adjust_head(ctx, len - BENCH_FRAME_LEN))
		return XDP_ABORTED;
	void *data = (void *)(long)ctx->data;

	if (data + BENCH_FRAME_LEN > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(data, from, BENCH_FRAME_LEN);
	/* Atomic, so that the frame is in the cache and not on its way: a network card writes it long before. */
	__sync_fetch_and_add(&rounds, 1);
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

SEC("xdp")
int bench_empty(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
