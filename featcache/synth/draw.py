"""Radiographs drawn from formulas: an anatomy per patient, lesions per finding, noise per picture.

Nothing here looks like a patient to a radiologist. What matters is that a finding changes the
pixels where it should, that two pictures of one patient resemble each other, and that no single
pixel gives the answer away: pose, exposure, sharpness and noise differ from picture to picture.
Equal seeds give equal pixels for equal numpy and Pillow on equal processors: exponentials differ
in their last bit between instruction sets.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageOps

DRAWN_AT_MOST_PX = 512  # larger pictures are drawn at this size and enlarged

Plane = Float32[np.ndarray, "H W"]
Area = Bool[np.ndarray, "h w"]
Box = tuple[float, float, float, float]


def generator(seed: int, *names: object) -> np.random.Generator:
    """A random generator that depends on the names alone, not on what was drawn before."""
    text = "/".join(str(name) for name in (seed, *names))
    words = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words.tolist())))


@dataclass(frozen=True)
class Lesion:
    """Something that a report would mention.

    Attributes:
        kind: A key of `LESIONS`, of `GEOMETRY`, or `No Finding`.
        side: -1 for the viewer's left (the patient's right lung), 1 for the other, 0 for both.
        strength: Brightness it adds, as a share of the range; about 0.05 (faint) to 0.4 (dense).
        size: Extent as a share of a lung, about 0.2 to 1.
    """

    kind: str
    side: int
    strength: float
    size: float


@dataclass(frozen=True)
class Anatomy:
    """What stays the same in every picture of one patient; lengths in half picture widths."""

    torso: float
    lung_width: float
    lung_height: float
    lung_gap: float
    base: float
    heart_width: float
    heart_shift: float
    mediastinum: float
    rib_count: float
    rib_slope: float
    rib_contrast: float
    density: float


def make_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient."""
    u = rng.uniform
    return Anatomy(
        torso=u(0.84, 1.0),
        lung_width=u(0.3, 0.38),
        lung_height=u(0.58, 0.74),
        lung_gap=u(0.42, 0.48),
        base=u(0.42, 0.62),
        heart_width=u(0.24, 0.31),
        heart_shift=u(0.05, 0.15),
        mediastinum=u(0.1, 0.15),
        rib_count=u(4.2, 5.6),
        rib_slope=u(0.25, 0.5),
        rib_contrast=u(0.05, 0.11),
        density=u(0.42, 0.56),
    )


@dataclass(frozen=True)
class Scene:
    """One exposure before its noise.

    Attributes:
        x: Left to right in the patient's frame, about -1 to 1.
        y: Top to bottom in the patient's frame, about -1 to 1.
        patient: The anatomy.
        lungs: Share of lung per pixel, the viewer's left lung first.
        rng: Source of the lesions' own shapes.
    """

    x: Plane
    y: Plane
    patient: Anatomy
    lungs: tuple[Plane, Plane]
    rng: np.random.Generator

    def sides(self, side: int) -> tuple[int, ...]:
        """The lungs that a lesion touches, as -1 and 1."""
        return (-1, 1) if side == 0 else (side,)

    def lung(self, side: int) -> Plane:
        """Share of the lung on one side."""
        return self.lungs[0] if side < 0 else self.lungs[1]


def _plane(values: np.ndarray) -> Plane:
    """Values as float32."""
    plane: Plane = values.astype(np.float32)
    return plane


def _soft(value: Plane, edge: float) -> Plane:
    """A step from 0 to 1 at zero, `edge` wide."""
    return _plane(0.5 + 0.5 * np.tanh(value / np.float32(2 * edge)))


def _spot(scene: Scene, x: float, y: float, width: float, height: float) -> Plane:
    """A soft round spot with height 1."""
    distance = ((scene.x - x) / width) ** 2 + ((scene.y - y) / height) ** 2
    return _plane(np.exp(-distance))


def _patches(scene: Scene, lesion: Lesion, *, peripheral: bool, count: int) -> Plane:
    """Irregular patches inside the lungs: several overlapping spots each."""
    patient, u = scene.patient, scene.rng.uniform
    total = np.zeros_like(scene.x)
    for side in scene.sides(lesion.side):
        spots = np.zeros_like(scene.x)
        for _ in range(count):
            depth = u(0.35, 0.75) if peripheral else u(-0.3, 0.3)
            x = side * (patient.lung_gap + depth * patient.lung_width)
            y = u(-0.1, 0.85) * patient.base if peripheral else u(-0.6, 0.85) * patient.base
            radius = lesion.size * u(0.16, 0.26)
            for _ in range(4):
                dx, dy = scene.rng.normal(0, 0.55 * radius, 2)
                spots += _spot(scene, x + dx, y + dy, radius * u(0.5, 0.9), radius * u(0.5, 0.9))
        total += np.minimum(spots, 1) * scene.lung(side)
    return total


def _dense_patch(scene: Scene, lesion: Lesion) -> Plane:
    return _soft(_patches(scene, lesion, peripheral=False, count=1) - np.float32(0.45), 0.08)


def _hazy_patch(scene: Scene, lesion: Lesion) -> Plane:
    return _patches(scene, lesion, peripheral=False, count=1)


def _peripheral_haze(scene: Scene, lesion: Lesion) -> Plane:
    return _patches(scene, lesion, peripheral=True, count=3)


def _nodule(scene: Scene, lesion: Lesion) -> Plane:
    patient, u = scene.patient, scene.rng.uniform
    x = lesion.side * (patient.lung_gap + u(-0.4, 0.5) * patient.lung_width)
    y, radius = u(-0.6, 0.5) * patient.base, 0.04 + 0.06 * lesion.size
    distance = np.hypot(scene.x - x, scene.y - y)
    return _soft((radius - distance).astype(np.float32), 0.012)


def _effusion(scene: Scene, lesion: Lesion) -> Plane:
    """Fluid at the base, higher at the side wall than towards the heart."""
    patient = scene.patient
    total = np.zeros_like(scene.x)
    for side in scene.sides(lesion.side):
        inward = patient.lung_gap + patient.lung_width - side * scene.x
        level = patient.base - 0.12 - 0.55 * lesion.size + 0.5 * inward**2
        beyond = _soft(0.12 - inward, 0.05) * _soft(patient.base + 0.1 - scene.y, 0.03)
        inside = np.maximum(scene.lung(side), 0.5 * beyond)
        total += _soft((scene.y - level).astype(np.float32), 0.03) * inside
    return _plane(np.minimum(total, 1))


def _edema(scene: Scene, lesion: Lesion) -> Plane:
    """Haze around both hila, in a bat's-wing shape, with a streaky texture."""
    patient = scene.patient
    total = np.zeros_like(scene.x)
    streaks = 0.75 + 0.25 * np.sin(40 * scene.x + 22 * scene.y + scene.rng.uniform(0, 6))
    for side in (-1, 1):
        x = side * (patient.lung_gap - 0.35 * patient.lung_width)
        width, height = 0.75 * patient.lung_width, 0.3 + 0.25 * lesion.size
        total += _spot(scene, x, 0.05, width, height) * scene.lung(side)
    return _plane(total * streaks)


def _band(scene: Scene, lesion: Lesion) -> Plane:
    """A thin plate of collapsed lung above the diaphragm."""
    patient, u = scene.patient, scene.rng.uniform
    total = np.zeros_like(scene.x)
    for side in scene.sides(lesion.side):
        line = scene.y - patient.base + u(0.15, 0.35) + u(-0.4, 0.4) * (side * scene.x - 0.4)
        total += _soft((0.02 + 0.02 * lesion.size - np.abs(line)).astype(np.float32), 0.012)
        total *= scene.lung(side) if lesion.side else 1
    return _plane(np.minimum(total * np.maximum(*scene.lungs), 1))


def _pneumothorax(scene: Scene, lesion: Lesion) -> Plane:
    """A dark rim without vessels along the upper side wall; the value is negative."""
    patient = scene.patient
    width = patient.lung_width * (1 - 0.35 * lesion.size)
    dx = (lesion.side * scene.x - patient.lung_gap + 0.1 * lesion.size) / width
    dy = (scene.y + 0.05 - 0.25 * lesion.size) / patient.lung_height
    outside = _soft((dx**2 + dy**2 - 1).astype(np.float32), 0.03)
    edge = np.exp(-(((dx**2 + dy**2 - 1) / 0.05) ** 2))
    lung = scene.lung(lesion.side) * _soft(patient.base - 0.25 - scene.y, 0.1)
    return _plane((0.5 * edge - outside) * lung)


def _apical_cap(scene: Scene, lesion: Lesion) -> Plane:
    top = -scene.patient.lung_height + 0.2 + 0.12 * lesion.size
    wall = np.maximum(*scene.lungs) if lesion.side == 0 else scene.lung(lesion.side)
    return _plane(_soft((top - scene.y).astype(np.float32), 0.03) * wall)


def _fracture(scene: Scene, lesion: Lesion) -> Plane:
    """A short dark gap with a bright step beside it at the side of the chest."""
    patient, u = scene.patient, scene.rng.uniform
    x = lesion.side * (patient.lung_gap + 0.8 * patient.lung_width)
    y = u(-0.3, 0.3)
    gap = _spot(scene, x, y, 0.02, 0.07)
    return _plane(_spot(scene, x + 0.05, y, 0.03, 0.06) - 1.5 * gap)


def _device(scene: Scene, lesion: Lesion) -> Plane:
    """A catheter from the neck to the heart, for larger sizes also a pulse generator."""
    x0 = lesion.side * 0.3
    way = np.clip((scene.y + 0.95) / 1.15, 0, 1)
    path = x0 * (1 - way) ** 2 - 0.06 * way
    line = _soft((0.012 - np.abs(scene.x - path)).astype(np.float32), 0.006)
    line *= _soft((0.2 - scene.y).astype(np.float32), 0.02)
    if lesion.size > 0.6:
        dx, dy = np.abs(scene.x - lesion.side * 0.55), np.abs(scene.y + 0.55)
        line += _soft((0.1 - np.maximum(dx, dy)).astype(np.float32), 0.01)
    return _plane(np.minimum(line, 1))


LESIONS: dict[str, Callable[[Scene, Lesion], Plane]] = {
    "Atelectasis": _band,
    "Consolidation": _dense_patch,
    "COVID-19": _peripheral_haze,
    "Edema": _edema,
    "Fracture": _fracture,
    "Lung Lesion": _nodule,
    "Lung Opacity": _hazy_patch,
    "Pleural Effusion": _effusion,
    "Pleural Other": _apical_cap,
    "Pneumonia": _hazy_patch,
    "Pneumothorax": _pneumothorax,
    "Support Devices": _device,
}
GEOMETRY = ("Cardiomegaly", "Enlarged Cardiomediastinum")  # these change the anatomy itself


def _coordinates(height: int, width: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """The patient's frame of a slightly turned, shifted and scaled exposure, in "H W" planes."""
    y, x = np.meshgrid(
        np.linspace(-1, 1, height, dtype=np.float32),
        np.linspace(-1, 1, width, dtype=np.float32),
        indexing="ij",
    )
    angle, scale = rng.normal(0, 0.04), rng.uniform(0.92, 1.12)
    dx, dy = rng.normal(0, 0.04, 2)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    turned_x, turned_y = cos * x + sin * y + dx, cos * y - sin * x + dy
    return turned_x.astype(np.float32), turned_y.astype(np.float32)


def _lungs(x: Plane, y: Plane, patient: Anatomy) -> tuple[Plane, Plane]:
    """Share of lung per pixel: ellipses cut off by the domes of the diaphragm."""
    both = []
    for side in (-1, 1):
        dx = (side * x - patient.lung_gap) / patient.lung_width
        inside = _soft((1 - dx**2 - ((y + 0.05) / patient.lung_height) ** 2), 0.05)
        dome = patient.base + 0.03 * side + 0.08 * dx**2
        both.append(inside * _soft((dome - y).astype(np.float32), 0.015))
    return both[0], both[1]


def _chest(scene: Scene, lesions: Sequence[Lesion]) -> Plane:
    """Attenuation of the healthy chest, with heart and mediastinum as wide as the lesions say."""
    x, y, patient = scene.x, scene.y, scene.patient
    grown = {lesion.kind: lesion.size for lesion in lesions if lesion.kind in GEOMETRY}
    heart_width = patient.heart_width * (1 + 0.55 * grown.get("Cardiomegaly", 0))
    width = patient.mediastinum * (1 + 1.1 * grown.get("Enlarged Cardiomediastinum", 0))
    edge = patient.torso - 0.55 * np.maximum(-y - 0.65, 0) - np.abs(x)
    torso = _soft(edge.astype(np.float32), 0.03)
    heart_x = (x - patient.heart_shift - 0.15 * grown.get("Cardiomegaly", 0)) / heart_width
    heart = _soft((1 - heart_x**2 - ((y - 0.26) / 0.31) ** 2).astype(np.float32), 0.08)
    middle = _soft((width - np.abs(x - 0.02)).astype(np.float32), 0.025)
    spine = np.exp(-((x / 0.07) ** 2)) * (0.8 + 0.2 * np.sin(26 * y))
    phase = patient.rib_count * (y + patient.rib_slope * (np.abs(x) - 0.4) ** 2 * 3)
    ribs = _soft((np.cos(2 * np.pi * phase) - 0.35).astype(np.float32), 0.12)
    clavicle = np.exp(-(((y + 0.62 + 0.25 * np.abs(x)) / 0.035) ** 2))
    air = np.maximum(*scene.lungs) * (1 - 0.75 * heart) * (1 - 0.8 * middle)
    solid = patient.density + 0.16 * np.maximum(heart, middle) + 0.1 * spine
    bones = patient.rib_contrast * (ribs * (np.abs(x) > 0.12) + clavicle)
    return _plane((solid - 0.36 * air + bones) * torso + 0.04)


def _expose(plane: Plane, rng: np.random.Generator) -> Plane:
    """Exposure, uneven illumination, blur by a small shift, and quantum noise; stays in [0, 1]."""
    height, width = plane.shape
    coarse = rng.normal(0, 0.03, (4, 4)).astype(np.float32)
    uneven = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    blurred = 0.5 * plane + 0.25 * (np.roll(plane, 1, 0) + np.roll(plane, 1, 1))
    exposed = np.clip(blurred * rng.uniform(0.9, 1.15) + uneven, 0.0, 1.0) ** rng.uniform(0.8, 1.25)
    noise = rng.normal(0, rng.uniform(0.01, 0.03), plane.shape)
    return _plane(np.clip(exposed + noise * np.sqrt(exposed + 0.05), 0.0, 1.0))


def _area(shape: Plane) -> Area:
    """The pixels that stand out."""
    return np.asarray(np.abs(shape) >= 0.4 * np.abs(shape).max())


def _box(area: Area) -> Box:
    """Left, top, right and bottom of an area, as shares of the picture."""
    rows, columns = np.flatnonzero(area.any(1)), np.flatnonzero(area.any(0))
    height, width = area.shape
    edges = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return tuple(round(float(edge), 4) for edge in edges)  # type: ignore[return-value]


def _finish(plane: Plane, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Enlarge an exposure to its final size and make bytes of it."""
    picture = Image.fromarray((plane * 255 + 0.5).astype(np.uint8))
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(-4, 5, (height, width), dtype=np.int16)
        return np.array(np.clip(np.asarray(picture, dtype=np.int16) + grain, 0, 255), np.uint8)
    return np.array(picture)


def draw_frontal(
    patient: Anatomy,
    lesions: Sequence[Lesion],
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
) -> tuple[UInt8[np.ndarray, "H W"], list[tuple[str, Box]]]:
    """Draw a frontal radiograph.

    Args:
        patient: Whose chest.
        lesions: What is wrong with it.
        rng: Pose, noise and the lesions' own shapes.
        height: Rows of the picture.
        width: Columns of the picture.

    Returns:
        The grey levels (air dark), and a box for each lesion that has a place. Boxes are left,
        top, right, bottom as shares of the picture.
    """
    grey, areas = draw_with_areas(patient, lesions, rng, height=height, width=width)
    return grey, [(kind, _box(area)) for kind, area in areas]


def draw_with_areas(
    patient: Anatomy,
    lesions: Sequence[Lesion],
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
) -> tuple[UInt8[np.ndarray, "H W"], list[tuple[str, Area]]]:
    """Draw a frontal radiograph, as `draw_frontal` does, with the pixels of its lesions.

    Args:
        patient: Whose chest.
        lesions: What is wrong with it.
        rng: Pose, noise and the lesions' own shapes.
        height: Rows of the picture.
        width: Columns of the picture.

    Returns:
        The grey levels (air dark), and an area for each lesion that has a place, in the size that
        was drawn: at most `DRAWN_AT_MOST_PX`.
    """
    factor = min(1.0, DRAWN_AT_MOST_PX / max(height, width))
    x, y = _coordinates(max(round(height * factor), 1), max(round(width * factor), 1), rng)
    scene = Scene(x, y, patient, _lungs(x, y, patient), rng)
    plane = _chest(scene, lesions)
    areas = []
    for lesion in lesions:
        if lesion.kind in LESIONS:
            shape = LESIONS[lesion.kind](scene, lesion)
            plane = plane + np.float32(lesion.strength) * shape
            areas.append((lesion.kind, _area(shape)))
    return _finish(_expose(plane, rng), height, width, rng), areas


def draw_lateral(
    patient: Anatomy, rng: np.random.Generator, *, height: int, width: int
) -> UInt8[np.ndarray, "H W"]:
    """Draw a lateral radiograph: one dark field between sternum and spine, without lesions."""
    factor = min(1.0, DRAWN_AT_MOST_PX / max(height, width))
    x, y = _coordinates(max(round(height * factor), 1), max(round(width * factor), 1), rng)
    torso = _soft((0.8 * patient.torso - np.abs(x)).astype(np.float32), 0.03)
    air = _soft((1 - (x / 0.55) ** 2 - ((y + 0.05) / patient.lung_height) ** 2), 0.06)
    air *= _soft((patient.base - y + 0.4 * x).astype(np.float32), 0.02)
    heart = _soft((1 - ((x + 0.25) / 0.3) ** 2 - ((y - 0.25) / 0.25) ** 2), 0.1)
    spine = np.exp(-(((x - 0.55) / 0.09) ** 2)) * (0.75 + 0.25 * np.sign(np.sin(22 * y)))
    plane = (patient.density - 0.3 * air * (1 - 0.7 * heart) + 0.15 * spine) * torso + 0.04
    return _finish(_expose(plane.astype(np.float32), rng), height, width, rng)


def equalise(grey: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Stretch to the full range and equalise the histogram, as MIMIC-CXR-JPG's files are."""
    low, high = int(grey.min()), int(grey.max())
    stretched = (grey.astype(np.float32) - low) * (255 / max(high - low, 1))
    return np.array(ImageOps.equalize(Image.fromarray(stretched.astype(np.uint8))))
