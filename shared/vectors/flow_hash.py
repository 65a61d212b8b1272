#!/usr/bin/env python3
"""The flow hash from its description alone (see shared/src/flow.rs), and its golden vectors.

    flow_hash.py            print the vectors
    flow_hash.py --check    compare them with flow_hash.json beside this script
"""
import ipaddress
import json
import pathlib
import random
import sys

MASK = (1 << 64) - 1


def rotate(x, bits):
    return ((x << bits) | (x >> (64 - bits))) & MASK


def sip_round(v0, v1, v2, v3):
    v0 = (v0 + v1) & MASK
    v1 = rotate(v1, 13) ^ v0
    v0 = rotate(v0, 32)
    v2 = (v2 + v3) & MASK
    v3 = rotate(v3, 16) ^ v2
    v0 = (v0 + v3) & MASK
    v3 = rotate(v3, 21) ^ v0
    v2 = (v2 + v1) & MASK
    v1 = rotate(v1, 17) ^ v2
    v2 = rotate(v2, 32)
    return v0, v1, v2, v3


def siphash13(key, message):
    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    v0, v1 = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D
    v2, v3 = k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573
    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) & 0xFF])
    for i in range(0, len(padded), 8):
        word = int.from_bytes(padded[i : i + 8], "little")
        v3 ^= word
        v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
        v0 ^= word
    v2 ^= 0xFF
    for _ in range(3):
        v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


def flow_hash(key, source, source_port, destination, destination_port, protocol):
    message = (
        ipaddress.ip_address(source).packed
        + ipaddress.ip_address(destination).packed
        + source_port.to_bytes(2, "big")
        + destination_port.to_bytes(2, "big")
        + bytes([protocol, 0, 0, 0])
    )
    return siphash13(key, message)


def vectors():
    rng = random.Random(20180409)
    address = {
        4: lambda: str(ipaddress.IPv4Address(rng.getrandbits(32))),
        6: lambda: str(ipaddress.IPv6Address(rng.getrandbits(128))),
    }
    for i in range(48):
        family = 6 if i % 3 == 2 else 4
        key = bytes(16) if i < 2 else rng.getrandbits(128).to_bytes(16, "big")
        source, destination = address[family](), address[family]()
        source_port, destination_port = rng.getrandbits(16), rng.getrandbits(16)
        protocol = rng.choice([6, 17])
        buckets = 1 << rng.choice([4, 10, 16, 20])
        value = flow_hash(key, source, source_port, destination, destination_port, protocol)
        yield {
            "key": key.hex(),
            "source": source,
            "source_port": source_port,
            "destination": destination,
            "destination_port": destination_port,
            "protocol": protocol,
            "hash": f"{value:016x}",
            "buckets": buckets,
            "bucket": value & (buckets - 1),
        }


def main():
    text = "[\n" + ",\n".join(json.dumps(v) for v in vectors()) + "\n]\n"
    if sys.argv[1:] == ["--check"]:
        if pathlib.Path(__file__).with_suffix(".json").read_text() != text:
            sys.exit("flow_hash.json differs from what flow_hash.py computes")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        sys.stdout.write(text)


main()
