// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* A packet generator and a sink, for measurements. The generator runs in live frames of BPF_PROG_TEST_RUN, whose
 * pages come back as the last user left them: every byte of the headers is written every time.
 *
 * It may be told to keep no more than `window` packets under way: it looks at what the sink has counted and sends
 * nothing while too many are missing. So a forwarder is always busy and no queue overflows, whatever its speed. */

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define FRAME_LEN 60 /* the shortest that Ethernet has, without its checksum */
#define CPUS 64

/* The same words as `Settings::words` in src/bench/generator.rs. */
struct settings {
	__u64 to_mac;   /* in the low 6 bytes, as they lie in memory */
	__u64 from_mac;
	__u64 vip;      /* network order, in the low 4 bytes */
	__u64 port;     /* host order */
	__u64 flows;    /* a power of two */
	__u64 window;   /* packets under way, for each sender */
	__u64 net;      /* the sink counts what goes to this network, network order, */
	__u64 mask;     /* or to the virtual address */
	__u64 most;     /* how many each CPU sends in all: what it has sent already counts */
	__u64 patience; /* nanoseconds; when nothing has arrived for so long, what is under way is lost */
	__u64 cpus;     /* senders: CPUs from 0 */
	__u64 unused[5];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

/* What the generator on each CPU did. Only that CPU writes. */
struct sender {
	__u64 sent;
	__u64 lost;     /* given up; what arrives late makes it too large */
	__u64 seen;     /* the sink's count when it last grew */
	__u64 since;    /* and when that was */
	__u64 flow;
	__u64 credit;   /* may be sent without another look at what has arrived */
	__u64 unused[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CPUS);
	__type(key, __u32);
	__type(value, struct sender);
} senders SEC(".maps");

/* What the sink has counted on each CPU, each on a cache line of its own. */
struct arrived {
	__u64 packets;
	__u64 bytes;
	__u64 unused[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CPUS);
	__type(key, __u32);
	__type(value, struct arrived);
} arrivals SEC(".maps");

static __always_inline __u16 folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* What is sent between two looks at the counts, whose cache lines others write. */
#define CREDIT 32

/* Whether `sender` has to wait for the sink. What one CPU sends may arrive on another: all are counted together. */
static __always_inline int full(struct sender *sender, const struct settings *s)
{
	__s64 under_way = 0, arrived = 0, room;

	if (sender->credit) {
		sender->credit--;
		return 0;
	}
	for (__u32 cpu = 0; cpu < CPUS; cpu++) {
		__u32 key = cpu;

		if (cpu >= s->cpus)
			break;
		const volatile struct sender *from = bpf_map_lookup_elem(&senders, &key);
		const volatile struct arrived *to = bpf_map_lookup_elem(&arrivals, &key);

		if (!from || !to)
			return 1;
		under_way += from->sent - from->lost;
		arrived += to->packets;
	}
	under_way -= arrived;
	if (under_way < 0) {
		sender->lost += under_way; /* what was given up has come after all */
		under_way = 0;
	}
	room = (__s64)(s->window * s->cpus) - under_way;
	if (room > 0) {
		sender->credit = (room < CREDIT ? room : CREDIT) - 1;
		sender->since = 0;
		return 0;
	}
	__u64 now = bpf_ktime_get_ns();

	if (!sender->since || arrived != sender->seen) {
		sender->seen = arrived;
		sender->since = now;
	} else if (now - sender->since > s->patience) {
		sender->lost += under_way;
		sender->since = 0;
	}
	return 1;
}

SEC("xdp")
int generate(struct xdp_md *context)
{
	void *data = (void *)(long)context->data, *end = (void *)(long)context->data_end;
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	struct settings *s = bpf_map_lookup_elem(&settings, &zero);
	struct sender *sender = bpf_map_lookup_elem(&senders, &cpu);
	struct ethhdr *ethernet = data;
	struct iphdr *ip = data + sizeof(*ethernet);
	struct tcphdr *tcp = (void *)ip + sizeof(*ip);

	if (!s || !sender || data + FRAME_LEN > end)
		return XDP_ABORTED;
	if (sender->sent >= s->most)
		return XDP_DROP;
	if (full(sender, s))
		return XDP_DROP;
	/* An odd step visits all flows before it comes back to the first, and no two neighbours in a row. Two CPUs walk
	 * through the same flows, from different ends. */
	__u32 flow = (sender->flow * 0x9e3779b1u) & (s->flows - 1);
	__u32 source = 0xc6120000u + (flow >> 10); /* 198.18.0.0/15, for benchmarks: RFC 2544 */
	__u32 source_port = 1024 + (flow & 1023);

	sender->flow += cpu & 1 ? -1 : 1;
	__builtin_memcpy(ethernet->h_dest, &s->to_mac, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, &s->from_mac, ETH_ALEN);
	ethernet->h_proto = bpf_htons(ETH_P_IP);
	__builtin_memset(ip, 0, FRAME_LEN - sizeof(*ethernet));
	ip->version = 4;
	ip->ihl = 5;
	ip->tot_len = bpf_htons(sizeof(*ip) + sizeof(*tcp));
	ip->frag_off = bpf_htons(0x4000); /* do not fragment */
	ip->ttl = 64;
	ip->protocol = IPPROTO_TCP;
	ip->saddr = bpf_htonl(source);
	ip->daddr = s->vip;
	tcp->source = bpf_htons(source_port);
	tcp->dest = bpf_htons(s->port);
	tcp->seq = bpf_htonl(1);
	tcp->ack_seq = bpf_htonl(1);
	tcp->ack = 1;
	tcp->doff = 5;
	tcp->window = bpf_htons(64240);
	__u32 vip = bpf_ntohl(ip->daddr);
	__u32 addresses = (source >> 16) + (source & 0xffff) + (vip >> 16) + (vip & 0xffff);
	__u32 flags = 0x5010; /* five words, ACK */

	ip->check = bpf_htons(folded(0x4500 + 40 + 0x4000 + 0x4006 + addresses));
	/* Sequence and acknowledgement numbers are both 1. */
	tcp->check = bpf_htons(folded(addresses + IPPROTO_TCP + sizeof(*tcp) + source_port + (__u16)s->port +
				      1 + 1 + flags + 64240));
	sender->sent++;
	return XDP_TX;
}

SEC("xdp")
int sink(struct xdp_md *context)
{
	void *data = (void *)(long)context->data, *end = (void *)(long)context->data_end;
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	struct settings *s = bpf_map_lookup_elem(&settings, &zero);
	struct arrived *arrived = bpf_map_lookup_elem(&arrivals, &cpu);
	struct ethhdr *ethernet = data;
	struct iphdr *ip = data + sizeof(*ethernet);

	if (!s || !arrived || (void *)(ip + 1) > end || ethernet->h_proto != bpf_htons(ETH_P_IP))
		return XDP_PASS;
	if ((ip->daddr & (__u32)s->mask) != (__u32)s->net && ip->daddr != (__u32)s->vip)
		return XDP_PASS;
	arrived->packets++;
	arrived->bytes += end - data;
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
