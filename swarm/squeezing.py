"""A chunk of float32 values in fewer bytes, without any loss: their exponents take a third of the room.

    low 16 bits of every value, then sign and high 7 bits of the mantissa: noise, which travels as it is
    its exponent, 8 bits, Huffman-coded: some are far more frequent than others

Pure. Source: byte planes of floats, "ZipNN: Lossless Compression for AI Models", arXiv 2411.05239.
"""

import zlib

import numpy as np

from averaging.network import Buffer

WORD, NOISE = 4, 3  # bytes of a value, and of those all but the exponent
SPARED = 16  # at least a part of so many of its bytes, or a chunk travels as it is
MANTISSA_BITS, LOW_BITS = 23, 16
HIGH_MANTISSA, SIGN = 0x7F, 0x80  # in the byte between


def squeezed(chunk: Buffer) -> bytes | None:
    """`chunk` in fewer bytes; None if it has no redundant exponents to speak of."""
    count = len(chunk) // WORD
    words, tail = np.frombuffer(chunk, "<u4", count), bytes(memoryview(chunk)[count * WORD :])
    exponents = (words >> MANTISSA_BITS).astype(np.uint8)
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(exponents.data) + coder.flush()
    if count * NOISE + len(tail) + len(coded) > len(chunk) - len(chunk) // SPARED:
        return None
    between = ((words >> LOW_BITS) & HIGH_MANTISSA | (words >> (LOW_BITS + 8)) & SIGN).astype(np.uint8)
    return b"".join((words.astype("<u2").data, between.data, tail, coded))


def unsqueezed(data: Buffer, size: int) -> Buffer:
    """The chunk of `size` bytes that was squeezed into `data`. Raises ValueError."""
    count, view = size // WORD, memoryview(data)
    plain = count * NOISE + size % WORD
    if len(view) < plain:
        raise ValueError(f"{len(view)} bytes are no squeezed chunk of {size}")
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        exponents = decoder.decompress(view[plain:], count + 1)
    except zlib.error as error:
        raise ValueError(f"no squeezed chunk: {error}") from None
    if len(exponents) != count or not decoder.eof:
        raise ValueError(f"{len(exponents)} exponents in a squeezed chunk of {count} values")
    chunk = np.empty(size, np.uint8)
    words = chunk[: count * WORD]
    words.view("<u2")[::2] = np.frombuffer(view, "<u2", count)
    coded, between = (np.frombuffer(plane, np.uint8, count) for plane in (exponents, view[2 * count :]))
    np.bitwise_or(between & HIGH_MANTISSA, coded << 7, out=words[2::WORD])
    np.bitwise_or(between & SIGN, coded >> 1, out=words[3::WORD])
    chunk[count * WORD :] = np.frombuffer(view[count * NOISE : plain], np.uint8)
    return chunk.data
