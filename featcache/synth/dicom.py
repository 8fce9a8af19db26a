"""DICOM files of synthetic radiographs, written element by element: equal input, equal bytes."""

import hashlib
import io

import numpy as np
from jaxtyping import UInt8, UInt16
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian

_ROOT = "1.2.826.0.1.3680043.8.498."  # of pydicom, for anybody's use


def dicom_bytes(
    grey: UInt16[np.ndarray, "H W"] | UInt8[np.ndarray, "H W"],
    *,
    view: str,
    bits: int,
    uid: str,
    inverted: bool = False,
    missing: tuple[str, ...] = (),
) -> bytes:
    """One uncompressed picture as a file.

    Args:
        grey: Grey levels, air dark, each below `2 ** bits`.
        view: ViewPosition; empty writes a blank one.
        bits: Bits stored.
        uid: Name from which the identifiers are made.
        inverted: Whether to store it as MONOCHROME1, each level as `2 ** bits - 1 - level`.
        missing: Keywords of elements to leave out.

    Returns:
        The file's bytes.
    """
    number = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:12], "big")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"{_ROOT}{number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(f"{_ROOT}1")
    file = FileDataset("", Dataset(), bytes(128), meta)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, UID(f"{_ROOT}{number}")
    file.Modality, file.ViewPosition = "CR", view
    file.PatientName = file.PatientID = "synthetic"
    file.SamplesPerPixel = 1
    file.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    file.Rows, file.Columns = grey.shape
    file.BitsAllocated, file.PixelRepresentation = 8 * grey.dtype.itemsize, 0
    file.BitsStored, file.HighBit = bits, bits - 1
    stored = (2**bits - 1 - grey.astype(np.int64)).astype(grey.dtype) if inverted else grey
    content = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    file.PixelData = content + b"\0" * (len(content) % 2)
    file["PixelData"].VR = "OB" if grey.dtype.itemsize == 1 else "OW"
    for keyword in missing:
        delattr(file, keyword)
    target = io.BytesIO()
    file.save_as(target, enforce_file_format=True)
    return target.getvalue()
