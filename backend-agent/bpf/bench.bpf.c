// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * For timing only. A program under test changes its packet, and BPF_PROG_TEST_RUN with `repeat` hands each round
 * the packet as the round before left it. `bench_restore` makes the packet anew and then tail-calls the program;
 * with `bench_empty` as the target it times itself.
 */
#include "maps.h"

#define FRAME_LEN 128

struct frame {
	__u8 bytes[FRAME_LEN];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frame);
} frame SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} target SEC(".maps");

SEC("xdp")
int bench_restore(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct frame *from = bpf_map_lookup_elem(&frame, &zero);
	int len = ctx->data_end - ctx->data;

	if (!from || bpf_xdp_adjust_head(ctx, len - FRAME_LEN))
		return XDP_ABORTED;
	void *data = (void *)(long)ctx->data;

	if (data + FRAME_LEN > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(data, from, FRAME_LEN);
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

SEC("xdp")
int bench_empty(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
