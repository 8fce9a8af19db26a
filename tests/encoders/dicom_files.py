"""DICOM files as archives hold them, written with pydicom, Pillow and GDCM."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import compress
from pydicom.sequence import Sequence

IN_PYDICOM = (
    uid.RLELossless,
    uid.JPEG2000Lossless,
    uid.JPEGLSLossless,
)
IN_GDCM = (uid.JPEGLossless, uid.JPEGLosslessSV1)


def ramp(height=50, width=60, bits=12) -> np.ndarray:
    """Every column brighter than the one before, with some texture, from 0 to the highest value."""
    y, x = np.mgrid[0:height, 0:width]
    levels = x / (width - 1) * 0.9 + 0.1 * ((y * 7 + x * 3) % 11) / 10
    levels = (levels - levels.min()) / (levels.max() - levels.min())
    return np.rint(levels * (2**bits - 1)).astype(np.uint16 if bits > 8 else np.uint8)


def dataset(values, *, kind="MONOCHROME2", bits=12, syntax=uid.ExplicitVRLittleEndian, **elements):
    """A data set of one frame, not yet compressed.

    Args:
        values: Height, width, and three colours if there are any; their type is the stored one.
        kind: Photometric interpretation.
        bits: Bits stored.
        syntax: An uncompressed one.
        elements: Further elements by keyword, or others than the usual.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = syntax
    little = syntax != uid.ExplicitVRBigEndian
    made = FileDataset("", {}, bytes(128), meta, is_little_endian=little)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4"
    made.PatientName, made.PatientID = "Secret^Patient", "SECRET-4711"
    made.Rows, made.Columns = values.shape[:2]
    made.SamplesPerPixel = 1 if values.ndim == 2 else values.shape[2]
    if values.ndim == 3:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation = kind
    made.BitsAllocated = 8 * values.dtype.itemsize
    made.BitsStored, made.HighBit = bits, bits - 1
    made.PixelRepresentation = int(values.dtype.kind == "i")
    made.PixelData = values.astype(values.dtype.newbyteorder("<" if little else ">")).tobytes()
    made["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def table(entries, *, first=0, bits=16) -> Sequence:
    """A LUT sequence of one item."""
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 2**16, first, bits]
    item.LUTData = [int(entry) for entry in entries]
    item["LUTDescriptor"].VR = "US" if first >= 0 else "SS"
    item["LUTData"].VR = "US"
    return Sequence([item])


def save(made: FileDataset, path: Path, syntax=None) -> Path:
    """Write a data set, compressed on the way if the syntax asks for it."""
    if syntax in IN_PYDICOM:
        compress(made, syntax, generate_instance_uid=False)
    made.save_as(path, enforce_file_format=True)
    if syntax in IN_GDCM:
        _compress_with_gdcm(path, syntax)
    return path


def _compress_with_gdcm(path: Path, syntax: uid.UID) -> None:
    import zlib  # noqa: F401 - a libz that gdcm loads first is mixed up with its own

    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    done = reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    kind = gdcm.TransferSyntax.GetTSType(str.__str__(syntax))
    change.SetTransferSyntax(gdcm.TransferSyntax(kind))
    change.SetInput(reader.GetImage())
    done = done and change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    if not (done and writer.Write()):
        raise ValueError(f"GDCM did not write {syntax.name}")


def write(path: Path, values, *, syntax=uid.ExplicitVRLittleEndian, **options) -> Path:
    """`dataset` and `save` at once."""
    native = syntax if not syntax.is_compressed or syntax.is_deflated else None
    plain = native or uid.ExplicitVRLittleEndian
    return save(dataset(values, syntax=plain, **options), path, syntax)


def write_jpeg(path: Path, values, **options) -> Path:
    """A JPEG baseline file of 8 bits."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", quality=95)
    made = dataset(values, bits=8, **options)
    made.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    made.PixelData = encapsulate([stream.getvalue()])
    made["PixelData"].is_undefined_length = True
    made.save_as(path, enforce_file_format=True)
    return path


def without_preamble(path: Path) -> Path:
    """Cut preamble, mark and the group of the file's meta off."""
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    path.write_bytes(content[start:])
    return path
