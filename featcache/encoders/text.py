"""Text encoders of the BERT kind: texts to tokens, special tokens included."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from featcache.cache.format import FeatureSetSpec
from featcache.config import file_sha256
from featcache.encoders.huggingface import build_network, network_name, read_architecture
from featcache.encoders.interface import (
    Dtype,
    Encoded,
    EncoderConfig,
    LocatedEncoder,
    Tokenized,
    library_version,
)
from featcache.encoders.tokens import choose_blocks, token_record
from featcache.encoders.weights import Shelf, check_pin, open_shelf
from featcache.errors import EncoderError, UsageError, WeightsError

_BERT = ("bert", "cxr-bert")
# These count positions from after the padding id, so two of their positions are never used.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
_NO_LIMIT = 10**9
_FINAL_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f")


class FrozenTextEncoder:
    """One network and its tokenizer behind the `TextEncoder` interface.

    Args:
        located: Its files.
        device: Where it runs.
        random: Leave the weights as initialised; only `random_encoder` asks for that.

    Raises:
        EncoderError: It gives other tokens than its preset says.
        WeightsError: The weights do not fill the network, or give numbers that are not finite.
    """

    def __init__(self, located: LocatedEncoder, *, device: str = "cpu", random: bool = False):
        self.located, self.name = located, located.name
        if located.model_config is None or located.config.max_tokens is None:
            raise EncoderError("a text encoder without config.json", where=located.name)
        self._tokenizer = _load_tokenizer(located)
        self.pad_id = int(self._tokenizer.pad_token_id or 0)
        self.max_tokens = located.config.max_tokens
        self._positions = position_limit(read_architecture(located.model_config))
        body = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        self.num_prefix_tokens = whole.index(body[0])
        self._num_suffix = len(whole) - len(body) - self.num_prefix_tokens

        network = build_network(located.model_config, None if random else located.weights)
        network.eval().requires_grad_(False).float().to(device)
        self._network = network
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        # BERT ends in its last block; behind another network's final norm inner blocks mean little
        ends = not any(hasattr(network, name) for name in _FINAL_NORMS)
        self._depth = getattr(network.config, "num_hidden_layers", None) if ends else None
        self._blocks = choose_blocks(
            located.config.layers, self._depth, encoder=self.name, network=located.network
        )
        ids, valid = self.pad_batch([whole])
        encoded = self(ids.to(device), valid.to(device))
        self.dim = int(encoded.tokens.shape[2])
        self.pooled_dim = None if encoded.pooled is None else int(encoded.pooled.shape[1])
        self._check(encoded)

    def _check(self, encoded: Encoded) -> None:
        """Compare what the network gave with what the preset says."""
        expected = self.located.config.dim
        found = self.dim // max(1, len(self._blocks))
        if expected is not None and expected != found:
            raise EncoderError(
                f"`{self.name}` has dim = {found}, its preset says {expected}",
                where=self.located.network,
                fix="correct the preset, or give the weights of the network it names",
            )
        if not torch.isfinite(encoded.tokens).all():
            raise WeightsError(
                f"`{self.name}` gives numbers that are not finite",
                where=self.located.weights,
                fix="download or copy the weights again",
            )

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Turn texts into ids, at most `max_tokens` each; see `TextEncoder`."""
        if not texts:
            return Tokenized([], [])
        whole = self._tokenizer(list(texts), padding=False, truncation=False, verbose=False)
        longest, suffix = self.max_tokens, self._num_suffix
        truncated = [len(ids) > longest for ids in whole["input_ids"]]
        ids = [
            row[: longest - suffix] + row[len(row) - suffix :] if cut else list(row)
            for row, cut in zip(whole["input_ids"], truncated, strict=True)
        ]
        return Tokenized(ids, truncated)

    def pad_batch(
        self, ids: Sequence[Sequence[int]], *, multiple: int = 32
    ) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Pad ids to one length; see `TextEncoder`."""
        return pad_batch(ids, self.pad_id, multiple=multiple, limit=self._positions)

    def __call__(self, ids: Int64[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Encoded:
        """Encode a padded batch; see `TextEncoder`."""
        with torch.inference_mode():
            asked = {"output_hidden_states": True} if self._blocks else {}
            output = self._network(input_ids=ids, attention_mask=valid.long(), **asked)
            tokens = output.last_hidden_state  # B T D
            pooled = self._pool(tokens, valid)
            if self._blocks:
                tokens = torch.cat([output.hidden_states[block] for block in self._blocks], -1)
            return Encoded(tokens, pooled)

    def _pool(
        self, tokens: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B D"]:
        """The pooled vector that the preset asks for; a BERT's own is its class token."""
        how = self.located.config.pooled
        if how in ("own", "class"):
            return tokens[:, 0]
        weights = valid[..., None].to(tokens.dtype)
        mean = (tokens * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1) if how == "normalized_mean" else mean

    def spec(
        self, *, dtype: Dtype = "float16", batch_size: int, autocast: str | None = None
    ) -> FeatureSetSpec:
        """Everything that decides the bytes of a row; see `Encoder`."""
        config = self.located.config
        preprocessing: dict[str, JsonValue] = {
            "network": self.located.network,
            "lowercase": config.lowercase,
            "special_tokens": [self.num_prefix_tokens, self._num_suffix],
            "padded_to_multiple": 32,
            "pooled": "class" if config.pooled == "own" else config.pooled,
        }
        return FeatureSetSpec(
            modality="text",
            encoder=self.name,
            source=config.public_source,
            library=config.library,
            library_version=library_version(config.library),
            weights_sha256=self.located.weights_sha256,
            preprocessing=preprocessing | token_record(config, self._depth),
            tokenizer_sha256=self.located.tokenizer_sha256,
            num_prefix_tokens=self.num_prefix_tokens,
            max_tokens=self.max_tokens,
            dim=self.dim,
            pooled_dim=self.pooled_dim,
            dtype=dtype,
            batch_size=batch_size,
            autocast=autocast,
        )


def pad_batch(
    ids: Sequence[Sequence[int]], pad_id: int, *, multiple: int = 32, limit: int | None = None
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Pad ids to one length, so that equal lengths give equal kernels whatever the neighbours.

    Args:
        ids: Token ids of each text.
        pad_id: What to fill with.
        multiple: The length is the longest text's, rounded up to a multiple of this.
        limit: Length never to go beyond: the network's positions.

    Returns:
        Ids on the CPU, and `valid`, True where an id is real.
    """
    longest = max(len(row) for row in ids)
    length = -(-longest // multiple) * multiple
    length = max(longest, length if limit is None else min(length, limit))
    padded = torch.full((len(ids), length), pad_id, dtype=torch.int64)
    valid = torch.zeros(len(ids), length, dtype=torch.bool)
    for number, row in enumerate(ids):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        valid[number, : len(row)] = True
    return padded, valid


def locate_text(
    name: str, config: EncoderConfig, *, weights: Path | None, max_tokens: int | None
) -> LocatedEncoder:
    """Find and hash the files of a text encoder; see `locate_encoder`."""
    repo = config.source.removeprefix("hf:") if config.source.startswith("hf:") else None
    shelf = open_shelf(name, config.source, extra=config.extra, weights=weights, repo=repo)
    model_config = shelf.file(["config.json"])
    values = read_architecture(model_config)
    config = _shortened(name, config, position_limit(values), max_tokens)
    file = shelf.weights_file()
    tokenizer, lowercase = _find_tokenizer(shelf, config, str(values.get("model_type")))
    for pinned, expected in config.sha256.items():
        check_pin(file.parent / pinned, expected, encoder=name)
    return LocatedEncoder(
        name=name,
        config=config.model_copy(update={"lowercase": lowercase}),
        network=network_name(values),
        weights=file,
        weights_sha256=file_sha256(file),
        model_config=model_config,
        tokenizer=tokenizer,
        tokenizer_sha256=_hash_files(tokenizer),
    )


def position_limit(values: dict[str, JsonValue]) -> int:
    """The longest text that a network has positions for, from its `config.json`."""
    limit = values.get("max_position_embeddings")
    if not isinstance(limit, int):
        return _NO_LIMIT
    pad = values.get("pad_token_id")
    if values.get("model_type") in _OFFSET_POSITIONS and isinstance(pad, int):
        return limit - pad - 1
    return limit


def _shortened(
    name: str, config: EncoderConfig, limit: int, max_tokens: int | None
) -> EncoderConfig:
    """The config for the length that the user asks for, within the network's positions."""
    if max_tokens is not None and not 3 <= max_tokens <= limit:
        raise UsageError(
            f"`{name}` reads 3 to {limit} tokens of a text, {max_tokens} were asked for",
            where="--max-tokens",
            fix=f"--max-tokens {limit}",
        )
    longest = max_tokens or min(config.max_tokens or 512, limit)
    return config.model_copy(update={"max_tokens": longest})


def _find_tokenizer(
    shelf: Shelf, config: EncoderConfig, model_type: str
) -> tuple[tuple[Path, ...], bool | None]:
    """The files that the ids depend on, and whether capitals become small letters.

    A BERT needs its vocabulary alone, and everything else is said to it by argument; a folder's
    own word on small letters is in a file that some lack, and a vocabulary without any capital
    letter tells as much.
    """
    if model_type not in _BERT:
        return (shelf.file(["tokenizer.json"]), shelf.file(["tokenizer_config.json"])), None
    file = shelf.file(["vocab.txt", "tokenizer.json"])
    if config.lowercase is not None:
        return (file,), config.lowercase
    beside = file.parent / "tokenizer_config.json"
    stated = read_architecture(beside).get("do_lower_case") if beside.is_file() else None
    if isinstance(stated, bool):
        return (file,), stated
    words = (word for word in _read_vocabulary(file) if not word.startswith("["))
    return (file,), not any(word != word.lower() for word in words)


def _read_vocabulary(file: Path) -> dict[str, int]:
    """Words and ids of a `vocab.txt` or a `tokenizer.json`."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return dict(json.loads(text)["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError("the tokenizer's vocabulary is damaged", where=file) from None
    return {word: number for number, word in enumerate(text.rstrip("\n").split("\n"))}


def _hash_files(files: Sequence[Path]) -> str:
    """One hash over the contents of a tokenizer's files, in their order."""
    together = "\n".join(file_sha256(file) for file in files)
    return hashlib.sha256(together.encode()).hexdigest()


def _load_tokenizer(located: LocatedEncoder) -> PreTrainedTokenizerBase:
    """Build the tokenizer from the located files, without asking a hub."""
    file = located.tokenizer[0]
    options: dict[str, Any] = {"model_max_length": _NO_LIMIT}
    if len(located.tokenizer) == 1:
        vocabulary = _read_vocabulary(file)
        lowercase = bool(located.config.lowercase)
        return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, **options)
    return AutoTokenizer.from_pretrained(
        file.parent, local_files_only=True, trust_remote_code=False, **options
    )
