/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Headers of Ethernet, IPv4, UDP and TCP, and the sum of an IPv4 header. */
#pragma once

#include <linux/types.h>

#include <bpf/bpf_helpers.h>

#define ETHERTYPE_IPV4 0x0800
#define PROTOCOL_IPV4 4
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_ACK 0x10

struct ethernet {
	__u8 destination[6];
	__u8 source[6];
	__be16 type;
};

struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 len;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__be32 source;
	__be32 destination;
};

struct udp {
	__be16 source;
	__be16 destination;
	__be16 len;
	__u16 checksum;
};

struct tcp {
	__be16 source;
	__be16 destination;
	__be32 sequence;
	__be32 acknowledgement;
	__u8 data_offset;
	__u8 flags;
	__be16 window;
	__u16 checksum;
	__be16 urgent;
};

#define ETHERNET_LEN 14
#define IPV4_LEN 20
#define UDP_LEN 8
#define TCP_LEN 20
_Static_assert(sizeof(struct ethernet) == ETHERNET_LEN, "Ethernet");
_Static_assert(sizeof(struct ipv4) == IPV4_LEN, "IPv4");
_Static_assert(sizeof(struct udp) == UDP_LEN, "UDP");
_Static_assert(sizeof(struct tcp) == TCP_LEN, "TCP");

/* The sum of a header without options as 32-bit words. Ones' complement sums do not care about byte order. */
static __always_inline __u64 sum_ipv4(const struct ipv4 *ip)
{
	const __u32 *words = (const void *)ip;

	return (__u64)words[0] + words[1] + words[2] + words[3] + words[4];
}

/* Folds a sum of 32-bit words to 16 bits. */
static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}
