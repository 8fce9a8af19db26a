import json
from pathlib import Path

import numpy as np
import pytest

from featcache.cache import header
from featcache.errors import ShardError

SIZE = 60_000
WHERE = Path("shard.h5")


def make_places(ragged=False, dtype="float16", pooled=3):
    tokens = (7, 4) if ragged else (2, 3, 4)
    shapes = header.array_shapes(2, tokens, dtype, pooled, "S5")
    return {
        name: header.Place(8192 + 4096 * position, shape, kind)
        for position, (name, (shape, kind)) in enumerate(shapes.items())
    }


def make_block(places, changed="", **changes):
    text = header.header_text("f" * 32, "a" * 32, SIZE, places)
    if changed:
        values = json.loads(text)
        values["arrays"][changed] |= changes
        text = header.canonical_json(values).encode()
    packed = header.pack_header(text, list(range(100, 100 + len(places))))
    assert len(packed) == header.header_size(len(text), len(places))
    return packed.ljust(header.USER_BLOCK, b"\0")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("pooled", [None, 3])
def test_header_says_what_was_packed(ragged, dtype, pooled):
    places = make_places(ragged, dtype, pooled)
    found = header.parse_header(make_block(places), SIZE, WHERE)
    assert found.places == places
    assert list(found.places) == [name for name in header.ARRAY_ORDER if name in places]
    names = [name for name in places if name != "tokens"] + ["rest"]
    assert found.digests == {name: 100 + i for i, name in enumerate(names)}
    assert (found.fingerprint, found.keys_hash, found.num_rows) == ("f" * 32, "a" * 32, 2)


def test_header_bytes_are_those_of_the_format_page():
    block = make_block(make_places())
    assert block[:8] == b"FEATCACH"
    assert block[8:12] == b"\1\0\0\0"
    length = int.from_bytes(block[12:16], "little")
    text = block[16 : 16 + length]
    assert text.startswith(b'{"arrays":{"checksums":{"dtype":"uint64","offset":24576,"shape":[2]},')
    assert text.endswith(b'"format_version":1,"keys_hash":"' + b"a" * 32 + b'"}')


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokens", {"offset": 2**62}, "ends at byte 46116860184273"),
        ("tokens", {"offset": 10**300 * 4096}, "ends at byte 40960000"),
        ("tokens", {"offset": -4096}, "starts at -4096"),
        ("tokens", {"offset": 4096}, "starts at 4096"),
        ("tokens", {"offset": 8193}, "starts at 8193"),
        ("tokens", {"offset": 8192.0}, "starts at 8192.0"),
        ("tokens", {"offset": True}, "starts at True"),
        ("tokens", {"offset": 12288}, "`tokens` overlaps `pooled`|`pooled` overlaps `tokens`"),
        ("tokens", {"shape": (2**40, 2**40, 2**40)}, "more than a file of 60000 bytes"),
        ("tokens", {"shape": (2, -3, 4)}, "more than a file"),
        ("tokens", {"shape": (2, 3.0, 4)}, "more than a file"),
        ("tokens", {"shape": (2, 3, 50_000)}, "ends at byte 608192"),
        ("tokens", {"shape": (2, 0, 4)}, "beside 2 keys"),
        ("tokens", {"shape": (3, 3, 4)}, "beside 2 keys"),
        ("tokens", {"shape": ()}, "a shape that is none"),
        ("tokens", {"shape": (2,)}, "a shape that it cannot have"),
        ("tokens", {"dtype": "bool"}, "a dtype that it cannot have"),
        ("tokens", {"dtype": "object"}, "a dtype that the format does not know"),
        ("tokens", {"dtype": "S129"}, "a dtype that the format does not know"),
        ("tokens", {"dtype": "int8"}, "`scale_channel` is missing"),
        ("keys", {"shape": (0,)}, "a shape that it cannot have"),
        ("keys", {"dtype": "float16"}, "a dtype that it cannot have"),
        ("pooled", {"shape": (2, 0)}, "`pooled` is empty"),
        ("pooled", {"shape": (1, 3)}, r"`pooled` is float16 \(1, 3\), not"),
        ("valid", {"dtype": "int8"}, "`valid` is int8"),
        ("offsets", {"shape": (2,)}, r"`offsets` is int64 \(2,\)"),
        ("checksums", {"shape": (1,)}, r"`checksums` is uint64 \(1,\)"),
    ],
)
def test_lying_header_is_refused_although_its_checksum_is_right(name, changes, message):
    block = make_block(make_places(ragged=name == "offsets"), name, **changes)
    with pytest.raises(ShardError, match=message):
        header.parse_header(block, SIZE, WHERE)


@pytest.mark.parametrize("name", ["tokens", "valid", "keys", "checksums", "offsets"])
def test_missing_array_is_refused(name):
    places = make_places(ragged=True)
    del places[name]
    with pytest.raises(ShardError, match=r"missing|cannot have|beside"):
        header.parse_header(make_block(places), SIZE, WHERE)


def forge(text):
    block = header.pack_header(text, [1] * 5)
    return block.ljust(header.USER_BLOCK, b"\0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 2048, "no JSON"),
        (b'{"a":' + b"9" * 2000 + b"}", "not the keys of the format"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "not the keys"),
        (b"NaN", "not the keys"),
    ],
)
def test_forged_json_is_refused(text, message):
    with pytest.raises(ShardError, match=message):
        header.parse_header(forge(text), SIZE, WHERE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arrays": 3}, "list of arrays"),
        ({"arrays": {"evil": {}}}, "list of arrays"),
        ({"arrays": {"tokens": 3}}, "not described by"),
        (
            {"arrays": {"tokens": {"offset": 8192, "shape": 3, "dtype": "int8"}}},
            "shape that is none",
        ),
        ({"arrays": {"tokens": {"offset": 8192, "shape": [3], "dtype": []}}}, "does not know"),
        ({"arrays": {}}, "`keys` or `tokens` is missing"),
        ({"fingerprint": 3}, "contradicts the format"),
        ({"format_version": 2}, "contradicts the format"),
        ({"file_size": 10**1000}, "60000 bytes, its header says 1000000"),
    ],
)
def test_forged_values_are_refused(values, message):
    base = {"format_version": 1, "fingerprint": "f", "keys_hash": "a", "file_size": SIZE}
    text = header.canonical_json({**base, "arrays": {}, **values}).encode()
    with pytest.raises(ShardError, match=message):
        header.parse_header(forge(text), SIZE, WHERE)


def test_checks_run_from_the_outside_in():
    block = bytearray(make_block(make_places()))
    cases = {
        0: "does not start with the header",
        8: "format version 0",
        14: "its length says",
        20: "its checksum differs",
    }
    for position, message in cases.items():
        wrong = (
            bytes(block[:position]) + bytes([block[position] ^ 1]) + bytes(block[position + 1 :])
        )
        with pytest.raises(ShardError, match=message):
            header.parse_header(bytes(wrong), SIZE, WHERE)
    with pytest.raises(ShardError, match="only 100 bytes"):
        header.parse_header(bytes(block[:100]), SIZE, WHERE)
    with pytest.raises(ShardError, match="has 59999 bytes, its header says 60000"):
        header.parse_header(bytes(block), SIZE - 1, WHERE)


def test_damaged_list_of_checksums_is_refused():
    block = bytearray(make_block(make_places()))
    end = header.parse_header(bytes(block), SIZE, WHERE).end
    block[end - 20] ^= 1
    with pytest.raises(ShardError, match="list of checksums"):
        header.parse_header(bytes(block), SIZE, WHERE)


def test_place_counts_bytes_without_overflow():
    place = header.Place(0, (2**40, 2**40, 2**40), "float32")
    assert place.size_bytes == 4 * 2**120
    assert place.numpy_type == np.dtype("<f4")


def test_largest_possible_header_fits():
    places = {
        name: header.Place(10**15, (10**12,) * len(shape), kind)
        for name, (shape, kind) in header.array_shapes(2, (7, 4), "int8", 3, "S128").items()
    }
    text = header.header_text("f" * 32, "a" * 32, 10**17, places)
    assert len(text) <= header.ATTRIBUTE_BYTES
    assert header.header_size(header.ATTRIBUTE_BYTES, 8) <= header.USER_BLOCK
