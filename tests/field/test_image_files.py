"""Image files as archives really hold them: cut off, deep, negative, compressed, of odd colours."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders.dicom_files import dataset, save, write
from encoders.test_decode import radiograph
from PIL import Image, ImageChops
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from reliability.kit import key_of, times, write_rows

from featcache.cache.folder import read_failures
from featcache.cache.reader import FeatureSet
from featcache.encoders.decode import Preprocessing, decode_image, to_input
from featcache.encoders.interface import load_encoder, locate_encoder
from featcache.workspace import Workspace

SMALL = Preprocessing(image_size=(64, 64), mean=(0.5,), std=(0.5,))
DEEP = (radiograph().astype(np.uint16) * 16).astype(np.uint16)
WHOLE = {"WindowCenter": 2048, "WindowWidth": 4096}
ROWS = range(11)
BAD = key_of(5)


@pytest.fixture(scope="module")
def encoder(tiny):
    return load_encoder(locate_encoder(str(tiny.vit), "image"))


def pooled(encoder, *paths):
    """Mean tokens of each file, of length one."""
    greys = np.stack([decode_image(path, encoder.preprocessing) for path in paths])
    tokens = encoder(to_input(torch.from_numpy(greys), encoder.preprocessing)).tokens
    return torch.nn.functional.normalize(tokens.mean(dim=1), dim=-1)


@pytest.fixture
def pictures(tiny, tmp_path):
    """A folder of eleven good pictures, for a test to spoil one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in ROWS:
        shutil.copy2(tiny.pictures / f"{key_of(row)}.jpg", folder)
    return folder


@pytest.fixture(scope="module")
def clean(tiny, tmp_path_factory):
    """The eleven good pictures, extracted."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("clean"), ROWS, texts=0)
    tiny.extract(workspace)
    return FeatureSet.open(workspace.features / "image/vit")


def extract_from(tiny, pictures, root):
    workspace = write_rows(Workspace.open(root), pictures, ROWS, texts=0)
    result = tiny.extract(workspace, max_failures=1.0)
    return workspace, result, FeatureSet.open(workspace.features / "image/vit")


def assert_only_row_5_differs(got, clean):
    others = np.asarray([row for row in ROWS if row != 5])
    assert got.keys == clean.keys
    np.testing.assert_array_equal(got.read_tokens(others), clean.read_tokens(others))


def reason_of_row_5(workspace):
    failures = read_failures(workspace.features / "image/vit")
    assert [row["key"] for row in failures] == [BAD]
    return failures[0]["reason"]


@pytest.mark.parametrize("cut", ["at 60 per cent", "two bytes before its end"])
def test_a_jpeg_that_stops_early_is_quarantined_until_it_is_mended(
    tiny, clean, pictures, tmp_path, cut
):
    """Padded with grey and embedded, the damage would never be seen again."""
    victim = pictures / f"{BAD}.jpg"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) * 6 // 10] if cut == "at 60 per cent" else whole[:-2])
    workspace, result, got = extract_from(tiny, pictures, tmp_path / "root")
    assert "1 unreadable row" in result.to_text()
    assert reason_of_row_5(workspace) == "the file is truncated, it cannot be decoded"
    assert got.valid.tolist() == [row != 5 for row in ROWS]
    assert_only_row_5_differs(got, clean)
    assert not got.read_tokens(np.asarray([5])).any()

    before = times(got.folder)
    tiny.extract(workspace, max_failures=1.0)
    assert times(got.folder) == before

    shutil.copy2(tiny.pictures / victim.name, victim)
    tiny.extract(workspace, max_failures=1.0)
    mended = FeatureSet.open(got.folder)
    assert mended.valid.all()
    every = np.asarray(ROWS)
    np.testing.assert_array_equal(mended.read_tokens(every), clean.read_tokens(every))


def test_deep_png_files_do_not_turn_white(tmp_path, encoder):
    """Clipped at 255, nearly every pixel of a 12-bit picture would be white."""
    deep = np.tile(np.linspace(0, 4095, 256).astype(np.uint16), (256, 1))
    flat = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    paths = [tmp_path / "deep.png", tmp_path / "flat.png"]
    for path, values in zip(paths, [deep, flat], strict=True):
        Image.fromarray(values).save(path)
    one, other = pooled(encoder, *paths)
    assert one @ other > 0.999
    grey = decode_image(paths[0], SMALL)
    assert (grey == 255).mean() < 0.05
    assert "over 8 bits min-max" in encoder.spec(batch_size=1).preprocessing["decode"]


@pytest.mark.parametrize("window", [False, True])
def test_monochrome1_is_no_negative(tmp_path, encoder, window):
    """The inversion comes after the window, so the negative's window is the mirrored one."""
    centre = {"WindowCenter": 1500, "WindowWidth": 2000} if window else {}
    mirrored = {"WindowCenter": 4096 - 1500, "WindowWidth": 2000} if window else {}
    two = write(tmp_path / "2.dcm", DEEP, **centre)
    one = write(tmp_path / "1.dcm", 4095 - DEEP, kind="MONOCHROME1", **mirrored)
    assert np.array_equal(decode_image(one, SMALL), decode_image(two, SMALL))
    assert torch.equal(*pooled(encoder, one, two))
    assert "monochrome1 inverted" in encoder.spec(batch_size=1).preprocessing["decode"]


def test_compressed_dicom_is_read_out_of_the_box(tmp_path, encoder):
    syntaxes = [
        uid.ExplicitVRLittleEndian,
        uid.RLELossless,
        uid.JPEG2000Lossless,
        uid.JPEGLSLossless,
        uid.JPEGLosslessSV1,
    ]
    paths = [
        write(tmp_path / f"{number}.dcm", DEEP, syntax=syntax)
        for number, syntax in enumerate(syntaxes)
    ]
    greys = [decode_image(path, SMALL) for path in paths]
    assert all(np.array_equal(grey, greys[0]) for grey in greys)
    vectors = pooled(encoder, *paths)
    assert (vectors == vectors[0]).all()


def test_the_decoders_are_in_our_own_list_of_dependencies():
    from featcache.encoders.dicom import _OURS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    listed = {line.split(">=")[0] for line in project["project"]["dependencies"]}
    assert {package for _, package in _OURS.values()} | {"pydicom", "pylibjpeg"} <= listed
    assert "pylibjpeg-libjpeg" not in listed  # its licence is the GPL


def test_an_unsupported_syntax_is_quarantined_by_name(tiny, clean, pictures, tmp_path):
    film = dataset(DEEP, PixelData=encapsulate([bytes(range(200))]))
    film["PixelData"].is_undefined_length = True
    film.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    save(film, pictures / f"{BAD}.jpg")
    workspace, _, got = extract_from(tiny, pictures, tmp_path / "root")
    reason = reason_of_row_5(workspace)
    assert reason.startswith("the DICOM syntax MPEG2 Main Profile")
    assert "1.2.840.10008.1.2.4.100" in reason
    assert "no package that featcache uses decodes it" in reason
    assert_only_row_5_differs(got, clean)


def test_of_several_windows_the_first_counts(tmp_path, encoder):
    several = {"WindowCenter": [2048, 600], "WindowWidth": [4096, 400]}
    both = write(tmp_path / "both.dcm", DEEP, **several)
    first = write(tmp_path / "first.dcm", DEEP, **WHOLE)
    second = write(tmp_path / "second.dcm", DEEP, WindowCenter=600, WindowWidth=400)
    assert np.array_equal(decode_image(both, SMALL), decode_image(first, SMALL))
    assert torch.equal(*pooled(encoder, both, first))
    assert decode_image(second, SMALL).mean() > decode_image(first, SMALL).mean() + 20
    assert "first window" in encoder.spec(batch_size=1).preprocessing["decode"]


def with_alpha(grey):
    image = grey.copy()
    image.putalpha(255)
    return image


def reversed_palette(grey):
    """Number i means grey 255 - i: the numbers themselves are the negative."""
    image = ImageChops.invert(grey).convert("P")
    image.putdata(ImageChops.invert(grey).tobytes())
    image.putpalette([255 - number for number in range(256) for _ in range(3)])
    return image


def test_colours_and_alpha_are_the_same_grey_picture(tmp_path, encoder):
    grey = Image.fromarray(radiograph())
    files = {
        "l.png": grey,
        "rgb.png": grey.convert("RGB"),
        "rgba.png": with_alpha(grey.convert("RGB")),
        "la.png": with_alpha(grey),
        "cmyk.jpg": grey.convert("CMYK"),
        "palette.png": reversed_palette(grey),
    }
    paths = [tmp_path / name for name in files]
    for path, image in zip(paths, files.values(), strict=True):
        image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    vectors = pooled(encoder, *paths)
    assert (vectors @ vectors[0] > 0.999).all()


def test_lossless_jpeg_of_older_archives_is_read_among_others(tiny, clean, pictures, tmp_path):
    shutil.copy2(get_testdata_file("SC_rgb_jpeg_gdcm.dcm"), pictures / f"{BAD}.jpg")
    _, _, got = extract_from(tiny, pictures, tmp_path / "root")
    assert got.valid.all()
    assert_only_row_5_differs(got, clean)


_STARVED = """
import resource, sys
from pathlib import Path
from featcache.encoders.decode import Preprocessing, decode_image
from featcache.errors import ImageError

small = Preprocessing(image_size=(64, 64), mean=(0.5,), std=(0.5,))
decode_image(Path(sys.argv[2]), small)
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + 40 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.argv[1:]:
    try:
        print(decode_image(Path(path), small).shape)
    except ImageError as error:
        print(error.what)
"""


def test_a_picture_beyond_the_memory_allowed_is_named_and_the_next_one_is_read(tiny, tmp_path):
    huge, good = tmp_path / "huge.png", tiny.pictures / f"{key_of(0)}.jpg"
    Image.new("L", (9_000, 9_000), 7).save(huge, compress_level=1)
    script = [sys.executable, "-c", _STARVED, str(huge), str(good)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == ["the picture does not fit into memory", "(64, 64)"]
