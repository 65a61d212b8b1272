/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The chain protocol: daisy_shared::chain::decide, rule by rule. */
#pragma once

#include "kind.h"
#include "walk.h"

/*
 * Lists of owners live here rather than on the stack: the verifier keeps no track of what they hold, so that the
 * loops over them stay cheap for it. Indices are masked to LIST_LEN, which is more than any list gets.
 */
#define LIST_LEN 16
#define AT(index) ((index) & (LIST_LEN - 1))

struct list {
	__u32 owner[LIST_LEN];
	__u32 len;
};

struct scratch {
	/* What the packet lists: visited, then to visit. */
	struct list packet;
	__u32 packet_visited;
	/* What the packet and the older knowledge teach together. */
	struct list taught;
	/* What is known of the bucket, once the packet has taught. */
	struct list known;
	__u32 known_generation;
	__u32 is_known;
	/* A table of the controller is at the root of it: then the chain leads to every connection. */
	__u32 from_table;
	struct list visited;
	struct list pending;
	/* The walk to write, and where to. */
	struct list out;
	__u32 out_visited;
	__u32 out_returned;
	__u32 out_hops;
	__u32 next;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* Generations are compared with wrap-around (RFC 1982). */
INLINE int is_newer(__u32 generation, __u32 than)
{
	return (__s32)(generation - than) > 0;
}

INLINE int contains(const struct list *list, __u32 owner)
{
	__u32 i, len = list->len;

	for (i = 0; i < MAX_OWNERS; i++) {
		if (i >= len)
			break;
		if (list->owner[i] == owner)
			return 1;
	}
	return 0;
}

/* Appends; nothing if there is no room, which is said by 0. */
INLINE int push(struct list *list, __u32 owner)
{
	__u32 len = list->len;

	if (len >= MAX_OWNERS)
		return 0;
	list->owner[AT(len)] = owner;
	list->len = len + 1;
	return 1;
}

/* Appends an owner, if it is not in the list yet. */
INLINE int push_new(struct list *list, __u32 owner)
{
	return contains(list, owner) || push(list, owner);
}

/* Whether an owner has been declared dead. */
INLINE __u32 is_dead(__u32 address)
{
	const struct peer *peer = bpf_map_lookup_elem(&peers, &address);

	return peer && (peer->flags & PEER_DEAD);
}

/* Copies the addresses that the packet lists. */
INLINE void read_owners(struct scratch *s, const struct walk *walk, const void *data, const void *end)
{
	const __u32 *from = data + OWNERS_AT;
	__u32 i;

	for (i = 0; i < MAX_OWNERS && i < walk->owners; i++) {
		if ((const void *)(from + i + 1) > end)
			break;
		s->packet.owner[i] = from[i];
	}
	s->packet.len = walk->owners;
	s->packet_visited = walk->visited;
}

INLINE int teaches(const struct walk *walk, __u64 word)
{
	return walk->present && (!(word & FLAG_KNOWN) || is_newer(walk->generation, (__u32)word));
}

/*
 * Rule 3, the packet's part: its path is the head of what it teaches. Returns whether that fits. A global function:
 * the verifier looks at it once and by itself.
 */
__attribute__((noinline)) int teach_path(struct scratch *s)
{
	__u32 i, fits = 1;

	if (!s)
		return 0;
	s->taught.len = 0;
	/* A packet that has visited nobody is on its way to the head: then this agent comes first. */
	for (i = 0; i <= MAX_OWNERS && i <= s->packet.len; i++) {
		if (i == s->packet_visited)
			fits &= push_new(&s->taught, my_address);
		if (i < s->packet.len)
			fits &= push_new(&s->taught, s->packet.owner[AT(i)]);
	}
	return fits;
}

/*
 * `push_new` without a branch for each comparison, or the verifier, which has to follow this under a lock in the
 * middle of everything else, would not come to an end.
 */
INLINE __u32 teach(struct list *list, __u32 owner)
{
	__u32 i, len = list->len & 0xff;
	__u64 found = 0;

#pragma unroll
	for (i = 0; i < MAX_OWNERS; i++) {
		__u64 difference = list->owner[i] ^ owner;

		/* Keeps the compiler from making a branch of the next line, which is 1 if there is no difference. */
		asm volatile("" : "+r"(difference));
		found |= (difference - 1) >> 63 << i;
	}
	if (found & ((1ULL << len) - 1))
		return 1;
	return push(list, owner);
}

INLINE void copy_knowledge(struct scratch *s, const struct knowledge *entry)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < MAX_OWNERS; i++)
		s->known.owner[i] = entry->owners[i];
}

/*
 * Rule 3: learns from the packet what is newer than what is known, and takes a copy of what is known then. What
 * is known is read again under the lock: another CPU may have learned, or the daemon's table may have come.
 * Returns 0, LEARNED, or the counter of the reason to drop.
 */
INLINE __u32 learn(struct knowledge *entry, struct brief *brief, struct scratch *s, const struct walk *walk)
{
	__u32 i, len, result = 0, fits;
	__u64 word;

	if (!teaches(walk, entry->word)) {
		bpf_spin_lock(&entry->lock);
		word = entry->word;
		copy_knowledge(s, entry);
		bpf_spin_unlock(&entry->lock);
		/* The daemon has just had the bucket forgotten. */
		if (teaches(walk, word))
			word = 0;
		goto copied;
	}

	fits = teach_path(s);
	bpf_spin_lock(&entry->lock);
	word = entry->word;
	if (teaches(walk, word)) {
		len = word & FLAG_KNOWN ? (word >> LEN_SHIFT) & 0xff : 0;
		for (i = 0; i < MAX_OWNERS; i++) {
			if (i < len)
				fits &= teach(&s->taught, entry->owners[i]);
		}
		result = DROP_CHAIN_OVERFLOW;
		if (fits) {
			result = LEARNED;
			word = FLAG_KNOWN | (word & FLAG_FROM_TABLE) | (__u64)s->taught.len << LEN_SHIFT |
			       walk->generation;
			if (s->taught.owner[0] == my_address)
				word |= FLAG_HEAD_IS_ME;
			begin_write(entry, brief);
#pragma unroll
			for (i = 0; i < MAX_OWNERS; i++)
				entry->owners[i] = s->taught.owner[i];
			end_write(entry, brief, word);
		}
	}
	copy_knowledge(s, entry);
	bpf_spin_unlock(&entry->lock);
copied:
	s->known.len = (word >> LEN_SHIFT) & 0xff;
	s->known_generation = (__u32)word;
	s->is_known = (word & FLAG_KNOWN) != 0;
	s->from_table = (word & FLAG_FROM_TABLE) != 0;
	return result;
}

/* Prepares the walk `out`, whose list stands already, unless the packet's hops are spent (rule 7). */
INLINE __u32 send_to(struct scratch *s, __u32 next, __u32 visited, __u32 hops, __u32 outcome)
{
	if (hops >= MAX_HOPS)
		return DROP_HOPS_SPENT;
	s->next = next;
	s->out_visited = visited;
	s->out_hops = hops + 1;
	s->out_returned = outcome == RETURNED;
	return outcome;
}

/*
 * Rules 2 and 4 to 7, for a packet without a local connection that is no newer than what is known. Returns the
 * counter that the packet ends in; for SENT_ON and RETURNED with the walk to write in `out`.
 *
 * A global function, as above.
 */
__attribute__((noinline)) int walk_on(struct scratch *s, struct walk *walk, __u32 kind)
{
	__u32 i, j, head, owner;

	if (!s || !walk || s->known.len == 0)
		return DROP_NO_BACKEND;
	head = s->known.owner[0];
	s->visited.len = s->pending.len = s->out.len = 0;

	if (walk->present && !is_newer(s->known_generation, walk->generation)) {
		for (i = 0; i < MAX_OWNERS && i < walk->owners; i++) {
			owner = s->packet.owner[i];
			if (i < walk->visited)
				push(&s->visited, owner);
			else if (owner != my_address)
				push(&s->pending, owner);
		}
	} else if (head != my_address) {
		/* Rule 2: start anew at the head. */
		if (!is_dead(head)) {
			for (i = 1; i < MAX_OWNERS && i < s->known.len; i++)
				push(&s->out, s->known.owner[i]);
			return send_to(s, head, 0, walk->hops, SENT_ON);
		}
		/* A dead head is still the origin, from which others learn who is head; but it has not looked. */
		push(&s->visited, head);
		push(&s->pending, head);
	}
	/* Rule 4: those that only this agent knows. */
	for (i = 0; i < MAX_OWNERS && i < s->known.len; i++) {
		owner = s->known.owner[i];
		if (owner != my_address && !contains(&s->visited, owner) && !push_new(&s->pending, owner))
			return DROP_WALK_OVERFLOW;
	}

	/* Rules 5 and 6. */
	if (kind == NEW && head == my_address && s->pending.len == 0 && s->from_table)
		return ACCEPTED;
	if (!push_new(&s->visited, my_address) || s->visited.len + s->pending.len > MAX_OWNERS + 1)
		return DROP_WALK_OVERFLOW;
	for (i = 0; i < MAX_OWNERS && i < s->visited.len; i++)
		push(&s->out, s->visited.owner[i]);
	for (i = 0; i < MAX_OWNERS && i < s->pending.len; i++) {
		owner = s->pending.owner[i];
		if (is_dead(owner)) {
			/* Skipped, and still to visit. */
			push(&s->out, owner);
			continue;
		}
		for (j = i + 1; j < MAX_OWNERS && j < s->pending.len; j++)
			push(&s->out, s->pending.owner[j]);
		return send_to(s, owner, s->visited.len, walk->hops, SENT_ON);
	}
	if (s->pending.len)
		return DROP_DEAD_OWNER;
	if (!s->from_table)
		return DROP_UNKNOWN_BUCKET;
	/* Rule 7: everybody has looked. */
	if (kind != NEW)
		return ANSWERED;
	/* Rule 5: the last owner sends a new flow back to its origin. */
	head = s->visited.owner[0];
	if (head == my_address)
		return DROP_WALK_CONTRADICTS;
	return send_to(s, head, s->visited.len, walk->hops, RETURNED);
}

/* What a packet is sent on with. */
struct onward {
	__u32 next;
	/* The walk to write: how many owners its list has, and how many of them have been visited. */
	__u32 owners;
	__u32 visited;
	__u32 generation;
	__u32 hops;
	__u32 returned;
	/* From the outer headers that came. */
	__be16 source_port;
	__u8 tos;
};

/*
 * `walk_on` for what is common: the packet lists the chain that is known in its order, without this agent, or as
 * many owners of it as its mux knew; or its walk starts anew. Then the next owner is the one behind this agent, and the
 * walk is the chain without it. Nobody stands twice in what is known: controllers see to it, and so does learning.
 *
 * Returns what `walk_on` would, with the walk's list in `known`; or 0 where it would have to look closer.
 */
INLINE __u32 walk_plainly(struct onward *on, __u32 known[MAX_OWNERS], const struct walk *walk, __u64 word,
			  enum kind kind, const void *data, const void *end)
{
	const __u32 *listed = data + OWNERS_AT;
	__u32 i, len = (word >> LEN_SHIFT) & 0xff, at;

	if (!(word & FLAG_KNOWN) || len == 0 || walk->hops >= MAX_HOPS)
		return 0;
	on->generation = (__u32)word;
	on->hops = walk->hops + 1;
	if (!walk->present || is_newer((__u32)word, walk->generation)) {
		at = (word & FLAG_HEAD_IS_ME) != 0;
	} else {
		__u32 owners = walk->owners, visited = walk->visited, other = 0;

		if (owners >= len || (const void *)(listed + MAX_OWNERS) > end)
			return 0;
#pragma unroll
		for (i = 0; i < MAX_OWNERS - 1; i++) {
			__u32 before = known[i], behind = known[i + 1];

			/* Keeps the compiler from choosing between addresses on the stack, which the verifier refuses. */
			asm volatile("" : "+r"(before), "+r"(behind));
			if (i == visited)
				other |= before ^ my_address;
			if (i < owners)
				other |= listed[i] ^ (i < visited ? before : behind);
		}
		if (visited == MAX_OWNERS - 1)
			other |= known[MAX_OWNERS - 1] ^ my_address;
		if (other)
			return 0;
		at = visited + 1;
	}
	if (at < len) {
#pragma unroll
		for (i = 0; i < MAX_OWNERS; i++) {
			if (i == at)
				on->next = known[i];
			if (i >= at && i < MAX_OWNERS - 1)
				known[i] = known[i + 1];
		}
		on->owners = len - 1;
		on->visited = at;
		on->returned = 0;
		return SENT_ON;
	}
	/* The end of the walk: rules 7 and 5. */
	if (!(word & FLAG_FROM_TABLE))
		return 0;
	if (kind != NEW)
		return ANSWERED;
	if (word & FLAG_HEAD_IS_ME)
		return 0;
	on->next = known[0];
	on->owners = on->visited = len;
	on->returned = 1;
	return RETURNED;
}

/*
 * Whether the packet has come back to this agent as its origin, and everybody who is known has looked: then no rule
 * sends it on.
 */
INLINE int is_back(const struct walk *walk, __u64 word, const __u32 known[MAX_OWNERS], const void *data,
		   const void *end)
{
	const __u64 flags = FLAG_KNOWN | FLAG_FROM_TABLE | FLAG_HEAD_IS_ME;
	const __u32 *listed = data + OWNERS_AT;
	__u32 i, other = 0;

	if ((word & flags) != flags || !walk->present || is_newer((__u32)word, walk->generation) ||
	    walk->visited != walk->owners || walk->owners != ((word >> LEN_SHIFT) & 0xff) ||
	    (const void *)(listed + MAX_OWNERS) > end)
		return 0;
#pragma unroll
	for (i = 0; i < MAX_OWNERS; i++) {
		if (i < walk->owners)
			other |= listed[i] ^ known[i];
	}
	return !other;
}
