"""DICOM files as the radiograph challenges have them: a grey JPEG in a secondary capture.

The header is that of the published files, with what is odd about it: an age without its unit, one
date for all, and a patient's id that names the image.
"""

import io
from typing import NamedTuple

import numpy as np
import pydicom
from jaxtyping import UInt8
from PIL import Image
from pydicom import config, uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

JPEG_QUALITY = 90
SPACINGS_MM = (0.139, 0.143, 0.168, 0.171)


class Header(NamedTuple):
    """What differs from file to file.

    Attributes:
        patient: Patient's id and name; in the challenges the same word as the image's.
        study_uid: Unique identifier of the study.
        series_uid: Unique identifier of the series.
        sop_uid: Unique identifier of the image.
        view: `PA`, `AP`, or empty for a header that does not say it.
        sex: `F` or `M`.
        age: As written, e.g. `62`, which lacks the unit that the standard asks for.
        spacing_mm: Side of a pixel.
    """

    patient: str
    study_uid: str
    series_uid: str
    sop_uid: str
    view: str
    sex: str
    age: str
    spacing_mm: float


def draw_header(
    rng: np.random.Generator, patient: str, uids: tuple[str, str, str], *, age: int | None = None
) -> Header:
    """Draw what a header says beside its identifiers.

    Args:
        rng: Chooses view, sex, age and spacing.
        patient: Patient's id.
        uids: Of the study, the series and the image.
        age: In years; drawn by default.
    """
    view = ("PA", "AP")[int(rng.random() > 0.54)]
    sex = ("M", "F")[int(rng.random() > 0.57)]
    years = int(rng.integers(1, 95)) if age is None else age
    spacing = SPACINGS_MM[rng.integers(len(SPACINGS_MM))]
    return Header(patient, *uids, view, sex, str(years), spacing)


def encode_dicom(grey: UInt8[np.ndarray, "H W"], header: Header) -> bytes:
    """A DICOM file with the picture as JPEG Baseline; equal arguments give equal bytes.

    Args:
        grey: Grey levels, 0 black.
        header: The rest of the file.
    """
    jpeg = io.BytesIO()
    Image.fromarray(grey).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = uid.UID(header.sop_uid)
    meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    meta.ImplementationClassUID = uid.UID("1.2.276.0.7230010.3.0.3.6.0")
    meta.ImplementationVersionName = "OFFIS_DCMTK_360"
    dataset = _describe(header)
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = grey.shape
    dataset.PixelData = encapsulate([jpeg.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def _describe(header: Header) -> Dataset:
    """The data set without its picture."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = header.sop_uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = header.study_uid, header.series_uid
    dataset.StudyDate, dataset.StudyTime = "19010101", "000000.00"
    dataset.Modality, dataset.ConversionType = "CR", "WSD"
    dataset.SeriesDescription = f"view: {header.view}" if header.view else ""
    dataset.PatientName = dataset.PatientID = header.patient
    dataset.PatientSex = header.sex
    # The published files have ages without a unit, which pydicom would warn of.
    dataset.add(DataElement("PatientAge", "AS", header.age, validation_mode=config.IGNORE))
    dataset.BodyPartExamined, dataset.ViewPosition = "CHEST", header.view
    dataset.SeriesNumber, dataset.InstanceNumber = 1, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelSpacing = [header.spacing_mm] * 2
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.LossyImageCompression = "01"
    dataset.LossyImageCompressionMethod = "ISO_10918_1"
    return dataset
