import json

import pytest
import yaml

from featcache.adaptor.model import count_parameters
from featcache.adaptor.run import (
    MetricsLog,
    RunConfig,
    RunResult,
    finished_facts,
    free_folder,
    load_run_config,
    run_identity,
    start_folder,
    write_facts,
)
from featcache.adaptor.saved import build_adaptor
from featcache.config import find_config, load_config
from featcache.errors import ConfigError, TrainingError


def identity(**changes):
    return run_identity(RunConfig(**changes), images="i" * 8, texts="t" * 8)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_batch_without_negatives_is_refused_in_words(size):
    with pytest.raises(ConfigError, match="leave nothing to contrast a pair with; at least 2"):
        load_config(RunConfig, overrides=[f"batch_size={size}"])


def test_the_shipped_default_is_the_default_of_the_code():
    assert load_run_config(None) == RunConfig()


def test_the_shipped_paper_config_has_the_papers_values():
    config = load_run_config(find_config("runs", "paper"))
    assert (config.epochs, config.batch_size, config.lr) == (50, 1024, 2e-5)
    assert (config.warmup, config.schedule, config.weight_decay) == (0.02, "linear", 0.01)
    adaptor = config.adaptor
    assert (adaptor.objective, adaptor.fusion, adaptor.text_to_image_weight) == (
        "paper",
        "none",
        0.75,
    )
    assert (adaptor.dim, adaptor.layers, adaptor.heads, adaptor.feedforward, adaptor.dropout) == (
        768,
        2,
        12,
        2048,
        0.1,
    )


@pytest.mark.parametrize(
    ("image_dim", "count"), [(768, 12_207_617), (384, 11_912_705), (512, 12_011_009)]
)
def test_the_shipped_paper_config_has_the_papers_number_of_parameters(image_dim, count):
    config = load_run_config(find_config("runs", "paper"))
    modules = build_adaptor(config.adaptor, image_dim, 768)
    assert sum(map(count_parameters, modules)) == count


def test_names_and_means_do_not_make_another_run():
    named = identity(images="vit-b", manifest="mimic", threads=7, buffer_mb=64, io="pread")
    assert named == identity()
    means = {"devices": 2, "gradient_cache": 8, "compile": True, "resident": True}
    assert identity(checkpoint_every=5, **means) == identity()
    for changes in ({"lr": 1.0}, {"tokens": "grid"}, {"text_tokens": 4}, {"queue": 8}):
        assert identity(**changes) != identity()


def test_a_finished_run_of_the_same_identity_is_recognised(tmp_path):
    assert finished_facts(tmp_path, identity()) is None
    start_folder(tmp_path, RunConfig(), identity())
    assert finished_facts(tmp_path, identity()) is None  # begun, not finished
    write_facts(tmp_path, {"status": "finished", "identity": identity(), "steps": 4})
    assert finished_facts(tmp_path, identity())["steps"] == 4


def test_another_run_in_the_folder_is_named_with_every_difference(tmp_path):
    start_folder(tmp_path, RunConfig(), identity())
    other = run_identity(
        RunConfig.model_validate({"lr": 0.5, "adaptor": {"layers": 3}}), images="x", texts="t" * 8
    )
    with pytest.raises(TrainingError) as caught:
        finished_facts(tmp_path, other)
    message = str(caught.value)
    assert "`config.lr`: the folder has 0.0001, this run asks for 0.5" in message
    assert "`config.adaptor.layers`: the folder has 2, this run asks for 3" in message
    assert '`inputs.images`: the folder has "iiiiiiii", this run asks for "x"' in message
    assert "texts" not in message


def test_a_file_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(TrainingError, match="does not describe a run"):
        finished_facts(tmp_path, identity())


def test_a_run_without_a_name_never_takes_the_folder_of_another(tmp_path):
    first = free_folder(tmp_path, "vit-b-bert", identity())
    assert first.name == "vit-b-bert"
    start_folder(first, RunConfig(), identity())
    assert free_folder(tmp_path, "vit-b-bert", identity()) == first
    second = free_folder(tmp_path, "vit-b-bert", identity(lr=0.5))
    assert second != first
    assert second.name.startswith("vit-b-bert-")
    assert second == free_folder(tmp_path, "vit-b-bert", identity(lr=0.5))


def test_the_resolved_config_starts_the_same_run(tmp_path):
    config = RunConfig(images="vit-b", texts="bert", lr=3e-7)
    start_folder(tmp_path / "run", config, identity())
    assert load_config(RunConfig, path=tmp_path / "run" / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == 3e-7


def test_each_line_of_the_metrics_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("step", step=1, loss=0.5)
        assert json.loads(path.read_text()) == {"kind": "step", "step": 1, "loss": 0.5}
        with pytest.raises(ValueError, match="JSON compliant"):
            log.write("step", loss=float("nan"))


def test_a_result_says_what_was_written_and_what_comes_next(tmp_path):
    facts = {"epochs": 3, "final_loss": 1.25}
    text = RunResult(tmp_path, "trained", facts).to_text()
    assert text.startswith(f"wrote {tmp_path}   3 epochs, last loss 1.250")
    assert "next: featcache" in text
    again = RunResult(tmp_path, "unchanged", facts)
    assert again.to_text().startswith("nothing to do, finished before")
    assert again.to_json()["did"] == "unchanged"


def test_the_metrics_are_cut_back_to_a_step_and_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 5):
            log.write("step", step=step)
            if step % 2 == 0:
                log.write("validate", epoch=step // 2 - 1)
    path.write_text(path.read_text() + '{"kind": "step", "st')  # killed in the middle of a line
    with MetricsLog(path, keep_steps=3, keep_validations=1) as log:
        log.write("step", step=4)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    names = [one.get("step", f"epoch {one.get('epoch')}") for one in found]
    assert names == [1, 2, "epoch 0", 3, 4]
    assert log.kept == found[:4]
    with MetricsLog(path):
        pass
    assert path.read_text() == ""
