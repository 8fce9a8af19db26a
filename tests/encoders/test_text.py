"""Text encoders: ids, lengths, padding, and folders in the shapes found in the wild."""

import json
import socket

import pytest
import torch
from contracts.encoder_contract import TextEncoderContract
from encoders.conftest import WORDS, save_bert
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from featcache.encoders.interface import load_encoder, locate_encoder, random_encoder
from featcache.encoders.text import pad_batch, position_limit
from featcache.errors import EncoderError, UsageError, WeightsError

TEXTS = [
    "No acute cardiopulmonary abnormality.",
    "Small left pleural effusion, mild edema in the right base.",
    "Lungs are clear. Heart size is normal.",
]


def load(folder, **options):
    return load_encoder(locate_encoder(str(folder), "text", **options))


class TestSmallBert(TextEncoderContract):
    @pytest.fixture
    def encoder(self, folders):
        return load(folders["bert"])

    @pytest.fixture
    def texts(self):
        return TEXTS

    def test_its_tokens_are_what_transformers_gives(self, encoder, folders, texts):
        network = BertModel.from_pretrained(folders["bert"], add_pooling_layer=False).eval()
        tokenizer = BertTokenizer(vocab=str(folders["bert"] / "vocab.txt"))
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            expected = network(**batch).last_hidden_state
        ids, valid = encoder.pad_batch(encoder.tokenize(texts).ids, multiple=1)
        assert torch.equal(ids, batch["input_ids"])
        assert torch.equal(encoder(ids, valid).tokens[valid], expected[valid])

    def test_its_class_token_comes_first(self, encoder, texts):
        encoded = encoder(*encoder.pad_batch(encoder.tokenize(texts).ids))
        assert encoder.num_prefix_tokens == 1
        assert torch.equal(encoded.pooled, encoded.tokens[:, 0])

    def test_random_weights_have_another_name(self, encoder, texts):
        other = random_encoder(encoder.located, seed=0)
        batch = encoder.pad_batch(encoder.tokenize(texts).ids)
        assert other.name == "bert-random0"
        assert not torch.equal(other(*batch).tokens, encoder(*batch).tokens)

    def test_no_text_gives_no_ids(self, encoder):
        assert encoder.tokenize([]) == ([], [])


def test_inner_layers_are_the_hidden_states(folders):
    encoder, plain = load(folders["bert"], layers=(1, 2)), load(folders["bert"])
    network = BertModel.from_pretrained(folders["bert"], add_pooling_layer=False).eval()
    ids, valid = encoder.pad_batch(encoder.tokenize(TEXTS).ids)
    with torch.inference_mode():
        output = network(ids, attention_mask=valid.long(), output_hidden_states=True)
    tokens, pooled = encoder(ids, valid)
    wanted = torch.cat([output.hidden_states[1], output.last_hidden_state], -1)
    assert torch.equal(tokens, wanted)
    assert torch.equal(pooled, plain(ids, valid).pooled)
    spec = encoder.spec(batch_size=4)
    assert (spec.dim, spec.pooled_dim, spec.preprocessing["layers"]) == (64, 32, [1, 2])
    with pytest.raises(UsageError, match="has 2 layers, -3 were asked for"):
        load(folders["bert"], layers=(-3,))


def test_tokens_of_texts_have_no_grid_to_pool(folders):
    with pytest.raises(UsageError, match="no grid") as caught:
        locate_encoder(str(folders["bert"]), "text", pool_grid=2)
    assert caught.value.where == "--pool-grid"


@pytest.mark.parametrize("pooled", ["mean", "normalized_mean"])
def test_a_mean_is_over_real_tokens_only(folders, pooled):
    path = folders["bert"].parent / f"{pooled}.yaml"
    path.write_text(
        "kind: encoder\nmodality: text\nlibrary: transformers\nsource: folder:bert\n"
        f"pooled: {pooled}\n"
    )
    encoder = load(path)
    ids, valid = encoder.pad_batch(encoder.tokenize(TEXTS).ids)
    tokens, vectors = encoder(ids, valid)
    wanted = torch.stack([row[real].mean(0) for row, real in zip(tokens, valid, strict=True)])
    if pooled == "normalized_mean":
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
    assert torch.allclose(vectors, wanted, atol=1e-6)


def test_padding_goes_to_multiples_but_not_beyond_the_positions():
    ids, valid = pad_batch([[1] * 33, [1] * 5], 7, multiple=32, limit=40)
    assert ids.shape == (2, 40)
    assert valid.sum(1).tolist() == [33, 5]
    assert ids[1, 5:].unique().tolist() == [7]
    assert pad_batch([[1] * 33], 0, multiple=32)[0].shape == (1, 64)
    assert pad_batch([[1] * 32], 0, multiple=32, limit=64)[0].shape == (1, 32)


@pytest.mark.parametrize("asked", [65, 600, 2, 0])
def test_more_tokens_than_positions_are_a_usage_error(folders, asked):
    with pytest.raises(UsageError, match=f"3 to 64 tokens of a text, {asked} were") as caught:
        locate_encoder(str(folders["bert"]), "text", max_tokens=asked)
    assert caught.value.fix == "--max-tokens 64"


def test_fewer_tokens_may_be_asked_for(folders):
    encoder = load(folders["bert"], max_tokens=8)
    assert [len(row) for row in encoder.tokenize(TEXTS).ids] == [8, 8, 8]
    assert encoder.spec(batch_size=4).max_tokens == 8


def test_positions_after_the_padding_are_counted():
    values = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert position_limit(values) == 512
    assert position_limit(values | {"model_type": "bert"}) == 514


def test_small_letters_follow_the_folder_then_the_vocabulary(tmp_path):
    cased = [word.capitalize() if number > 20 else word for number, word in enumerate(WORDS)]
    folder = save_bert(tmp_path / "cased", vocabulary=cased)
    encoder = load(folder)
    assert encoder.spec(batch_size=1).preprocessing["lowercase"] is False
    assert encoder.tokenize(["Mild mild"]).ids[0][1:3] == [cased.index("Mild"), 1]

    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert load(folder).spec(batch_size=1).preprocessing["lowercase"] is True
    assert load(save_bert(tmp_path / "plain")).located.config.lowercase is True


def test_a_tokenizer_json_alone_gives_the_same_ids(folders, tmp_path):
    folder = tmp_path / "json-only"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((folders["bert"] / name).read_bytes())
    BertTokenizer(vocab=str(folders["bert"] / "vocab.txt")).save_pretrained(folder)
    assert not (folder / "vocab.txt").exists()
    assert load(folder).tokenize(TEXTS) == load(folders["bert"]).tokenize(TEXTS)


def test_the_fingerprint_follows_tokenizer_weights_and_architecture(tmp_path):
    folder = save_bert(tmp_path / "one")
    seen = {load(folder).spec(batch_size=4).fingerprint}

    (folder / "vocab.txt").write_text("\n".join([*WORDS, "new"]) + "\n")
    seen.add(load(folder).spec(batch_size=4).fingerprint)

    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    seen.add(load(folder).spec(batch_size=4).fingerprint)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    changed = load(folder).spec(batch_size=4)
    seen.add(changed.fingerprint)
    assert len(seen) == 4

    (folder / "config.json").write_text(
        json.dumps(
            config | {"layer_norm_eps": 1e-6, "transformers_version": "0.0", "dtype": "float16"}
        )
    )
    assert load(folder).spec(batch_size=4) == changed
    folder.rename(tmp_path / "two")
    moved = load(tmp_path / "two").spec(batch_size=4)
    assert moved.model_copy(update={"encoder": "one"}) == changed


def test_a_pretraining_checkpoint_with_remote_code_loads_without_it(folders, tmp_path):
    """The layout of CXR-BERT specialized: its BERT under `bert.`, two heads, code beside it."""
    tensors = load_file(folders["bert"] / "model.safetensors")
    heads = {"cls.predictions.bias": torch.zeros(60), "cls_projection_head.x.weight": torch.ones(2)}
    save_file({f"bert.{k}": v for k, v in tensors.items()} | heads, tmp_path / "model.safetensors")
    config = json.loads((folders["bert"] / "config.json").read_text())
    config |= {"model_type": "cxr-bert", "auto_map": {"AutoModel": "trap.Trap"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "trap.py").write_text("raise SystemExit('code beside the weights was run')")
    (tmp_path / "vocab.txt").write_bytes((folders["bert"] / "vocab.txt").read_bytes())

    special, plain = load(tmp_path), load(folders["bert"])
    batch = plain.pad_batch(plain.tokenize(TEXTS).ids)
    assert torch.equal(special(*batch).tokens, plain(*batch).tokens)


def test_a_pickled_checkpoint_of_old_names_loads(folders, tmp_path):
    tensors = load_file(folders["bert"] / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((folders["bert"] / name).read_bytes())
    old_encoder, encoder = load(tmp_path), load(folders["bert"])
    batch = encoder.pad_batch(encoder.tokenize(TEXTS).ids)
    assert torch.equal(old_encoder(*batch).tokens, encoder(*batch).tokens)


def test_a_language_model_keeps_its_head_out(folders, tmp_path):
    BertForMaskedLM.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((folders["bert"] / "vocab.txt").read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("cls.") for name in tensors)
    encoder, plain = load(tmp_path), load(folders["bert"])
    batch = plain.pad_batch(plain.tokenize(TEXTS).ids)
    assert torch.equal(encoder(*batch).tokens, plain(*batch).tokens)


def test_missing_attention_is_refused_not_left_random(folders, tmp_path):
    tensors = load_file(folders["bert"] / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((folders["bert"] / name).read_bytes())
    with pytest.raises(WeightsError, match=r"1 missing \(.*query.weight\)"):
        load(tmp_path)


def test_a_half_precision_checkpoint_runs_in_float32(folders, tmp_path):
    tensors = load_file(folders["bert"] / "model.safetensors")
    save_file({name: t.half() for name, t in tensors.items()}, tmp_path / "half.safetensors")
    located = locate_encoder(str(folders["bert"]), "text", weights=tmp_path / "half.safetensors")
    assert located.weights.name == "half.safetensors"
    encoder = load_encoder(located)
    assert encoder(*encoder.pad_batch([[2, 5, 3]])).tokens.dtype == torch.float32


def save_roberta(folder):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary |= {letter: number for number, letter in enumerate("Ġabcdefghijklmnop", 5)}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    config = RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=40, max_position_embeddings=42,
    )  # fmt: skip
    RobertaModel(config).eval().save_pretrained(folder)
    return folder


def test_another_family_brings_its_own_tokenizer(tmp_path):
    encoder = load(save_roberta(tmp_path))
    assert (encoder.max_tokens, encoder.pad_id, encoder.num_prefix_tokens) == (40, 1, 1)
    ids, truncated = encoder.tokenize(["abc", "abc" * 40])
    assert (ids[0][0], ids[0][-1], len(ids[1]), ids[1][-1]) == (0, 2, 40, 2)
    assert truncated == [False, True]
    ids, valid = encoder.pad_batch(ids)
    assert ids.shape == (2, 40)
    assert encoder(ids, valid).tokens.shape == (2, 40, 32)


def test_behind_a_final_norm_there_are_no_inner_layers_to_ask_for(tmp_path):
    """ModernBERT's inner states lack the norm that its tokens pass."""
    save_roberta(tmp_path)
    config = ModernBertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=40, max_position_embeddings=40, pad_token_id=1, cls_token_id=0, sep_token_id=2,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    ModernBertModel(config).eval().save_pretrained(tmp_path)
    assert load(tmp_path).dim == 32
    with pytest.raises(UsageError, match="only its last layer can be stored"):
        load(tmp_path, layers=(1,))


@pytest.mark.parametrize("offline", ["", "1"])
def test_local_folders_open_no_connection(folders, tmp_path, monkeypatch, offline):
    roberta = tmp_path / "roberta"
    roberta.mkdir()
    save_roberta(roberta)
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda *a: calls.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: calls.append(a) or [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", bool(offline))
    load(folders["bert"])
    load(roberta)
    assert not calls


def test_damaged_files_are_named(folders, tmp_path):
    folder = save_bert(tmp_path / "damaged")
    (folder / "config.json").write_text("{")
    with pytest.raises(EncoderError, match=r"config.json is damaged"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    with pytest.raises(EncoderError, match="says what cannot be"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-network"}')
    with pytest.raises(EncoderError, match="no network of the type `no-such-network`"):
        load(save_unknown(folder))


def save_unknown(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
             "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
             "post_processor": None, "decoder": None, "truncation": None, "padding": None}
        )
    )  # fmt: skip
    return folder
