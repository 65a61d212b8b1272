/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * `daisy_install` writes the daemon's tables into the map of knowledge. The daemon runs it by BPF_PROG_TEST_RUN; the
 * "packet" is a batch of entries. So the kernel alone writes knowledge, each bucket under its lock, and an older
 * table can never undo what a packet has taught meanwhile.
 */
#pragma once

#include "maps.h"

struct batch {
	__u32 count;
	__u32 zero[3];
};

struct batch_entry {
	/* Of the bucket in the map. */
	__u32 index;
	__u32 generation;
	__u8 operation;
	__u8 len;
	__u16 zero;
	__u32 owners[MAX_OWNERS];
};

_Static_assert(sizeof(struct batch) == BATCH_HEADER_LEN, "batch");
_Static_assert(sizeof(struct batch_entry) == BATCH_ENTRY_LEN, "batch entry");

/* Returns how many entries it has written: all but those older than what is known. */
SEC("xdp")
int daisy_install(struct xdp_md *ctx)
{
	void *end = (void *)(long)ctx->data_end;
	struct batch *batch = (void *)(long)ctx->data;
	struct batch_entry *from = (void *)(batch + 1);
	__u32 i, j, count, written = 0;

	if ((void *)(batch + 1) > end)
		return 0;
	count = batch->count;
	for (i = 0; i < BATCH_MAX && i < count; i++, from++) {
		struct knowledge *entry;
		struct brief *brief;
		__u64 word = 0, known;
		__u32 index;

		if ((void *)(from + 1) > end)
			break;
		index = from->index;
		entry = bpf_map_lookup_elem(&knowledge, &index);
		brief = bpf_map_lookup_elem(&briefs, &index);
		if (!entry || !brief || from->len > MAX_OWNERS)
			continue;
		if (from->operation == OP_INSTALL) {
			word = FLAG_KNOWN | FLAG_FROM_TABLE | (__u64)from->len << LEN_SHIFT | from->generation;
			if (from->len && from->owners[0] == my_address)
				word |= FLAG_HEAD_IS_ME;
		}
		bpf_spin_lock(&entry->lock);
		known = entry->word;
		if (!word || !(known & FLAG_KNOWN) || (__s32)((__u32)known - from->generation) <= 0) {
			begin_write(entry, brief);
			for (j = 0; j < MAX_OWNERS; j++)
				entry->owners[j] = from->owners[j];
			end_write(entry, brief, word);
			written++;
		}
		bpf_spin_unlock(&entry->lock);
	}
	return written;
}
