"""The checksum that libhdf5 puts on its own structures."""

import struct

WORDS = 2**32 - 1


def rotate(value, count):
    return (value << count | value >> (32 - count)) & WORDS


def lookup3(content):
    """The checksum of HDF5's own structures, by Bob Jenkins."""
    a = b = c = (0xDEADBEEF + len(content)) & WORDS
    while len(content) > 12:
        x, y, z = struct.unpack_from("<3I", content)
        a, b, c = (a + x) & WORDS, (b + y) & WORDS, (c + z) & WORDS
        for counts in ((4, 6, 8), (16, 19, 4)):
            a = ((a - c) & WORDS) ^ rotate(c, counts[0])
            c = (c + b) & WORDS
            b = ((b - a) & WORDS) ^ rotate(a, counts[1])
            a = (a + c) & WORDS
            c = ((c - b) & WORDS) ^ rotate(b, counts[2])
            b = (b + a) & WORDS
        content = content[12:]
    if not content:
        return c
    x, y, z = struct.unpack("<3I", content.ljust(12, b"\0"))
    a, b, c = (a + x) & WORDS, (b + y) & WORDS, (c + z) & WORDS
    c = ((c ^ b) - rotate(b, 14)) & WORDS
    a = ((a ^ c) - rotate(c, 11)) & WORDS
    b = ((b ^ a) - rotate(a, 25)) & WORDS
    c = ((c ^ b) - rotate(b, 16)) & WORDS
    a = ((a ^ c) - rotate(c, 4)) & WORDS
    b = ((b ^ a) - rotate(a, 14)) & WORDS
    return ((c ^ b) - rotate(b, 24)) & WORDS


def sealed_part(content, start, size):
    """First byte, and place of the checksum, of the object header that holds some bytes."""
    first = max(content.rfind(name, 8192, start) for name in (b"OHDR", b"OCHK"))
    for end in range(start + size, len(content) - 3):
        if lookup3(content[first:end]) == int.from_bytes(content[end : end + 4], "little"):
            return first, end
    raise ValueError("nothing seals these bytes")
