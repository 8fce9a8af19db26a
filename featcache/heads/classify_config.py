"""What `finetune` is asked: which labels, which heads, how they are chosen and measured."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from featcache.cache.format import FeatureSetSpec
from featcache.cache.reader import FeatureSet
from featcache.config import Config
from featcache.errors import ManifestError, UsageError
from featcache.heads import scores
from featcache.heads.findings import finding_names, labelled_findings
from featcache.heads.labels import PREFIX, LabelledImages, LabelPolicy, labelled_images
from featcache.heads.vectors import POOLINGS, Pooling
from featcache.manifest.table import Manifest


class ProbeConfig(Config):
    """How probes are trained, chosen and measured."""

    label: str = Field("class", description="Label column, without `label:`.")
    findings: tuple[str, ...] | Literal["all"] = Field(
        (), description="Label columns of which an image may have several, in place of `label`."
    )
    uncertain: Literal["ignore", "positive", "negative"] = Field(
        "ignore", description="What a finding's label -1 (uncertain) counts as."
    )
    blank: Literal["ignore", "negative"] = Field(
        "ignore", description="What a finding's empty label (not mentioned) counts as."
    )
    head: Literal["linear", "mlp", "attention"] = Field(
        "linear",
        description="linear; mlp: one hidden layer; or attention: a trained pooling of the patch "
        "tokens, read by a linear layer.",
    )
    poolings: tuple[Pooling, ...] = Field(
        POOLINGS,
        min_length=1,
        description="How the encoder's tokens become a vector: mean of the patches, prefix (the "
        "class token), both; validation chooses. Without prefix tokens the mean alone. "
        "Attention pooling is a head: head=attention.",
    )
    fractions: tuple[PositiveFloat, ...] = Field(
        (1, 10, 100), min_length=1, description="Shares of the training labels, in percent."
    )
    shots: PositiveInt | None = Field(
        None, description="Training images of each class, in place of `fractions`."
    )
    subsets: PositiveInt = Field(3, description="Subsets drawn of each share below 100 %.")
    seeds: PositiveInt = Field(3, description="Probes per subset, from different first weights.")
    weight_decays: tuple[PositiveFloat, ...] = Field(
        (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
        min_length=1,
        description="Of linear probes; validation chooses one for each subset.",
    )
    learning_rates: tuple[PositiveFloat, ...] = Field(
        (3e-4, 3e-3), min_length=1, description="Of mlp and attention heads; validation chooses."
    )
    mlp_weight_decays: tuple[PositiveFloat, ...] = Field(
        (0.01, 1.0), min_length=1, description="Of mlp and attention heads, as AdamW takes it."
    )
    hidden: PositiveInt = Field(128, description="Hidden units of mlp heads.")
    epochs: PositiveInt = Field(
        50, description="Epochs of mlp and attention heads, at least 200 steps."
    )
    select_by: Literal["auroc", "accuracy", "balanced_accuracy"] = Field(
        "auroc", description="Validation figure that chooses; ties go to the smaller decay."
    )
    random_encoder: bool = Field(True, description="Whether to compute the random encoder's row.")
    draws: int = Field(1000, ge=100, description="Bootstrap draws of the test patients.")
    tolerance: PositiveFloat = Field(1e-5, description="Largest gradient of a converged probe.")
    max_steps: PositiveInt = Field(1000, description="Steps after which a probe is left as it is.")
    batch_size: PositiveInt = Field(64, description="Images read at a time.")
    seed: int = Field(0, ge=0, description="Seed of subsets, weights and bootstrap.")

    @field_validator("label")
    @classmethod
    def _plain(cls, label: str) -> str:
        """One name for one question: else it had two folders, each with a test split to read."""
        return label.removeprefix(PREFIX)

    @property
    def policy(self) -> LabelPolicy:
        """What labels mean that say neither yes nor no."""
        return LabelPolicy(self.uncertain, self.blank)

    def names(self, manifest: Manifest) -> tuple[str, ...]:
        """The label columns that are read.

        Args:
            manifest: Where `all` findings are looked up.
        """
        if self.findings == "all":
            return finding_names(manifest)
        return self.findings or (self.label,)

    @property
    def asked(self) -> str:
        """What is asked of an image, as a part of a folder's name."""
        parts = ["findings" if self.findings else self.label]
        parts += [] if self.head == "linear" else [self.head]
        return "-".join(parts + ([] if self.shots is None else [f"{self.shots}-shots"]))


def labels_of(images: FeatureSet, manifest: Manifest, config: ProbeConfig) -> LabelledImages:
    """The labelled images that a config asks for.

    Args:
        images: Features of the manifest's images.
        manifest: Labels, splits and patients.
        config: Names the label, or the findings and their policy.

    Raises:
        UsageError: There is no such label, or `all` findings of none.
        ManifestError: A split is empty, a patient is in two splits, or there is nothing to tell
            apart.
    """
    if not config.findings:
        return labelled_images(images, manifest, config.label, config.policy)
    names = config.names(manifest)
    if not names:
        raise UsageError(
            "the manifest has no column of findings (whole numbers 1, 0, -1)",
            where=manifest.folder,
            fix=f"--set label=NAME; labels: {', '.join(manifest.label_names) or 'none'}",
        )
    if config.select_by != "auroc" or config.shots is not None:
        raise UsageError(
            "of several findings AUROC alone can choose, and shots are of a single label",
            where="--set findings",
            fix="leave select_by and shots out, or ask for one finding: --set label=NAME",
        )
    return labelled_findings(images, manifest, names, config.policy)


def refuse_blind_choice(labelled: LabelledImages, config: ProbeConfig) -> None:
    """Validation must be able to tell probes apart by the figure that chooses.

    Args:
        labelled: All labelled images.
        config: Names the figure.

    Raises:
        ManifestError: It cannot.
    """
    if labelled.of_findings:
        if not scores.defined_findings(labelled.targets[labelled.of("validate")]).any():
            raise ManifestError(
                "no finding is both present and absent in split `validate`: AUROC cannot choose",
                fix="--set blank=negative, or a manifest with a larger validate split",
            )
        return
    present = [n for n, count in labelled.class_counts(labelled.of("validate")).items() if count]
    if config.select_by == "auroc" and len(present) < 2:
        raise ManifestError(
            f"split `validate` holds one class only, `{present[0]}`: AUROC cannot choose there",
            fix="--set select_by=accuracy, or a manifest with a larger validate split",
        )


def refuse_placeless(spec: FeatureSetSpec, config: ProbeConfig) -> None:
    """Attention heads read patch tokens.

    Args:
        spec: Of the image set.
        config: Names the head.

    Raises:
        UsageError: They are asked for, and the set has none.
    """
    if config.head == "attention" and spec.grid is None:
        raise UsageError(
            f"attention heads read patch tokens, and the set `{spec.title}` has none",
            where="--set head=attention",
            fix="extract with the token budget `all` or `grid`, or --set head=mlp",
        )
